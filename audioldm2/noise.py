"""Gaussian noise from PyTorch's generators, drawn as diffusers draws it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from audioldm2.quoting import quoted

Generators = torch.Generator | Sequence[torch.Generator] | None


def randn(
    shape: Sequence[int],
    generator: Generators = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Gaussian noise, the same numbers that diffusers draws from the same generator.

    A CPU generator draws on the CPU and the result is moved to `device`, so a seed gives the same noise on
    every device.

    Args:
        shape: (B, ...).
        generator: one generator for the batch, or a list with one generator for each item; PyTorch's global
            generator by default.
        device: where the noise is returned; the CPU by default.
        dtype: PyTorch's default dtype by default.

    Returns:
        Noise of shape `shape`.

    Raises:
        ValueError: the list has the wrong length, or a generator belongs to another accelerator.
    """
    device = torch.device("cpu" if device is None else device)
    if generator is None or isinstance(generator, torch.Generator):
        return _draw(shape, generator, device, dtype)
    if len(generator) == 1:
        return _draw(shape, generator[0], device, dtype)
    if len(generator) != shape[0]:
        raise ValueError(
            f"got a list of {len(generator)} generators for a batch of {shape[0]}; pass one generator, "
            "or one for each item"
        )
    return torch.cat([_draw((1, *shape[1:]), one, device, dtype) for one in generator])


def check_generators(generator: Any, batch: int) -> None:
    """Check what a caller passes as `generator`.

    Args:
        generator: None, a generator, or a list with one for each of `batch` sounds.
        batch: number of sounds.

    Raises:
        TypeError: it is something else.
        ValueError: the list has another length.
    """
    if generator is None or isinstance(generator, torch.Generator):
        return
    if not isinstance(generator, list | tuple) or not all(isinstance(g, torch.Generator) for g in generator):
        raise TypeError(
            f"generator must be a torch.Generator or a list of them, got {quoted(generator)}; for a seed "
            "pass torch.Generator().manual_seed(seed)"
        )
    if len(generator) != batch:
        raise ValueError(f"{len(generator)} generators for {batch} waveforms; give one, or one per waveform")


def _draw(
    shape: Sequence[int], generator: torch.Generator | None, device: torch.device, dtype: torch.dtype | None
) -> Tensor:
    if generator is None or generator.device.type == device.type:
        return torch.randn(shape, generator=generator, device=device, dtype=dtype)
    if generator.device.type != "cpu":
        raise ValueError(
            f"a generator on {generator.device.type} cannot draw noise for {device}; create it on the CPU"
        )
    return torch.randn(shape, generator=generator, device="cpu", dtype=dtype).to(device)
