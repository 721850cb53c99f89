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

Difference from the paper: at order 3 of the stochastic equation diffusers has -1/2 where phi3 above has 1/2;
this is kept, so that the samples are the same.

The attribute `sigmas` holds the ratios sigma / alpha = exp(-lambda), the noise levels of Karras et al. 2022.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from audioldm2.arguments import check_choice, check_number
from audioldm2.noise import Generators, randn
from audioldm2.schedulers.config import records_settings
from audioldm2.schedulers.multistep import SMALLEST_STEP, MultistepScheduler, lambda_steps
from audioldm2.schedulers.noise_schedule import training_sigmas
from audioldm2.schedulers.output import SchedulerOutput

ALGORITHMS = ("dpmsolver++", "sde-dpmsolver++", "dpmsolver", "sde-dpmsolver")
FIXED_VARIANCES = ("fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log")  # without effect


@dataclass(frozen=True)
class Update:
    """The weights, in float64, of the tensors whose sum is the next x."""

    sample: float
    m0: float
    m0_m1: float = 0.0  # weight of the difference m0 - m1, which loses less precision than its parts
    m1_m2: float = 0.0
    noise: float = 0.0


class DPMSolverMultistepScheduler(MultistepScheduler[Update]):
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
    spacings = ("use_karras_sigmas", "use_exponential_sigmas", "use_lu_lambdas")

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
        check_choice("variance_type", variance_type, (None, *FIXED_VARIANCES))
        if lambda_min_clipped != -math.inf:
            check_number("lambda_min_clipped", lambda_min_clipped)
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
            timesteps: decreasing timesteps to use instead of N and `timestep_spacing`.

        Raises:
            ValueError: if N is not an integer from 1 to T, if the timesteps do not decrease from
                at most T - 1 to at least 0, or are given although a setting spaces the noise levels, or if
                the run would visit a timestep that was not trained. The scheduler is then unchanged.
        """
        if mu is not None:
            raise ValueError("mu is not supported, since use_dynamic_shifting is not")
        config = self.config
        values, levels = self._levels(
            num_inference_steps,
            timesteps,
            rounded=not config.use_exponential_sigmas and config.beta_schedule != "squaredcos_cap_v2",
            lu_lambdas=config.use_lu_lambdas,
            lambda_min=config.lambda_min_clipped,
        )
        last = 0.0 if config.final_sigmas_type == "zero" else training_sigmas(self.alphas_cumprod)[0]
        self._begin_run(values, levels, float(last), device)

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

        m0 = self._estimate(model_output.to(work), sample, now, of_x0=self._estimates_x0)
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

    # ------------------------------------------------------------ the updates of a run

    def _order(self, i: int, number: int) -> int:
        config = self.config
        short = config.lower_order_final and number < 15
        if i == number - 1 and (short or config.euler_at_final or config.final_sigmas_type == "zero"):
            return 1
        if i == number - 2 and short:
            return min(int(config.solver_order), 2)
        return int(config.solver_order)

    def _update(self, sigmas: list[float], i: int, order: int) -> Update:
        """The update from noise level i to i + 1; the module docstring has the formulas."""
        *before, h = lambda_steps(
            sigmas[max(i - order + 1, 0) : i + 2]
        )  # of the levels that this update uses
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
