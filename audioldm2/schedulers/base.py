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

from abc import ABC, abstractmethod
from typing import Any, Protocol

import torch
from torch import Tensor

from audioldm2.arguments import check_choice, check_count
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


class StepOutput(Protocol):
    """What every sampler's `step` returns: at least the sample at the next noise level."""

    @property
    def prev_sample(self) -> Tensor: ...


class Scheduler(Configurable, ABC):
    """Base class of the samplers; a subclass adds `__init__`, `set_timesteps` and `step`.

    Attributes:
        betas: the variances of the training steps, (T,) float32 on the CPU.
        alphas_cumprod: abar of the training steps, (T,) float32 on the CPU.
        timesteps: the timesteps of the run, (N,) int64 on the device given to `set_timesteps`, from noisy to
            clean. Before `set_timesteps`, all T training steps.
        num_inference_steps: N, or None before `set_timesteps`.
        order: the number of network evaluations in a step.
        init_noise_sigma: the standard deviation of the noise that a run starts from.
        default_num_inference_steps: the N that gives good results with this sampler.
    """

    order = 1
    init_noise_sigma: float = 1.0
    default_num_inference_steps: int
    num_inference_steps: int | None
    timesteps: Tensor

    def __init__(self) -> None:
        """Build the noise schedule from `self.config`, which the subclass's `__init__` recorded."""
        config = self.config
        total = config.num_train_timesteps
        check_count("num_train_timesteps", total, lowest=2)
        check_choice("beta_schedule", config.beta_schedule, BETA_SCHEDULES)
        check_choice("prediction_type", config.get("prediction_type", "epsilon"), PREDICTION_TYPES)
        check_choice("timestep_spacing", config.get("timestep_spacing", "leading"), TIMESTEP_SPACINGS)
        ratio = config.get("dynamic_thresholding_ratio", 1.0)
        if not 0 <= ratio <= 1:
            raise ValueError(f"dynamic_thresholding_ratio must lie in [0, 1], got {ratio}")

        betas = self._betas()
        self.betas = zero_terminal_snr(betas) if config.get("rescale_betas_zero_snr") else betas
        self.alphas_cumprod = torch.cumprod(1 - self.betas, dim=0)
        self._abar = self.alphas_cumprod  # the same values on the device where they were needed last
        self._set_timesteps(list(range(total - 1, -1, -1)))
        self.num_inference_steps = None

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
        steps = self._training_timesteps(timesteps, original_samples.device)
        return mix_noise(original_samples, noise, self._abar_on(original_samples.device)[steps])

    # ------------------------------------------------------------ the noise schedule

    def _betas(self) -> Tensor:
        config, total = self.config, self.config.num_train_timesteps
        if config.trained_betas is None:
            for name in ("beta_start", "beta_end"):
                if not 0 < config[name] < 1:
                    raise ValueError(f"{name} must lie between 0 and 1, got {config[name]}")
            betas = make_betas(config.beta_schedule, config.beta_start, config.beta_end, total)
        else:
            betas = torch.as_tensor(config.trained_betas).to("cpu", torch.float32, copy=True)
            self._update_config(trained_betas=betas.double().tolist())
            if betas.shape != (total,):
                raise ValueError(
                    f"trained_betas has shape {tuple(betas.shape)}, but num_train_timesteps is {total}; "
                    "pass one beta for each training step"
                )
        if not bool(((betas > 0) & (betas < 1)).all()):
            raise ValueError("every beta must lie between 0 and 1; check trained_betas")
        return betas

    def _abar_on(self, device: torch.device) -> Tensor:
        self._abar = self._abar.to(device)  # so that it is moved once and not at every call
        return self._abar

    # ------------------------------------------------------------ the timesteps of a run

    def _spaced_timesteps(self, number: int) -> list[int]:
        """The N timesteps of a run by `timestep_spacing` and `steps_offset`, checked."""
        config, total = self.config, self.config.num_train_timesteps
        check_count("num_inference_steps", number, lowest=1, highest=total)
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
        value: int | float
        if isinstance(timestep, Tensor):
            if timestep.numel() != 1:
                raise ValueError(f"step() takes one timestep, got a tensor of shape {tuple(timestep.shape)}")
            if self._is_view(timestep):
                index = int(timestep.storage_offset())
                return index, self._timesteps[index]
            value = timestep.item()
        else:
            value = timestep
        if not 0 <= value < self.config.num_train_timesteps or int(value) != value:
            raise ValueError(f"timestep {value} is not one of 0 to {self.config.num_train_timesteps - 1}")
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
        indices = [i for i, one in enumerate(self._timesteps) if one == value]
        if not indices:
            raise ValueError(f"timestep {value} is not in this sampling run; pass an element of timesteps")
        return indices[0] if indices[0] == 0 or len(indices) == 1 else indices[1]

    def _training_timesteps(self, timesteps: Tensor | int, device: torch.device) -> Tensor:
        """The timesteps given to `add_noise` as (B,) int64 on `device`; on the CPU their range is checked."""
        steps = torch.as_tensor(timesteps).reshape(-1)
        total = self.config.num_train_timesteps
        if steps.device.type == "cpu" and bool(((steps < 0) | (steps >= total)).any()):
            raise ValueError(f"add_noise got timesteps {steps.tolist()}; they must lie in 0 to {total - 1}")
        return steps.to(device=device, dtype=torch.int64)

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

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_placed": self._placed if self._is_view(self.timesteps) else None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._recognize_views_of(self._placed)  # a copied tensor has a version counter of its own
