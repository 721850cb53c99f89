"""Loading and saving checkpoint folders: one stage, or all parts of a pipeline.

    load_pretrained_stage, load_stage, save_stage    a folder with config.json and weights <-> a `Stage`
    load_parts, save_parts                           a folder with model_index.json <-> parts by name

Loading checks before it allocates: a stage is built from its config on the meta device, all shapes and types
of the checkpoint are compared with it, and only then are tensors read. All errors name the file.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, get_type_hints

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from audioldm2.atomic import replacing
from audioldm2.audio.log_mel import ClapFeatureExtractor, ClapFeatureExtractorConfig
from audioldm2.checkpoints.errors import CheckpointError
from audioldm2.checkpoints.fill import fill
from audioldm2.checkpoints.formats import (
    CONFIG_FILES,
    FEATURE_EXTRACTOR,
    INDEX,
    PARTS,
    TOKENIZERS,
    Format,
    StageT,
    check_folders,
    format_of,
    part_classes,
    read_index,
    write_index,
    write_json,
)
from audioldm2.checkpoints.hub import Source, checkpoint_folder, default_dtype
from audioldm2.checkpoints.tensors import WeightFiles, read_json
from audioldm2.checkpoints.weight_map import weight_map
from audioldm2.models.config import check_types
from audioldm2.models.stage import Stage
from audioldm2.runtime.device import available_device
from audioldm2.runtime.precision import check_dtype
from audioldm2.schedulers import SCHEDULERS
from audioldm2.schedulers.base import Scheduler

VOCABULARIES = ("tokenizer.json", "vocab.json", "spiece.model")


# --- one stage


def load_pretrained_stage(
    stage_class: type[StageT],
    source: Source,
    subfolder: str = "",
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> StageT:
    """Find a checkpoint, download it if necessary, and load a stage; see `Stage.from_pretrained`."""
    # A subclass is loaded from the checkpoints of the stage that it extends.
    form = dataclasses.replace(format_of(stage_class), stage=stage_class)
    folder = checkpoint_folder(source, [subfolder])
    dtype = default_dtype(folder) if dtype is None else dtype
    return load_stage(folder / subfolder, form, dtype, device or "cpu", source.variant)


@torch.inference_mode(False)  # parameters made in inference mode could never be trained
def load_stage(
    folder: Path,
    form: Format[StageT],
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    variant: str | None = None,
) -> StageT:
    """Load a stage from a local folder.

    Args:
        folder: holds config.json and weights.
        form: the stage's checkpoint format.
        dtype: dtype of the weights; None keeps the checkpoint's.
        device: where the weights are placed.
        variant: weights of a variant, such as "fp16".

    Returns:
        The stage, in eval mode.

    Raises:
        CheckpointError: config.json is missing, is for another class or has a value that is not supported; or
            the weights are missing, broken or do not fit the config. The message names the file.
        ValueError: the dtype or the device is not supported.
    """
    check_dtype(dtype)
    device = available_device(device)
    path = folder / "config.json"
    content = read_json(path)
    named = content.get("_class_name") or content.get("architectures") or form.class_name
    named = named[0] if isinstance(named, list) else named
    if named not in form.classes:
        raise CheckpointError(f"{path} is for class {named}; class {form.class_name} is needed here")
    try:
        check_types(get_type_hints(form.config), content)
        config = form.config.from_dict(content)
        stage = _built(form, config)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error
    except (TypeError, LookupError, ArithmeticError, RuntimeError, AssertionError) as error:
        # Sizes that a layer, rather than the config, rejects: a division by a size of 0, for example.
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise CheckpointError(
            f"{path}: the sizes are not valid for class {form.class_name} ({reason})"
        ) from error
    files = WeightFiles(folder, variant)
    try:
        return fill(stage, weight_map(form.weights), files, dtype, device)
    except CheckpointError as error:
        raise CheckpointError(f"{folder}: {error}") from error


def _built(form: Format[StageT], config: Any) -> StageT:
    """A stage on the meta device, whose parameters have names, shapes and types, but no memory."""
    with torch.device("meta"), _SkipInit():
        return form.stage(config)


class _SkipInit(TorchFunctionMode):
    """Modules are built without initializing their weights, which are replaced by the checkpoint's.

    The meta device would not initialize them either, but PyTorch would import its compiler for that, which
    takes a second.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


def save_stage(stage: Stage[Any], folder: Path) -> None:
    """Write a stage's config.json and weights such that diffusers or transformers can load them.

    Tensors of the reference that the stage does not have are not written: buffers that are computed here
    (CLAP's position_ids, for example) and weights that the pipeline never uses (GPT-2's word embeddings).
    transformers initializes those when it loads the folder, and reports it.

    Args:
        stage: what to write.
        folder: created if it does not exist; files of an earlier save are replaced.

    Raises:
        TypeError: the stage's class has no checkpoint format, or its parameters are not those of its class;
            nothing has been written then.
    """
    _check_weights(stage)
    _write_stage(stage, folder)


def _write_stage(stage: Stage[Any], folder: Path) -> None:
    from safetensors.torch import save_file

    form = format_of(type(stage))
    weights = weight_map(form.weights).save(_weights_to_save(stage))
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / form.weights_file) as temporary:
        save_file(weights, temporary, metadata={"format": "pt"})
    write_json(folder / "config.json", {**form.identity, **dataclasses.asdict(stage.config)})


def _check_weights(stage: Stage[Any]) -> None:
    """Raise TypeError if a stage's weights are not those that its class has for its config."""
    shapes, expected = (
        {name: weight.shape for name, weight in _floats(one).items()}
        for one in (stage, _built(format_of(type(stage)), stage.config))
    )
    if shapes != expected:
        name = min(name for name, _ in shapes.items() ^ expected.items())
        raise TypeError(
            f"{type(stage).__name__} cannot be saved: its weights are not those of its class, {name!r} for "
            "one; first merge adapters, remove parametrizations and undo quantization"
        )


def _weights_to_save(stage: Stage[Any]) -> dict[str, Tensor]:
    """A stage's weights by name, on the CPU, each in memory of its own."""
    saved: dict[str, Tensor] = {}
    memory: set[int] = set()
    for name, weight in _floats(stage).items():
        weight = weight.detach().cpu()
        address = weight.untyped_storage().data_ptr()
        # A file holds each tensor whole, also those of parameters that share memory.
        saved[name] = weight.clone() if address in memory else weight
        memory.add(address)
    return saved


def _floats(stage: Stage[Any]) -> dict[str, Tensor]:
    """The floating-point tensors of a stage's state dict, which holds other objects after quantization."""
    state: dict[str, Any] = stage.state_dict()
    return {name: x for name, x in state.items() if isinstance(x, Tensor) and x.is_floating_point()}


# --- all parts of a pipeline


def load_parts(
    source: Source, dtype: torch.dtype | None = None, device: torch.device | str | None = None
) -> dict[str, Any]:
    """Find a pipeline's checkpoint, download it if necessary, and load all of its parts.

    Args:
        source: the checkpoint; only the needed files are downloaded.
        dtype: dtype of the weights; None keeps the checkpoint's own ("tiny" is loaded in float32).
        device: where the weights are placed; None is the CPU.

    Returns:
        The stages, tokenizers, feature extractor and scheduler, by their names in model_index.json.

    Raises:
        CheckpointError: the checkpoint cannot be found or read, or a part does not fit; the message names the
            file.
        ValueError: the dtype or the device is not supported.
    """
    device = available_device(device or "cpu")
    check_dtype(dtype)
    folder = checkpoint_folder(source, ["", *part_classes()], first_file=INDEX, check=read_index)
    dtype = default_dtype(folder) if dtype is None else dtype
    classes = read_index(folder)
    check_folders(folder, [*classes])
    parts: dict[str, Any] = {}
    # Importing transformers takes a second, during which weights are read.
    with ThreadPoolExecutor(max_workers=1) as pool:
        tokenizers = {name: pool.submit(load_tokenizer, folder / name, classes[name]) for name in TOKENIZERS}
        for name, forms in PARTS.items():
            form = next(form for form in forms if classes[name] in form.classes)
            parts[name] = load_stage(folder / name, form, dtype, device, source.variant)
        for name, tokenizer in tokenizers.items():
            parts[name] = tokenizer.result()
    for name, file in CONFIG_FILES.items():
        path = folder / name / file
        content = read_json(path)
        try:
            parts[name] = (
                _load_scheduler(content, classes[name]) if name == "scheduler" else _load_extractor(content)
            )
        except (ValueError, TypeError) as error:
            raise CheckpointError(f"{path}: {error}") from error
    return parts


def save_parts(parts: Mapping[str, Any], folder: str | Path) -> None:
    """Write all parts of a pipeline into a folder that diffusers and this package can load.

    Args:
        parts: as `load_parts` returns them.
        folder: created if it does not exist; files of an earlier save are replaced.

    Raises:
        TypeError: a part is of a class that cannot be written, or a stage's parameters are not those of its
            class; nothing has been written then.
    """
    folder = Path(folder)
    forms = {name: _format_of_part(name, parts[name]) for name in PARTS}
    kinds: dict[str, tuple[type, ...]] = {
        "scheduler": tuple(SCHEDULERS.values()),
        "feature_extractor": (ClapFeatureExtractor,),
    }
    for name, classes in kinds.items():
        if not isinstance(parts[name], classes):
            raise TypeError(f"{name} is a {type(parts[name]).__name__}, which this package cannot save")
    for name in TOKENIZERS:
        if not callable(getattr(parts[name], "save_pretrained", None)):
            raise TypeError(f"{name} is a {type(parts[name]).__name__}, which has no save_pretrained")
    for name in PARTS:
        _check_weights(parts[name])
    configs = {
        "feature_extractor": parts["feature_extractor"].config.to_dict(),
        "scheduler": parts["scheduler"].config_dict(),
    }
    for name in PARTS:
        _write_stage(parts[name], folder / name)
    for name in TOKENIZERS:
        parts[name].save_pretrained(folder / name)
    for name, config in configs.items():
        (folder / name).mkdir(exist_ok=True)
        write_json(folder / name / CONFIG_FILES[name], config)
    write_index(
        folder,
        {
            **{name: (form.library, form.class_name) for name, form in forms.items()},
            **{name: ("transformers", type(parts[name]).__name__) for name in TOKENIZERS},
            "feature_extractor": ("transformers", FEATURE_EXTRACTOR),
            "scheduler": ("diffusers", type(parts["scheduler"]).__name__),
        },
    )


def load_tokenizer(folder: Path, class_name: str) -> Any:
    """Load one of transformers' tokenizers.

    Args:
        folder: holds the tokenizer's files.
        class_name: the class that model_index.json names.

    Raises:
        CheckpointError: it cannot be read.
    """
    # Without a vocabulary transformers would make an empty tokenizer.
    if not any((folder / name).is_file() for name in VOCABULARIES):
        raise CheckpointError(
            f"{folder}: the tokenizer cannot be read: it has none of {', '.join(VOCABULARIES)}"
        )
    # Slow to import, and needed for the tokenizers only.
    import transformers

    # Fast tokenizers read tokenizer.json and need no sentencepiece. Their names end in Fast in transformers 4
    # and are the plain names in 5, whose RobertaTokenizerFast splits words into letters before 5.16
    # (transformers issue 47706). VITS has a slow tokenizer only.
    plain = class_name.removesuffix("Fast")
    tokenizer = getattr(transformers, plain)
    if not issubclass(tokenizer, transformers.PreTrainedTokenizerFast):
        tokenizer = getattr(transformers, f"{plain}Fast", tokenizer)
    try:
        return tokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        # transformers documents no errors of its own here: a broken tokenizer.json raises a bare Exception.
        raise CheckpointError(f"{folder}: the tokenizer cannot be read: {error}") from error


def _load_extractor(content: Mapping[str, Any]) -> ClapFeatureExtractor:
    check_types(get_type_hints(ClapFeatureExtractorConfig), content)
    return ClapFeatureExtractor(ClapFeatureExtractorConfig.from_dict(content))


def _load_scheduler(content: Mapping[str, Any], class_name: str) -> Scheduler:
    scheduler = SCHEDULERS[class_name]
    hints = {**get_type_hints(scheduler.__init__), "_use_default_values": tuple[str, ...]}
    # A null may stand for False, as in diffusers' signatures.
    check_types(hints, {key: value for key, value in content.items() if value is not None})
    return scheduler.from_config(content)


def _format_of_part(name: str, stage: Any) -> Format[Any]:
    if isinstance(stage, Stage):
        form = format_of(type(stage))
        if form in PARTS[name]:
            return form
    raise TypeError(f"{name} is a {type(stage).__name__}, which this package cannot save as a {name}")
