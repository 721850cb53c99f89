"""The noise schedule: how much noise each training step adds, and which noise levels a sampling run visits.

A diffusion model is trained on samples (here: latents) to which noise was added in a single step (Ho et al.
2020, eq. 4):

    x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps,        eps ~ N(0, 1),  t = 0 .. T-1
    abar_t = prod_{s <= t} (1 - beta_s)                   `alphas_cumprod` in the code, shape (T,)

`beta_t` is the variance added at training step t. abar falls from nearly 1 (almost no noise) to nearly 0
(almost only noise).

The noise-to-signal ratio sqrt((1 - abar) / abar) is called `sigma`, as in Karras et al. 2022, and grows
with t.

Betas and abar are computed in float32 by the same operations as in training, so that they are the values the
network was trained with.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from audioldm2.arguments import check_number
from audioldm2.quoting import quoted
from audioldm2.schedulers.config import SchedulerConfig

BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")
FLOAT32 = torch.finfo(torch.float32)
TIMESTEP_SPACINGS = ("linspace", "leading", "trailing")


# ---------------------------------------------------------------- training


def make_betas(schedule: str, start: float, end: float, steps: int) -> Tensor:
    """The variances beta_t of the training steps, (T,) float32.

    Args:
        schedule: one of `BETA_SCHEDULES`:
            `linear` has evenly spaced betas (Ho et al. 2020, section 4);
            `scaled_linear` has evenly spaced square roots (Rombach et al. 2022; AudioLDM 2 uses it);
            `squaredcos_cap_v2` has abar(u) = cos^2(pi/2 (u + 0.008) / 1.008) with betas capped at 0.999
            (Nichol & Dhariwal 2021, eq. 17), and ignores `start` and `end`.
        start: the first beta.
        end: the last beta.
        steps: T.

    Raises:
        ValueError: if the schedule is not supported.
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
        f"beta_schedule {quoted(schedule)} is not supported; choose one of {', '.join(BETA_SCHEDULES)}"
    )


def zero_terminal_snr(betas: Tensor) -> Tensor:
    """Rescale the schedule so that the last training step is pure noise: (T,) -> (T,).

    Lin et al. 2023 ("Common diffusion noise schedules and sample steps are flawed"), algorithm 1: sqrt(abar)
    is shifted so that its last value is 0, and scaled so that its first value is unchanged. The last beta
    becomes 1.
    """
    root = torch.cumprod(1 - betas, dim=0).sqrt()
    first, last = root[0], root[-1]
    alphas_cumprod = ((root - last) * (first / (first - last))) ** 2
    alphas = torch.cat([alphas_cumprod[:1], alphas_cumprod[1:] / alphas_cumprod[:-1]])
    return 1 - alphas


def mix_noise(original: Tensor, noise: Tensor, alphas_cumprod: Tensor) -> Tensor:
    """x_t = sqrt(abar) x_0 + sqrt(1 - abar) noise; `original`, `noise` (B, ...); `alphas_cumprod` (B,)."""
    abar = alphas_cumprod.reshape(-1, *[1] * (original.dim() - 1))  # (B, 1, ...)
    return abar.sqrt().to(original.dtype) * original + (1 - abar).sqrt().to(original.dtype) * noise


# ---------------------------------------------------------------- sampling


def spaced_timesteps(spacing: str, total: int, number: int, offset: int = 0) -> list[int]:
    """N of the T training steps, from the noisiest to the cleanest (Lin et al. 2023, table 2).

    Args:
        spacing: one of `TIMESTEP_SPACINGS`:
            `linspace` includes both the first and the last training step;
            `leading` is 0, T // N, 2 (T // N), ..., plus `offset`;
            `trailing` includes the last training step.
        total: T.
        number: N.
        offset: added to the timesteps of `leading`.
    """
    # NumPy, as in diffusers: where a timestep falls halfway between two integers, its rounding decides.
    if spacing == "linspace":
        steps = np.linspace(0, total - 1, number).round()[::-1]
    elif spacing == "leading":
        steps = (np.arange(number) * (total // number))[::-1] + offset
    else:
        steps = np.arange(total, 0, -total / number).round() - 1
        steps = steps[steps >= 0]  # with a stride that is not exact in binary, arange can go one step too far
    return [int(step) for step in steps]


def sampling_sigmas(
    config: SchedulerConfig,
    alphas_cumprod: Tensor,
    number: int,
    *,
    rounded: bool,
    lu_lambdas: bool = False,
    lambda_min: float = -math.inf,
) -> tuple[list[int], NDArray[np.float64]]:
    """The timesteps (N,) and noise levels (N,) of a run of a multistep sampler, from noisy to clean.

    Either the timesteps are spaced as `timestep_spacing` says, and the noise levels follow, or the noise
    levels are spaced (`use_karras_sigmas`, `use_exponential_sigmas`, `lu_lambdas`), and the timesteps follow.

    Args:
        config: the scheduler's settings.
        alphas_cumprod: abar of the training steps, (T,).
        number: N.
        rounded: whether the timesteps of spaced noise levels are rounded; otherwise they are rounded down.
        lu_lambdas: whether to space the noise levels evenly in lambda, whatever `sigma_min` and `sigma_max`.
        lambda_min: the lambda of the noisiest level that spaced timesteps may start from.

    Raises:
        ValueError: if there are fewer training steps than "leading" spacing needs, or a setting leaves no
            noise levels.
    """
    training = training_sigmas(alphas_cumprod)
    if config.use_karras_sigmas or config.use_exponential_sigmas or lu_lambdas:
        # The configs of other samplers carry these limits.
        low, high = config.get("sigma_min"), config.get("sigma_max")
        low = training[0].item() if low is None else low
        high = training[-1].item() if high is None else high
        check_limits(low, high)
        if config.use_karras_sigmas:
            sigmas = karras_sigmas(number, low, high)
        elif lu_lambdas:
            logs = np.log(training)
            sigmas = exponential_sigmas(number, logs[0].item(), logs[-1].item())
        else:
            sigmas = exponential_sigmas(number, math.log(low), math.log(high))
        steps = np.array([sigma_to_timestep(sigma, training) for sigma in sigmas])
        if rounded:
            steps = steps.round()
        return [int(step) for step in steps], sigmas

    total = config.num_train_timesteps
    lambdas = alphas_cumprod.sqrt().log() - (1 - alphas_cumprod).sqrt().log()  # falling
    last = total - int(torch.searchsorted(lambdas.flip(0), lambda_min))
    if last < 1:
        raise ValueError(f"lambda_min_clipped {lambda_min} leaves no training step")
    if config.timestep_spacing == "linspace":
        steps = np.linspace(0, last - 1, number + 1).round()[::-1][:-1]
    elif config.timestep_spacing == "leading":
        if number >= last:
            raise ValueError(
                f"num_inference_steps {number} is too large for timestep_spacing 'leading', which omits "
                f"timestep 0; use at most {last - 1}"
            )
        steps = (np.arange(number + 1) * (last // (number + 1)))[::-1][:-1] + config.steps_offset
    else:
        steps = np.arange(last, 0, -total / number).round() - 1
        steps = steps[steps >= 0]  # the last one can round to -1
    return [int(step) for step in steps], np.interp(steps, np.arange(total), training)


def check_limits(sigma_min: float | None, sigma_max: float | None) -> None:
    """Raise ValueError unless these can be the limits of spaced noise levels; None is not checked."""
    for name, limit in (("sigma_min", sigma_min), ("sigma_max", sigma_max)):
        if limit is not None:
            check_number(name, limit)
            if limit <= 0:
                raise ValueError(f"{name} must be positive, got {limit:g}")
            if not FLOAT32.tiny <= limit <= FLOAT32.max:
                raise ValueError(f"{name} must be a number that float32 can hold, got {limit:g}")
    if sigma_min is not None and sigma_max is not None and sigma_min >= sigma_max:
        raise ValueError(f"sigma_min must lie between 0 and sigma_max {sigma_max:g}, got {sigma_min:g}")


def training_sigmas(alphas_cumprod: Tensor) -> NDArray[np.float32]:
    """sqrt((1 - abar) / abar) of every training step, (T,) float32, rising."""
    sigmas: NDArray[np.float32] = (((1 - alphas_cumprod) / alphas_cumprod) ** 0.5).cpu().numpy()
    return sigmas


def karras_sigmas(number: int, low: float, high: float, rho: float = 7.0) -> NDArray[np.float64]:
    """N noise levels from `high` to `low`, evenly spaced in sigma^(1/rho) (Karras et al. 2022, eq. 5)."""
    ramp = np.linspace(0, 1, number)
    sigmas: NDArray[np.float64] = (high ** (1 / rho) + ramp * (low ** (1 / rho) - high ** (1 / rho))) ** rho
    return sigmas


def exponential_sigmas(number: int, log_low: float, log_high: float) -> NDArray[np.float64]:
    """N noise levels from exp(`log_high`) to exp(`log_low`), evenly spaced in log sigma."""
    return np.exp(np.linspace(log_high, log_low, number))


def sigma_to_timestep(sigma: float, training: NDArray[np.float32]) -> float:
    """The fractional training step of a noise level, interpolated linearly in log sigma.

    Args:
        sigma: the noise level; one outside the training levels gives the nearest training step.
        training: the noise levels of the training steps, (T,), rising.
    """
    logs = np.log(training)
    log = np.log(np.maximum(sigma, 1e-10))
    below = min(int(np.cumsum(log - logs >= 0).argmax()), len(logs) - 2)
    low, high = logs[below], logs[below + 1]
    part = np.clip((low - log) / (low - high), 0, 1)
    return float((1 - part) * below + part * (below + 1))
