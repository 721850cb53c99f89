"""DDIM, the sampler AudioLDM 2 was published with (Song et al. 2021, "Denoising diffusion implicit models").

In: the network's output for (x_t, t), and x_t; both (B, C, ...). Out: x_{t'} at an earlier timestep t', same
shape.

The network's output gives an estimate of the clean sample x_0 and of the noise eps that is in x_t. A step
goes back to x_0 and adds the noise again, but less of it (eq. 12 of the paper; abar is `alphas_cumprod`, the
paper's alpha):

    x_{t'} = sqrt(abar_t') x_0  +  sqrt(1 - abar_t' - sigma^2) eps  +  sigma z,       z ~ N(0, 1)
    sigma  = eta sqrt((1 - abar_t') / (1 - abar_t)) sqrt(1 - abar_t / abar_t')        (eq. 16)

With eta = 0 nothing is random (DDIM); with eta = 1 it is the ancestral sampling of DDPM.

x_0 and eps follow from what the network was trained to predict:

    epsilon       x_0 = (x_t - sqrt(1 - abar) out) / sqrt(abar)  eps = out
    sample        x_0 = out                                      eps = (x_t - sqrt(abar) out) / sqrt(1 - abar)
    v_prediction  x_0 = sqrt(abar) x_t - sqrt(1 - abar) out      eps = sqrt(abar) out + sqrt(1 - abar) x_t
                  (Salimans & Ho 2022, appendix D)

With `trailing` and some N (61, 103, ...) diffusers takes one step too many, at timestep -1; here that step is
dropped. The earlier timestep is t' = t - T // N for every spacing, also where `timesteps` has other gaps (as
in diffusers). Below zero there is no training step; abar_t' is then 1 (`set_alpha_to_one`) or abar_0.

A step depends on nothing but t, so it may be called with any t in any order.
"""

from __future__ import annotations

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
    randn,
    remembers_config,
)


class DDIMOutput(NamedTuple):
    """What a step returns: x_{t'} and the estimate of x_0 it used (after clipping), both (B, C, ...)."""

    prev_sample: Tensor
    pred_original_sample: Tensor


@dataclass(frozen=True)
class Coefficients:
    """The numbers of one step, in float64: abar at t and at t', and their square roots."""

    root_alpha: float  # sqrt(abar_t)
    root_noise: float  # sqrt(1 - abar_t)
    alpha_prev: float  # abar_t'
    sigma: float  # eq. 16 with eta = 1


class DDIMScheduler(NoiseSchedule):
    """The DDIM sampler. Settings (diffusers' names and defaults):

    num_train_timesteps: T. beta_start, beta_end, beta_schedule, trained_betas: the schedule, see
    `make_betas`. clip_sample, clip_sample_range: clip the estimate of x_0 to [-range, range].
    set_alpha_to_one: whether the last step ends at abar = 1 (no noise left) or at the first training step's
    abar. steps_offset: added to the timesteps of the `leading` spacing. prediction_type: epsilon, sample or
    v_prediction. thresholding, dynamic_thresholding_ratio, sample_max_value: see `dynamic_threshold`; comes
    before clip_sample. timestep_spacing: leading (0, k, 2k, ...), linspace (both ends included) or trailing
    (the last step included);
        table 2 of Lin et al. 2023.
    rescale_betas_zero_snr: see `zero_terminal_snr`. A network that predicts epsilon says nothing about x_0
    where
        abar is 0, so with `epsilon` a walk that visits the last training step is refused.

    Raises ValueError, naming the setting, for a value that is not supported.
    """

    default_num_inference_steps = 200

    @remembers_config
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
        self._build_table()
        self._alphas: list[float] = self.alphas_cumprod.double().tolist()
        self._final_alpha = 1.0 if set_alpha_to_one else self._alphas[0]
        self._plan: list[Coefficients] = []

    def set_timesteps(self, num_inference_steps: int, device: torch.device | str | None = None) -> None:
        """Choose the N timesteps of a walk, put them on `device` and compute every step's coefficients.

        Raises ValueError if N is not a whole number from 1 to T, or if the walk leaves the training steps.
        """
        self._check_num_inference_steps(num_inference_steps)
        total, spacing = self.config.num_train_timesteps, self.config.timestep_spacing
        # numpy, as in diffusers: where a timestep falls between two, the rounding decides.
        if spacing == "linspace":
            steps = np.linspace(0, total - 1, num_inference_steps).round()[::-1]
        elif spacing == "leading":
            ratio = total // num_inference_steps
            steps = (np.arange(num_inference_steps) * ratio)[::-1] + self.config.steps_offset
        else:
            steps = np.arange(total, 0, -total / num_inference_steps).round() - 1
            steps = steps[steps >= 0]  # arange may go one too far where the stride is no exact float
        values = steps.astype(np.int64).tolist()
        stride = total // num_inference_steps
        plan = [self._coefficients(t, stride) for t in values if 0 <= t < total]
        self._place_timesteps(values, device)
        self.num_inference_steps = num_inference_steps
        self._plan, self._stride = plan, stride

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
    ) -> DDIMOutput | tuple[Tensor, Tensor]:
        """One step of eq. 12: x_t and the network's output, both (B, C, ...), to x_{t'}.

        Args:
            timestep: t; an element of `timesteps`, or any training step (an int, or a tensor, whose value is
            read). eta: 0 (nothing random) to 1 (as DDPM). use_clipped_model_output: derive eps again from x_0
            after clipping, so that both still agree with x_t. generator: draws z, see `randn`.
            variance_noise: z itself, instead of `generator`.
            return_dict: False for a plain tuple.

        Raises ValueError before `set_timesteps`, for a timestep outside training and for an eta outside [0,
        1].
        """
        index, t = self._locate(timestep)
        now = self._coefficients(t, self._stride) if index is None else self._plan[index]
        if not 0 <= eta <= 1:
            raise ValueError(f"eta must lie in [0, 1], got {eta}")

        prediction = self.config.prediction_type
        if prediction == "epsilon":
            x0 = (sample - now.root_noise * model_output) / now.root_alpha
            eps = model_output
        elif prediction == "sample":
            x0 = model_output
            eps = (sample - now.root_alpha * model_output) / now.root_noise
        else:
            x0 = now.root_alpha * sample - now.root_noise * model_output
            eps = now.root_alpha * model_output + now.root_noise * sample

        if self.config.thresholding:
            x0 = dynamic_threshold(x0, self.config.dynamic_thresholding_ratio, self.config.sample_max_value)
        elif self.config.clip_sample:
            x0 = x0.clamp(-self.config.clip_sample_range, self.config.clip_sample_range)
        if use_clipped_model_output:
            eps = (sample - now.root_alpha * x0) / now.root_noise

        sigma = eta * now.sigma
        direction = math.sqrt(max(1 - now.alpha_prev - sigma**2, 0.0))
        prev_sample = math.sqrt(now.alpha_prev) * x0 + direction * eps
        if eta > 0:
            if variance_noise is not None and generator is not None:
                raise ValueError("give either generator or variance_noise, not both")
            if variance_noise is None:
                variance_noise = randn(model_output.shape, generator, model_output.device, model_output.dtype)
            prev_sample = prev_sample + sigma * variance_noise

        return DDIMOutput(prev_sample, x0) if return_dict else (prev_sample, x0)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor | int) -> Tensor:
        """x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) noise, (B, ...) -> same; `timesteps` (B,) or one."""
        device = original_samples.device
        steps = self._training_timesteps(timesteps, device)
        return mix_noise(original_samples, noise, self._table_on(device)[steps])

    def _table_on(self, device: torch.device) -> Tensor:
        self.alphas_cumprod = self.alphas_cumprod.to(device)  # stays there: moved once, not at every call
        return self.alphas_cumprod

    def _coefficients(self, t: int, stride: int) -> Coefficients:
        alpha = self._alphas[t]
        alpha_prev = self._alphas[t - stride] if t >= stride else self._final_alpha
        if alpha == 0 and self.config.prediction_type == "epsilon":
            raise ValueError(
                f"timestep {t} is pure noise (rescale_betas_zero_snr): prediction_type 'epsilon' fails; "
                "use 'v_prediction' or 'sample', or timestep_spacing 'leading'"
            )
        variance = (1 - alpha_prev) / (1 - alpha) * (1 - alpha / alpha_prev)
        return Coefficients(math.sqrt(alpha), math.sqrt(1 - alpha), alpha_prev, math.sqrt(max(variance, 0.0)))
