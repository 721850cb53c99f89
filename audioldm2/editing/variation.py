"""Variation of a sound: noise it, and denoise it with a prompt (SDEdit, Meng et al. 2022, algorithm 2).

Of the N steps of a run only the last `strength` N are taken. They begin with the sound's latents x_0 at the
noise level of the first of these steps: x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor


def first_step(num_inference_steps: int, strength: float) -> int:
    """The index of the step with which a run of a strength begins.

    A strength above 0 takes at least one step.

    Args:
        num_inference_steps: N.
        strength: 0 takes no step, 1 takes all.
    """
    taken = max(1, round(num_inference_steps * strength)) if strength > 0 else 0
    return num_inference_steps - taken


def noisy(scheduler: Any, clean: Tensor, noise: Tensor, index: int) -> Tensor:
    """Latents at the noise level of a step.

    Args:
        scheduler: the sampler, after `set_timesteps`.
        clean: x_0, (B, channels, T/4, F/4).
        noise: eps, of the same shape.
        index: of the step's timestep; the number of timesteps after the last step, where there is no noise.
    """
    if index == len(scheduler.timesteps):
        return clean
    # A slice, and not its value: a value can occur twice in a run.
    level = scheduler.timesteps[index : index + 1].expand(len(clean))
    result: Tensor = scheduler.add_noise(clean, noise, level)
    return result.to(clean.dtype)
