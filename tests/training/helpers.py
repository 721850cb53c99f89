"""What the tests of the losses share."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from tests.helpers import seeded

Losses = dict[str, Tensor]


def gradients(module: nn.Module) -> list[Tensor]:
    """The gradients of all parameters, copied."""
    return [parameter.grad.clone() for parameter in module.parameters()]


def descend(
    module: nn.Module, loss: Callable[[torch.Generator], Losses], steps: int, rate: float
) -> dict[str, list[float]]:
    """Train for a few steps with Adam, as `audioldm2.training.loop.train` does but without files.

    Returns:
        Every loss in each step.
    """
    optimizer = torch.optim.Adam(module.parameters(), lr=rate, betas=(0.5, 0.9))
    curves: dict[str, list[float]] = {}
    for step in range(steps):
        losses = loss(seeded(step))
        optimizer.zero_grad()
        losses["loss"].backward()
        optimizer.step()
        for key, value in losses.items():
            curves.setdefault(key, []).append(value.item())
    return curves
