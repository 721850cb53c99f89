"""Reading adapters: a folder, a file, a repository on the Hub or a state dict -> an `Adapter` for a UNet.

Formats, all of them with diffusers' names of the layers:

    base_model.model.LAYER.lora_A.weight    PEFT's, with adapter_config.json beside it
    unet.LAYER.lora_A.weight                diffusers', its config, if any, in the header of the safetensors
    file unet.LAYER.lora.down.weight             older ones of diffusers, with or without LAYER.alpha
    LAYER.processor.to_q_lora.down.weight   the oldest

A file is not trusted: it is read as a checkpoint's are (`checkpoints.tensors`), everything in it has to fit,
and what does not is reported in one error, before anything is changed.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import torch
from torch import Tensor

from audioldm2.adapters.config import LoraConfig, scaling
from audioldm2.adapters.layers import LowRank
from audioldm2.adapters.state import Adapter, layers_for
from audioldm2.adapters.targets import Target, targets, weight_of
from audioldm2.adapters.writing import (
    DIFFUSERS_METADATA,
    DIFFUSERS_PREFIX,
    DIFFUSERS_WEIGHTS,
    PEFT_CONFIG,
    PEFT_PREFIX,
    PEFT_WEIGHTS,
)
from audioldm2.checkpoints.errors import CheckpointError, MissingCheckpointError
from audioldm2.checkpoints.fill import TensorDict, TensorSource
from audioldm2.checkpoints.hub import Source, repository_folder
from audioldm2.checkpoints.operations import OPERATIONS
from audioldm2.checkpoints.tensors import FLOATS, WeightFiles, read_json
from audioldm2.models.unet import UNet
from audioldm2.quoting import listed, one_line, printable, quoted

# In the order in which they are looked for.
_FILES = (PEFT_WEIGHTS, DIFFUSERS_WEIGHTS, "adapter_model.bin", "pytorch_lora_weights.bin")
_SUFFIXES = (".safetensors", ".bin")
_TENSOR = re.compile(
    r"(?P<layer>.+?)(?:\.lora_(?P<letter>[AB])(?:\.\w+)?|(?P<old>\.lora|_lora)\.(?P<way>down|up))\.weight"
)
_ALPHA = re.compile(r"(?P<layer>.+?)(?P<old>\.lora(?:_A|\.down)?|_lora(?:\.down)?)?(?:\.weight)?\.alpha")
# What else a file can hold, and what it means.
_OTHER_KINDS = {
    r"lora_magnitude_vector|dora_scale": "is a DoRA adapter",
    r"hada_w": "is a LoHa adapter",
    r"lokr_w": "is a LoKr adapter",
    r"^lora_(unet|te\d?)_": "has kohya's names of layers",
    r"^(base_model\.model\.)?text_encoder": "has weights of a text encoder",
    r"modules_to_save": "has whole layers besides LoRA",
    r"\.bias$": "has trained biases",
}


class Given(NamedTuple):
    """An adapter as it was given.

    Attributes:
        tensors: by the names that they have there.
        config: None if there is none.
        where: names it in errors.
    """

    tensors: TensorSource
    config: LoraConfig | None
    where: str


def open_adapter(given: Any, source: Source, subfolder: str, weight_name: str | None) -> Given:
    """Find an adapter, download it if necessary, and read its config and what its tensors are.

    Args:
        given: a state dict, or what `source` was made from.
        source: a folder, a file, or a repository on the Hub.
        subfolder: where it is in there.
        weight_name: the file with its tensors, if there are several.

    Raises:
        CheckpointError: it cannot be found or read, or is of a kind that is not supported.
    """
    if isinstance(given, Mapping):
        if not all(isinstance(name, str) and isinstance(x, Tensor) for name, x in given.items()):
            raise TypeError("the state dict of an adapter must have tensors by name")
        return Given(TensorDict(given), None, "the state dict")
    path = Path(source.name).expanduser()
    if path.is_file():
        return _opened(path)
    if path.is_dir():
        folder = path / subfolder
        names = [p.name for p in folder.iterdir()] if folder.is_dir() else []
        return _opened(folder / _weights_among(names, weight_name, str(folder)))

    def choose(files: Collection[str]) -> list[str]:
        inside = {p.name: str(p) for p in map(PurePosixPath, files) if p.parent == PurePosixPath(subfolder)}
        chosen = _weights_among(inside, weight_name, source.name)
        return [inside[name] for name in (chosen, PEFT_CONFIG) if name in inside]

    candidates = [f"{PurePosixPath(subfolder, name)}" for name in ([weight_name] if weight_name else _FILES)]
    folder = repository_folder(source, choose, candidates) / subfolder
    return _opened(folder / _weights_among([p.name for p in folder.iterdir()], weight_name, source.name))


def _weights_among(names: Collection[str], weight_name: str | None, where: str) -> str:
    """The name of the file with an adapter's tensors."""
    if weight_name is not None:
        if not weight_name.endswith(_SUFFIXES) or PurePosixPath(weight_name).name != weight_name:
            raise CheckpointError(
                f"weight_name must be a .safetensors or .bin file, got {quoted(weight_name)}"
            )
        if weight_name not in names:
            raise MissingCheckpointError(f"{where} has no file {quoted(weight_name)}")
        return weight_name
    for name in _FILES:
        if name in names:
            return name
    for suffix in _SUFFIXES:
        others = sorted(name for name in names if name.endswith(suffix))
        if len(others) == 1:
            return others[0]
        if others:
            raise CheckpointError(
                f"{where} has several weight files; pass weight_name, one of {listed(map(printable, others))}"
            )
    raise MissingCheckpointError(f"{where} has no adapter (looked for {', '.join(_FILES)})")


def _opened(path: Path) -> Given:
    if path.suffix not in _SUFFIXES:
        raise CheckpointError(f"{path} is not a .safetensors or .bin file")
    files = WeightFiles.of(path)
    config = None
    if (path.parent / PEFT_CONFIG).exists() and path.name.startswith("adapter_model."):
        beside = path.parent / PEFT_CONFIG
        config = LoraConfig.from_dict(read_json(beside), str(beside))
    elif path.name in (PEFT_WEIGHTS, "adapter_model.bin"):
        raise MissingCheckpointError(
            f"{path.parent / PEFT_CONFIG} is missing, which says how strong the adapter is"
        )
    elif DIFFUSERS_METADATA in files.metadata:
        try:
            content = json.loads(files.metadata[DIFFUSERS_METADATA])
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{path}: {DIFFUSERS_METADATA} is not JSON ({one_line(error)})") from error
        if not isinstance(content, dict):
            raise CheckpointError(f"{path}: {DIFFUSERS_METADATA} must contain a JSON object")
        own = {
            k.removeprefix(DIFFUSERS_PREFIX): v for k, v in content.items() if k.startswith(DIFFUSERS_PREFIX)
        }
        config = LoraConfig.from_dict(own, str(path)) if own else None
    return Given(files, config, str(path))


class _Names(NamedTuple):
    """Where an adapter's tensors are, by the names that they have in a file.

    Attributes:
        matrices: the names of A and B by layer.
        alphas: the names of alphas by layer.
        wrong: what is not part of an adapter, described.
    """

    matrices: dict[str, dict[str, str]]
    alphas: dict[str, str]
    wrong: list[str]


def _sorted_out(given: Given) -> _Names:
    """Sort an adapter's tensors by their names.

    Raises:
        CheckpointError: it is of a kind that is not supported.
    """
    found = _Names({}, {}, [])
    for name, shape in given.tensors.shapes.items():
        for pattern, kind in _OTHER_KINDS.items():
            if re.search(pattern, name):
                raise CheckpointError(f"{given.where} {kind}, which is not supported ({printable(name)})")
        plain = name.removeprefix(PEFT_PREFIX).removeprefix(DIFFUSERS_PREFIX).replace(".processor.", ".")
        if match := _TENSOR.fullmatch(plain):
            side = match["letter"] or {"down": "A", "up": "B"}[match["way"]]
            sides = found.matrices.setdefault(_layer(match), {})
            if sides.setdefault(side, name) != name:
                found.wrong.append(f"duplicate: {printable(sides[side])} and {printable(name)}")
        elif match := _ALPHA.fullmatch(plain):
            found.alphas[_layer(match)] = name
        else:
            found.wrong.append(f"unexpected: {printable(name)}, shape {quoted(shape)}")
    return found


def _layer(match: re.Match[str]) -> str:
    """diffusers' name of the layer; the oldest format had its own for the output of an attention."""
    old = (match["old"] or "").startswith("_lora")
    return f"{match['layer']}.0" if old and match["layer"].endswith("to_out") else match["layer"]


@torch.inference_mode(False)
def read_adapter(given: Given, unet: UNet) -> Adapter:
    """Make an adapter for a UNet; the UNet is not changed.

    Args:
        given: from `open_adapter`.
        unet: on whose device, and in whose dtype, the adapter is made.

    Raises:
        CheckpointError: something does not fit; the message lists what.
        TypeError: a layer of the UNet cannot have updates.
    """
    source, names, known = given.tensors, _sorted_out(given), targets(unet)
    wrong = names.wrong
    for layer, sides in names.matrices.items():
        wrong += _misfits(layer, sides, known.get(layer), given)
    for layer, name in names.alphas.items():
        if layer not in names.matrices:
            wrong.append(f"unexpected: {printable(name)}, the alpha of a layer that is not there")
        elif source.shapes[name] not in ((), (1,)) or source.types[name] not in FLOATS.values():
            wrong.append(f"wrong shape or type: {printable(name)} must be one number")
    if wrong:
        count = f"{len(wrong)} problem{'s' * (len(wrong) > 1)}"
        raise CheckpointError(f"{given.where} does not fit this UNet ({count}): {listed(wrong, '; ')}")
    if not names.matrices:
        raise CheckpointError(f"{given.where} has no weights of an adapter")
    if isinstance(source, WeightFiles):
        # Each parameter gets memory of its own, so a small file must not stand for many large ones.
        sizes = (
            torch.Size(source.shapes[n]).numel() for sides in names.matrices.values() for n in sides.values()
        )
        if 2 * sum(sizes) > source.nbytes:
            raise CheckpointError(f"{given.where}: the weights share memory: they are larger than the file")
    layers = layers_for(unet, names.matrices)
    use_rslora = given.config is not None and given.config.use_rslora
    updates = {}
    for layer, sides in names.matrices.items():
        a, b = (
            _converted(source.read(sides[side]), layers[layer], unet, sides[side], given) for side in "AB"
        )
        rank = len(a)
        if given.config is not None:
            alpha = given.config.alpha_of(layer)
        elif layer in names.alphas:
            alpha = float(source.read(names.alphas[layer]).reshape(()))
            if not -1e30 < alpha < 1e30:
                raise CheckpointError(
                    f"{given.where}: {printable(names.alphas[layer])} is not a finite number"
                )
        else:
            alpha = _default_alpha(names, source, rank)
        dropout = 0.0 if given.config is None else given.config.dropout
        first, factor = layers[layer].first_row, scaling(alpha, rank, use_rslora)
        updates[layer] = LowRank(
            a, b, first, alpha, factor, dropout, weight_of(unet, layers[layer].path).dtype
        )
    return Adapter(updates, {layer: target.path for layer, target in layers.items()}, use_rslora)


def _misfits(layer: str, sides: Mapping[str, str], target: Target | None, given: Given) -> list[str]:
    """What is wrong with the two matrices of a layer."""
    source = given.tensors
    if target is None:
        return [f"the UNet has no layer {printable(layer)}"]
    if len(sides) < 2:
        return [f"missing: {'B' if 'A' in sides else 'A'} of {layer}"]
    found = [
        f"wrong type: {printable(name)} holds {source.types[name]}"
        for name in sides.values()
        if source.types[name] not in FLOATS.values()
    ]
    shape = source.shapes[sides["A"]]
    rank = shape[0] if shape else 0
    for side, expected in zip("AB", target.shapes(rank), strict=True):
        if source.shapes[sides[side]] != expected or rank < 1:
            got = quoted(source.shapes[sides[side]])
            found.append(f"wrong shape: {printable(sides[side])} has {got}, the UNet needs {expected}")
    if given.config is not None and (said := given.config.rank_of(layer)) != rank:
        found.append(f"wrong rank: {layer} has {rank}, the config says {said}")
    return found


def _default_alpha(names: _Names, source: TensorSource, rank: int) -> float:
    """The alpha of a layer in a file without a config that has none for it.

    As in diffusers: with alphas of other layers, the most frequent one; without any, the layer's rank, which
    is no factor.
    """
    alphas = Counter(float(source.read(name).reshape(())) for name in names.alphas.values())
    return alphas.most_common(1)[0][0] if alphas else rank


def _converted(tensor: Tensor, target: Target, unet: UNet, name: str, given: Given) -> Tensor:
    """A matrix as our layer needs it, in memory of its own, on the layer's device and in its dtype."""
    if target.operation == "squeeze":
        tensor = OPERATIONS[target.operation].apply([tensor])
    weight = weight_of(unet, target.path)
    converted = tensor.detach().to(weight.device, weight.dtype, copy=True).contiguous()
    if not bool(converted.isfinite().all()):
        dtype = str(weight.dtype).removeprefix("torch.")
        raise CheckpointError(f"{given.where}: {printable(name)} has NaN or infinity, in {dtype}")
    return converted
