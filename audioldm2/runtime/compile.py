"""Compiling stages, each as one graph: what torch.compile is called on, and the rules that keep it rare.

The compiler works once for each set of shapes. So that a new prompt brings no new shapes, texts are padded to
a multiple of `BUCKET` tokens where a stage is compiled (the pipeline does it; the padding is masked, so the
numbers stay). Another duration, batch or number of candidates does bring new shapes, and compiles anew.

On a GPU the graphs are recorded and replayed (CUDA graphs), which leaves no time between kernels.

What was compiled is kept on disk by PyTorch (TORCHINDUCTOR_CACHE_DIR, else a folder in the temporary one) and
found again by the next process, which then compiles in a fraction of the time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from einops import rearrange, reduce, repeat
from torch import nn

BUCKET = 16  # tokens
LIMIT = 64  # sets of shapes for which one function may be compiled before the compiler refuses; its own is 8
# What is compiled of a stage: a submodule, a method, or all of it. Of CLAP it is the tower that every
# generation needs.
TARGETS: dict[str, str] = {
    "text_encoder": "text",
    "text_encoder_2": "",
    "projection_model": "",
    "language_model": "states",
    "unet": "denoise",
    "vae": "decoder",
    "vocoder": "",
}
# The language model writes into its caches and the projection takes sequences of any length: neither can be
# recorded in a CUDA graph.
UNRECORDED = {"reduce-overhead": "default", "max-autotune": "max-autotune-no-cudagraphs"}


def default_mode(device: torch.device) -> str:
    """CUDA graphs where there is a GPU."""
    return "reduce-overhead" if device.type == "cuda" else "default"


def compile_stage(name: str, stage: nn.Module, mode: str) -> None:
    """Compile what `TARGETS` names of a stage: all, a submodule or a method. It compiles when first called.

    Args:
        name: of the part.
        stage: changed in place.
        mode: as torch.compile's.
    """
    for function in (rearrange, reduce, repeat):
        # Without this the compiler traces through einops itself, which takes longer than all the rest.
        torch.compiler.allow_in_graph(function)
    # Newer releases call it recompile_limit, and know this name too.
    config = torch._dynamo.config
    config.cache_size_limit = max(config.cache_size_limit, LIMIT)
    # The projection alone sees as many tokens as there are: what comes after them must not move.
    dynamic = name == "projection_model"
    if name in ("language_model", "projection_model"):
        mode = UNRECORDED.get(mode, mode)
    target = getattr(stage, TARGETS[name]) if TARGETS[name] else stage
    if isinstance(target, nn.Module):
        target.compile(fullgraph=True, dynamic=dynamic, mode=mode)
    else:
        compiled: Callable[..., object] = torch.compile(target, fullgraph=True, dynamic=dynamic, mode=mode)
        setattr(stage, TARGETS[name], compiled)


def rounded_up(count: int, multiple: int) -> int:
    """The least multiple that is no less than `count`."""
    return -(-count // multiple) * multiple


def check_stages(stages: Sequence[str] | None) -> list[str]:
    """The names of stages to compile, None meaning all.

    Raises:
        ValueError: there is no stage of that name.
    """
    chosen = [*TARGETS] if stages is None else [stages] if isinstance(stages, str) else [*stages]
    for name in chosen:
        if name not in TARGETS:
            raise ValueError(f"there is no stage {name!r} to compile; there are {', '.join(TARGETS)}")
    return chosen
