"""DPM-Solver++: good samples in a tenth of DDIM's steps (Lu et al. 2022, arXiv 2211.01095).

In: the network's output for (x_t, t), and x_t; both (B, C, ...). Out: x at the next, cleaner noise level.

Sampling solves a differential equation from noise to data. Write x_t = alpha_t x_0 + sigma_t eps with
alpha = sqrt(abar), sigma = sqrt(1 - abar), and let lambda = log(alpha / sigma), half the log signal-to-noise
ratio. In lambda the linear part of the equation is solved exactly, and only the network's estimate of x_0
remains under an integral (the paper's eq. 8). From noise level s to t, with h = lambda_t - lambda_s:

    x_t = sigma_t / sigma_s  x_s  +  sigma_t  integral from lambda_s to lambda_t of e^l x_0(l) dl

The estimate of x_0 is expanded in lambda around s, with derivatives from the estimates of earlier steps. One
term gives order 1 (which is DDIM), two give order 2 (algorithm 2, "2M"), three give order 3. With m0, m1, m2
the estimates at this step and the two before, h0 and h1 the lengths in lambda of the two steps before,
r0 = h0 / h and r1 = h1 / h:

    order 1    x_t = sigma_t / sigma_s x_s + alpha_t phi1 m0      phi1 = 1 - e^-h
    order 2    ... + alpha_t phi1 / 2 D1                          (solver_type midpoint)
               ... + alpha_t phi2 D1                              (solver_type heun)    phi2 = 1 - phi1 / h
    order 3    ... + alpha_t phi2 D1 + alpha_t phi3 D2            phi3 = 1/2 - (h - phi1) / h^2

where D1 = (m0 - m1) / r0 at order 2; at order 3, with d0 = (m0 - m1) / r0 and d1 = (m1 - m2) / r1,
D1 = d0 + r0 (d0 - d1) / (r0 + r1)  and  D2 = (d0 - d1) / (r0 + r1).

`sde-dpmsolver++` solves the stochastic equation instead (the paper's appendix): the same with 2h for h in the
phis, the factor of x_s times e^-h, and fresh noise of standard deviation sigma_t sqrt(1 - e^-2h).

`dpmsolver`, the older DPM-Solver (Lu et al. 2022, arXiv 2206.00927), expands the estimate of eps instead,
which is less stable with guidance. With m0, m1, m2 estimates of eps, and the same D1 and D2:

    order 1    x_t = alpha_t / alpha_s x_s - sigma_t psi1 m0      psi1 = e^h - 1
    order 2    ... - sigma_t psi1 / 2 D1                          (solver_type midpoint)
               ... - sigma_t psi2 D1                              (solver_type heun)    psi2 = psi1 / h - 1
    order 3    ... - sigma_t psi2 D1 - sigma_t psi3 D2            psi3 = (psi1 - h) / h^2 - 1/2

`sde-dpmsolver` doubles all of these weights except that of x_s, adds noise of standard deviation
sigma_t sqrt(e^2h - 1), and has no order 3.

Differences from the paper and from diffusers: at order 3 of the stochastic equation diffusers has -1/2 where
phi3 above has 1/2; this is kept, so that the samples are the same. A step between equal noise levels, where
the formulas divide by h = 0, leaves x as it is, and an order that would need an estimate from before such a
step is lowered; diffusers returns NaN there.

The attribute `sigmas` holds the ratios sigma / alpha = exp(-lambda), the noise levels of Karras et al. 2022.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from audioldm2.arguments import check_choice, check_count, check_number
from audioldm2.noise import Generators, randn
from audioldm2.schedulers.base import Scheduler
from audioldm2.schedulers.config import records_settings
from audioldm2.schedulers.noise_schedule import mix_noise, sampling_sigmas, training_sigmas
from audioldm2.schedulers.output import SchedulerOutput
from audioldm2.schedulers.prediction import dynamic_threshold, x0_and_eps

ALGORITHMS = ("dpmsolver++", "sde-dpmsolver++", "dpmsolver", "sde-dpmsolver")
FIXED_VARIANCES = ("fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log")  # without effect
SMALLEST_STEP = 1e-6  # in lambda; float32 noise levels cannot resolve a shorter step


@dataclass(frozen=True)
class Update:
    """The weights, in float64, of the tensors whose sum is the next x."""

    sample: float
    m0: float
    m0_m1: float = 0.0  # weight of the difference m0 - m1, which loses less precision than its parts
    m1_m2: float = 0.0
    noise: float = 0.0


@dataclass(frozen=True)
class Step:
    """One step of a run: the noise level it starts from, and its updates of order 1 to the highest."""

    alpha: float
    sigma: float
    updates: list[Update]


class DPMSolverMultistepScheduler(Scheduler):
    """The multistep DPM-Solver++ sampler, for about 20 steps.

    Args:
        num_train_timesteps: T, the number of training steps.
        beta_start: the first beta; see `make_betas`.
        beta_end: the last beta.
        beta_schedule: "linear", "scaled_linear" or "squaredcos_cap_v2".
        trained_betas: the betas themselves, (T,), instead of the three settings above.
        solver_order: 1, 2 or 3; 2 is recommended with guidance.
        prediction_type: "epsilon", "sample" or "v_prediction": what the network was trained to predict.
        thresholding: whether to use `dynamic_threshold` on the estimate of x_0.
        dynamic_thresholding_ratio: its quantile.
        sample_max_value: the upper limit of its threshold.
        algorithm_type: "dpmsolver++" (deterministic) or "sde-dpmsolver++" (adds noise at every step), or the
            older "dpmsolver" and "sde-dpmsolver", which need `final_sigmas_type` "sigma_min".
        solver_type: "midpoint" or "heun", the two forms of order 2.
        lower_order_final: whether a run of fewer than 15 steps ends with orders 2 and 1.
        euler_at_final: whether every run ends with order 1.
        use_karras_sigmas: whether to space the noise levels by `karras_sigmas` instead of by timestep.
        use_exponential_sigmas: whether to space them evenly in log sigma.
        use_beta_sigmas: not supported.
        use_lu_lambdas: whether to space them evenly in lambda (Lu et al. 2022); the timesteps are rounded.
        use_flow_sigmas: not supported.
        flow_shift: ignored; belongs to `use_flow_sigmas`.
        final_sigmas_type: "zero" to end without noise, or "sigma_min" to end at the lowest trained noise
            level.
        lambda_min_clipped: the lambda of the noisiest level to start from; needed for "squaredcos_cap_v2".
        variance_type: None or a fixed variance, which has no effect; a learned variance is not supported.
        timestep_spacing: "linspace", "leading" or "trailing"; the first two omit timestep 0.
        steps_offset: added to the timesteps of "leading" spacing.
        rescale_betas_zero_snr: whether to rescale the schedule with `zero_terminal_snr`. The last abar is
            then set to 2^-24, so that its noise level is finite.
        use_dynamic_shifting: not supported.
        time_shift_type: ignored; belongs to `use_dynamic_shifting`.

    Raises:
        ValueError: if a setting has a value that is not supported.

    Example:
        >>> pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
        >>> audio = pipe("A hammer hits a wooden surface", num_inference_steps=20).audios[0]
    """

    default_num_inference_steps = 20
    _step_index: int | None  # of the next step
    _begin_index: int | None
    _estimates: list[Tensor]  # m0 and m1 of the last step: estimates of x_0 or eps, the newest first
    _alternatives: list[int]  # where else the next step could be, if the run began at an ambiguous timestep

    @records_settings
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: Sequence[float] | Tensor | None = None,
        solver_order: int = 2,
        prediction_type: str = "epsilon",
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        sample_max_value: float = 1.0,
        algorithm_type: str = "dpmsolver++",
        solver_type: str = "midpoint",
        lower_order_final: bool = True,
        euler_at_final: bool = False,
        use_karras_sigmas: bool = False,
        use_exponential_sigmas: bool = False,
        use_beta_sigmas: bool = False,
        use_lu_lambdas: bool = False,
        use_flow_sigmas: bool = False,
        flow_shift: float = 1.0,
        final_sigmas_type: str = "zero",
        lambda_min_clipped: float = -math.inf,
        variance_type: str | None = None,
        timestep_spacing: str = "linspace",
        steps_offset: int = 0,
        rescale_betas_zero_snr: bool = False,
        use_dynamic_shifting: bool = False,
        time_shift_type: str = "exponential",
    ):
        # Configs of DEIS and UniPC have solver names of their own. diffusers replaces them in the same way.
        if algorithm_type == "deis":
            self.register_to_config(algorithm_type="dpmsolver++")
        if solver_type in ("logrho", "bh1", "bh2"):
            self.register_to_config(solver_type="midpoint")
        check_choice("algorithm_type", self.config.algorithm_type, ALGORITHMS)
        check_choice("solver_type", self.config.solver_type, ("midpoint", "heun"))
        check_choice("solver_order", solver_order, (1, 2, 3))
        check_choice("final_sigmas_type", final_sigmas_type, ("zero", "sigma_min"))
        for name in ("use_beta_sigmas", "use_flow_sigmas", "use_dynamic_shifting"):
            if self.config[name]:
                raise ValueError(f"{name} is not supported; leave it False")
        check_choice("variance_type", variance_type, (None, *FIXED_VARIANCES))
        if lambda_min_clipped != -math.inf:
            check_number("lambda_min_clipped", lambda_min_clipped)
        if use_karras_sigmas and use_exponential_sigmas:
            raise ValueError("use_karras_sigmas and use_exponential_sigmas cannot both be set; choose one")
        self._stochastic = self.config.algorithm_type.startswith("sde-")
        self._estimates_x0 = self.config.algorithm_type.endswith("++")
        if not self._estimates_x0 and final_sigmas_type == "zero":
            raise ValueError(
                f"algorithm_type {algorithm_type!r} cannot reach a noise level of 0; "
                "use final_sigmas_type 'sigma_min', or 'dpmsolver++'"
            )
        if algorithm_type == "sde-dpmsolver" and solver_order == 3:
            raise ValueError("algorithm_type 'sde-dpmsolver' has no solver_order 3; use 1 or 2")
        super().__init__()
        if rescale_betas_zero_snr:
            self.alphas_cumprod[-1] = 2**-24
        self.sigmas = torch.from_numpy(training_sigmas(self.alphas_cumprod))
        self._run: list[Step] = []
        self._begin_index = None
        self._restart(None)

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

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: torch.device | str | None = None,
        mu: float | None = None,
        timesteps: Sequence[int] | Tensor | None = None,
    ) -> None:
        """Choose the N noise levels of a sampling run and compute the updates of its steps.

        Sets `timesteps`, (N,) int64, and `sigmas`, (N + 1,) float32 on the CPU: the noise level before each
        step and after the last.

        Args:
            num_inference_steps: N, from 1 to T.
            device: where `timesteps` is placed; the CPU by default.
            mu: not supported; belongs to `use_dynamic_shifting`.
            timesteps: the timesteps themselves, falling, instead of N and `timestep_spacing`.

        Raises:
            ValueError: if N is not an integer from 1 to T, if the timesteps do not fall from at most T - 1 to
                at least 0, or are given although a setting spaces the noise levels, or if the run would visit
                a timestep that was not trained. The scheduler is then unchanged.
        """
        if mu is not None:
            raise ValueError("mu is not supported, since use_dynamic_shifting is not")
        if timesteps is None:
            check_count("num_inference_steps", num_inference_steps, 1, self.config.num_train_timesteps)
            number = int(num_inference_steps)  # type: ignore[arg-type] # it has been checked
            values, levels = sampling_sigmas(self.config, self.alphas_cumprod, number)
            self._check_timesteps(values)
        else:
            for name in ("use_karras_sigmas", "use_exponential_sigmas", "use_lu_lambdas"):
                if self.config[name]:
                    raise ValueError(f"timesteps cannot be given together with {name}, which chooses them")
            values = self._given_timesteps(timesteps, num_inference_steps)
            levels = training_sigmas(self.alphas_cumprod)[values].astype(np.float64)
        last = 0.0 if self.config.final_sigmas_type == "zero" else training_sigmas(self.alphas_cumprod)[0]
        sigmas = torch.from_numpy(np.append(levels, last).astype(np.float32))
        steps = self._plan(sigmas.tolist())

        self._set_timesteps(values, device)
        self._repeats = len(set(values)) < len(values)
        self.sigmas, self._run = sigmas, steps
        self._run_abar = (1 / (sigmas.double() ** 2 + 1)).float()  # (N + 1,); moves to where it is needed
        self._begin_index = None
        self._restart(None)

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        generator: Generators = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> SchedulerOutput:
        """One update, from x at noise level i to x at noise level i + 1.

        The steps of a run must follow each other, since each uses the estimates of those before. A timestep
        other than the next one starts a new run there, at order 1. float16 and bfloat16 inputs are computed
        in float32.

        Args:
            model_output: the network's output for (x, timestep), (B, C, ...).
            timestep: an element of `timesteps`, or its value; see `index_for_timestep`. A tensor from
                elsewhere is read, which waits for the accelerator.
            sample: x, (B, C, ...).
            generator: draws the noise of the stochastic algorithms, in float32; see `randn`.
            variance_noise: that noise itself, (B, C, ...); takes precedence over `generator`.
            return_dict: for compatibility with diffusers; the output is an object, a mapping and a tuple in
                either case.

        Returns:
            `prev_sample`, (B, C, ...).

        Raises:
            ValueError: before `set_timesteps`, if the tensors are not floating-point numbers of one shape, if
                `timestep` is not in the run, or, after `set_begin_index`, if it is not the next one or the
                run is over.
        """
        self._check_step(model_output, sample, variance_noise)
        index = self._next_index(timestep)
        now = self._run[index]
        dtype = torch.promote_types(sample.dtype, model_output.dtype)
        work = torch.promote_types(dtype, torch.float32)
        sample = sample.to(work)

        x0, eps = x0_and_eps(model_output.to(work), sample, now.alpha, now.sigma, self.config.prediction_type)
        if self.config.thresholding:
            x0 = dynamic_threshold(x0, self.config.dynamic_thresholding_ratio, self.config.sample_max_value)
            eps = (sample - now.alpha * x0) / now.sigma
        m0 = x0 if self._estimates_x0 else eps
        estimates = [m0, *self._estimates]
        order = min(len(estimates), len(now.updates))
        weights = now.updates[order - 1]

        x = weights.sample * sample + weights.m0 * m0
        if order >= 2:
            x = x + weights.m0_m1 * (estimates[0] - estimates[1])
        if order == 3:
            x = x + weights.m1_m2 * (estimates[1] - estimates[2])
        if self._stochastic:
            if variance_noise is None:
                variance_noise = randn(m0.shape, generator, m0.device, torch.float32)
            x = x + weights.noise * variance_noise.to(m0.device, work)

        self._estimates = estimates[: self.config.solver_order - 1]
        self._step_index = index + 1
        return SchedulerOutput(x.to(dtype))

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

    # ------------------------------------------------------------ the updates of a run

    def _plan(self, sigmas: list[float]) -> list[Step]:
        """The steps between consecutive noise levels."""
        config, number = self.config, len(sigmas) - 1
        # `rescale_betas_zero_snr` sets the last training step to a level below that of the step before it.
        falling = sigmas[1:] if config.rescale_betas_zero_snr else sigmas
        for before, after in itertools.pairwise(falling):
            if after > before * (1 + SMALLEST_STEP):
                raise ValueError(
                    f"the noise level must not rise during a run, but goes from {before:g} to {after:g}; "
                    "check sigma_min, sigma_max and final_sigmas_type"
                )
        short = config.lower_order_final and number < 15
        steps = []
        for i in range(number):
            order = min(config.solver_order, i + 1)
            if i == number - 1 and (short or config.euler_at_final or config.final_sigmas_type == "zero"):
                order = 1
            elif i == number - 2 and short:
                order = min(order, 2)
            while order > 1 and min(_gaps(sigmas[i - order + 1 : i + 1])) < SMALLEST_STEP:
                order -= 1  # two of the estimates are at the same noise level
            alpha = 1 / math.sqrt(sigmas[i] ** 2 + 1)
            updates = [self._update(sigmas, i, k) for k in range(1, order + 1)]
            steps.append(Step(alpha, sigmas[i] * alpha, updates))
        return steps

    def _update(self, sigmas: list[float], i: int, order: int) -> Update:
        """The update from noise level i to i + 1; the module docstring has the formulas."""
        *before, h = _gaps(sigmas[max(i - order + 1, 0) : i + 2])  # of the levels that this update uses
        if abs(h) < SMALLEST_STEP:
            return Update(sample=1.0, m0=0.0)
        alpha = 1 / math.sqrt(sigmas[i + 1] ** 2 + 1)
        sigma = sigmas[i + 1] * alpha
        noise = 0.0
        if self._estimates_x0:
            scale = alpha
            sample = sigma * math.sqrt(sigmas[i] ** 2 + 1) / sigmas[i]
            reach = h  # the h of the phis
            if self._stochastic:
                reach = 2 * h
                sample *= math.exp(-h)
                noise = sigma * math.sqrt(-math.expm1(-2 * h))
            phi1 = -math.expm1(-reach)
            phi2 = 1 - phi1 / reach
            phi3 = (-0.5 if self._stochastic else 0.5) - (reach - phi1) / reach**2
        else:  # these phis are the psis
            scale = -sigma
            sample = alpha * math.sqrt(sigmas[i] ** 2 + 1)
            phi1 = math.expm1(h)
            phi2 = phi1 / h - 1
            phi3 = (phi1 - h) / h**2 - 0.5
            if self._stochastic:
                scale *= 2
                noise = sigma * math.sqrt(math.expm1(2 * h))
        if order == 1:
            return Update(sample, scale * phi1, noise=noise)

        r0 = before[-1] / h
        if order == 2:
            weight = phi1 / 2 if self.config.solver_type == "midpoint" else phi2
            return Update(sample, scale * phi1, scale * weight / r0, noise=noise)

        r1 = before[-2] / h
        # D1 and D2, expanded in the differences m0 - m1 and m1 - m2
        slope = (phi2 * r0 + phi3) / (r0 + r1)
        return Update(sample, scale * phi1, scale * (phi2 + slope) / r0, -scale * slope / r1, noise)


def _gaps(sigmas: list[float]) -> list[float]:
    """The lengths in lambda of the steps between noise levels."""
    lambdas = [-math.log(sigma) if sigma > 0 else math.inf for sigma in sigmas]
    return [after - before for before, after in itertools.pairwise(lambdas)]
