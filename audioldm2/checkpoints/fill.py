"""Filling a stage with a checkpoint's tensors, as its weight map says."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from typing import Protocol, TypeVar, cast

import torch
from torch import Tensor, nn

from audioldm2.checkpoints.errors import CheckpointError
from audioldm2.checkpoints.tensors import FLOATS
from audioldm2.checkpoints.weight_map import WeightMap, apply
from audioldm2.models.stage import Stage
from audioldm2.quoting import listed, printable
from audioldm2.runtime.precision import parameter_dtype

ModuleT = TypeVar("ModuleT", bound=nn.Module)


class TensorSource(Protocol):
    """Tensors that are read by name; their shapes and types are known before anything is read."""

    shapes: dict[str, tuple[int, ...]]
    types: dict[str, torch.dtype | str]  # a string for a type that parameters cannot have
    nbytes: int  # the memory that the tensors take if no two share it

    def read(self, name: str) -> Tensor:
        """Read a tensor that is converted and then dropped."""

    def map(self, name: str) -> Tensor:
        """Read a tensor that becomes a parameter as it is, backed by the memory-mapped file if possible."""


class TensorDict:
    """A `TensorSource` of tensors that are in memory, such as a state dict."""

    def __init__(self, tensors: Mapping[str, Tensor]):
        self.tensors = tensors
        self.shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        self.types: dict[str, torch.dtype | str] = {name: tensor.dtype for name, tensor in tensors.items()}
        self.nbytes = sum(tensor.nbytes for tensor in tensors.values())

    def read(self, name: str) -> Tensor:
        return self.tensors[name]

    map = read


def fill(
    stage: ModuleT,
    weights: WeightMap,
    source: TensorSource,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> ModuleT:
    """Give a stage that was built on the meta device its tensors.

    All shapes and types are checked before the first tensor is read. Tensors that can be used unchanged stay
    in the memory-mapped file; the others are read one at a time, so that loading peaks at the stage's own
    size.

    Args:
        stage: built on the meta device.
        weights: the stage's weight map.
        source: the checkpoint's tensors.
        dtype: dtype of the parameters; None is the checkpoint's, that of most of its numbers.
        device: where the parameters are placed.

    Returns:
        `stage` itself, in eval mode, all parameters and buffers contiguous.

    Raises:
        CheckpointError: tensors that do not fit (see `WeightMap.plan`), do not hold floating-point numbers,
            or share memory.
    """
    state = stage.state_dict()
    targets = {name: tuple(tensor.shape) for name, tensor in state.items() if tensor.is_floating_point()}
    plan = weights.plan(targets, source.shapes)
    used = sorted({name for recipe in plan.values() for name in recipe.sources})
    wrong = [
        f"wrong type: {printable(name)} holds {source.types[name]}"
        for name in used
        if source.types[name] not in FLOATS.values()
    ]
    if wrong:
        raise CheckpointError(f"{len(wrong)} of the checkpoint's tensors do not fit: {listed(wrong, '; ')}")
    # Each parameter gets memory of its own, so a small file must not stand for many large ones.
    needed = sum(
        math.prod(source.shapes[name]) * cast(torch.dtype, source.types[name]).itemsize for name in used
    )
    if needed > source.nbytes:
        raise CheckpointError("the weights share memory: they are larger than the files that contain them")

    if dtype is None:
        # A stage runs in one dtype, also if a few of its tensors were saved in another.
        numbers: Counter[torch.dtype] = Counter()
        for name in used:
            numbers[cast(torch.dtype, source.types[name])] += math.prod(source.shapes[name])
        dtype = numbers.most_common(1)[0][0] if numbers else torch.float32

    filled: dict[str, Tensor] = {}
    for name, empty in state.items():
        if name not in plan:
            # Integer buffers count training steps (BatchNorm's num_batches_tracked); counting starts anew.
            # Not zeros_like, which imports PyTorch's compiler and sympy for a tensor on the meta device.
            filled[name] = torch.zeros(empty.shape, dtype=empty.dtype, device=device)
            continue
        recipe = plan[name]
        held = cast(torch.dtype, source.types[recipe.sources[0]])
        wanted = dtype
        if isinstance(stage, Stage):
            wanted = parameter_dtype(stage, name, wanted)
        # A tensor that is used as it is must not be read through the short-lived window of the file, which it
        # would keep alive as a whole.
        unchanged = recipe.operation in ("copy", "squeeze") and held == wanted
        read = source.map if unchanged and torch.device(device).type == "cpu" else source.read
        filled[name] = apply(recipe, read).to(device=device, dtype=wanted).contiguous()
    stage.load_state_dict(filled, strict=True, assign=True)
    return stage.eval()
