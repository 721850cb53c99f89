"""What multistep samplers share: the noise levels of a run, the position in it, and noise at its levels.

A multistep sampler combines the network's estimate at the current noise level with those of the steps
before. So its steps must follow each other, and a timestep alone may not say which step is meant: where the
noise levels are spaced densely, several of them have the same timestep.

Two cases in which the formulas divide by zero, and diffusers returns NaN, are the same in all of them: a step
between equal noise levels leaves x as it is, and an order that would need two estimates at one level is
lowered.

The attribute `sigmas` holds the ratios sigma / alpha, the noise levels of Karras et al. 2022. Formulas are
written in lambda = log(alpha / sigma) = -log(sigma / alpha), half the log signal-to-noise ratio.
"""

from __future__ import annotations

import itertools
import math
import warnings
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from audioldm2.arguments import check_choice, check_count
from audioldm2.schedulers.base import Scheduler
from audioldm2.schedulers.noise_schedule import mix_noise, sampling_sigmas, training_sigmas
from audioldm2.schedulers.prediction import dynamic_threshold, x0_and_eps

SMALLEST_STEP = 1e-6  # in lambda; float32 noise levels cannot resolve a shorter step

U = TypeVar("U")  # the weights of one update


@dataclass(frozen=True)
class Step(Generic[U]):
    """One step of a run: the noise level it starts from, and its updates of order 1 to the highest."""

    alpha: float
    sigma: float
    updates: list[U]


class MultistepScheduler(Scheduler, Generic[U]):
    """Base class of the multistep samplers.

    A subclass adds `set_timesteps`, `step`, and what describes the updates of a run, `_order` and `_update`.

    Attributes:
        sigmas: the noise level before each step of the run and after the last, (N + 1,) float32 on the CPU.
            Before `set_timesteps`, those of all T training steps.
    """

    sigmas: Tensor
    _run: list[Step[U]]
    _step_index: int | None  # of the next step
    _begin_index: int | None
    _estimates: list[Tensor]  # of earlier steps, the newest first: estimates of x_0 or eps
    _alternatives: list[int]  # where else the next step could be, if the run began at an ambiguous timestep

    def __init__(self) -> None:
        config = self.config
        check_choice("final_sigmas_type", config.final_sigmas_type, ("zero", "sigma_min"))
        for name in ("use_beta_sigmas", "use_flow_sigmas", "use_dynamic_shifting"):
            if config[name]:
                raise ValueError(f"{name} is not supported; leave it False")
        if config.use_karras_sigmas and config.use_exponential_sigmas:
            raise ValueError("use_karras_sigmas and use_exponential_sigmas cannot both be set; choose one")
        super().__init__()
        if config.rescale_betas_zero_snr:
            self.alphas_cumprod[-1] = 2**-24  # so that the last noise level is finite
        self.sigmas = torch.from_numpy(training_sigmas(self.alphas_cumprod))
        self._run = []
        self._begin_index = None
        self._restart(None)

    @abstractmethod
    def _order(self, i: int, number: int) -> int:
        """The highest order of step i of a run of `number` steps."""

    @abstractmethod
    def _update(self, sigmas: list[float], i: int, order: int) -> U:
        """The update of an order from noise level i to i + 1."""

    @property
    def alpha_t(self) -> Tensor:
        """alpha of the training steps, (T,)."""
        return self.alphas_cumprod.sqrt()

    @property
    def sigma_t(self) -> Tensor:
        """sigma of the training steps, (T,); the attribute `sigmas` is sigma / alpha."""
        return (1 - self.alphas_cumprod).sqrt()

    @property
    def lambda_t(self) -> Tensor:
        """lambda of the training steps, log(alpha / sigma), (T,)."""
        return self.alpha_t.log() - self.sigma_t.log()

    @property
    def step_index(self) -> int | None:
        """The index of the next step; None before the first."""
        return self._step_index

    @property
    def begin_index(self) -> int | None:
        """The index set by `set_begin_index`; None if the first timestep decides where the run begins."""
        return self._begin_index

    def set_begin_index(self, begin_index: int | None = 0) -> None:
        """Begin the next run at this index of `timesteps`; None lets its first timestep decide.

        A timestep that occurs twice in a run can stand for two noise levels. The index decides between them,
        in `step` and in `add_noise`.

        Raises:
            ValueError: if it is not an index of the run.
        """
        if begin_index is not None:
            last = None if self.num_inference_steps is None else self.num_inference_steps - 1
            check_count("begin_index", begin_index, lowest=0, highest=last)
            begin_index = int(begin_index)
        self._begin_index = begin_index
        self._restart(None)

    def index_for_timestep(self, timestep: int | Tensor, schedule_timesteps: Tensor | None = None) -> int:
        """The index in `timesteps` at which a run begins that begins with a timestep.

        Args:
            timestep: an element of `timesteps`, which stands for its own index, or its value. A value that
                occurs more than once stands for the second, as in diffusers, or for the first if that is 0.
            schedule_timesteps: for compatibility with diffusers; without effect.

        Raises:
            ValueError: if it is not in the run.
        """
        return self._index_of(timestep)

    # ------------------------------------------------------------ the noise levels of a run

    def _levels(
        self,
        number: int | None,
        timesteps: Sequence[int] | Tensor | None,
        *,
        rounded: bool,
        lu_lambdas: bool = False,
        lambda_min: float = -math.inf,
    ) -> tuple[list[int], NDArray[np.float64]]:
        """The timesteps, (N,), and noise levels, (N,), that the arguments of `set_timesteps` ask for.

        Args:
            number: N, or None.
            timesteps: see `_given_timesteps`; None if the settings space them.
            rounded: see `sampling_sigmas`, as for the arguments after it.
        """
        if timesteps is not None:
            for name in self.spacings:
                if self.config[name]:
                    raise ValueError(f"timesteps cannot be given together with {name}, which chooses them")
            values = self._given_timesteps(timesteps, number)
            return values, training_sigmas(self.alphas_cumprod)[values].astype(np.float64)
        check_count("num_inference_steps", number, 1, self.config.num_train_timesteps)
        values, levels = sampling_sigmas(
            self.config,
            self.alphas_cumprod,
            int(number),  # type: ignore[arg-type] # it has been checked
            rounded=rounded,
            lu_lambdas=lu_lambdas,
            lambda_min=lambda_min,
        )
        self._check_timesteps(values)
        return values, levels

    def _begin_run(
        self,
        values: list[int],
        levels: NDArray[np.float64],
        last: float,
        device: torch.device | str | None,
    ) -> None:
        """Set the timesteps, (N,), and their noise levels, (N,), of which the run ends at `last`."""
        sigmas = torch.from_numpy(np.append(levels, last).astype(np.float32))
        steps = self._plan(sigmas.tolist())
        self._set_timesteps(values, device)
        self._repeats = len(set(values)) < len(values)
        self.sigmas, self._run = sigmas, steps
        self._run_abar = (1 / (sigmas.double() ** 2 + 1)).float()  # (N + 1,); moves to where it is needed
        self._begin_index = None
        self._restart(None)

    def _plan(self, sigmas: list[float]) -> list[Step[U]]:
        """The steps between consecutive noise levels."""
        self._check_falling(sigmas)
        number = len(sigmas) - 1
        steps = []
        for i in range(number):
            order = min(self._order(i, number), i + 1)
            while order > 1 and min(lambda_steps(sigmas[i - order + 1 : i + 1])) < SMALLEST_STEP:
                order -= 1  # two of the estimates are at the same noise level
            alpha = 1 / math.sqrt(sigmas[i] ** 2 + 1)
            updates = [self._update(sigmas, i, k) for k in range(1, order + 1)]
            steps.append(Step(alpha, sigmas[i] * alpha, updates))
        return steps

    def _check_falling(self, sigmas: list[float]) -> None:
        """Raise ValueError if the noise level rises during a run."""
        # `rescale_betas_zero_snr` sets the last training step to a level below that of the step before it.
        falling = sigmas[1:] if self.config.rescale_betas_zero_snr else sigmas
        for before, after in itertools.pairwise(falling):
            if after > before * (1 + SMALLEST_STEP):
                raise ValueError(
                    f"the noise level must not rise during a run, but goes from {before:g} to {after:g}; "
                    "check sigma_min, sigma_max and final_sigmas_type"
                )

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor | int) -> Tensor:
        """Noisy samples: x_t = alpha_t x_0 + sigma_t noise.

        A timestep of the run stands for the run's noise level there, by the same rules as in `step`. After
        `set_begin_index` the level is that of the next step, whatever the timesteps. Otherwise an element or
        a slice of `timesteps` has its own levels, and so has a value; but a value that occurs more than once
        can mean several levels, of which it stands for that of the next step, or else that of the index that
        `index_for_timestep` returns, with a warning. Any other timestep stands for its level in training.

        Args:
            original_samples: x_0, (B, ...).
            noise: (B, ...).
            timesteps: t, (B,), or one for all.

        Returns:
            x_t, (B, ...).

        Raises:
            ValueError: if the tensors are not floating-point numbers of one shape, or a timestep on the CPU
                is not a training step.
        """
        steps = self._training_timesteps(timesteps, original_samples, noise)
        device = original_samples.device
        trained = self._abar_on(device)[steps]  # (B,)
        if self.num_inference_steps is None:
            return mix_noise(original_samples, noise, trained)
        self._run_abar = self._run_abar.to(device)
        if self._begin_index is not None:
            index = self._begin_index if self._step_index is None else self._step_index
            return mix_noise(original_samples, noise, self._run_abar[index].expand(len(steps)))
        positions = self._positions_of_view(timesteps)
        if positions is not None:
            return mix_noise(original_samples, noise, self._run_abar[positions])
        if self._repeats:
            found = [self._position_of(value) for value in steps.tolist()]
            rows = [trained[k] if i is None else self._run_abar[i] for k, i in enumerate(found)]
            return mix_noise(original_samples, noise, torch.stack(rows))
        same = steps[:, None] == self.timesteps.to(device)  # (B, N)
        abar = torch.where(same.any(1), self._run_abar[same.to(torch.int64).argmax(1)], trained)
        return mix_noise(original_samples, noise, abar)

    # ------------------------------------------------------------ a step

    def _estimate(self, model_output: Tensor, sample: Tensor, now: Step[U], *, of_x0: bool) -> Tensor:
        """The network's estimate of x_0, with the thresholding that is set, or of eps."""
        config = self.config
        x0, eps = x0_and_eps(model_output, sample, now.alpha, now.sigma, config.prediction_type)
        if config.thresholding:
            x0 = dynamic_threshold(x0, config.dynamic_thresholding_ratio, config.sample_max_value)
            eps = (sample - now.alpha * x0) / now.sigma
        return x0 if of_x0 else eps

    # ------------------------------------------------------------ the position in a run

    def _restart(self, index: int | None) -> None:
        self._step_index = index
        self._estimates = []
        self._alternatives = []

    def _next_index(self, timestep: int | Tensor) -> int:
        """The index of the step that `timestep` asks for; starts a new run if it is not the next one."""
        index, value = self._locate(timestep)
        upcoming = self._step_index
        if self._begin_index is not None:
            upcoming = self._begin_index if upcoming is None else upcoming
            if not 0 <= upcoming < len(self._run):
                raise ValueError(
                    f"there is no step {upcoming} in a run of {len(self._run)}; call set_timesteps() first"
                )
            if index not in (None, upcoming) or value != self._timesteps[upcoming]:
                raise ValueError(
                    f"since set_begin_index(), the next step is that at index {upcoming}, timestep "
                    f"{self._timesteps[upcoming]}, but timestep {value} is given"
                )
            return upcoming
        if index is not None:
            if index != upcoming:
                self._restart(index)
            self._alternatives = []
            return index
        possible = [i for i in self._alternatives if self._timesteps[i : i + 1] == [value]]
        if upcoming is not None and self._timesteps[upcoming : upcoming + 1] == [value]:
            self._alternatives = [i + 1 for i in possible]
            return upcoming
        if possible:
            raise ValueError(
                f"timestep {value} shows that the run began at another of several equal timesteps; pass "
                "elements of scheduler.timesteps instead of their values, or call set_begin_index()"
            )
        index = self._index_of(value)
        self._warn_of_levels(value, index)
        self._restart(index)
        self._alternatives = [i + 1 for i in self._occurrences(value) if i != index]
        return index

    def _position_of(self, value: int) -> int | None:
        """The index that a timestep's value means in `add_noise`; None if it is not in the run."""
        upcoming = self._step_index
        if upcoming is not None and self._timesteps[upcoming : upcoming + 1] == [value]:
            return upcoming
        if value not in self._timesteps:
            return None
        index = self._index_of(value)
        self._warn_of_levels(value, index)
        return index

    def _warn_of_levels(self, value: int, index: int) -> None:
        """Warn if a timestep's value does not say which of several noise levels is meant."""
        levels = [float(self.sigmas[i]) for i in self._occurrences(value)]
        if max(levels) > min(levels):
            warnings.warn(
                f"timestep {value} occurs {len(levels)} times in this run, at noise levels from "
                f"{max(levels):g} to {min(levels):g}, and is taken to mean index {index}; pass an element or "
                "a slice of scheduler.timesteps, which knows its index, or call set_begin_index()",
                stacklevel=4,
            )


def lambdas_of(sigmas: Sequence[float]) -> list[float]:
    """lambda of noise levels; infinite at level 0."""
    return [-math.log(sigma) if sigma > 0 else math.inf for sigma in sigmas]


def lambda_steps(sigmas: Sequence[float]) -> list[float]:
    """The lengths in lambda of the steps between consecutive noise levels."""
    return [after - before for before, after in itertools.pairwise(lambdas_of(sigmas))]
