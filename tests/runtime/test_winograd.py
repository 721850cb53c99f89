"""Winograd's minimal filtering gives a convolution's numbers."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from audioldm2.runtime import winograd
from tests.helpers import noise


@pytest.fixture
def scratch(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Limits the temporaries to the parameter's number of floats; None leaves the limit as it is."""
    if request.param is not None:
        monkeypatch.setattr(winograd, "MAX_SCRATCH_FLOATS", request.param)


def largest_difference(actual: Tensor, expected: Tensor) -> float:
    """Relative to the scale of what is expected."""
    return float((actual - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize(("outputs", "taps"), [(2, 3), (4, 3), (4, 4)])
def test_a_minimal_filter_is_exact(outputs: int, taps: int) -> None:
    a, g, b = winograd.filter_matrices(outputs, taps)
    points = outputs + taps - 1
    assert [tuple(m.shape) for m in (a, g, b)] == [(outputs, points), (points, taps), (points, points)]
    x, f = noise(points, dtype=torch.float64), noise(taps, seed=1, dtype=torch.float64)
    expected = torch.stack([(f * x[i : i + taps]).sum() for i in range(outputs)])
    assert (a @ ((g @ f) * (b @ x)) - expected).abs().max() <= 1e-12


# float64 shows that the algorithm is right, float32 what its rounding costs.
PRECISIONS = pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])


@PRECISIONS
@pytest.mark.usefixtures("scratch")
@pytest.mark.parametrize(
    "scratch",
    [1, 1500, 5000, None],
    ids=["one tile row at a time", "a few tile rows", "a few images", "all at once"],
    indirect=True,
)
@pytest.mark.parametrize(
    ("batch", "height", "width"),
    [(1, 16, 8), (2, 17, 7), (3, 5, 1), (5, 8, 4), (1, 1, 9), (1, 1, 1), (2, 18, 3), (1, 43, 6)],
)
def test_conv_2d(
    batch: int,
    height: int,
    width: int,
    dtype: torch.dtype,
    bound: float,
) -> None:
    """Includes maps that tiles of 4x2 do not divide, and temporaries that hold a part of the batch."""
    x, bias = noise(batch, 5, height, width, dtype=dtype), noise(7, seed=2, dtype=dtype)
    weight = noise(7, 5, 3, 3, seed=1, dtype=dtype) / math.sqrt(45)
    actual = winograd.conv_2d(x, winograd.kernel_2d(weight), bias)
    expected = F.conv2d(x.double(), weight.double(), bias.double(), padding=1)
    assert actual.dtype == dtype
    assert actual.is_contiguous(memory_format=torch.channels_last)
    assert largest_difference(actual, expected) <= bound


@PRECISIONS
@pytest.mark.usefixtures("scratch")
@pytest.mark.parametrize(
    "scratch", [1, 600, None], ids=["one tile at a time", "a few tiles", "all at once"], indirect=True
)
@pytest.mark.parametrize("dilation", [1, 3, 5])
@pytest.mark.parametrize("taps", [3, 5, 7, 11])
def test_conv_1d(
    taps: int,
    dilation: int,
    dtype: torch.dtype,
    bound: float,
) -> None:
    """Includes lengths that the filter overlooks whole, and that tiles of 4 · dilation do not divide."""
    weight, bias = noise(6, 4, taps, seed=1, dtype=dtype) / math.sqrt(4 * taps), noise(6, seed=2, dtype=dtype)
    kernel = winograd.kernel_1d(weight)
    for batch, length in ((1, 1), (2, 3), (1, 20), (3, 61), (1, 120), (2, 133)):
        x = noise(batch, 4, length, dtype=dtype)
        actual = winograd.conv_1d(x, kernel, bias, taps, dilation)
        padding = taps // 2 * dilation
        expected = F.conv1d(x.double(), weight.double(), bias.double(), padding=padding, dilation=dilation)
        assert actual.dtype == dtype
        assert actual.transpose(1, 2).is_contiguous()
        assert largest_difference(actual, expected) <= bound, (batch, length)


def test_rounding_is_as_documented() -> None:
    """At the widths of the real stages: about 2e-6 of the output's scale, as the module says."""
    for channels in (128, 512):
        x, bias = noise(1, channels, 40, 16), noise(channels, seed=2)
        weight = noise(channels, channels, 3, 3, seed=1) / math.sqrt(9 * channels)
        actual = winograd.conv_2d(x, winograd.kernel_2d(weight), bias)
        expected = F.conv2d(x.double(), weight.double(), bias.double(), padding=1)
        assert largest_difference(actual, expected) <= 3e-6
        for taps, dilation in ((3, 1), (7, 3), (11, 5)):
            x = noise(1, channels, 300)
            weight = noise(channels, channels, taps, seed=1) / math.sqrt(taps * channels)
            actual = winograd.conv_1d(x, winograd.kernel_1d(weight), bias, taps, dilation)
            padding = taps // 2 * dilation
            expected = F.conv1d(
                x.double(), weight.double(), bias.double(), padding=padding, dilation=dilation
            )
            assert largest_difference(actual, expected) <= 3e-6
