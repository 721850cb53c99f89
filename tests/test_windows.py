"""Overlapping windows and circles of the time axis: what a predictor sees, and what is made of it."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from audioldm2.windows import averaged, fading_weights, in_windows, shifted, window_starts
from tests.helpers import noise


@pytest.mark.parametrize("circular", [False, True])
def test_windows_cover_all_rows_and_overlap_enough(circular: bool) -> None:
    for window, overlap in ((8, 4), (9, 2), (5, 0)):
        for rows in range(window + 1, 60):
            starts = window_starts(rows, window, overlap, circular)
            ends = [start + window for start in starts]
            gaps = [after - before for before, after in pairwise(starts)]
            assert max(gaps, default=0) <= window - overlap
            assert max(gaps, default=0) - min(gaps, default=0) <= 1, "spread evenly"
            assert starts[0] == 0
            assert ends[-1] - rows >= overlap if circular else ends[-1] == rows


def test_weights_fade_towards_both_ends() -> None:
    assert torch.equal(fading_weights(6, 2), torch.tensor([1, 2, 3, 3, 2, 1]) / 3)
    assert torch.equal(fading_weights(3, 0), torch.ones(3))


@pytest.mark.parametrize("circular", [False, True])
@pytest.mark.parametrize(("rows", "scale"), [(33, 1), (40, 4), (8, 4), (9, 1)])
def test_a_function_of_single_rows_is_the_same_in_windows(rows: int, scale: int, circular: bool) -> None:
    seen = []

    def f(x: Tensor) -> Tensor:
        seen.append(x.shape[2])
        return torch.cat([x.square(), x], dim=1).repeat_interleave(scale, dim=2)

    x = noise(2, 3, rows, 4)
    result = averaged(f, x, 8, 4, circular)
    assert set(seen) == {8}, "all windows have the same shape"
    torch.testing.assert_close(result, f(x), rtol=1e-6, atol=1e-6)


def test_half_precision_is_averaged_in_full_precision() -> None:
    x = noise(1, 2, 50, 4, dtype=torch.float64).to(torch.bfloat16)
    result = averaged(lambda part: part, x, 8, 6)
    assert result.dtype == torch.bfloat16
    assert torch.equal(result, x)


@pytest.mark.parametrize("circular", [False, True])
def test_windows_that_disagree_are_crossfaded(circular: bool) -> None:
    """Each window predicts a number of its own; the mean of equal weights would jump by a third of them."""
    calls: list[int] = []

    def f(x: Tensor) -> Tensor:
        calls.append(len(calls) % 2)
        return torch.full_like(x, float(calls[-1]))

    mean = averaged(f, torch.zeros(1, 1, 80, 1), 20, 10, circular)[0, 0, :, 0]
    assert len(calls) == (8 if circular else 7)
    assert mean.min() < 0.1
    assert mean.max() > 0.9
    steps = (mean - mean.roll(1)).abs() if circular else mean.diff().abs()
    assert steps.max() < 0.12


def test_on_a_circle_the_cut_moves_from_call_to_call() -> None:
    """A predictor that depends on the position sees every row at many positions, and nothing else changes."""
    x = noise(2, 3, 40, 4)
    positions = []

    def predict(latents: Tensor, t: Tensor) -> Tensor:
        torch.testing.assert_close(latents.sum(2), x.sum(2))
        positions.append(int((latents == x[:, :, :1]).all(3).all(1).all(0).nonzero()[0, 0]))
        return torch.cat([latents, latents + t])

    around = shifted()
    t = torch.tensor(2.0)
    for _ in range(20):
        # As `denoise` wraps it again after each callback; the shifts go on.
        assert torch.equal(around(predict)(x, t), torch.cat([x, x + t]))
    cuts = sorted({*positions})
    assert positions[0] == 0
    assert len(cuts) >= 18
    assert max(after - before for before, after in pairwise(cuts)) <= 4


def test_windows_on_a_circle_continue_at_its_beginning() -> None:
    seen: list[Tensor] = []

    def predict(latents: Tensor, t: Tensor) -> Tensor:
        seen.append(latents[0, 0, :, 0])
        return latents

    rows = torch.arange(20.0).view(1, 1, 20, 1)
    in_windows(8, circular=True)(predict)(rows, torch.tensor(0))
    assert math.prod(seen[-1].shape) == 8
    assert seen[-1].tolist() == [16, 17, 18, 19, 0, 1, 2, 3]
