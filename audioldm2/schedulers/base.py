"""The base class of the samplers: the noise schedule and the timesteps of a sampling run.

A sampling run visits N of the T training steps, from noise to a clean sample:

    scheduler.set_timesteps(N, device)
    x = noise * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        output = network(scheduler.scale_model_input(x, t), t)
        x = scheduler.step(output, t, x).prev_sample

A sampler computes the coefficients of its steps once, in `set_timesteps`, on the CPU in float64, and stores
them as Python floats. A step multiplies tensors by them and never waits for the accelerator.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Sequence
from numbers import Real
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from audioldm2.arguments import as_integer, check_choice, check_count, check_number
from audioldm2.quoting import quoted
from audioldm2.schedulers.config import Configurable
from audioldm2.schedulers.noise_schedule import (
    BETA_SCHEDULES,
    TIMESTEP_SPACINGS,
    make_betas,
    mix_noise,
    spaced_timesteps,
    zero_terminal_snr,
)
from audioldm2.schedulers.prediction import PREDICTION_TYPES

# Far more than any model was trained with (1000, at most 4000); a config with more is wrong or hostile.
MAX_TRAIN_TIMESTEPS = 100_000


class StepOutput(Protocol):
    """What every sampler's `step` returns: at least the sample at the next noise level."""

    @property
    def prev_sample(self) -> Tensor: ...


class Scheduler(Configurable, ABC):
    """Base class of the samplers; a subclass adds `__init__`, `set_timesteps` and `step`.

    Attributes:
        betas: the variances of the training steps, (T,) float32.
        alphas: 1 - betas.
        alphas_cumprod: abar of the training steps, (T,) float32. `set_timesteps` reads it.
        timesteps: the timesteps of the run, (N,) int64 on the device given to `set_timesteps`, from noisy to
            clean. Before `set_timesteps`, all T training steps.
        num_inference_steps: N, or None before `set_timesteps`.
        order: the number of network evaluations in a step.
        init_noise_sigma: the standard deviation of the noise that a run starts from.
        default_num_inference_steps: the N that gives good results with this sampler.
        spacings: the settings that space the noise levels in place of `timestep_spacing`.
    """

    order = 1
    init_noise_sigma: float = 1.0
    default_num_inference_steps: int
    spacings: ClassVar[tuple[str, ...]] = ()
    num_inference_steps: int | None
    timesteps: Tensor

    def __init__(self) -> None:
        """Build the noise schedule from `self.config`, which the subclass's `__init__` recorded."""
        config = self.config
        total = config.num_train_timesteps
        check_count("num_train_timesteps", total, lowest=2, highest=MAX_TRAIN_TIMESTEPS)
        check_choice("beta_schedule", config.beta_schedule, BETA_SCHEDULES)
        check_choice("prediction_type", config.get("prediction_type", "epsilon"), PREDICTION_TYPES)
        check_choice("timestep_spacing", config.get("timestep_spacing", "leading"), TIMESTEP_SPACINGS)
        check_count("steps_offset", config.get("steps_offset", 0), lowest=0, highest=total - 1)
        ratio = config.get("dynamic_thresholding_ratio", 1.0)
        if not 0 <= ratio <= 1:
            raise ValueError(f"dynamic_thresholding_ratio must lie in [0, 1], got {ratio}")
        for name in ("sample_max_value", "clip_sample_range"):
            check_number(name, config.get(name, 1.0))
            if config.get(name, 1.0) <= 0:
                raise ValueError(f"{name} must be positive, got {config[name]}")

        self.betas = self._betas()
        self.alphas = 1 - self.betas
        self.alphas_cumprod = torch.cumprod(self.alphas, dim=0)
        self._moved = self.alphas_cumprod, self.alphas_cumprod  # and a copy where it was needed last
        self._set_timesteps(list(range(total - 1, -1, -1)))
        self.num_inference_steps = None

    def __len__(self) -> int:
        """T, the number of training steps."""
        return self.config.num_train_timesteps

    @abstractmethod
    def set_timesteps(self, num_inference_steps: int, device: torch.device | str | None = None) -> None:
        """Choose the N timesteps of a sampling run, and discard the state of an earlier run.

        Args:
            num_inference_steps: N, from 1 to T.
            device: where `timesteps` is placed; the CPU by default.
        """

    @abstractmethod
    def step(self, model_output: Tensor, timestep: int | Tensor, sample: Tensor) -> StepOutput:
        """Take one step: from the sample at `timestep` to the sample at the next noise level.

        Args:
            model_output: the network's output for (sample, timestep), (B, C, ...).
            timestep: an element of `timesteps`, or its value.
            sample: (B, C, ...).

        Returns:
            `prev_sample`, (B, C, ...), and whatever else the sampler returns.
        """

    def scale_model_input(self, sample: Tensor, timestep: int | Tensor | None = None) -> Tensor:
        """The network's input for a sample: by default the sample itself, which has the scale of training.

        Args:
            sample: (B, C, ...).
            timestep: an element of `timesteps`, or its value; not needed by default.

        Returns:
            (B, C, ...).
        """
        return sample

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor | int) -> Tensor:
        """Noisy samples as in training: x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) noise.

        Args:
            original_samples: x_0, (B, ...).
            noise: (B, ...).
            timesteps: t, (B,), or one for all.

        Returns:
            x_t, (B, ...).

        Raises:
            ValueError: if a timestep on the CPU is not a training step.
        """
        steps = self._training_timesteps(timesteps, original_samples, noise)
        return mix_noise(original_samples, noise, self._abar_on(original_samples.device)[steps])

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Tensor | int) -> Tensor:
        """The target of training with "v_prediction": v = sqrt(abar_t) noise - sqrt(1 - abar_t) x_0.

        Args:
            sample: x_0, (B, ...).
            noise: (B, ...).
            timesteps: t, training steps, (B,), or one for all.

        Returns:
            v, (B, ...).

        Raises:
            ValueError: as in `add_noise`.
        """
        steps = self._training_timesteps(timesteps, sample, noise, "sample")
        return mix_noise(noise, -sample, self._abar_on(sample.device)[steps])

    # ------------------------------------------------------------ the noise schedule

    def _betas(self) -> Tensor:
        config, total = self.config, self.config.num_train_timesteps
        if config.trained_betas is None:
            for name in ("beta_start", "beta_end"):
                if not 0 < config[name] < 1:
                    raise ValueError(f"{name} must lie between 0 and 1, got {config[name]}")
            betas = make_betas(config.beta_schedule, config.beta_start, config.beta_end, total)
        else:
            betas = self._trained_betas(config.trained_betas, total)
        names = ("beta_start", "beta_end") if config.trained_betas is None else ("trained_betas",) * 2
        abar = torch.cumprod(1 - betas, dim=0)
        if abar[0] == 1:
            raise ValueError(f"{names[0]} is too small: in float32, 1 - beta is 1 at the first training step")
        if abar[-1] < torch.finfo(torch.float32).tiny:  # below it, the noise-to-signal ratio is infinite
            raise ValueError(
                f"{names[1]} is too large: alphas_cumprod falls below the range of float32 in {total} "
                "training steps"
            )
        if not config.get("rescale_betas_zero_snr"):
            return betas
        betas = zero_terminal_snr(betas)
        if not bool(betas.isfinite().all()):
            raise ValueError(f"rescale_betas_zero_snr needs noise at every training step; check {names[1]}")
        return betas

    def _trained_betas(self, value: Sequence[float] | Tensor, total: int) -> Tensor:
        try:
            given = torch.as_tensor(value)
            betas = given.to("cpu", torch.float32 if not given.is_complex() else None, copy=True)
            listed = betas.double().tolist()
        except (TypeError, ValueError, RuntimeError, OverflowError) as error:
            raise ValueError(f"trained_betas must be a list of {total} numbers: {error}") from error
        if betas.shape != (total,):
            raise ValueError(
                f"trained_betas has shape {tuple(betas.shape)}, but num_train_timesteps is {total}; "
                "pass one beta for each training step"
            )
        if not bool(((betas > 0) & (betas < 1)).all()):
            raise ValueError("every beta must lie between 0 and 1; check trained_betas")
        self.register_to_config(trained_betas=listed)
        return betas

    def _abar_on(self, device: torch.device) -> Tensor:
        source, copy = self._moved
        if source is not self.alphas_cumprod or copy.device != device:  # so it is not moved at every call
            self._moved = self.alphas_cumprod, self.alphas_cumprod.to(device)
        return self._moved[1]

    # ------------------------------------------------------------ the timesteps of a run

    def _spaced_timesteps(self, number: int) -> list[int]:
        """The N timesteps of a run by `timestep_spacing` and `steps_offset`, checked."""
        config, total = self.config, self.config.num_train_timesteps
        check_count("num_inference_steps", number, lowest=1, highest=total)
        number = int(number)
        timesteps = spaced_timesteps(config.timestep_spacing, total, number, config.steps_offset)
        self._check_timesteps(timesteps)
        return timesteps

    def _check_timesteps(self, timesteps: list[int]) -> None:
        last = self.config.num_train_timesteps - 1
        for timestep in timesteps:
            if not 0 <= timestep <= last:
                raise ValueError(
                    f"{len(timesteps)} inference steps would visit timestep {timestep}, outside 0 to {last}; "
                    "change num_inference_steps or steps_offset"
                )

    def _given_timesteps(self, timesteps: Sequence[int] | Tensor, number: int | None) -> list[int]:
        """The timesteps given to `set_timesteps`, checked.

        Args:
            timesteps: integers, in a list, a tensor or a NumPy array.
            number: the number of steps given to `set_timesteps`, or None.
        """
        try:
            listed = timesteps.tolist() if hasattr(timesteps, "tolist") else list(timesteps)
            values = [
                int(value) if value == int(value) and not isinstance(value, bool) else None
                for value in listed
            ]
        except (TypeError, ValueError, OverflowError) as error:
            raise ValueError(f"timesteps must be a list of integers, got {quoted(timesteps)}") from error
        steps = [value for value in values if value is not None]
        last = self.config.num_train_timesteps - 1
        decreasing = all(after < before for before, after in itertools.pairwise(steps))
        if len(steps) < len(values) or not steps or not decreasing or steps[0] > last or steps[-1] < 0:
            raise ValueError(
                f"timesteps must be decreasing integers from at most {last} to at least 0, got "
                f"{quoted(listed)}"
            )
        if number is not None and as_integer(number) != len(steps):
            raise ValueError(
                f"num_inference_steps is {quoted(number)}, but there are {len(steps)} timesteps; pass only "
                "these"
            )
        return steps

    def _set_timesteps(self, timesteps: list[int], device: torch.device | str | None = None) -> None:
        """Begin a run: set `timesteps` and `num_inference_steps`, and what `_locate` needs."""
        # A normal tensor even in inference mode: inference tensors have no version counter.
        with torch.inference_mode(False):
            placed = torch.tensor(timesteps, dtype=torch.int64, device=device or "cpu")
        self.timesteps = placed
        self.num_inference_steps = len(timesteps)
        self._timesteps = timesteps
        self._recognize_views_of(placed)

    def _locate(self, timestep: int | Tensor) -> tuple[int | None, int]:
        """The position of a timestep in the run, or None if only its value is known, and its value.

        `for t in scheduler.timesteps` yields views into `timesteps`. The address of a view gives its position
        without reading the value, which would wait for the accelerator. Any other tensor is read.

        Raises:
            ValueError: before `set_timesteps`, or if the timestep is not a training step.
        """
        if self.num_inference_steps is None:
            raise ValueError(
                "there are no timesteps yet; call set_timesteps(num_inference_steps) before step()"
            )
        value: Any = timestep
        if isinstance(timestep, Tensor):
            if timestep.numel() != 1:
                raise ValueError(f"step() takes one timestep, got a tensor of shape {tuple(timestep.shape)}")
            if self._is_view(timestep):
                index = int(timestep.storage_offset())
                return index, self._timesteps[index]
            value = timestep.item()
        last = self.config.num_train_timesteps - 1
        is_number = isinstance(value, Real) and not isinstance(value, bool)
        if not is_number or not 0 <= value <= last or int(value) != value:
            raise ValueError(f"timestep {quoted(value)} is not one of 0 to {last}")
        return None, int(value)

    def _index_of(self, timestep: int | Tensor) -> int:
        """The position of a timestep in the run.

        A value that occurs twice means the second occurrence, as in diffusers: a run that starts in the
        middle would otherwise repeat a step. At the very beginning it means the first.

        Raises:
            ValueError: if the timestep is not in the run.
        """
        index, value = self._locate(timestep)
        if index is not None:
            return index
        indices = self._occurrences(value)
        if not indices:
            raise ValueError(f"timestep {value} is not in this sampling run; pass an element of timesteps")
        return indices[0] if indices[0] == 0 or len(indices) == 1 else indices[1]

    def _occurrences(self, value: int) -> list[int]:
        return [i for i, one in enumerate(self._timesteps) if one == value]

    # ------------------------------------------------------------ checks of tensors

    def _training_timesteps(
        self, timesteps: Tensor | int, original: Tensor, noise: Tensor, name: str = "original_samples"
    ) -> Tensor:
        """The timesteps given to `add_noise` as (B,) or (1,) int64, where the samples are.

        On the CPU their values are checked. On an accelerator that would wait for it.
        """
        check_pair(name, original, "noise", noise)
        try:
            steps = torch.as_tensor(timesteps).reshape(-1)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"timesteps must be integers, got {quoted(timesteps)}") from error
        total = self.config.num_train_timesteps
        if steps.numel() not in (1, len(original)):
            raise ValueError(
                f"got {steps.numel()} timesteps for {len(original)} samples; pass one, or one each"
            )
        if steps.is_complex() or steps.dtype == torch.bool:
            raise ValueError(f"timesteps must be integers, got {steps.dtype}")
        if steps.device.type == "cpu":
            fine = (steps >= 0) & (steps < total) & (steps == steps.round())
            if not bool(fine.all()):
                raise ValueError(
                    f"timesteps must lie in 0 to {total - 1} and be integers, got {quoted(steps.tolist())}"
                )
        return steps.to(device=original.device, dtype=torch.int64)

    def _check_step(self, model_output: Tensor, sample: Tensor, variance_noise: Tensor | None) -> None:
        """Raise ValueError unless a step can be taken with these tensors."""
        check_pair("sample", sample, "model_output", model_output)
        if self.config.get("thresholding") and sample.dim() < 2:
            raise ValueError(f"thresholding needs a sample of shape (B, C, ...), got {tuple(sample.shape)}")
        if variance_noise is None:
            return
        check_float_tensor("variance_noise", variance_noise)
        shape = tuple(variance_noise.shape)
        padded = (1,) * (sample.dim() - len(shape)) + shape
        if len(padded) != sample.dim() or any(
            size not in (1, whole) for size, whole in zip(padded, sample.shape, strict=True)
        ):
            raise ValueError(f"variance_noise has shape {shape}, but the sample has {tuple(sample.shape)}")

    # ------------------------------------------------------------ views into `timesteps`

    def _recognize_views_of(self, timesteps: Tensor | None) -> None:
        self._placed = None if timesteps is None or timesteps.is_inference() else timesteps
        self._placed_version = 0 if self._placed is None else self._placed._version

    def _is_view(self, tensor: Tensor) -> bool:
        """Whether a tensor is a view into the run's timesteps, and they still have the values of the run."""
        placed = self._placed
        return (
            placed is not None
            and placed._version == self._placed_version  # counts writes, such as `timesteps += 1`
            and tensor.dtype == placed.dtype
            and tensor.device == placed.device
            and tensor.untyped_storage().data_ptr() == placed.untyped_storage().data_ptr()
        )

    def _positions_of_view(self, tensor: object) -> list[int] | None:
        """The positions in the run of the elements of a view into `timesteps`; None if it is not one."""
        if not isinstance(tensor, Tensor) or tensor.dim() > 1 or not self._is_view(tensor):
            return None
        start, stride = tensor.storage_offset(), tensor.stride(0) if tensor.dim() else 0
        return [int(start + i * stride) for i in range(tensor.numel())]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_placed": self._placed if self._is_view(self.timesteps) else None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._recognize_views_of(self._placed)  # a copied tensor has a version counter of its own


def check_float_tensor(name: str, value: object) -> None:
    """Raise ValueError unless `value` is a tensor of floating-point numbers that is not empty."""
    if not isinstance(value, Tensor):
        raise ValueError(f"{name} must be a tensor, got {type(value).__name__}")
    if not value.is_floating_point():
        raise ValueError(f"{name} must be a tensor of floating-point numbers, got {value.dtype}")
    if value.numel() == 0 or value.dim() == 0:
        raise ValueError(f"{name} must have the shape (B, C, ...), got {tuple(value.shape)}")


def check_pair(name: str, value: object, other_name: str, other: object) -> None:
    """Raise ValueError unless two arguments are tensors of floating-point numbers of the same shape."""
    for label, one in ((name, value), (other_name, other)):
        check_float_tensor(label, one)
    assert isinstance(value, Tensor)
    assert isinstance(other, Tensor)
    if value.shape != other.shape:
        raise ValueError(f"{other_name} has shape {tuple(other.shape)}, but {name} has {tuple(value.shape)}")
