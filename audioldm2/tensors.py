"""Checks of the tensors that a caller passes and of those that a stage returns."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class NonFiniteError(ValueError, FloatingPointError):
    """Numbers that were finite became NaN or infinite; the message says in which stage."""


def check_finite(stage: str, x: Tensor, causes: str = "weights and config") -> None:
    """Check that a stage returned finite numbers.

    Args:
        stage: the part that computed `x`, for the error message.
        x: what it returned, of any shape.
        causes: what the message says to check, apart from the dtype.

    Raises:
        NonFiniteError: `x` contains NaN or infinity.
    """
    if not bool(x.isfinite().all()):
        raise NonFiniteError(
            f"{stage} turned finite numbers into NaN or infinity, in {str(x.dtype).removeprefix('torch.')}; "
            f"check its {causes}, or use another dtype"
        )


def check_tensor(name: str, value: Any, shape: str, floating: bool = True) -> None:
    """Check a tensor that a caller passes: a dense one on a device, with finite numbers.

    Args:
        name: the argument's name, for error messages.
        value: the argument.
        shape: what its dimensions are, for error messages, such as "(B, N, width)".
        floating: whether it must be floating-point; otherwise integers and booleans are allowed, too.

    Raises:
        TypeError: it is not a tensor.
        ValueError: it has the wrong number of dimensions, no elements, the wrong kind of numbers, or NaN or
            infinity; or it is sparse or on the meta device.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor of shape {shape}, got {type(value).__name__}")
    if value.layout != torch.strided or value.is_meta:
        kind = "meta" if value.is_meta else str(value.layout).removeprefix("torch.")
        raise ValueError(f"{name} is a {kind} tensor; pass a dense one with values")
    if value.dim() != shape.count(",") + 1 or value.numel() == 0:
        raise ValueError(f"{name} has shape {tuple(value.shape)}; it must be {shape}, and not empty")
    if value.is_complex() or (floating and not value.is_floating_point()):
        kind = "floating-point" if floating else "real"
        raise ValueError(f"{name} must be {kind}, got {str(value.dtype).removeprefix('torch.')}")
    if value.is_floating_point() and not bool(value.isfinite().all()):
        raise ValueError(f"{name} has numbers that are not finite (NaN or infinity)")
