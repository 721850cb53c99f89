"""Checking that a device exists before anything is moved to it."""

from __future__ import annotations

import torch

from audioldm2.quoting import quoted


def named_device(name: torch.device | str) -> torch.device:
    """The device of that name, whether or not this machine has it.

    Raises:
        ValueError: there is no such device.
    """
    try:
        return torch.device(name)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"unknown device {quoted(name)}; use cpu, cuda, cuda:1, mps or xpu") from error


def available_device(name: torch.device | str | int) -> torch.device:
    """The device of that name, if this machine has it.

    Args:
        name: a torch.device, a name such as "cpu", "cuda", "cuda:1" or "mps", or the number of a CUDA device.

    Raises:
        ValueError: the device is unknown, not supported, or not available on this machine.
    """
    if isinstance(name, int) and not isinstance(name, bool):
        name = f"cuda:{name}"  # PyTorch's own meaning of a number depends on the machine
    try:
        device = torch.device(name)
        if isinstance(name, str) and str(device) != name:
            raise RuntimeError(f"PyTorch reads it as {device}")  # cuda:256 as cuda:0
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


def default_accelerator() -> torch.device:
    """The first accelerator of this machine, or the CPU if it has none."""
    for name in ("cuda", "mps", "xpu"):
        try:
            return available_device(name)
        except ValueError:
            continue
    return torch.device("cpu")
