"""Building a stage from a config, a weight map and tensors, and the way back."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from audioldm2.atomic import replacing
from audioldm2.checkpoints.errors import CheckpointError
from audioldm2.checkpoints.tensors import FLOATS, WeightFiles, read_json
from audioldm2.checkpoints.weight_map import WeightMap, apply, weight_map
from audioldm2.runtime.cpu import tune
from audioldm2.runtime.device import available_device
from audioldm2.runtime.precision import parameter_dtype

StageT = TypeVar("StageT", bound=nn.Module)
# The types of a config's values, as a reader of config.json knows them.
_IN_WORDS = {
    int: "a whole number from 0 to 2147483647",
    float: "a number",
    str: "a text",
    bool: "true or false",
    types.NoneType: "null",
}


class TensorSource(Protocol):
    """Somewhere tensors are read from by name; shapes and types are known before anything is read."""

    shapes: dict[str, tuple[int, ...]]
    types: dict[str, torch.dtype | str]  # a text for what torch has no dtype for, or no stage a use

    def read(self, name: str) -> Tensor:
        """A tensor to be worked on and let go."""

    def map(self, name: str) -> Tensor:
        """A tensor to be used where it lies."""


class TensorDict:
    """Tensors that are in memory already."""

    def __init__(self, tensors: Mapping[str, Tensor]):
        self.tensors = tensors
        self.shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        self.types: dict[str, torch.dtype | str] = {name: tensor.dtype for name, tensor in tensors.items()}

    def read(self, name: str) -> Tensor:
        return self.tensors[name]

    map = read


class _WithoutDrawing(TorchFunctionMode):
    """Modules are built, but no weights drawn for them, which the checkpoint's will replace.

    On the meta device nothing would be drawn anyway; but PyTorch would import its compiler for it, a second.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


@dataclass(frozen=True)
class Format(Generic[StageT]):
    """How a stage lies in a checkpoint: its classes, its weight map, and what its config.json calls it."""

    stage: type[StageT]
    config: Any  # the stage's config dataclass
    weights: str  # the name of its weight map
    identity: Mapping[str, Any]  # the keys of config.json that name the class
    aliases: tuple[str, ...] = ()  # other classes whose checkpoints hold this stage
    # A submodule that may be read when it is first needed (see `fill`): "audio" belongs to a stage that has
    # `audio_later`, and `audio_tower()`, which reads it.
    later: str = ""

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
    later: str = "",
) -> StageT:
    """Give a stage that was built on the `meta` device its tensors; it is returned in eval mode.

    Every shape and type is checked before the first tensor is read. Tensors that need no work are used where
    they lie in the memory-mapped file; the others are read one at a time, so loading peaks at the stage's own
    size.

    Args:
        stage: the stage, on `meta`.
        weights: its map.
        source: the checkpoint's tensors.
        dtype: None keeps the checkpoint's own.
        device: where the stage is to be.
        later: a submodule that is not read now. It is checked with the rest, and then None; `<later>_later`
            of the stage is a function that reads it, given a dtype and a device.

    Raises:
        CheckpointError: tensors that do not fit (see `WeightMap.plan`), or that do not hold floats.
    """
    state = stage.state_dict()
    targets = {name: tuple(tensor.shape) for name, tensor in state.items() if tensor.is_floating_point()}
    plan = weights.plan(targets, source.shapes)
    used = sorted({name for recipe in plan.values() for name in recipe.sources})
    floats = FLOATS.values()
    wrong = [
        f"wrong type: {name} holds {source.types[name]}" for name in used if source.types[name] not in floats
    ]
    if wrong:
        shown = "\n  ".join(wrong)
        raise CheckpointError(f"{len(wrong)} of the checkpoint's tensors do not fit:\n  {shown}")

    def made(
        names: Iterable[str], dtype: torch.dtype | None, device: torch.device | str
    ) -> dict[str, Tensor]:
        filled = {}
        for name in names:
            if name not in plan:
                # What is no float is a counter of training steps (BatchNorm's), which starts anew.
                filled[name] = torch.zeros_like(state[name], device=device)
                continue
            recipe = plan[name]
            held = source.types[recipe.sources[0]]
            wanted = parameter_dtype(stage, name, dtype or typing.cast(torch.dtype, held))
            # A copy or a view of one tensor can stay where it lies. It must not be read through the window of
            # the file that is soon dropped: it would hold on to all of it.
            view = recipe.operation in ("copy", "squeeze", "transpose")
            in_place = view and held == wanted and torch.device(device).type == "cpu"
            tensor = apply(recipe, source.map if in_place else source.read).to(device=device, dtype=wanted)
            as_it_lies = in_place and recipe.operation == "transpose"  # products take it so
            filled[name] = tensor if as_it_lies else tensor.contiguous()
        return filled

    prefix = f"{later}."
    put_off = [name for name in state if later and name.startswith(prefix)]
    now = [name for name in state if not later or not name.startswith(prefix)]
    unread = getattr(stage, later) if later else None
    if later:
        setattr(stage, later, None)
    stage.load_state_dict(made(now, dtype, device), strict=True, assign=True)
    if unread is None:
        return stage.eval()

    def read(dtype: torch.dtype | None, device: torch.device) -> nn.Module:
        submodule: nn.Module = copy.deepcopy(unread)
        tensors = {name.removeprefix(prefix): t for name, t in made(put_off, dtype, device).items()}
        submodule.load_state_dict(tensors, strict=True, assign=True)
        return submodule.eval()

    def whole(module: nn.Module, *_: object) -> None:
        getattr(module, f"{later}_tower")()

    setattr(stage, f"{later}_later", read)
    # Whoever saves the stage, or loads other weights into it, means all of it.
    stage.register_state_dict_pre_hook(whole)
    stage.register_load_state_dict_pre_hook(whole)
    return stage.eval()


@torch.inference_mode(False)  # weights that were made in that mode would not tell when they are written to
def load_stage(
    folder: Path,
    form: Format[StageT],
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    variant: str | None = None,
    put_off: bool = False,
) -> StageT:
    """A stage from a folder with a config.json and weights.

    Args:
        folder: where they lie.
        form: which stage.
        dtype, device: as for `fill`.
        variant: as for `WeightFiles`.
        put_off: leave `form.later`, if there is one, for when it is needed.

    Raises:
        CheckpointError: see `WeightFiles` and `fill`; also a config.json that is missing, is for another
            class or holds a value that is not supported. The message names the file.
        ValueError: `dtype` or `device` is none that a stage runs in or on.
    """
    check_dtype(dtype)
    device = available_device(device)
    path = folder / "config.json"
    content = read_json(path)
    named = content.get("_class_name") or content.get("architectures") or form.class_name
    named = named[0] if isinstance(named, list) else named
    if named not in (form.class_name, *form.aliases):
        raise CheckpointError(f"{path} is for a {named}; a {form.class_name} is needed here")
    try:
        check_types(typing.get_type_hints(form.config), content)
        config = form.config.from_dict(content)
        with torch.device("meta"), _WithoutDrawing():
            stage = form.stage(config)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error
    except (TypeError, LookupError, ArithmeticError, RuntimeError, AssertionError) as error:
        # Sizes that a layer, not the config, finds impossible: a division by a size of 0, say.
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise CheckpointError(f"{path}: no {form.class_name} has these sizes ({reason})") from error
    files = WeightFiles(folder, variant)
    try:
        fill(stage, weight_map(form.weights), files, dtype, device, form.later if put_off else "")
    except CheckpointError as error:
        raise CheckpointError(f"{folder}: {error}") from error
    tune(stage)
    return stage


def check_dtype(dtype: Any) -> None:
    """Refuse with a ValueError what is no floating-point dtype; None means a checkpoint's own."""
    if dtype is not None and dtype not in FLOATS.values():
        supported = ", ".join(map(str, FLOATS.values()))
        raise ValueError(f"torch_dtype = {dtype!r} is not supported; {supported} are")


def check_types(hints: Mapping[str, Any], content: Mapping[str, Any], within: str = "") -> None:
    """Refuse values of a config's JSON whose type is not the hinted one; keys that are absent are fine.

    Args:
        hints: the type for each key: int, float, str, bool, None, tuple[X, ...], a union or a dataclass.
        content: what was read from JSON.
        within: where in the file `content` stands, to be put before a key's name.

    Raises:
        ValueError: names the key, its value and what is supported.
    """
    for key in (key for key in hints if key in content):
        hint, value = hints[key], content[key]
        if dataclasses.is_dataclass(hint):
            if isinstance(value, Mapping):
                check_types(typing.get_type_hints(hint), value, f"{within}{key}.")
                continue
            fits, expected = value is None, "an object or null"
        else:
            fits, expected = _fits(value, hint), _in_words(hint)
        if not fits:
            raise ValueError(f"{within}{key} = {value!r} is not supported; it has to be {expected}")


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value of a config.json is of a dataclass field's type."""
    options = typing.get_args(hint)
    if isinstance(hint, types.UnionType):
        return any(_fits(value, option) for option in options)
    if options:  # tuple[X, ...], a list in JSON
        return isinstance(value, list | tuple) and all(_fits(entry, options[0]) for entry in value)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and not math.isnan(value)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31
    return isinstance(value, hint)


def _in_words(hint: Any) -> str:
    options = typing.get_args(hint)
    if isinstance(hint, types.UnionType):
        return " or ".join(map(_in_words, options))
    return f"a list (of {_in_words(options[0])})" if options else _IN_WORDS.get(hint, hint.__name__)


def save_stage(stage: nn.Module, folder: Path, form: Format[Any]) -> None:
    """Write a stage's config.json and weights, such that diffusers and transformers load them.

    What the stage does not hold is not written: the buffers that are computed (CLAP's position_ids and such),
    and what the pipeline never reads (GPT-2's word embeddings). transformers makes those up when it loads the
    folder, and says so.
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
