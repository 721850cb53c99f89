"""DDIM, the sampler AudioLDM 2 was published with (Song et al. 2021, "Denoising diffusion implicit models").

In: the network's output for (x_t, t), and x_t; both (B, C, ...). Out: x_{t'} at an earlier timestep t', same
shape.

The network's output gives an estimate of the clean sample x_0 and of the noise eps in x_t (prediction.py). A
step goes back to x_0 and adds the noise again, but less of it (eq. 12 of the paper; abar is `alphas_cumprod`,
the paper's alpha):

    x_{t'} = sqrt(abar_t') x_0  +  sqrt(1 - abar_t' - sigma^2) eps  +  sigma z,       z ~ N(0, 1)
    sigma  = eta sqrt((1 - abar_t') / (1 - abar_t)) sqrt(1 - abar_t / abar_t')        (eq. 16)

With eta = 0 a step is deterministic (DDIM); with eta = 1 it is the ancestral sampling of DDPM.

The earlier timestep is t' = t - T // N for every spacing, even where the gaps in `timesteps` differ from
that, as in diffusers. In a run of given timesteps it is the next of them. If t' is below 0 or there is no
next one, abar_t' is 1 (`set_alpha_to_one`) or abar_0.

A step depends on nothing but t, so steps can be taken at any t in any order (in a run of given timesteps, at
any of these).

Difference from diffusers: with `trailing` spacing and some N (61, 103, ...) diffusers takes one step too
many, at timestep -1. That step is omitted here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from audioldm2.arguments import check_number
from audioldm2.noise import Generators, randn
from audioldm2.schedulers.base import Scheduler
from audioldm2.schedulers.config import records_settings
from audioldm2.schedulers.output import SchedulerOutput
from audioldm2.schedulers.prediction import dynamic_threshold, x0_and_eps


class DDIMOutput(SchedulerOutput):
    """What a step returns: x_{t'} and the estimate of x_0 it used (after clipping), both (B, C, ...)."""

    names: ClassVar[tuple[str, ...]] = ("prev_sample", "pred_original_sample")

    @property
    def pred_original_sample(self) -> Tensor:
        """The estimate of x_0, (B, C, ...)."""
        tensor: Tensor = self[1]
        return tensor


@dataclass(frozen=True)
class Coefficients:
    """The scalars of one step from t to t', computed in float64."""

    alpha: float  # sqrt(abar_t)
    sigma: float  # sqrt(1 - abar_t)
    abar_prev: float  # abar_t'
    noise: float  # eq. 16 with eta = 1


class DDIMScheduler(Scheduler):
    """The DDIM sampler, deterministic by default; AudioLDM 2 was published with 200 steps of it.

    Args:
        num_train_timesteps: T, the number of training steps.
        beta_start: the first beta; see `make_betas`.
        beta_end: the last beta.
        beta_schedule: "linear", "scaled_linear" or "squaredcos_cap_v2".
        trained_betas: the betas themselves, (T,), instead of the three settings above.
        clip_sample: whether to clip the estimate of x_0 to [-clip_sample_range, clip_sample_range].
        set_alpha_to_one: whether the last step ends at abar = 1 (no noise) instead of at abar_0.
        steps_offset: added to the timesteps of "leading" spacing.
        prediction_type: "epsilon", "sample" or "v_prediction": what the network was trained to predict.
        thresholding: whether to use `dynamic_threshold` on the estimate of x_0, instead of clipping.
        dynamic_thresholding_ratio: its quantile.
        clip_sample_range: see `clip_sample`.
        sample_max_value: the upper limit of the threshold in `dynamic_threshold`.
        timestep_spacing: "leading", "linspace" or "trailing"; see `spaced_timesteps`.
        rescale_betas_zero_snr: whether to rescale the schedule with `zero_terminal_snr`. With "epsilon" a run
            must then not visit the last training step, since pure noise implies nothing about x_0.

    Raises:
        ValueError: if a setting has a value that is not supported.

    Example:
        >>> scheduler = DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.0015, beta_end=0.0195)
        >>> scheduler.set_timesteps(200)
        >>> x = torch.randn(1, 8, 256, 16)
        >>> for t in scheduler.timesteps:
        ...     x = scheduler.step(network(x, t), t, x).prev_sample
    """

    default_num_inference_steps = 200

    @records_settings
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: Sequence[float] | Tensor | None = None,
        clip_sample: bool = True,
        set_alpha_to_one: bool = True,
        steps_offset: int = 0,
        prediction_type: str = "epsilon",
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        clip_sample_range: float = 1.0,
        sample_max_value: float = 1.0,
        timestep_spacing: str = "leading",
        rescale_betas_zero_snr: bool = False,
    ):
        super().__init__()
        # abar after the last step, where there is no earlier timestep.
        self.final_alpha_cumprod = torch.tensor(1.0) if set_alpha_to_one else self.alphas_cumprod[0]
        self._abars: list[float] = []
        self._final_abar = 1.0
        self._stride: int | None = None
        self._run: list[Coefficients] = []

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: torch.device | str | None = None,
        timesteps: Sequence[int] | Tensor | None = None,
    ) -> None:
        """Choose the N timesteps of a sampling run and compute the coefficients of its steps.

        Args:
            num_inference_steps: N, from 1 to T.
            device: where `timesteps` is placed; the CPU by default.
            timesteps: decreasing timesteps to use instead of N and `timestep_spacing`. Each step then goes to
                the next of them.

        Raises:
            ValueError: if N is not an integer from 1 to T, if the timesteps do not decrease from
                at most T - 1 to at least 0, or if the run would visit a timestep that was not trained or that
                `prediction_type` cannot start from. The scheduler is then unchanged.
        """
        if timesteps is None:
            steps = self._spaced_timesteps(num_inference_steps)  # type: ignore[arg-type] # which checks it
            stride = self.config.num_train_timesteps // int(num_inference_steps)  # type: ignore[arg-type]
            following = [t - stride for t in steps]
        else:
            steps, stride = self._given_timesteps(timesteps, num_inference_steps), None
            following = [*steps[1:], -1]
        abars, final = self.alphas_cumprod.double().tolist(), float(self.final_alpha_cumprod)
        coefficients = [
            self._coefficients(t, abars[t], abars[after] if after >= 0 else final)
            for t, after in zip(steps, following, strict=True)
        ]
        self._set_timesteps(steps, device)
        self._abars, self._final_abar, self._stride, self._run = abars, final, stride, coefficients

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        eta: float = 0.0,
        use_clipped_model_output: bool = False,
        generator: Generators = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> DDIMOutput:
        """One step of eq. 12, from x_t to x_{t'}.

        Args:
            model_output: the network's output for (x_t, t), (B, C, ...).
            timestep: t, an element of `timesteps` or any training step. A tensor from elsewhere is read,
                which waits for the accelerator.
            sample: x_t, (B, C, ...).
            eta: from 0 (deterministic) to 1 (as in DDPM).
            use_clipped_model_output: whether to derive eps again from the clipped x_0, so that both agree
                with x_t.
            generator: draws z; see `randn`.
            variance_noise: z itself, (B, C, ...), instead of `generator`.
            return_dict: for compatibility with diffusers; the output is an object, a mapping and a tuple in
                either case.

        Returns:
            `prev_sample`, x_{t'}, and `pred_original_sample`, the estimate of x_0; both (B, C, ...).

        Raises:
            ValueError: before `set_timesteps`, if `timestep` is not a training step, if the tensors are not
                floating-point numbers of one shape, if `eta` is outside [0, 1], or if both `generator` and
                `variance_noise` are given.
        """
        self._check_step(model_output, sample, variance_noise)
        check_number("eta", eta)
        if not 0 <= eta <= 1:
            raise ValueError(f"eta must lie in [0, 1], got {eta}")
        if variance_noise is not None and generator is not None and eta > 0:
            raise ValueError("pass either generator or variance_noise, not both")
        now = self._coefficients_of(timestep)
        dtype = torch.promote_types(sample.dtype, model_output.dtype)
        work = torch.promote_types(dtype, torch.float32)
        sample, output = sample.to(work), model_output.to(work)

        x0, eps = x0_and_eps(output, sample, now.alpha, now.sigma, self.config.prediction_type)
        if self.config.thresholding:
            x0 = dynamic_threshold(x0, self.config.dynamic_thresholding_ratio, self.config.sample_max_value)
        elif self.config.clip_sample:
            x0 = x0.clamp(-self.config.clip_sample_range, self.config.clip_sample_range)
        if use_clipped_model_output:
            eps = (sample - now.alpha * x0) / now.sigma

        noise = eta * now.noise
        direction = math.sqrt(max(1 - now.abar_prev - noise**2, 0.0))
        prev_sample = math.sqrt(now.abar_prev) * x0 + direction * eps
        if eta > 0:
            if variance_noise is None:
                variance_noise = randn(model_output.shape, generator, model_output.device, model_output.dtype)
            prev_sample = prev_sample + noise * variance_noise.to(model_output.device, work)
        return DDIMOutput(prev_sample.to(dtype), x0.to(dtype))

    def _get_variance(self, timestep: int, prev_timestep: int) -> Tensor:
        """The square of eq. 16 with eta = 1, for a step between two training steps; under diffusers' name.

        Args:
            timestep: t.
            prev_timestep: t'; below 0, the end of the run.
        """
        abar = self.alphas_cumprod[timestep]
        abar_prev = self.alphas_cumprod[prev_timestep] if prev_timestep >= 0 else self.final_alpha_cumprod
        return (1 - abar_prev) / (1 - abar) * (1 - abar / abar_prev)

    def _coefficients_of(self, timestep: int | Tensor) -> Coefficients:
        index, t = self._locate(timestep)
        if index is None and self._stride is None:
            index = self._index_of(t)  # only the run's own timesteps have one that follows
        if index is not None:
            return self._run[index]
        assert self._stride is not None
        after = t - self._stride
        return self._coefficients(t, self._abars[t], self._abars[after] if after >= 0 else self._final_abar)

    def _coefficients(self, t: int, abar: float, abar_prev: float) -> Coefficients:
        if abar == 0 and self.config.prediction_type == "epsilon":
            raise ValueError(
                f"timestep {t} is pure noise (rescale_betas_zero_snr), which prediction_type 'epsilon' "
                "cannot start from; use 'v_prediction' or 'sample', or timestep_spacing 'leading'"
            )
        variance = (1 - abar_prev) / (1 - abar) * (1 - abar / abar_prev)
        return Coefficients(math.sqrt(abar), math.sqrt(1 - abar), abar_prev, math.sqrt(max(variance, 0.0)))
