"""Layers with low-rank updates (LoRA, Hu et al. 2022, "Low-Rank Adaptation of Large Language Models", eq. 3).

    h = W x + scale · B A x,    A (r, in), B (rows, r), r much smaller than both

A layer with updates is the same object as without them: `attach` changes its class, as
torch.nn.utils.parametrize does, and gives it the updates as submodules. So its weight, its hooks and its
place in the UNet stay as they are, while everything that goes through the UNet's parameters (moving, casting,
offload, compiling, optimizers) meets the updates, too. `detach` makes it the plain layer again.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LowRank(nn.Module):
    """An update of some rows of a layer's weight: scale · B A.

    Args:
        a: A, (r, in) of a linear layer, (r, channels, height, width) of a convolution.
        b: B, (rows, r), or (rows, r, 1, 1) of a convolution.
        first_row: the first of the weight's rows that are updated.
        alpha: the numerator of `scaling`, kept for saving.
        scaling: alpha / r, or alpha / sqrt(r) of a rank-stabilized adapter (Kalajdzievski 2023).
        dropout: the share of the input that is set to zero in training.
        base_dtype: the dtype of the layer's weight.

    Attributes:
        scale: the weight that the caller gave the adapter, times `scaling`.
    """

    def __init__(
        self,
        a: Tensor,
        b: Tensor,
        first_row: int,
        alpha: float,
        scaling: float,
        dropout: float,
        base_dtype: torch.dtype,
    ):
        super().__init__()
        self.a = nn.Parameter(a)
        self.b = nn.Parameter(b)
        self.first_row = first_row
        self.alpha = alpha
        self.scaling = self.scale = scaling
        self.dropout = dropout
        self.base_dtype = base_dtype

    @property
    def rank(self) -> int:
        """r."""
        return len(self.a)

    def input(self, x: Tensor) -> Tensor:
        """What A is applied to: a layer's input, in A's dtype."""
        x = x.to(self.a.dtype)
        return F.dropout(x, self.dropout) if self.training and self.dropout else x

    def added(self, output: Tensor, update: Tensor, dim: int) -> Tensor:
        """A layer's output, plus this update's share of it.

        Args:
            output: W x; may be written to.
            update: B A x.
            dim: the axis of the weight's rows.
        """
        rows = len(self.b)
        if rows == output.shape[dim]:
            return output + self.scale * update.to(output.dtype)
        output.narrow(dim, self.first_row, rows).add_(update, alpha=self.scale)
        return output

    def product(self) -> Tensor:
        """B A, of the shape of the updated rows, in float32 or better."""
        dtype = torch.promote_types(self.a.dtype, torch.float32)
        product = self.b.detach().flatten(1).to(dtype) @ self.a.detach().flatten(1).to(dtype)
        return product.view(len(self.b), *self.a.shape[1:])

    def follow(self, weight: Tensor) -> None:
        """Move to where a layer's weight is, and convert to its dtype if that has changed in the meantime."""
        if weight.dtype != self.base_dtype:
            self.to(weight.dtype)
            self.base_dtype = weight.dtype
        self.to(weight.device)


class LoraLinear(nn.Linear):
    """A linear layer with updates."""

    updates: Sequence[LowRank]

    def forward(self, x: Tensor) -> Tensor:
        output = super().forward(x)
        for update in self.updates:
            output = update.added(output, F.linear(F.linear(update.input(x), update.a), update.b), dim=-1)
        return output


class LoraConv2d(nn.Conv2d):
    """A 2D convolution with updates. A has the layer's kernel size and stride, B is a 1x1 convolution."""

    updates: Sequence[LowRank]

    def forward(self, x: Tensor) -> Tensor:
        output = super().forward(x)
        for update in self.updates:
            hidden = F.conv2d(update.input(x), update.a, None, self.stride, self.padding, self.dilation)
            output = update.added(output, F.conv2d(hidden, update.b), dim=1)
        return output


_WITH_UPDATES: dict[type[nn.Module], type[nn.Module]] = {nn.Linear: LoraLinear, nn.Conv2d: LoraConv2d}
_WITHOUT = {adapted: plain for plain, adapted in _WITH_UPDATES.items()}


def can_have_updates(layer: nn.Module) -> bool:
    """Whether `attach` can give a layer updates: it is a plain layer of PyTorch's, or has updates already."""
    return type(layer) in _WITH_UPDATES or type(layer) in _WITHOUT


def attach(layer: nn.Module, updates: Sequence[LowRank]) -> None:
    """Give a layer these updates, in place of those that it has; none make it the plain layer again.

    Args:
        layer: see `can_have_updates`.
        updates: of its weight's rows.
    """
    weight: Tensor = layer.weight  # type: ignore[assignment]
    for update in getattr(layer, "updates", ()):
        update.base_dtype = weight.dtype  # it was converted together with the layer
    for update in updates:
        update.follow(weight)
        update.train(layer.training)
    if updates:
        layer.updates = nn.ModuleList(updates)
        layer.__class__ = _WITH_UPDATES.get(type(layer), type(layer))
    elif type(layer) in _WITHOUT:
        del layer.updates
        layer.__class__ = _WITHOUT[type(layer)]
