"""Compiling stages with torch.compile, each as one graph, and calling them with shapes that rarely change.

torch.compile compiles again for each new set of input shapes. To keep these few, texts are padded to a
multiple of `TOKEN_BUCKET` tokens before they enter a compiled stage, and the result is cut back (the padding
is masked, so it does not change the result). Another duration, batch size or number of candidates does
compile again.

On a GPU the graphs are recorded and replayed (CUDA graphs), which leaves no gaps between kernels. Every
replay writes its result into the same buffers, so results are copied.

PyTorch caches what it compiled on disk (TORCHINDUCTOR_CACHE_DIR, by default a temporary folder), so the next
process compiles in a fraction of the time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange, reduce, repeat
from torch import Tensor, nn

TOKEN_BUCKET = 16
# Sets of shapes for which a function may be compiled before PyTorch gives up on it; its default is 8.
MAX_SHAPES = 64
# The submodule of each stage that is compiled, "" for the whole stage. CLAP's audio tower is not: only
# ranking needs it.
TARGETS: dict[str, str] = {
    "text_encoder": "text",
    "text_encoder_2": "",
    "projection_model": "",
    "language_model": "",
    "unet": "",
    "vae": "decoder",
    "vocoder": "",
}
# Compiled for sequences of any length and not recorded in CUDA graphs; GPT-2 also writes into its caches.
DYNAMIC = ("projection_model", "language_model")
WITHOUT_CUDA_GRAPHS = {"reduce-overhead": "default", "max-autotune": "max-autotune-no-cudagraphs"}


def default_mode(device: torch.device) -> str:
    """torch.compile's mode on a device: with CUDA graphs on a GPU."""
    return "reduce-overhead" if device.type == "cuda" else "default"


def check_stage_names(stages: Sequence[str] | None) -> list[str]:
    """The names of the stages to compile; None means all.

    Raises:
        ValueError: a name that is not a stage's.
    """
    chosen = [*TARGETS] if stages is None else [stages] if isinstance(stages, str) else [*stages]
    for name in chosen:
        if name not in TARGETS:
            raise ValueError(f"there is no stage {name!r} to compile; choose from {', '.join(TARGETS)}")
    return chosen


def compile_stage(name: str, stage: nn.Module, mode: str) -> None:
    """Mark a stage, or its submodule in `TARGETS`, to be compiled at its first call (`nn.Module.compile`).

    Args:
        name: which part of the pipeline the stage is.
        stage: the stage; its parameters and its state dict do not change.
        mode: torch.compile's.
    """
    for function in (rearrange, reduce, repeat):
        # Otherwise the compiler traces einops' own code, which takes longer than everything else.
        torch.compiler.allow_in_graph(function)
    # Newer releases call it recompile_limit and still accept this name.
    config = torch._dynamo.config
    config.cache_size_limit = max(config.cache_size_limit, MAX_SHAPES)
    dynamic = name in DYNAMIC
    mode = WITHOUT_CUDA_GRAPHS.get(mode, mode) if dynamic else mode
    target = stage.get_submodule(TARGETS[name])
    target.compile(fullgraph=True, dynamic=dynamic, mode=mode)


# --- calling compiled stages


def rounded_up(count: int, multiple: int) -> int:
    """The smallest multiple that is at least `count`."""
    return -(-count // multiple) * multiple


class CompiledStage:
    """A wrapper through which the pipeline calls a compiled stage; it copies the results.

    Attributes (`config`, `parameters`, ...) are those of the stage.
    """

    def __init__(self, stage: Any):
        self.stage = stage

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stage, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        result = self.stage(*args, **kwargs)
        return result.clone() if isinstance(result, Tensor) else tuple(x.clone() for x in result)


class CompiledClap(CompiledStage):
    """CLAP; texts are padded to a multiple of `TOKEN_BUCKET`."""

    def text_features(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        tower = self.stage.text
        length = min(rounded_up(input_ids.shape[1], TOKEN_BUCKET), tower.max_tokens)
        added = (0, length - input_ids.shape[1])
        ids = F.pad(input_ids, added, value=tower.pad_token_id)
        features: Tensor = self.stage.text_features(ids, F.pad(attention_mask, added))
        return features.clone()


class CompiledSecondEncoder(CompiledStage):
    """T5 or VITS; texts are padded to a multiple of `TOKEN_BUCKET`, and the padding's states cut off."""

    def __call__(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        length = input_ids.shape[1]
        added = (0, rounded_up(length, TOKEN_BUCKET) - length)
        states: Tensor = self.stage(F.pad(input_ids, added), F.pad(attention_mask, added))
        return states[:, :length].clone()


class CompiledUNet(CompiledStage):
    """The UNet; the second encoder's states are padded to a multiple of `TOKEN_BUCKET`."""

    @property
    def contexts(self) -> Callable[[Tensor, Tensor, Tensor], Any]:
        """`UNet.contexts`. A property, so that a wrapped UNet without that method has none here either."""
        compute = self.stage.contexts

        def padded(vectors: Tensor, states: Tensor, mask: Tensor) -> Any:
            added = rounded_up(states.shape[1], TOKEN_BUCKET) - states.shape[1]
            return compute(vectors, F.pad(states, (0, 0, 0, added)), F.pad(mask, (0, added)))

        return padded

    def __call__(self, sample: Tensor, timestep: Tensor, **kwargs: Any) -> Tensor | tuple[Tensor, ...]:
        # The timestep is copied: it is a view into a longer tensor, and Inductor specializes on alignment.
        result = self.stage(sample, timestep.clone(), **kwargs)
        if isinstance(result, Tensor):
            return result.clone()
        # With `level`, also the features; a foreign UNet's prediction may come in a tuple of one.
        copies = tuple(x.clone() for x in result)
        return copies if len(copies) > 1 else copies[0]


class CompiledVAE(CompiledStage):
    """The VAE; only the decoder is compiled."""

    def decode(self, latents: Tensor) -> Tensor:
        mel: Tensor = self.stage.decode(latents)
        return mel.clone()


_WRAPPERS: dict[str, type[CompiledStage]] = {
    "text_encoder": CompiledClap,
    "text_encoder_2": CompiledSecondEncoder,
    "unet": CompiledUNet,
    "vae": CompiledVAE,
}


def compiled(name: str, stage: nn.Module) -> CompiledStage:
    """The wrapper through which the pipeline calls a stage that was compiled."""
    return _WRAPPERS.get(name, CompiledStage)(stage)
