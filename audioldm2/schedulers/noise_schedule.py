"""What both samplers stand on: the noise schedule, the settings, and the way a step finds its place.

A diffusion model is trained on sounds (here: latents) to which noise was added in one jump (Ho et al. 2020,
eq. 4):

    x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps,        eps ~ N(0, 1),  t = 0 .. T-1
    abar_t = prod_{s <= t} (1 - beta_s)                   `alphas_cumprod` in the code, shape (T,)

`beta_t` is the variance added at training step t. abar falls from nearly 1 (almost no noise) to nearly 0
(almost only noise). A sampler walks a few of the T training steps backwards, from noise to sound. What it
needs to know is only abar, so this file builds that table; `ddim.py` and `dpm_solver.py` each turn it into
one step of a walk.

Numbers. The table is made in float32 by the very operations that were used in training, since the network has
seen those values and no better ones. What a sampler derives from the table is computed on the CPU in float64,
once, in `set_timesteps`, and kept as Python floats: a step multiplies tensors by them and never waits for the
accelerator.

Names and defaults of the settings are those of diffusers, so that a `scheduler_config.json` means the same
here.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn, TypeVar

import numpy as np
import torch
from torch import Tensor

PREDICTION_TYPES = ("epsilon", "sample", "v_prediction")
TIMESTEP_SPACINGS = ("linspace", "leading", "trailing")
BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")

Generators = torch.Generator | Sequence[torch.Generator] | None
AnyScheduler = TypeVar("AnyScheduler", bound="NoiseSchedule")


# ---------------------------------------------------------------- settings


class SchedulerConfig(dict[str, Any]):
    """The settings of a scheduler: a dict that cannot be changed and can be read as `config.beta_start` too.

    Besides the settings of its own class it may carry keys of the class it was converted from, so that
    converting back loses nothing, and `_use_default_values`: the settings that nobody stated. Those are left
    out in a conversion, so that each class applies its own default.
    """

    def __getattr__(self, name: str) -> Any:
        if name in self:
            return self[name]
        raise AttributeError(f"the scheduler's config has no setting {name!r}")

    def _refuse(self, *args: object, **kwargs: object) -> NoReturn:
        raise TypeError("a scheduler's config is read-only; use from_config(scheduler.config, name=value)")

    __setitem__ = __delitem__ = __setattr__ = __delattr__ = _refuse
    __ior__ = update = setdefault = pop = popitem = clear = _refuse

    def __reduce__(self) -> tuple[type[SchedulerConfig], tuple[dict[str, Any]]]:
        return SchedulerConfig, (dict(self),)  # pickle and deepcopy would otherwise set item by item


def remembers_config(init: Callable[..., None]) -> Callable[..., None]:
    """Make a scheduler's `__init__` keep its arguments, and which of them were left out, in `self.config`."""
    signature = inspect.signature(init)

    @functools.wraps(init)
    def wrapper(*args: Any, **kwargs: Any) -> None:
        bound = signature.bind(*args, **kwargs)
        scheduler, *given = bound.arguments
        bound.apply_defaults()
        settings = dict(bound.arguments)
        instance = settings.pop(scheduler)
        unstated = sorted(settings.keys() - set(given))
        instance._config = SchedulerConfig(
            {**settings, **({"_use_default_values": unstated} if unstated else {})}
        )
        init(*bound.args, **bound.kwargs)

    return wrapper


# ---------------------------------------------------------------- the table


def make_betas(schedule: str, start: float, end: float, steps: int) -> Tensor:
    """The variances beta_t of the training steps, (T,) float32.

    - `linear`: evenly spaced from `start` to `end` (Ho et al. 2020, section 4).
    - `scaled_linear`: evenly spaced square roots (latent diffusion, Rombach et al. 2022; AudioLDM 2 uses it).
    - `squaredcos_cap_v2`: from abar(u) = cos^2(pi/2 (u + 0.008) / 1.008), capped at 0.999 (Nichol & Dhariwal
      2021, eq. 17); `start` and `end` play no part.
    """
    if schedule == "linear":
        return torch.linspace(start, end, steps, dtype=torch.float32, device="cpu")
    if schedule == "scaled_linear":
        return torch.linspace(start**0.5, end**0.5, steps, dtype=torch.float32, device="cpu") ** 2
    if schedule == "squaredcos_cap_v2":
        curve = [math.cos((i / steps + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(steps + 1)]
        betas = [min(1 - curve[i + 1] / curve[i], 0.999) for i in range(steps)]
        return torch.tensor(betas, dtype=torch.float32, device="cpu")
    raise ValueError(
        f"beta_schedule {schedule!r} is not supported; choose one of {', '.join(BETA_SCHEDULES)}"
    )


def zero_terminal_snr(betas: Tensor) -> Tensor:
    """Shift and stretch the schedule so that the last training step is pure noise: (T,) -> (T,).

    Lin et al. 2023 ("Common diffusion noise schedules and sample steps are flawed"), algorithm 1: sqrt(abar)
    is moved down by its last value and scaled so that its first value stays. The last beta becomes 1, the
    last abar 0.
    """
    root = torch.cumprod(1 - betas, dim=0).sqrt()
    first, last = root[0], root[-1]
    alphas_cumprod = ((root - last) * (first / (first - last))) ** 2
    alphas = torch.cat([alphas_cumprod[:1], alphas_cumprod[1:] / alphas_cumprod[:-1]])
    return 1 - alphas


# ---------------------------------------------------------------- small tools


def spaced_levels(config: SchedulerConfig, number: int, training: np.ndarray) -> np.ndarray:
    """Noise levels (N,) from the largest to the smallest of `training`, (T,) rising.

    Karras et al. 2022, eq. 5: even in sigma^(1/7), so dense where noise is low. Lu et al. 2022 and the
    exponential spacing: even in log sigma; their timesteps are rounded differently.
    """
    low, high = (
        config.get("sigma_min"),
        config.get("sigma_max"),
    )  # carried over from configs of Karras samplers
    low = training[0].item() if low is None else low
    high = training[-1].item() if high is None else high
    ramp = np.linspace(0, 1, number)
    if config.use_karras_sigmas:
        return (high ** (1 / 7) + ramp * (low ** (1 / 7) - high ** (1 / 7))) ** 7.0
    if config.use_lu_lambdas:
        logs = np.log(training)
        return np.exp(logs[-1].item() + ramp * (logs[0].item() - logs[-1].item()))
    return np.exp(np.linspace(math.log(high), math.log(low), number))


def timestep_of_level(level: np.ndarray, logs: np.ndarray) -> float:
    """The fractional training step of a noise level, linear between the rising log levels `logs`, (T,)."""
    log = np.log(np.maximum(level, 1e-10))
    below = min(int(np.cumsum(log - logs >= 0).argmax()), len(logs) - 2)
    low, high = logs[below], logs[below + 1]
    part = np.clip((low - log) / (low - high), 0, 1)
    return float((1 - part) * below + part * (below + 1))


def randn(
    shape: Sequence[int],
    generator: Generators = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Gaussian noise of `shape`, the same numbers that diffusers draws from the same generator.

    A CPU generator draws on the CPU and the result moves to `device`, so a seed means the same on every
    accelerator. A list has one generator for each item of the batch: each draws (1, ...), and the draws are
    concatenated. A list of one is that generator.

    Raises ValueError for a list of the wrong length and for a generator of another accelerator.
    """
    device = torch.device("cpu" if device is None else device)
    generators = (
        [generator] if generator is None or isinstance(generator, torch.Generator) else list(generator)
    )
    if len(generators) not in (1, shape[0]):
        raise ValueError(
            f"got a list of {len(generators)} generators for a batch of {shape[0]}; give one each, or one"
        )
    for one in generators:
        if one is not None and one.device.type not in ("cpu", device.type):
            raise ValueError(
                f"a generator on {one.device.type} cannot draw noise for {device}; make it on the CPU"
            )
    size = (shape[0] if len(generators) == 1 else 1, *shape[1:])
    draws = [
        torch.randn(
            size, generator=one, dtype=dtype, device=device if one is None else _drawing_device(one, device)
        )
        for one in generators
    ]
    return (draws[0] if len(draws) == 1 else torch.cat(draws)).to(device)


def _drawing_device(generator: torch.Generator, device: torch.device) -> torch.device:
    return device if generator.device.type == device.type else generator.device


def dynamic_threshold(x0: Tensor, ratio: float, largest: float) -> Tensor:
    """Dynamic thresholding of a predicted x_0, (B, C, ...) -> same (Saharia et al. 2022, section 2.3).

    s is the `ratio` quantile of |x_0| of each item, held within [1, `largest`]; x_0 is clipped to [-s, s] and
    divided by s. Values that guidance has pushed out of range come back without all of them sticking at the
    edge.
    """
    flat = x0.flatten(1).to(
        torch.promote_types(x0.dtype, torch.float32)
    )  # (B, C * ...); quantile needs float32
    s = torch.quantile(flat.abs(), ratio, dim=1, keepdim=True).clamp(min=1, max=largest)  # (B, 1)
    return (flat.clamp(-s, s) / s).reshape(x0.shape).to(x0.dtype)


def one_of(name: str, value: object, allowed: Sequence[object]) -> None:
    """Raise a ValueError that names the setting and what is supported, unless `value` is in `allowed`."""
    if value not in allowed:
        raise ValueError(f"{name} {value!r} is not supported; choose one of {', '.join(map(repr, allowed))}")


# ---------------------------------------------------------------- the base of both samplers


class NoiseSchedule:
    """Settings, the table abar, and the timesteps of a walk; the samplers add `set_timesteps` and `step`.

    Attributes:
        config: the settings, read-only.
        betas, alphas_cumprod: (T,) float32 on the CPU.
        timesteps: (N,) int64 on the device given to `set_timesteps`, from noisy to clean.
        num_inference_steps: N, or None before `set_timesteps`.
        order: model evaluations a step.
        init_noise_sigma: the standard deviation of the noise that the walk starts from.
        default_num_inference_steps: the N that this sampler needs for a good result.
    """

    order = 1
    init_noise_sigma = 1.0
    default_num_inference_steps: int
    num_inference_steps: int | None
    timesteps: Tensor
    _config: SchedulerConfig

    @property
    def config(self) -> SchedulerConfig:
        return self._config

    @classmethod
    def from_config(cls: type[AnyScheduler], config: Mapping[str, Any], **overrides: Any) -> AnyScheduler:
        """A scheduler from another's `config`, or from the dict read from a `scheduler_config.json`.

        Settings that this class does not have are kept in the new `config` but play no part. Settings that
        the other scheduler was never given (its `_use_default_values`) take *this* class's default.
        `overrides` win over both.

        Raises TypeError if `config` is not a mapping or an override is no scheduler's setting, ValueError for
        a setting that is not supported.
        """
        if not isinstance(config, Mapping):
            raise TypeError(
                f"from_config needs a mapping such as scheduler.config, got {type(config).__name__}"
            )
        names = _setting_names(cls)
        known = names.union(*map(_setting_names, NoiseSchedule.__subclasses__()))
        for name in overrides:
            if name not in known:
                raise TypeError(f"{cls.__name__} has no setting {name!r}")
        left_out = {"_use_default_values", *config.get("_use_default_values", ())}
        stated = {name: value for name, value in config.items() if name not in left_out}
        settings = {name: value for name, value in {**stated, **overrides}.items() if name in names}
        scheduler = cls(**settings)
        carried = {name: value for name, value in stated.items() if name not in settings}
        if "_class_name" in carried:
            carried["_class_name"] = cls.__name__
        scheduler._register(**carried)
        return scheduler

    def config_dict(self) -> dict[str, Any]:
        """The settings as JSON holds them, with `_class_name`: the content of `scheduler_config.json`."""
        settings = {name: value for name, value in self.config.items() if name != "_use_default_values"}
        return {**settings, "_class_name": type(self).__name__}

    def scale_model_input(self, sample: Tensor, timestep: int | Tensor | None = None) -> Tensor:
        """`sample` itself: both samplers keep x_t at its scale in training; others would change it."""
        return sample

    def _register(self, **settings: Any) -> None:
        self._config = SchedulerConfig({**self._config, **settings})

    def _build_table(self) -> None:
        """Check the settings that both samplers share and set `betas` and `alphas_cumprod`."""
        config = self.config
        total = config.num_train_timesteps
        _check_count("num_train_timesteps", total, lowest=2, highest=None)
        one_of("beta_schedule", config.beta_schedule, BETA_SCHEDULES)
        one_of("prediction_type", config.prediction_type, PREDICTION_TYPES)
        one_of("timestep_spacing", config.timestep_spacing, TIMESTEP_SPACINGS)
        if not 0 <= config.dynamic_thresholding_ratio <= 1:
            raise ValueError(
                f"dynamic_thresholding_ratio {config.dynamic_thresholding_ratio} must lie in [0, 1]"
            )
        if config.trained_betas is not None:
            betas = torch.as_tensor(config.trained_betas).to("cpu", torch.float32, copy=True)
            self._register(trained_betas=betas.double().tolist())
            if betas.shape != (total,):
                raise ValueError(
                    f"trained_betas has shape {tuple(betas.shape)}, but num_train_timesteps is {total}: "
                    "give one beta for each training step"
                )
        else:
            for name in ("beta_start", "beta_end"):
                if not 0 < config[name] < 1:
                    raise ValueError(f"{name} {config[name]} must lie between 0 and 1")
            betas = make_betas(config.beta_schedule, config.beta_start, config.beta_end, total)
        if not bool(((betas > 0) & (betas < 1)).all()):
            raise ValueError("every beta must lie between 0 and 1; check trained_betas")
        self.betas = zero_terminal_snr(betas) if config.rescale_betas_zero_snr else betas
        self.alphas_cumprod = torch.cumprod(1 - self.betas, dim=0)
        self._place_timesteps(list(range(total - 1, -1, -1)), None)
        self.num_inference_steps = None

    def _check_num_inference_steps(self, number: int) -> None:
        _check_count("num_inference_steps", number, lowest=1, highest=self.config.num_train_timesteps)

    def _place_timesteps(self, values: list[int], device: torch.device | str | None) -> None:
        """Set `timesteps` and keep what `_locate` needs: their ints, and the tensor views point into."""
        total = self.config.num_train_timesteps
        if max(values) >= total or min(values) < 0:
            wrong = max(values) if max(values) >= total else min(values)
            raise ValueError(
                f"{len(values)} steps with timestep_spacing {self.config.timestep_spacing!r}, steps_offset "
                f"{self.config.steps_offset} would visit timestep {wrong}, outside 0 to {total - 1}; "
                "change num_inference_steps or steps_offset"
            )
        self._values = values
        self.timesteps = self._placed = torch.tensor(values, dtype=torch.int64, device=device or "cpu")
        self.num_inference_steps = len(values)

    def _require_timesteps(self) -> None:
        if self.num_inference_steps is None:
            raise ValueError("no timesteps yet: call set_timesteps(num_inference_steps) before step()")

    def _locate(self, timestep: int | Tensor) -> tuple[int | None, int]:
        """Which step of the walk a timestep is, as (index or None if only the value is known, value).

        `for t in scheduler.timesteps` hands out views into `timesteps`. Their place in memory tells the index
        without reading the value, so an accelerator is never waited for. Any other tensor is read, which
        waits for it once.
        """
        self._require_timesteps()
        value: int | float = 0
        if isinstance(timestep, Tensor):
            if timestep.numel() != 1:
                raise ValueError(f"step() takes one timestep, got a tensor of shape {tuple(timestep.shape)}")
            placed = self._placed
            untouched = placed.is_inference() or placed._version == 0
            same_type = timestep.dtype == placed.dtype and timestep.device == placed.device
            if untouched and same_type and _storage(timestep) == _storage(placed):
                index = int(timestep.storage_offset())
                return index, self._values[index]
            value = timestep.item()
        else:
            value = timestep
        if int(value) != value or not 0 <= value < self.config.num_train_timesteps:
            raise ValueError(f"timestep {value} is not one of 0 to {self.config.num_train_timesteps - 1}")
        return None, int(value)

    def _training_timesteps(self, timesteps: Tensor | int, device: torch.device) -> Tensor:
        """What `add_noise` was given, as (B,) on `device`; checked if that makes no device wait."""
        steps = torch.as_tensor(timesteps).reshape(-1)
        total = self.config.num_train_timesteps
        if steps.device.type == "cpu" and bool(((steps < 0) | (steps >= total)).any()):
            raise ValueError(f"add_noise got timesteps {steps.tolist()}; they must lie in 0 to {total - 1}")
        return steps.to(device=device, dtype=torch.int64)


def mix_noise(original: Tensor, noise: Tensor, alphas_cumprod: Tensor) -> Tensor:
    """x_t = sqrt(abar) x_0 + sqrt(1 - abar) noise; `original`, `noise` (B, ...); `alphas_cumprod` (B,)."""
    abar = alphas_cumprod.reshape(-1, *[1] * (original.dim() - 1))  # (B, 1, ...)
    return abar.sqrt().to(original.dtype) * original + (1 - abar).sqrt().to(original.dtype) * noise


def _setting_names(scheduler: type[NoiseSchedule]) -> set[str]:
    return set(inspect.signature(scheduler.__init__).parameters) - {"self"}


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _check_count(name: str, value: object, lowest: int, highest: int | None) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{name} must be a whole number, got {value!r}")
    if value < lowest or (highest is not None and value > highest):
        limits = f"at least {lowest}" if highest is None else f"from {lowest} to {highest}"
        raise ValueError(f"{name} must be {limits}, got {value}")
