"""Building a stage from a config, a weight map and tensors, and the way back."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn

from audioldm2.atomic import replacing
from audioldm2.checkpoints.errors import CheckpointError
from audioldm2.checkpoints.tensors import WeightFiles, read_json
from audioldm2.checkpoints.weight_map import WeightMap, apply, weight_map
from audioldm2.runtime.precision import parameter_dtype

StageT = TypeVar("StageT", bound=nn.Module)


class TensorSource(Protocol):
    """Somewhere tensors are read from by name; shapes are known before anything is read."""

    shapes: dict[str, tuple[int, ...]]

    def read(self, name: str) -> Tensor:
        """A tensor to be worked on and let go."""

    def map(self, name: str) -> Tensor:
        """A tensor to be used where it lies."""


class TensorDict:
    """Tensors that are in memory already."""

    def __init__(self, tensors: Mapping[str, Tensor]):
        self.tensors = tensors
        self.shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}

    def read(self, name: str) -> Tensor:
        return self.tensors[name]

    map = read


@dataclass(frozen=True)
class Format(Generic[StageT]):
    """How a stage lies in a checkpoint: its classes, its weight map, and what its config.json calls it."""

    stage: type[StageT]
    config: Any  # the stage's config dataclass
    weights: str  # the name of its weight map
    identity: Mapping[str, Any]  # the keys of config.json that name the class
    aliases: tuple[str, ...] = ()  # other classes whose checkpoints hold this stage

    @property
    def class_name(self) -> str:
        name: str = self.identity.get("_class_name") or self.identity["architectures"][0]
        return name


def fill(
    stage: StageT,
    weights: WeightMap,
    source: TensorSource,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> StageT:
    """Give a stage that was built on the `meta` device its tensors; it is returned in eval mode.

    Every shape is checked before the first tensor is read (see `WeightMap.plan`, also for the error raised).
    Tensors that need no work are used where they lie in the memory-mapped file; the others are read one at a
    time, so loading peaks at the stage's own size.

    Args:
        stage: the stage, on `meta`.
        weights: its map.
        source: the checkpoint's tensors.
        dtype: None keeps the checkpoint's own.
        device: where the stage is to be.
    """
    state = stage.state_dict()
    targets = {name: tuple(tensor.shape) for name, tensor in state.items() if tensor.is_floating_point()}
    filled = {}
    for name, recipe in weights.plan(targets, source.shapes).items():
        tensor = source.map(recipe.sources[0])
        wanted = parameter_dtype(stage, name, dtype or tensor.dtype)
        in_place = (
            recipe.operation == "copy" and tensor.dtype == wanted and torch.device(device).type == "cpu"
        )
        if not in_place:
            tensor = apply(recipe, source.read).to(device=device, dtype=wanted).contiguous()
        filled[name] = tensor
    # What is no float is a counter of training steps (BatchNorm's), which starts anew.
    filled |= {n: torch.zeros_like(t, device=device) for n, t in state.items() if not t.is_floating_point()}
    stage.load_state_dict(filled, strict=True, assign=True)
    return stage.eval()


def load_stage(
    folder: Path,
    form: Format[StageT],
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    variant: str | None = None,
) -> StageT:
    """A stage from a folder with a config.json and weights.

    Raises:
        CheckpointError: see `WeightFiles` and `WeightMap.plan`; also a config.json that is missing, is for
            another
            class or holds a value that is not supported. The message names the folder.
    """
    content = read_json(folder / "config.json")
    named = content.get("_class_name") or (content.get("architectures") or [form.class_name])[0]
    if named not in (form.class_name, *form.aliases):
        raise CheckpointError(
            f"{folder / 'config.json'} is for a {named}; a {form.class_name} is needed here"
        )
    try:
        config = form.config.from_dict(content)
        with torch.device("meta"):
            stage = form.stage(config)
    except (ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{folder / 'config.json'}: {error}") from error
    try:
        return fill(stage, weight_map(form.weights), WeightFiles(folder, variant), dtype, device)
    except CheckpointError as error:
        raise CheckpointError(f"{folder}: {error}") from error


def save_stage(stage: nn.Module, folder: Path, form: Format[Any]) -> None:
    """Write a stage's config.json and weights, such that diffusers and transformers load them.

    What the stage does not hold is not written: GPT-2's word embeddings, for one, which the pipeline never
    reads. transformers makes those up when it loads the folder, and says so.
    """
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.detach().cpu() for name, tensor in stage.state_dict().items()}
    tensors = weight_map(form.weights).save({n: t for n, t in state.items() if t.is_floating_point()})
    name = "diffusion_pytorch_model" if "_class_name" in form.identity else "model"
    with replacing(folder / f"{name}.safetensors") as temporary:
        save_file(tensors, temporary, metadata={"format": "pt"})
    write_json(folder / "config.json", {**form.identity, **_plain(dataclasses.asdict(stage.config))})  # type: ignore[call-overload]


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _plain(config: dict[str, Any]) -> dict[str, Any]:
    """A config as JSON holds it (tuples are lists there)."""
    plain: dict[str, Any] = json.loads(json.dumps(config))
    return plain
