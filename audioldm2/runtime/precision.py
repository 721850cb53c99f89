"""Which dtype each parameter has when a stage runs in float32, bfloat16 or float16.

Everything runs in the requested dtype, from the token embeddings to the waveform, except for the following:

* In float16, the parameters that a stage lists in `float32_parameters` (fnmatch patterns) stay in float32:
  the last matrix of each feed-forward layer in T5, whose outputs exceed the largest float16 number, 65504.
  T5's residual stream is float32, too. bfloat16 has the range of float32 and needs no exception.
* The latents between the steps are float32, and so are guidance and the sampler's few operations, whose
  coefficients are Python floats (float64). Only the UNet gets the latents in its own dtype. With many steps,
  each changes the latents by little more than their rounding errors would be: with 200 steps of DPM-Solver++
  in bfloat16, the latents of "tiny" are 0.7 % from those in float32, and 4.2 % if they are bfloat16 between
  the steps (8 sounds). With 20 steps it makes no difference: 1.6 and 1.5 %.
* On a CPU, attention with narrow heads in bfloat16 is computed in float32 (see `models.layers.attention`).
* The sinusoids of the time embedding are computed in float32: float16 is too coarse for timesteps up to 999.
* Statistics of normalization layers and softmax are computed in float32, inside PyTorch's kernels and in
  `VAE.decode_in_chunks`.
* The waveform is returned in float32. CLAP's log-mel front end works in float64, because rounding errors of
  loud mel bands would drown quiet ones in float32.
"""

from __future__ import annotations

from fnmatch import fnmatchcase
from itertools import chain
from typing import Any

import torch
from torch import nn

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def check_dtype(dtype: Any) -> None:
    """Check that a stage can run in a dtype; None stands for a checkpoint's own.

    Raises:
        ValueError: it is not one of `DTYPES`.
    """
    if dtype is not None and dtype not in DTYPES:
        supported = ", ".join(map(str, DTYPES))
        raise ValueError(f"torch_dtype = {dtype!r} is not supported; use one of {supported}")


def parameter_dtype(stage: nn.Module | type[nn.Module], name: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype of the parameter or buffer `name` when `stage`, perhaps in wrappers, runs in `dtype`."""
    while isinstance(stage, nn.Module) and not hasattr(stage, "float32_parameters"):
        child, _, rest = name.partition(".")
        inner = stage._modules.get(child)
        if inner is None:
            break
        stage, name = inner, rest
    patterns = getattr(stage, "float32_parameters", ())
    if dtype == torch.float16 and any(fnmatchcase(name, pattern) for pattern in patterns):
        return torch.float32
    return dtype


def cast(stage: nn.Module, dtype: torch.dtype) -> None:
    """Convert a stage's parameters and buffers to `dtype` in place, one tensor at a time to save memory."""
    tensors = [*stage.named_parameters(), *stage.named_buffers()]
    for name, tensor in tensors:
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(parameter_dtype(stage, name, dtype))


def stage_dtype(stage: nn.Module) -> torch.dtype:
    """The dtype that a stage runs in: that of its first parameter that float16 makes no exception for."""
    for name, parameter in stage.named_parameters():
        if parameter.is_floating_point() and parameter_dtype(stage, name, torch.float16) == torch.float16:
            return parameter.dtype
    return torch.float32


def stage_device(stage: nn.Module) -> torch.device:
    """The device of a stage's parameters; the CPU if it has none."""
    tensor = next(chain(stage.parameters(), stage.buffers()), None)
    return torch.device("cpu") if tensor is None else tensor.device
