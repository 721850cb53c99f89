"""Checking that a device exists before anything is moved to it."""

from __future__ import annotations

import torch


def available_device(name: torch.device | str | int) -> torch.device:
    """The device of that name, if this machine has it.

    Args:
        name: a torch.device, a name such as "cpu", "cuda", "cuda:1" or "mps", or the index of a CUDA device.

    Raises:
        ValueError: the device is unknown, not supported, or not available on this machine.
    """
    try:
        device = torch.device("cuda", name) if isinstance(name, int) else torch.device(name)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"unknown device {str(name)!r}; use cpu, cuda, cuda:1, mps or xpu") from error
    if device.type not in ("cpu", "cuda", "mps", "xpu"):
        raise ValueError(f"device {device} is not supported; use cpu, cuda, cuda:1, mps or xpu")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"device {device} is not available: PyTorch sees {torch.cuda.device_count()} CUDA devices"
        )
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ValueError("device mps is not available: this machine or this build of PyTorch has no Metal")
    if device.type == "xpu" and not torch.xpu.is_available():
        raise ValueError(
            "device xpu is not available: this machine has no Intel GPU, or this build of PyTorch no support"
        )
    return device
