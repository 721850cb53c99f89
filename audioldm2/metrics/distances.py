"""Distances between two sets of embeddings, (N, D) and (M, D), and how far they would vary.

The Fréchet distance is that of two normal distributions with the sets' means and covariances (Dowson and
Landau 1982), which Heusel et al. 2017 introduced for images and Kilgour et al. 2019 for sounds:

    |mu1 - mu2|^2 + Tr(S1 + S2 - 2 (S1 S2)^(1/2))

The kernel distance is the unbiased estimate of the squared maximum mean discrepancy (Gretton et al. 2012, eq.
3), with the kernel and the scale of Chung et al. 2025, "KAD". It makes no assumption about the distribution,
and is right on average with any number of sounds, where the Fréchet distance of few sounds is too high.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from audioldm2.tensors import check_tensor

Embeddings = Tensor | np.ndarray[Any, Any]
GROUPS = 20  # that the jackknife leaves out in turn
SPLITS = 10  # into halves
KERNEL_SCALE = 100.0  # of Chung et al. 2025, for readable numbers


@dataclass(frozen=True)
class Figure:
    """A measured value.

    Attributes:
        value: what was measured.
        spread: the standard deviation that it would have over other sets of as many sounds, drawn at random;
            NaN if there are too few to tell. Sounds of the same prompts with other seeds vary much less.
        count: the number of sounds.
    """

    value: float
    spread: float
    count: int


class _Normal(NamedTuple):
    """A normal distribution: its mean, (D,), and a root R of its covariance, (K, D), with S = R^T R."""

    mean: Tensor
    root: Tensor


def frechet_distance(a: Embeddings, b: Embeddings) -> float:
    """The Fréchet distance between two sets of embeddings.

    The estimate is biased: two samples of the same distribution are not 0 apart, but about c (1/N + 1/M),
    where c grows with the number of dimensions in which the embeddings vary. Compare distances only if they
    come from equally many sounds, the same reference and the same embeddings; `halves` measures the bias, and
    `kernel_distance` has none.

    With S1 = A^T A and S2 = B^T B, Tr (S1 S2)^(1/2) is the sum of the singular values of A B^T. Unlike the
    root of the product of the covariances, it is real and accurate where these are singular (N <= D).

    Args:
        a: (N, D), N at least 2, a tensor or an array of any floating-point dtype; it is computed in float64.
        b: (M, D), M at least 2.

    Returns:
        The distance, 0 or more, in units of the embeddings squared. (Its root is a metric; as in the papers,
        it is not taken.)

    Raises:
        TypeError, ValueError: a set has another shape, fewer than two rows, or numbers that are not finite.

    Warns:
        UserWarning: a set has no more rows than dimensions, so that the bias is large.

    Example:
        >>> a = torch.randn(10_000, 2, generator=torch.Generator().manual_seed(0))
        >>> round(frechet_distance(a, a + torch.tensor([3.0, 4.0])), 9)
        25.0
    """
    first, second = as_embeddings("a", a), as_embeddings("b", b)
    _check_widths(first, second)
    fewest, width = min(len(first), len(second)), first.shape[1]
    if fewest <= width:
        warnings.warn(
            f"{fewest} sounds are few for a Fréchet distance of {width} dimensions: it is too high, and can "
            "only be compared with that of as many other sounds",
            stacklevel=2,
        )
    return _frechet(_normal(first), _normal(second))


def frechet_spread(a: Embeddings, b: Embeddings, after: Callable[[], object] = lambda: None) -> float:
    """How far `frechet_distance` would vary with other sounds in the place of those of `a`; see `jackknife`.

    Args:
        a: (N, D).
        b: (M, D), the reference, which stays.
        after: called after each of the jackknife's groups.
    """
    first, second = as_embeddings("a", a), as_embeddings("b", b)
    _check_widths(first, second)
    reference = _normal(second)

    def distance(rows: Tensor) -> float:
        return _frechet(_normal(first[rows]), reference) if len(rows) > 1 else math.nan

    return jackknife(distance, len(first), after)


def halves(x: Embeddings, seed: int = 0, after: Callable[[], object] = lambda: None) -> Figure:
    """The Fréchet distance between random halves of one set: what it gives where nothing differs.

    Args:
        x: (N, D), N at least 4.
        seed: of the splits.
        after: called after each of the `SPLITS`.

    Returns:
        Mean and standard deviation over the splits, and the number of rows in each half.

    Raises:
        TypeError, ValueError: `x` has another shape, fewer than four rows, or numbers that are not finite.
    """
    rows = as_embeddings("x", x, at_least=4)
    half, generator = len(rows) // 2, torch.Generator().manual_seed(seed)
    found = []
    for _ in range(SPLITS):
        order = torch.randperm(len(rows), generator=generator)
        found.append(_frechet(_normal(rows[order[:half]]), _normal(rows[order[half : 2 * half]])))
        after()
    return Figure(float(np.mean(found)), float(np.std(found, ddof=1)), half)


def kernel_distance(a: Embeddings, b: Embeddings) -> float:
    """The kernel distance between two sets of embeddings.

    With the kernel k(x, y) = exp(-|x - y|^2 / (2 s^2)), where s is the median distance between rows of `b`:

        100 (mean of k(a_i, a_j), i != j  +  mean of k(b_i, b_j), i != j  -  2 mean of k(a_i, b_j))

    Args:
        a: (N, D), N at least 2, a tensor or an array of any floating-point dtype; it is computed in float64.
        b: (M, D), the reference, M at least 2. It sets the kernel's width, so the two are not exchangeable.

    Returns:
        The distance; on average 0 for samples of one distribution, so that it is often slightly negative.

    Raises:
        TypeError, ValueError: a set has another shape, fewer than two rows, or numbers that are not finite;
            or half of the rows of `b` are equal.
    """
    within, across, reference = _kernels(a, b)
    return _kernel_distance(within, across, reference, torch.arange(len(within)))


def kernel_spread(a: Embeddings, b: Embeddings) -> float:
    """How far `kernel_distance` would vary with other sounds in the place of those of `a`; see `jackknife`.

    Args:
        a: (N, D).
        b: (M, D), the reference, which stays.
    """
    within, across, reference = _kernels(a, b)
    return jackknife(lambda rows: _kernel_distance(within, across, reference, rows), len(within))


def jackknife(
    statistic: Callable[[Tensor], float], count: int, after: Callable[[], object] = lambda: None
) -> float:
    """The standard error of a statistic, from its values without each of g groups of the sample (Tukey 1958).

        sqrt((g - 1) / g * sum over groups of (value without the group - mean of these)^2)

    The bootstrap would draw some rows several times. A set with equal rows has a narrower covariance and a
    larger kernel, which shifts both distances by more than their spread.

    Args:
        statistic: its value of the rows with these indices, (n,).
        count: the number of rows, N; there are min(N, `GROUPS`) groups.
        after: called after each group.

    Returns:
        The standard error; NaN if the statistic has no value without some group.
    """
    groups = min(count, GROUPS)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    found = []
    for group in range(groups):
        found.append(statistic(order[torch.arange(count) % groups != group]))
        after()
    values = np.array(found)
    return float(np.sqrt((groups - 1) / groups * ((values - values.mean()) ** 2).sum()))


def as_embeddings(name: str, x: Embeddings, at_least: int = 2) -> Tensor:
    """A set of embeddings, checked, as float64 on the CPU.

    Args:
        name: the argument's name, for error messages.
        x: (N, D).
        at_least: the smallest N.

    Raises:
        TypeError, ValueError: anything else.
    """
    tensor = torch.from_numpy(x) if isinstance(x, np.ndarray) else x
    check_tensor(name, tensor, "(N, D)")
    if len(tensor) < at_least:
        raise ValueError(f"{name} has {len(tensor)} embeddings; a distance needs at least {at_least}")
    return tensor.detach().to("cpu", torch.float64)


def _check_widths(a: Tensor, b: Tensor) -> None:
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"a has {a.shape[1]} dimensions and b has {b.shape[1]}; embed both with one model")


def _normal(x: Tensor) -> _Normal:
    mean = x.mean(0)
    root = (x - mean) / (len(x) - 1) ** 0.5
    # A triangle of D rows has the same R^T R as more rows.
    return _Normal(mean, torch.linalg.qr(root, mode="r").R if len(x) > x.shape[1] else root)


def _frechet(a: _Normal, b: _Normal) -> float:
    spread = a.root.square().sum() + b.root.square().sum()
    shared = torch.linalg.svdvals(a.root @ b.root.T).sum()
    distance = (a.mean - b.mean).square().sum() + spread - 2 * shared
    return max(float(distance), 0.0)  # rounding can leave -1e-16


def _kernels(a: Embeddings, b: Embeddings) -> tuple[Tensor, Tensor, float]:
    """The kernel of all pairs of rows of `a`, (N, N); of `a` and `b`, (N, M); and its mean over `b`."""
    first, second = as_embeddings("a", a), as_embeddings("b", b)
    _check_widths(first, second)
    distances = torch.pdist(second)
    width = float(distances.median())
    if width == 0:
        raise ValueError("half of the embeddings in b are equal; take different sounds as the reference")

    def kernel(x: Tensor) -> Tensor:
        return torch.exp(-x.square() / (2 * width**2))

    return (
        kernel(torch.cdist(first, first)),
        kernel(torch.cdist(first, second)),
        float(kernel(distances).mean()),
    )


def _kernel_distance(within: Tensor, across: Tensor, reference: float, rows: Tensor) -> float:
    n = len(rows)
    if n < 2:
        return math.nan
    inside = within[rows][:, rows]
    own = (inside.sum() - inside.trace()) / (n * (n - 1))
    return KERNEL_SCALE * float(own + reference - 2 * across[rows].mean())
