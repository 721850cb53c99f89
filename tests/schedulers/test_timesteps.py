"""The timesteps for few steps: a list that was searched for, and interpolated to other numbers of steps."""

from __future__ import annotations

import itertools

import pytest

from audioldm2.schedulers import SAMPLERS, sampler_class
from audioldm2.schedulers.timesteps import FOUND, MAX_STEPS, optimized_timesteps


def test_optimized_timesteps() -> None:
    for number in range(1, MAX_STEPS + 1):
        timesteps = optimized_timesteps(number)
        assert len(timesteps) == number
        assert timesteps[0] == 999
        assert all(after < before for before, after in itertools.pairwise(timesteps))
        assert number == 1 or timesteps[-1] <= 999 // number  # to the end of the run
    assert optimized_timesteps(len(FOUND) - 1) == [*FOUND[:-1]]
    for name in SAMPLERS:
        scheduler = sampler_class(name)()
        scheduler.set_timesteps(timesteps=optimized_timesteps(6))
        assert scheduler.timesteps.tolist() == optimized_timesteps(6)
    for wrong in (0, MAX_STEPS + 1, 2.5, "8", True, None):
        with pytest.raises(ValueError, match="steps must be an integer from 1 to 50"):
            optimized_timesteps(wrong)
