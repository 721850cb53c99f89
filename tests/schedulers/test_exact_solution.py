"""The samplers against closed forms, where the best network there can be is known.

Data of which every element is drawn from N(MEAN, STD^2) has, at x = alpha x_0 + sigma eps, the expected noise

    E[eps | x] = sigma (x - alpha MEAN) / (alpha^2 STD^2 + sigma^2)

and the probability-flow ODE keeps (x / alpha - MEAN) / sqrt(STD^2 + (sigma / alpha)^2) constant.
"""

from __future__ import annotations

import math

import pytest
import torch

from audioldm2.schedulers import DDIMScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler
from audioldm2.schedulers.multistep import MultistepScheduler
from tests.schedulers.helpers import AUDIOLDM2

MEAN, STD = 0.5, 0.3


def run(scheduler, steps, start, **arguments):
    """Sample with the exact network: from `start`, noise at the first noise level, to the last sample."""
    scheduler.set_timesteps(steps)
    x = start
    for i, t in enumerate(scheduler.timesteps):
        if isinstance(scheduler, MultistepScheduler):
            alpha = 1 / math.sqrt(float(scheduler.sigmas[i]) ** 2 + 1)
        else:
            alpha = math.sqrt(float(scheduler.alphas_cumprod[t]))
        variance = 1 - alpha**2
        eps = math.sqrt(variance) * (x - alpha * MEAN) / (alpha**2 * STD**2 + variance)
        x = scheduler.step(eps, t, x, **arguments).prev_sample
    return x


def exact(scheduler, start):
    """Where the probability-flow ODE goes from `start`, for a run that was just made."""
    if isinstance(scheduler, MultistepScheduler):
        first, last = scheduler.sigmas[0].item(), scheduler.sigmas[-1].item()
    else:
        abar = scheduler.alphas_cumprod[scheduler.timesteps[0]].item()
        first, last = math.sqrt(1 / abar - 1), 0.0
    alpha_first, alpha_last = 1 / math.sqrt(first**2 + 1), 1 / math.sqrt(last**2 + 1)
    ratio = math.sqrt((STD**2 + last**2) / (STD**2 + first**2))
    return alpha_last * (MEAN + (start / alpha_first - MEAN) * ratio)


UNIFORM = {"use_lu_lambdas": True, "lower_order_final": False, "final_sigmas_type": "sigma_min"}
EVEN = {"use_exponential_sigmas": True, "lower_order_final": False, "final_sigmas_type": "sigma_min"}


@pytest.mark.parametrize(
    ("scheduler", "ratio", "bound"),
    [
        # The last step, to no noise at all, is long, and DDIM approaches its order slowly.
        (DDIMScheduler(**AUDIOLDM2, clip_sample=False), 1.7, 7e-2),
        (DPMSolverMultistepScheduler(**AUDIOLDM2, **UNIFORM, solver_order=1), 2.0, 2e-2),
        (DPMSolverMultistepScheduler(**AUDIOLDM2, **UNIFORM, solver_order=2), 4.0, 4e-4),
        (DPMSolverMultistepScheduler(**AUDIOLDM2, **UNIFORM, solver_order=2, solver_type="heun"), 4.0, 6e-4),
        # The first steps, at orders 1 and 2, limit order 3 to the ratio of order 2.
        (DPMSolverMultistepScheduler(**AUDIOLDM2, **UNIFORM, solver_order=3), 4.2, 1.2e-4),
        # The corrector of UniPC raises the order by one.
        (UniPCMultistepScheduler(**AUDIOLDM2, **EVEN, solver_order=1), 4.1, 1.2e-3),
        (UniPCMultistepScheduler(**AUDIOLDM2, **EVEN, solver_order=2), 8.0, 4e-5),
        (UniPCMultistepScheduler(**AUDIOLDM2, **EVEN, solver_order=2, solver_type="bh1"), 8.3, 8e-5),
        (UniPCMultistepScheduler(**AUDIOLDM2, **EVEN, disable_corrector=[*range(200)]), 4.0, 4e-4),
    ],
)
def test_order_of_convergence(scheduler, ratio, bound):
    """A method of order k divides the error by 2^k when the number of steps doubles."""
    start = torch.linspace(-3, 3, 7, dtype=torch.float64)[None]
    errors = []
    for steps in (50, 100, 200):
        end = run(scheduler, steps, start)
        errors.append((end - exact(scheduler, start)).abs().max().item())
    assert errors[1] < bound
    assert errors[0] / errors[1] == pytest.approx(ratio, rel=0.1)
    assert errors[1] / errors[2] == pytest.approx(ratio, rel=0.1)


@pytest.mark.parametrize(
    ("scheduler", "steps", "arguments", "bound"),
    [
        (DDIMScheduler(**AUDIOLDM2, clip_sample=False), 200, {"eta": 0.0}, 0.05),
        (DDIMScheduler(**AUDIOLDM2, clip_sample=False), 200, {"eta": 1.0}, 0.1),
        (DPMSolverMultistepScheduler(**AUDIOLDM2, use_karras_sigmas=True), 50, {}, 0.01),
        (
            DPMSolverMultistepScheduler(
                **AUDIOLDM2, use_karras_sigmas=True, algorithm_type="sde-dpmsolver++"
            ),
            50,
            {},
            0.01,
        ),
    ],
)
def test_samples_have_the_distribution_of_the_data(scheduler, steps, arguments, bound):
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(1, 100_000, generator=generator)
    samples = run(scheduler, steps, start, generator=generator, **arguments)
    assert samples.mean().item() == pytest.approx(MEAN, rel=0.01)
    assert samples.std().item() == pytest.approx(STD, rel=bound)
