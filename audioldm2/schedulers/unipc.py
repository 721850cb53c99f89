"""UniPC, a predictor and a corrector for few steps (Zhao et al. 2023, arXiv 2302.04867).

In: the network's output for (x_t, t), and x_t; both (B, C, ...). Out: x at the next, cleaner noise level.

Like DPM-Solver++ (see dpm_solver.py), it expands the network's estimate of x_0 in
lambda = log(alpha / sigma). The step from noise level s to t, of length h = lambda_t - lambda_s, uses the
estimate m0 at s and those of the p - 1 steps before: m_k, at r_k h from s, so that r_k is negative. With
D_k = m_k - m0 and z = -h:

    predictor   x_t = sigma_t / sigma_s x_s - alpha_t (e^z - 1) m0 - alpha_t sum_{k < p} a_k / r_k D_k

At t the network is called in any case, for the next step. Its estimate there, m_p at r_p = 1, is one more
point of the expansion, and with it the corrector computes x_t once more, at no further call:

    corrector   x_t = sigma_t / sigma_s x_s - alpha_t (e^z - 1) m0 - alpha_t sum_{k <= p} c_k / r_k D_k

This raises the order from p to p + 1. The coefficients make both exact for estimates that are polynomials in
lambda (the paper's eq. 5), with phi_0(z) = e^z and phi_{j+1}(z) = (phi_j(z) - 1 / j!) / z:

    sum_k r_k^{j-1} a_k = j! z phi_{j+1}(z)        j = 1 .. p - 1 for a, 1 .. p for c

Where there is one coefficient to find, of the predictor at p = 2 and of the corrector at p = 1, the paper
takes B(h) / 2 instead of that solution, with B(h) = z (`solver_type` "bh1") or e^z - 1 ("bh2"). With "bh2"
the predictor of order 2 is DPM-Solver++ 2M.

With `predict_x0=False` the estimates are those of eps, z = h, sigma_t stands before the sums and
alpha_t / alpha_s before x_s.

A step first corrects the given x, then predicts from it. The terms of x_s and m0 are the same in both, so the
correction is

    x_t + alpha_t (sum_{k < p} (a_k - c_k) / r_k D_k - c_p (m_p - m0))

which needs no earlier x, and keeps what was done to x between the steps, as inpainting does.

Difference from diffusers, which returns NaN here: the step to a noise level of 0 always has order 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from audioldm2.arguments import as_integer, check_choice, check_count
from audioldm2.quoting import quoted
from audioldm2.schedulers.config import records_settings
from audioldm2.schedulers.multistep import SMALLEST_STEP, MultistepScheduler, lambdas_of
from audioldm2.schedulers.noise_schedule import check_limits, training_sigmas
from audioldm2.schedulers.output import SchedulerOutput

MAX_ORDER = 6  # higher orders amplify the errors of the estimates


@dataclass(frozen=True)
class Update:
    """The weights, in float64, of one step's predictor, and of the correction of its result.

    Attributes:
        sample: of x.
        m0: of the estimate m0.
        earlier: of m_k - m0, k = 1 .. p - 1, in the predictor.
        correction: of m_k - m0, k = 1 .. p - 1, and of m_p - m0, in the correction; None without one.
    """

    sample: float
    m0: float
    earlier: tuple[float, ...] = ()
    correction: tuple[float, ...] | None = None


class UniPCMultistepScheduler(MultistepScheduler[Update]):
    """The UniPC sampler, for 5 to 20 steps.

    Args:
        num_train_timesteps: T, the number of training steps.
        beta_start: the first beta; see `make_betas`.
        beta_end: the last beta.
        beta_schedule: "linear", "scaled_linear" or "squaredcos_cap_v2".
        trained_betas: the betas themselves, (T,), instead of the three settings above.
        solver_order: p, from 1 to 6; the corrector raises the order to p + 1. 2 is recommended with guidance.
        prediction_type: "epsilon", "sample" or "v_prediction": what the network was trained to predict.
        thresholding: whether to use `dynamic_threshold` on the estimate of x_0; needs `predict_x0`.
        dynamic_thresholding_ratio: its quantile.
        sample_max_value: the upper limit of its threshold.
        predict_x0: whether to expand the estimate of x_0; otherwise that of eps, which is less stable with
            guidance and needs `final_sigmas_type` "sigma_min".
        solver_type: "bh1" or "bh2", the paper's two forms of B(h).
        lower_order_final: whether the last steps have the orders p - 1, ..., 2, 1.
        disable_corrector: indices of the steps whose result is not corrected. The paper's authors leave out
            the correction of the first steps where guidance is strong.
        solver_p: not supported: another scheduler as the predictor.
        use_karras_sigmas: whether to space the noise levels by `karras_sigmas` instead of by timestep.
        use_exponential_sigmas: whether to space them evenly in log sigma.
        use_beta_sigmas: not supported.
        use_flow_sigmas: not supported.
        flow_shift: ignored; belongs to `use_flow_sigmas`.
        timestep_spacing: "linspace", "leading" or "trailing"; the first two omit timestep 0.
        steps_offset: added to the timesteps of "leading" spacing.
        final_sigmas_type: "zero" to end without noise, or "sigma_min" to end at the lowest noise level.
        rescale_betas_zero_snr: whether to rescale the schedule with `zero_terminal_snr`. The last abar is
            then set to 2^-24, so that its noise level is finite.
        use_dynamic_shifting: not supported.
        time_shift_type: ignored; belongs to `use_dynamic_shifting`.
        sigma_min: the lowest of spaced noise levels; by default that of training.
        sigma_max: the highest of spaced noise levels; by default that of training.
        shift_terminal: not supported; belongs to `use_flow_sigmas`.

    Raises:
        ValueError: if a setting has a value that is not supported.

    Example:
        >>> pipe.scheduler = UniPCMultistepScheduler.from_config(pipe.scheduler.config)
        >>> audio = pipe("A hammer hits a wooden surface", num_inference_steps=8).audios[0]
    """

    default_num_inference_steps = 20
    spacings = ("use_karras_sigmas", "use_exponential_sigmas")
    _correction: tuple[float, ...] | None  # the weights of the correction of the last step's result

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
        predict_x0: bool = True,
        solver_type: str = "bh2",
        lower_order_final: bool = True,
        disable_corrector: Sequence[int] = [],  # diffusers' default; it is copied
        solver_p: object = None,
        use_karras_sigmas: bool = False,
        use_exponential_sigmas: bool = False,
        use_beta_sigmas: bool = False,
        use_flow_sigmas: bool = False,
        flow_shift: float = 1.0,
        timestep_spacing: str = "linspace",
        steps_offset: int = 0,
        final_sigmas_type: str = "zero",
        rescale_betas_zero_snr: bool = False,
        use_dynamic_shifting: bool = False,
        time_shift_type: str = "exponential",
        sigma_min: float | None = None,
        sigma_max: float | None = None,
        shift_terminal: float | None = None,
    ):
        if solver_type in ("midpoint", "heun", "logrho"):  # of DPM-Solver++ and DEIS, as in diffusers
            self.register_to_config(solver_type="bh2")
        check_choice("solver_type", self.config.solver_type, ("bh1", "bh2"))
        check_count("solver_order", solver_order, lowest=1, highest=MAX_ORDER)
        for name in ("solver_p", "shift_terminal"):
            if self.config[name] is not None:
                raise ValueError(f"{name} is not supported; leave it None")
        check_limits(sigma_min, sigma_max)
        if not predict_x0 and final_sigmas_type == "zero":
            raise ValueError(
                "predict_x0=False cannot reach a noise level of 0; use final_sigmas_type 'sigma_min', or "
                "predict_x0=True"
            )
        if not predict_x0 and thresholding:
            raise ValueError("thresholding needs predict_x0=True, since it changes the estimate of x_0")
        self._uncorrected = _indices("disable_corrector", disable_corrector)
        self.register_to_config(disable_corrector=self._uncorrected)
        super().__init__()
        self._correction = None

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: torch.device | str | None = None,
        sigmas: Sequence[float] | None = None,
        mu: float | None = None,
        timesteps: Sequence[int] | Tensor | None = None,
    ) -> None:
        """Choose the N noise levels of a sampling run and compute the weights of its steps.

        Sets `timesteps`, (N,) int64, and `sigmas`, (N + 1,) float32 on the CPU: the noise level before each
        step and after the last.

        Args:
            num_inference_steps: N, from 1 to T.
            device: where `timesteps` is placed; the CPU by default.
            sigmas: not supported; belongs to `use_flow_sigmas`.
            mu: not supported; belongs to `use_dynamic_shifting`.
            timesteps: decreasing timesteps to use instead of N and `timestep_spacing`. diffusers has
                no such argument here.

        Raises:
            ValueError: if N is not an integer from 1 to T, if the timesteps do not decrease from
                at most T - 1 to at least 0, or are given although a setting spaces the noise levels, or if
                the run would visit a timestep that was not trained. The scheduler is then unchanged.
        """
        if sigmas is not None:
            raise ValueError("sigmas is not supported, since use_flow_sigmas is not; pass timesteps")
        if mu is not None:
            raise ValueError("mu is not supported, since use_dynamic_shifting is not")
        config = self.config
        values, levels = self._levels(num_inference_steps, timesteps, rounded=config.use_karras_sigmas)
        last = 0.0
        if config.final_sigmas_type == "sigma_min":
            spaced = any(config[name] for name in self.spacings)
            last = float(levels[-1] if spaced else training_sigmas(self.alphas_cumprod)[0])
        self._begin_run(values, levels, last, device)

    def step(
        self, model_output: Tensor, timestep: int | Tensor, sample: Tensor, return_dict: bool = True
    ) -> SchedulerOutput:
        """Correct x at noise level i, and predict x at noise level i + 1 from it.

        The steps of a run must follow each other, since each uses the estimates of those before. A timestep
        other than the next one starts a new run there, at order 1 and without a correction. float16 and
        bfloat16 inputs are computed in float32.

        Args:
            model_output: the network's output for (x, timestep), (B, C, ...).
            timestep: an element of `timesteps`, or its value; see `index_for_timestep`. A tensor from
                elsewhere is read, which waits for the accelerator.
            sample: x, as the step before returned it, (B, C, ...).
            return_dict: for compatibility with diffusers; the output is an object, a mapping and a tuple in
                either case.

        Returns:
            `prev_sample`, (B, C, ...).

        Raises:
            ValueError: before `set_timesteps`, if the tensors are not floating-point numbers of one shape, if
                `timestep` is not in the run, or, after `set_begin_index`, if it is not the next one or the
                run is over.
        """
        self._check_step(model_output, sample, None)
        index = self._next_index(timestep)
        now = self._run[index]
        dtype = torch.promote_types(sample.dtype, model_output.dtype)
        work = torch.promote_types(dtype, torch.float32)
        x = sample.to(work)

        m0 = self._estimate(model_output.to(work), x, now, of_x0=self.config.predict_x0)

        if self._estimates and self._correction is not None:
            before, *earlier = self._estimates
            others = [*earlier[: len(self._correction) - 1], m0]
            for weight, estimate in zip(self._correction, others, strict=True):
                x = x + weight * (estimate - before)

        order = min(len(self._estimates) + 1, len(now.updates))
        weights = now.updates[order - 1]
        earlier = self._estimates[: len(weights.earlier)]  # none if the step has no length
        result = weights.sample * x + weights.m0 * m0
        for weight, estimate in zip(weights.earlier, earlier, strict=True):
            result = result + weight * (estimate - m0)

        self._correction = None if index in self._uncorrected else weights.correction
        self._estimates = [m0, *self._estimates][: self.config.solver_order]
        self._step_index = index + 1
        return SchedulerOutput(result.to(dtype))

    # ------------------------------------------------------------ the weights of a run

    def _order(self, i: int, number: int) -> int:
        if i == number - 1 and self.config.final_sigmas_type == "zero":
            return 1
        order = int(self.config.solver_order)
        return min(order, number - i) if self.config.lower_order_final else order

    def _update(self, sigmas: list[float], i: int, order: int) -> Update:
        """The update from noise level i to i + 1; the module docstring has the formulas."""
        p = order
        *before, now, after = lambdas_of(sigmas[i - p + 1 : i + 2])
        h = after - now
        if abs(h) < SMALLEST_STEP:
            return Update(sample=1.0, m0=0.0)
        alpha = 1 / math.sqrt(sigmas[i + 1] ** 2 + 1)
        sigma = sigmas[i + 1] * alpha
        if self.config.predict_x0:
            z, scale, sample = -h, -alpha, sigma * math.sqrt(sigmas[i] ** 2 + 1) / sigmas[i]
        else:
            z, scale, sample = h, -sigma, alpha * math.sqrt(sigmas[i] ** 2 + 1)
        if math.isinf(h):
            return Update(sample, scale * math.expm1(z))

        half = (z if self.config.solver_type == "bh1" else math.expm1(z)) / 2
        r = np.array([*((earlier - now) / h for earlier in reversed(before)), 1.0])  # (p,)
        powers = r ** np.arange(p)[:, None]  # row j - 1 has r_k^{j-1}
        right = np.array([math.factorial(j) * _remainder(j, z) for j in range(1, p + 1)])
        a = np.full(1, half) if p == 2 else np.linalg.solve(powers[:-1, :-1], right[:-1])  # (p - 1,)
        c = np.full(1, half) if p == 1 else np.linalg.solve(powers, right)  # (p,)
        predictor = scale * a / r[:-1]
        correction = scale * c / r - np.append(predictor, 0.0)
        return Update(sample, scale * math.expm1(z), tuple(predictor.tolist()), tuple(correction.tolist()))


def _remainder(j: int, z: float) -> float:
    """z phi_{j+1}(z) = phi_j(z) - 1 / j!, without the cancellation that this difference has near z = 0."""
    if abs(z) < 1:
        return sum(z**n / math.factorial(j + n) for n in range(1, 20))
    value = math.expm1(z)  # phi_0(z) - 1
    for k in range(1, j + 1):
        value = value / z - 1 / math.factorial(k)
    return value


def _indices(name: str, value: Sequence[int]) -> list[int]:
    """A setting that lists indices of steps, as integers."""
    listed = value.tolist() if hasattr(value, "tolist") else value
    indices = [as_integer(one) for one in listed] if isinstance(listed, list | tuple) else [None]
    if any(index is None or index < 0 for index in indices):
        raise ValueError(f"{name} must be a list of indices of steps, from 0, got {quoted(value)}")
    return [index for index in indices if index is not None]
