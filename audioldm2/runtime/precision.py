"""Which numbers may be halved.

Everything runs in the dtype that is asked for, from the token embeddings to the waveform. What stays float32
all the same, and why:

* The parameters that a stage names in `float32_parameters` (fnmatch patterns), where float16 is asked for.
  That is the last matrix of each of T5's feed-forwards, whose results outgrow float16 (largest number 65504);
  T5 also adds up its blocks in float32. bfloat16 has float32's range and keeps nothing.
* DPM-Solver++'s arithmetic, a few operations a step: it takes differences of estimates that are nearly alike.
  Coefficients are float64 numbers of Python's.
* The sinusoids of the time embedding: timesteps up to 999 are no float16 numbers to multiply with.
* Means and variances of norms, and softmax: inside PyTorch's own kernels, and in `VAE.decode_in_chunks`.
* The waveform that comes out. CLAP's log-mel front end for ranking is float64: quiet bands beside loud ones
  lie below float32's noise.
"""

from __future__ import annotations

from fnmatch import fnmatchcase

import torch
from torch import nn


def parameter_dtype(stage: nn.Module | type[nn.Module], name: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype of the parameter `name` when `stage` is run in `dtype`."""
    patterns = getattr(stage, "float32_parameters", ())
    if dtype == torch.float16 and any(fnmatchcase(name, pattern) for pattern in patterns):
        return torch.float32
    return dtype


def cast(stage: nn.Module, dtype: torch.dtype) -> None:
    """Turn a stage's parameters and buffers into `dtype`, in place, one tensor at a time."""
    tensors = [*stage.named_parameters(), *stage.named_buffers()]
    for name, tensor in tensors:
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(parameter_dtype(stage, name, dtype))


def stage_dtype(stage: nn.Module) -> torch.dtype:
    """The dtype a stage runs in: that of its first parameter that may be halved."""
    for name, parameter in stage.named_parameters():
        if parameter_dtype(stage, name, torch.float16) == torch.float16:
            return parameter.dtype
    return torch.float32


def stage_device(stage: nn.Module) -> torch.device:
    return next(stage.parameters()).device
