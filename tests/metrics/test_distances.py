"""Fréchet and kernel distances against SciPy and known distributions, and their spreads."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from torch import Tensor

from audioldm2.metrics import (
    frechet_distance,
    frechet_spread,
    halves,
    kernel_distance,
    kernel_spread,
)
from audioldm2.metrics.distances import jackknife
from tests.helpers import noise


def drawn(count: int, width: int, seed: int, scale: float = 1.0, shift: float = 0.0) -> Tensor:
    """Rows that vary less in each further dimension, as embeddings do."""
    deviations = scale / (1 + torch.arange(width, dtype=torch.float64)).sqrt()
    return noise(count, width, seed=seed, dtype=torch.float64) * deviations + shift


def by_scipy(a: Tensor, b: Tensor) -> float:
    """The equation as it is printed."""
    x, y = a.numpy(), b.numpy()
    first, second = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    difference = x.mean(0) - y.mean(0)
    return float(difference @ difference + np.trace(first + second - 2 * sqrtm(first @ second).real))


@pytest.mark.parametrize(("n", "m", "width"), [(60, 80, 5), (300, 200, 32), (9, 40, 8)])
def test_the_frechet_distance_is_scipys(n: int, m: int, width: int) -> None:
    a, b = drawn(n, width, 0, scale=1.3, shift=0.2), drawn(m, width, 1)
    assert frechet_distance(a, b) == pytest.approx(by_scipy(a, b), rel=1e-9)
    assert frechet_distance(b.numpy(), a.numpy()) == pytest.approx(by_scipy(a, b), rel=1e-9)


def test_fewer_rows_than_dimensions_are_computed_and_warned_of() -> None:
    a, b = drawn(6, 20, 0, shift=1.0), drawn(15, 20, 1)
    with pytest.warns(UserWarning, match="6 sounds are few for a Fréchet distance of 20 dimensions"):
        found = frechet_distance(a, b)
    # SciPy's root of a singular product is accurate to the root of float64's precision.
    assert found == pytest.approx(by_scipy(a, b), abs=1e-4)
    with pytest.warns(UserWarning, match="6 sounds are few"):
        assert 0 <= frechet_distance(a, a) < 1e-12


def test_known_gaussians() -> None:
    # Exact moments: the corners of a cube, stretched and shifted.
    cube = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * 3).double()
    variance = 8 / 7  # of a corner's coordinates, unbiased
    moved = cube * torch.tensor([1.0, 2.0, 5.0]) + torch.tensor([3.0, 0.0, 4.0])
    assert frechet_distance(cube, moved) == pytest.approx(25 + variance * (0 + 1 + 16))
    a, b = noise(20_000, 4), 3 * noise(20_000, 4, seed=1) + 1
    assert frechet_distance(a, b) == pytest.approx(4 * 1 + 4 * (3 - 1) ** 2, rel=0.02)


def test_the_bias_falls_with_the_number_of_rows_and_halves_show_it() -> None:
    few, many = (halves(drawn(n, 16, 0)) for n in (160, 1600))
    assert (few.count, many.count) == (80, 800)
    assert 6 < few.value / many.value < 14
    assert 0 < few.spread < few.value
    assert halves(drawn(160, 16, 0)) == few
    # With twice as many rows in each set, the distance of samples of one distribution is half as large.
    same = np.mean([frechet_distance(drawn(160, 16, 2 * i), drawn(160, 16, 2 * i + 1)) for i in range(10)])
    assert same == pytest.approx(few.value / 2, rel=0.2)


def test_the_kernel_distance_is_its_equation_and_has_no_bias() -> None:
    a, b = drawn(7, 3, 0, shift=0.5).numpy(), drawn(9, 3, 1).numpy()
    pairs = [np.linalg.norm(b[i] - b[j]) for i in range(9) for j in range(i)]
    assert len(pairs) == 36
    width = sorted(pairs)[17]  # the lower of the two in the middle

    def k(x: np.ndarray, y: np.ndarray) -> float:
        return math.exp(-((x - y) ** 2).sum() / (2 * width**2))

    inside = [np.mean([k(x, y) for i, x in enumerate(s) for j, y in enumerate(s) if i != j]) for s in (a, b)]
    across = np.mean([k(x, y) for x in a for y in b])
    assert kernel_distance(a, b) == pytest.approx(100 * (sum(inside) - 2 * across), rel=1e-9)
    same = [kernel_distance(drawn(20, 32, 2 * i), drawn(20, 32, 2 * i + 1)) for i in range(60)]
    assert abs(np.mean(same)) < 3 * np.std(same) / 60**0.5
    assert min(same) < 0
    assert kernel_distance(drawn(20, 32, 0, shift=0.5), drawn(20, 32, 1)) > 5


def test_the_jackknife_of_a_mean_is_its_standard_error() -> None:
    x = noise(20, dtype=torch.float64)
    assert jackknife(lambda rows: float(x[rows].mean()), 20) == pytest.approx(float(x.std()) / 20**0.5)


def test_spreads_are_the_deviation_over_other_samples() -> None:
    reference = drawn(100, 24, 1000)
    runs = [drawn(100, 24, seed, scale=1.2, shift=0.1) for seed in range(40)]
    for distance, spread in ((frechet_distance, frechet_spread), (kernel_distance, kernel_spread)):
        true = np.std([distance(run, reference) for run in runs], ddof=1)
        assert np.mean([spread(run, reference) for run in runs[:8]]) == pytest.approx(true, rel=0.4)
    assert math.isnan(frechet_spread(reference[:2], reference))
    assert math.isnan(kernel_spread(reference[:2], reference))


def test_embeddings_that_cannot_be_compared() -> None:
    good = noise(5, 2)
    for a, b, error, message in [
        (good[:1], good, ValueError, "a has 1 embeddings; a distance needs at least 2"),
        (good, good[0], ValueError, r"b has shape \(2,\); it must be \(N, D\)"),
        (good, good * math.nan, ValueError, "b has numbers that are not finite"),
        (good, noise(5, 3), ValueError, "a has 2 dimensions and b has 3"),
        (good.long(), good, ValueError, "a must be floating-point"),
        ([[1.0]], good, TypeError, "a must be a torch.Tensor"),
    ]:
        for distance in (frechet_distance, frechet_spread, kernel_distance, kernel_spread):
            with warnings.catch_warnings(), pytest.raises(error, match=message):
                distance(a, b)
    with pytest.raises(ValueError, match="x has 3 embeddings; a distance needs at least 4"):
        halves(good[:3])
    with pytest.raises(ValueError, match="half of the embeddings in b are equal"):
        kernel_distance(good, torch.ones(5, 2))
