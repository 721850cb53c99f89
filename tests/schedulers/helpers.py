"""What the tests of the samplers share: a network, whole sampling runs, comparisons with diffusers."""

from __future__ import annotations

import inspect
import math

import diffusers
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from audioldm2.schedulers import DDIMScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler
from audioldm2.schedulers.multistep import MultistepScheduler

THEIRS = {
    DDIMScheduler: diffusers.DDIMScheduler,
    DPMSolverMultistepScheduler: diffusers.DPMSolverMultistepScheduler,
    UniPCMultistepScheduler: diffusers.UniPCMultistepScheduler,
}


AUDIOLDM2 = {"beta_schedule": "scaled_linear", "beta_start": 0.0015, "beta_end": 0.0195}


SHAPE = (2, 3, 4, 5)


NOISE = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))


def network(x, t):
    """A fixed function of sample and timestep: nonlinear but smooth, so that runs do not amplify rounding."""
    return torch.tanh(x.float() + 0.2 * math.sin(0.01 * float(t))).to(x.dtype)


def sampling_run(scheduler, steps, start=0, sample=NOISE, **arguments):
    """The sample after each step of a run, (steps, ...)."""
    scheduler.set_timesteps(steps)
    return steps_over(scheduler, scheduler.timesteps[start:], sample, **arguments)


def steps_over(scheduler, timesteps, sample=NOISE, **arguments):
    """The sample after each step over some of a run's timesteps, (steps, ...)."""
    trajectory = []
    for t in timesteps:
        sample = scheduler.step(
            network(sample, t), t, scheduler.scale_model_input(sample, t), **arguments
        ).prev_sample
        trajectory.append(sample)
    return torch.stack(trajectory)


def seeded(scheduler, seed):
    """The arguments that seed the noise of a sampler's steps; none for UniPC, which draws no noise."""
    takes = "generator" in inspect.signature(scheduler.step).parameters
    return {"generator": torch.Generator().manual_seed(seed)} if takes else {}


def assert_close(ours, theirs, bound=1e-5):
    assert torch.isfinite(theirs.float()).all(), "the reference is not finite, so this case tests nothing"
    assert ours.shape == theirs.shape
    assert ours.dtype == theirs.dtype
    error = (ours.double() - theirs.double()).abs().max() / theirs.double().abs().max()
    assert error <= bound, f"{error:.2e} of the reference's largest value"


def compare(cls, settings, steps, start=0, bound=1e-5, **arguments):
    """Compare every sample of a run with diffusers, relative to the largest value."""
    ours, theirs = cls(**settings), THEIRS[cls](**settings)
    a, b = (sampling_run(one, steps, start, **arguments, **seeded(one, 1)) for one in (ours, theirs))
    assert torch.equal(ours.timesteps, theirs.timesteps)
    assert ours.num_inference_steps == theirs.num_inference_steps
    if issubclass(cls, MultistepScheduler):
        assert torch.equal(ours.sigmas, theirs.sigmas)
    assert_close(a, b, bound)


class NoReading(TorchDispatchMode):
    """Fails when a tensor's value is read into Python, which on an accelerator waits for it."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            raise AssertionError(f"{func} waits for the device")
        return func(*args, **(kwargs or {}))
