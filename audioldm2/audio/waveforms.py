"""Checks of waveforms that come from the caller. The error is one line that names the argument."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

SILENCE = 1e-4  # a peak of -80 dB, above the noise of 16-bit samples; anything softer is silent


def check_waveform(name: str, value: Any) -> None:
    """Check that a value is a waveform of shape (..., samples).

    Args:
        name: the argument's name, for error messages.
        value: what was passed.

    Raises:
        TypeError: it is not a dense floating-point tensor.
        ValueError: it has no sample axis, no samples, NaN or infinity.
    """
    if not isinstance(value, Tensor):
        hint = "; convert it with torch.from_numpy" if type(value).__module__ == "numpy" else ""
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}{hint}")
    if not value.is_floating_point():
        raise TypeError(f"{name} must be a floating-point tensor, got {value.dtype}")
    if value.layout != torch.strided or value.is_meta:
        kind = "a meta tensor, which has no values" if value.is_meta else f"layout {value.layout}"
        raise TypeError(f"{name} must be a dense tensor, got {kind}")
    if value.dim() == 0:
        raise ValueError(f"{name} must have shape (..., samples), got a single number")
    if value.numel() == 0:
        raise ValueError(f"{name} has no samples: its shape is {tuple(value.shape)}")
    check_finite_samples(name, value)


def check_finite_samples(name: str, value: Tensor) -> None:
    """Raise ValueError if a waveform has NaN or infinite samples."""
    # The extremes are NaN if one sample is. Finding them is ten times faster than counting.
    extremes = torch.stack(torch.aminmax(value.detach()))
    if not torch.isfinite(extremes).all():
        invalid = value.numel() - int(torch.isfinite(value).sum())
        raise ValueError(f"{invalid} of {value.numel()} samples in {name} are NaN or infinite")
