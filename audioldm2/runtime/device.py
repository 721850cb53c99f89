"""Devices by name."""

from __future__ import annotations

import torch


def available_device(name: torch.device | str) -> torch.device:
    """The device of that name.

    Raises:
        ValueError: there is no such kind of device, or none on this machine.
    """
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"no device {str(name)!r}; there are cpu, cuda, cuda:1, mps, ...") from error
    if device.type not in ("cpu", "cuda", "mps", "xpu"):
        raise ValueError(f"device {device} is none to make sound on; there are cpu, cuda, cuda:1, mps, ...")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"device {device} is not there: this machine shows {torch.cuda.device_count()} CUDA devices"
        )
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ValueError("device mps is not there: this machine or this PyTorch has no Metal")
    if device.type == "xpu" and not torch.xpu.is_available():
        raise ValueError("device xpu is not there: this machine or this PyTorch has none")
    return device
