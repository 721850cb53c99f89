"""DPM-Solver++: fewer steps than DDIM for the same quality (Lu et al. 2022, arXiv 2211.01095).

In: the network's output for (x_t, t), and x_t; both (B, C, ...). Out: x at the next, cleaner noise level.

Sampling is solving a differential equation from noise to sound. Write x_t = alpha_t x_0 + sigma_t eps with
alpha = sqrt(abar), sigma = sqrt(1 - abar), and let lambda = log(alpha / sigma), half the log signal-to-noise
ratio. In lambda the equation's linear part is solved exactly, and only the network's estimate of x_0 remains
under an integral (the paper's eq. 8). From noise level s to t, with h = lambda_t - lambda_s:

    x_t = sigma_t / sigma_s  x_s  +  sigma_t  integral from lambda_s to lambda_t of e^l x_0(l) dl

The estimate of x_0 is expanded in lambda around s, with derivatives taken from the estimates of earlier
steps. One term gives order 1 (which is DDIM), two give order 2 (algorithm 2, "2M"), three order 3. With m0,
m1, m2 the estimates at this step and the two before, h0, h1 the lambda lengths of the two steps before, r0 =
h0 / h and r1 = h1 / h:

    order 1    x_t = sigma_t / sigma_s x_s + alpha_t phi1 m0    phi1 = 1 - e^-h
    order 2    ... + alpha_t phi1 / 2 D1                       (solver_type midpoint)
               ... + alpha_t phi2 D1           (solver_type heun)    phi2 = 1 - phi1 / h
    order 3    ... + alpha_t phi2 D1 + alpha_t phi3 D2          phi3 = 1/2 - (h - phi1) / h^2
    where D1 = (m0 - m1) / r0 at order 2; at order 3, with d0 = (m0 - m1) / r0 and d1 = (m1 - m2) / r1,
    D1 = d0 + r0 (d0 - d1) / (r0 + r1)  and  D2 = (d0 - d1) / (r0 + r1).

`sde-dpmsolver++` solves the stochastic equation instead (the paper's appendix): the same with 2h for h inside
the phi's, the factor of x_s times e^-h, and fresh noise of standard deviation sigma_t sqrt(1 - e^-2h). At
order 3 diffusers has -1/2 where phi3 above has 1/2; here it is kept, so that the samples are the same.

`sigmas` in the code is the ratio sigma / alpha (the noise level of Karras et al. 2022), exp(-lambda).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from audioldm2.schedulers.noise_schedule import (
    Generators,
    NoiseSchedule,
    dynamic_threshold,
    mix_noise,
    one_of,
    randn,
    remembers_config,
    spaced_levels,
    timestep_of_level,
)

SAME_LEVEL = 1e-6  # a step in lambda shorter than float32 can resolve


class DPMSolverOutput(NamedTuple):
    """What a step returns: x at the next noise level, (B, C, ...)."""

    prev_sample: Tensor


@dataclass(frozen=True)
class Coefficients:
    """One update of one order, in float64: the next x is the sum of each weight times its tensor."""

    sample: float
    m0: float
    m0_m1: float = 0.0  # of the difference m0 - m1: differences lose less than their parts would
    m1_m2: float = 0.0
    noise: float = 0.0


class DPMSolverMultistepScheduler(NoiseSchedule):
    """The multistep DPM-Solver++ sampler. Settings (diffusers' names and defaults):

    num_train_timesteps: T. beta_start, beta_end, beta_schedule, trained_betas: the schedule, see
    `make_betas`. solver_order: 1 to 3; 2 is recommended with guidance. prediction_type: epsilon, sample or
    v_prediction. thresholding, dynamic_thresholding_ratio, sample_max_value: see `dynamic_threshold`.
    algorithm_type: dpmsolver++ (deterministic) or sde-dpmsolver++ (adds noise at each step). solver_type:
    midpoint or heun, the two forms of order 2. lower_order_final: with fewer than 15 steps, end with orders 2
    and 1. euler_at_final: always end with order 1. use_karras_sigmas, use_lu_lambdas, use_exponential_sigmas:
    how noise levels are spaced instead of by timestep. final_sigmas_type: end at no noise (`zero`) or at the
    least trained noise (`sigma_min`). lambda_min_clipped: start no noisier than this lambda; needed for
    `squaredcos_cap_v2`. timestep_spacing, steps_offset: as for DDIM, but leaving out timestep 0 in linspace
    and leading. rescale_betas_zero_snr: see `zero_terminal_snr`; the last abar becomes 2^-24 so that its
    noise level is finite.

    Not supported, and refused: use_beta_sigmas, use_flow_sigmas, use_dynamic_shifting, a learned
    variance_type, the algorithms without ++ and flow_prediction. flow_shift and time_shift_type only matter
    with those.

    Raises ValueError, naming the setting, for a value that is not supported.
    """

    default_num_inference_steps = 20
    _step_index: int | None
    _begin_index: int | None
    _history: list[Tensor]  # the estimates of x_0 of earlier steps, the newest first

    @remembers_config
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
        # A config of a sister sampler (DEIS, UniPC) names its own solver; diffusers reads those names so.
        if algorithm_type == "deis":
            self._register(algorithm_type="dpmsolver++")
        if solver_type in ("logrho", "bh1", "bh2"):
            self._register(solver_type="midpoint")
        one_of("algorithm_type", self.config.algorithm_type, ("dpmsolver++", "sde-dpmsolver++"))
        one_of("solver_type", self.config.solver_type, ("midpoint", "heun"))
        one_of("solver_order", solver_order, (1, 2, 3))
        one_of("final_sigmas_type", final_sigmas_type, ("zero", "sigma_min"))
        one_of("use_beta_sigmas", use_beta_sigmas, (False, None))
        one_of("use_flow_sigmas", use_flow_sigmas, (False, None))
        one_of("use_dynamic_shifting", use_dynamic_shifting, (False, None))
        if variance_type in ("learned", "learned_range"):
            raise ValueError(f"variance_type {variance_type!r} is not supported; use None (a fixed variance)")
        if use_karras_sigmas and use_exponential_sigmas:
            raise ValueError(
                "use_karras_sigmas and use_exponential_sigmas exclude each other; set one of them"
            )
        self._build_table()
        if rescale_betas_zero_snr:
            self.alphas_cumprod[-1] = 2**-24
        self._table = self.alphas_cumprod  # abar of every training step, for add_noise
        self.sigmas = ((1 - self.alphas_cumprod) / self.alphas_cumprod) ** 0.5
        self._walk_alphas = self.alphas_cumprod[:0]
        self._plan: list[list[Coefficients]] = []
        self.set_begin_index(None)
        self._restart(None)

    @property
    def step_index(self) -> int | None:
        """The index of the step that comes next; None before the first."""
        return self._step_index

    @property
    def begin_index(self) -> int | None:
        """Where the walk was told to begin; None to find it from the first timestep."""
        return self._begin_index

    def set_begin_index(self, begin_index: int | None = 0) -> None:
        """Begin the walk at this index of `timesteps` and then count, whatever timestep `step` is given."""
        self._begin_index = begin_index

    def set_timesteps(self, num_inference_steps: int, device: torch.device | str | None = None) -> None:
        """Choose the N noise levels of a walk, compute all coefficients, put `timesteps` on `device`.

        Sets `timesteps` (N,) int64 and `sigmas` (N + 1,) float32 on the CPU: the noise level before each step
        and after the last.

        Raises ValueError if N is not a whole number from 1 to T, if the walk leaves the training steps, or if
        it repeats a noise level where the solver's order needs two different ones.
        """
        self._check_num_inference_steps(num_inference_steps)
        timesteps, levels = self._spaced(num_inference_steps)
        last = 0.0 if self.config.final_sigmas_type == "zero" else float(self._training_sigmas()[0])
        sigmas = np.concatenate([levels, [last]]).astype(np.float32)
        plan = self._make_plan(sigmas.astype(np.float64).tolist())
        self._place_timesteps(timesteps.astype(np.int64).tolist(), device)
        self.sigmas, self._plan = torch.from_numpy(sigmas), plan
        self._table = self.alphas_cumprod.to(device or "cpu")
        self._walk_alphas = (
            (1 / (self.sigmas[:-1].double() ** 2 + 1)).float().to(device or "cpu")
        )  # abar, (N,)
        self.set_begin_index(None)
        self._restart(None)

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        generator: Generators = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> DPMSolverOutput | tuple[Tensor]:
        """One update: x at noise level i and the network's output, both (B, C, ...), to x at level i + 1.

        The steps of a walk follow each other, since each uses the estimates of those before. A timestep that
        is not the next one starts a new walk there, at order 1. float16 and bfloat16 are computed in float32.

        Args:
            timestep: an element of `timesteps`, or its value (a tensor's value is read).
            generator: draws the noise of `sde-dpmsolver++`, in float32; see `randn`.
            variance_noise: that noise itself; it wins over `generator`.
            return_dict: False for a plain tuple.

        Raises ValueError before `set_timesteps`, for a timestep that the walk does not visit and, where
        `set_begin_index` set it counting, after its last step.
        """
        index = self._next_index(timestep)
        dtype = torch.promote_types(sample.dtype, model_output.dtype)
        work = torch.promote_types(dtype, torch.float32)
        sample = sample.to(work)

        m0 = self._estimate_x0(model_output.to(work), sample, index)
        history = [m0, *self._history]  # the newest first
        order = min(len(history), len(self._plan[index]))
        weights = self._plan[index][order - 1]

        prev_sample = weights.sample * sample + weights.m0 * m0
        if order >= 2:
            prev_sample = prev_sample + weights.m0_m1 * (history[0] - history[1])
        if order == 3:
            prev_sample = prev_sample + weights.m1_m2 * (history[1] - history[2])
        if self.config.algorithm_type == "sde-dpmsolver++":
            if variance_noise is None:
                variance_noise = randn(m0.shape, generator, m0.device, torch.float32)
            prev_sample = prev_sample + weights.noise * variance_noise.to(m0.device, work)

        self._history = history[: self.config.solver_order - 1]
        self._step_index = index + 1
        output = DPMSolverOutput(prev_sample.to(dtype))
        return output if return_dict else (output.prev_sample,)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor | int) -> Tensor:
        """x_t = alpha_t x_0 + sigma_t noise, (B, ...) -> (B, ...); `timesteps` (B,) or one for all.

        A timestep of the walk means the walk's noise level there (of a timestep that occurs twice, the
        second, where a walk that starts in the middle begins); any other, its noise level in training. After
        `set_begin_index` the level is that of the step that comes next.
        """
        device = original_samples.device
        steps = self._training_timesteps(timesteps, device)
        self._table = self._table.to(device)  # stays there: moved once, not at every call
        if self.num_inference_steps is None:
            return mix_noise(original_samples, noise, self._table[steps])
        self._walk_alphas = self._walk_alphas.to(device)
        if self._begin_index is not None:
            index = self._begin_index if self._step_index is None else self._step_index
            return mix_noise(original_samples, noise, self._walk_alphas[index].expand(len(steps)))
        same = steps[:, None] == self.timesteps.to(device)  # (B, N)
        wanted = same.sum(1, keepdim=True).clamp(max=2)  # the second of several, the only one, or none
        found = (same & (same.cumsum(1) == wanted)).to(torch.int64)  # (B, N), at most a single one a row
        alphas = torch.where(found.any(1), self._walk_alphas[found.argmax(1)], self._table[steps])
        return mix_noise(original_samples, noise, alphas)

    # ------------------------------------------------------------ where a step is

    def _restart(self, index: int | None) -> None:
        self._step_index = index
        self._history = []

    def _next_index(self, timestep: int | Tensor) -> int:
        self._require_timesteps()
        if self._begin_index is not None:
            counted = self._begin_index if self._step_index is None else self._step_index
            if not 0 <= counted < len(self._values):
                raise ValueError(
                    f"there is no step {counted} of {len(self._values)}: call set_timesteps() to walk again"
                )
            return counted
        index, value = self._locate(timestep)
        upcoming = self._step_index
        if upcoming is not None and (
            index == upcoming or (index is None and [value] == self._values[upcoming:][:1])
        ):
            return upcoming
        if index is None:
            places = [i for i, one in enumerate(self._values) if one == value]
            if not places:
                raise ValueError(f"timestep {value} is not one of this walk's; give an element of timesteps")
            # Of a value that occurs twice the second is meant, unless it is the very beginning: a walk that
            # starts in the middle would otherwise repeat a step.
            index = places[0] if places[0] == 0 else places[:2][-1]
        self._restart(index)
        return index

    def _estimate_x0(self, model_output: Tensor, sample: Tensor, index: int) -> Tensor:
        alpha, sigma = self._signal_and_noise[index]
        if self.config.prediction_type == "epsilon":
            x0 = (sample - sigma * model_output) / alpha
        elif self.config.prediction_type == "sample":
            x0 = model_output
        else:
            x0 = alpha * sample - sigma * model_output
        if self.config.thresholding:
            x0 = dynamic_threshold(x0, self.config.dynamic_thresholding_ratio, self.config.sample_max_value)
        return x0

    # ------------------------------------------------------------ the noise levels of a walk

    def _training_sigmas(self) -> np.ndarray:
        sigmas = ((1 - self.alphas_cumprod) / self.alphas_cumprod) ** 0.5
        return sigmas.numpy()  # (T,) float32, rising

    def _spaced(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """The timesteps (N,) and noise levels (N,) of a walk, in numpy to round as diffusers does."""
        config = self.config
        training = self._training_sigmas()
        logs = np.log(training)
        if config.use_karras_sigmas or config.use_exponential_sigmas or config.use_lu_lambdas:
            levels = spaced_levels(config, number, training)
            timesteps = np.array([timestep_of_level(level, logs) for level in levels])
            rounded = not config.use_exponential_sigmas and config.beta_schedule != "squaredcos_cap_v2"
            return (timesteps.round() if rounded else timesteps), levels

        total = config.num_train_timesteps
        lambdas = self.alphas_cumprod.sqrt().log() - (1 - self.alphas_cumprod).sqrt().log()
        last = total - int(torch.searchsorted(lambdas.flip(0), config.lambda_min_clipped))
        if config.timestep_spacing == "linspace":
            timesteps = np.linspace(0, last - 1, number + 1).round()[::-1][:-1]
        elif config.timestep_spacing == "leading":
            timesteps = (np.arange(number + 1) * (last // (number + 1)))[::-1][:-1] + config.steps_offset
        else:
            timesteps = np.arange(last, 0, -total / number).round() - 1
            timesteps = timesteps[timesteps >= 0]  # the last may round to -1, which was never trained
        return timesteps, np.interp(timesteps, np.arange(total), training)

    # ------------------------------------------------------------ the coefficients of a walk

    def _make_plan(self, sigmas: list[float]) -> list[list[Coefficients]]:
        """For each step its coefficients at order 1 and up, as far as the order may go there."""
        config, number = self.config, len(sigmas) - 1
        for before, after in itertools.pairwise(sigmas):
            if after > before * (1 + SAME_LEVEL):
                raise ValueError(f"the noise must not rise on the way, but goes from {before:g} to {after:g}")
        self._signal_and_noise = [
            (1 / math.sqrt(sigma**2 + 1), sigma / math.sqrt(sigma**2 + 1)) for sigma in sigmas[:-1]
        ]
        lambdas = [-math.log(sigma) if sigma > 0 else math.inf for sigma in sigmas]
        few = config.lower_order_final and number < 15
        plan = []
        for i in range(number):
            highest = min(config.solver_order, i + 1)
            if i == number - 1 and (few or config.euler_at_final or config.final_sigmas_type == "zero"):
                highest = 1
            elif i == number - 2 and few:
                highest = min(highest, 2)
            plan.append([self._coefficients(sigmas, lambdas, i, order) for order in range(1, highest + 1)])
        return plan

    def _coefficients(self, sigmas: list[float], lambdas: list[float], i: int, order: int) -> Coefficients:
        """The update from noise level i to i + 1 at this order; the module docstring has the formulas."""
        h = lambdas[i + 1] - lambdas[i]
        if abs(h) < SAME_LEVEL:  # the level stays, so does x; the formulas would divide by h
            return Coefficients(sample=1.0, m0=0.0)
        alpha = 1 / math.sqrt(sigmas[i + 1] ** 2 + 1)
        sigma = sigmas[i + 1] * alpha
        sample = sigma * math.sqrt(sigmas[i] ** 2 + 1) / sigmas[i]
        noise = 0.0
        reach = h  # the length that the phi's see
        stochastic = self.config.algorithm_type == "sde-dpmsolver++"
        if stochastic:
            reach = 2 * h
            sample *= math.exp(-h)
            noise = sigma * math.sqrt(-math.expm1(-2 * h))
        phi1 = -math.expm1(-reach)
        if order == 1:
            return Coefficients(sample, alpha * phi1, noise=noise)

        steps_before = [lambdas[i - k] - lambdas[i - k - 1] for k in range(order - 1)]
        if min(steps_before) < SAME_LEVEL:
            raise ValueError(
                f"{len(sigmas) - 1} steps visit the noise level {sigmas[i]:g} twice, where solver_order "
                f"{self.config.solver_order} needs different ones; take fewer steps or solver_order 1"
            )
        phi2 = 1 - phi1 / reach
        r0 = steps_before[0] / h
        if order == 2:
            weight = phi1 / 2 if self.config.solver_type == "midpoint" else phi2
            return Coefficients(sample, alpha * phi1, alpha * weight / r0, noise=noise)

        r1 = steps_before[1] / h
        phi3 = (-0.5 if stochastic else 0.5) - (reach - phi1) / reach**2
        # D1 and D2 written out in the differences m0 - m1 and m1 - m2
        slope = (phi2 * r0 + phi3) / (r0 + r1)
        return Coefficients(sample, alpha * phi1, alpha * (phi2 + slope) / r0, -alpha * slope / r1, noise)
