"""Loading and saving checkpoint folders: one stage, or all parts of a pipeline.

    load_pretrained_stage, load_stage, save_stage    a folder with config.json and weights <-> a `Stage`
    load_parts, save_parts                           a folder with model_index.json <-> parts by name

Loading checks before it allocates: a stage is built from its config on the meta device, all shapes and types
of the checkpoint are compared with it, and only then are tensors read. All errors name the file.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from audioldm2.arguments import check_count
from audioldm2.audio.clap_features import ClapFeatureExtractor
from audioldm2.audio.log_mel import log_mel_settings
from audioldm2.checkpoints.agreement import check_parts, check_scheduler, tokenizer_errors
from audioldm2.checkpoints.errors import CheckpointError, MissingCheckpointError
from audioldm2.checkpoints.fill import fill
from audioldm2.checkpoints.formats import (
    CONFIG_FILES,
    INDEX,
    PARTS,
    TOKENIZERS,
    Format,
    StageT,
    check_folders,
    class_label,
    explain_missing,
    format_of,
    index_entry,
    index_of,
    part_classes,
    part_format,
    read_index,
    scheduler_class,
    write_index,
    write_json,
)
from audioldm2.checkpoints.hub import Source, check_subfolder, checkpoint_folder, revision_of
from audioldm2.checkpoints.options import Dtypes, SaveOptions, part_dtype
from audioldm2.checkpoints.recommended import RECOMMENDED, SETTINGS_FILE, check_recommended, read_settings
from audioldm2.checkpoints.tensors import WeightFiles, check_file, read_json
from audioldm2.checkpoints.weight_map import weight_map
from audioldm2.checkpoints.writing import (
    remove_stale_tokenizer,
    remove_stale_weights,
    save_itself,
    staging,
    take,
    write_weights,
)
from audioldm2.models.config import check_types
from audioldm2.models.stage import Stage
from audioldm2.quoting import one_line, quoted
from audioldm2.runtime.device import available_device
from audioldm2.runtime.foreign import unwrapped
from audioldm2.runtime.garbage import without_garbage_collection
from audioldm2.runtime.precision import check_dtype
from audioldm2.schedulers.base import MAX_TRAIN_TIMESTEPS, Scheduler

VOCABULARIES = ("tokenizer.json", "vocab.json", "spiece.model")
MAX_EXTRA_IDS = 1024  # 100 in every real checkpoint
MAX_TOKENIZER_BYTES = 10 * 2**20  # of a file; the largest one of a real checkpoint has 3.5 MB


# --- one stage


def load_pretrained_stage(
    stage_class: type[StageT],
    source: Source,
    subfolder: str | None = "",
    dtype: Dtypes = None,
    device: torch.device | str = "cpu",
) -> StageT:
    """Find a checkpoint, download it if necessary, and load a stage; see `Stage.from_pretrained`."""
    # A subclass is loaded from the checkpoints of the stage that it extends.
    form = dataclasses.replace(format_of(stage_class), stage=stage_class)
    subfolder = check_subfolder(subfolder)
    folder = checkpoint_folder(source, [subfolder])
    return load_stage(
        folder / subfolder, form, part_dtype(dtype, folder), device, source.variant, source.use_safetensors
    )


@torch.inference_mode(False)  # parameters made in inference mode could never be trained
def load_stage(
    folder: Path,
    form: Format[StageT],
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    variant: str | None = None,
    use_safetensors: bool | None = None,
) -> StageT:
    """Load a stage from a local folder.

    Args:
        folder: holds config.json and weights.
        form: the stage's checkpoint format.
        dtype: dtype of the weights; None keeps the checkpoint's.
        device: where the weights are placed.
        variant: weights of a variant, such as "fp16".
        use_safetensors: True for weights in safetensors files only, False for `.bin` files only.

    Returns:
        The stage, in eval mode.

    Raises:
        CheckpointError: config.json is missing, is for another class or has a value that is not supported; or
            the weights are missing, broken or do not fit the config. The message names the file.
        ValueError: the dtype or the device is not supported.
    """
    check_dtype(dtype)
    device = available_device(device)
    stage, files = _open_stage(folder, form, variant, use_safetensors)
    try:
        return fill(stage, weight_map(form.weights), files, dtype, device)
    except CheckpointError as error:
        raise CheckpointError(f"{folder}: {error}") from error


def _open_stage(
    folder: Path, form: Format[StageT], variant: str | None, use_safetensors: bool | None = None
) -> tuple[StageT, WeightFiles]:
    """The stage of a folder's config.json, on the meta device, and the folder's weight files."""
    path = folder / "config.json"
    part = next((name for name, forms in PARTS.items() if form.classes in [f.classes for f in forms]), "")
    explain_missing(path, subfolder_hint=f'pass the part\'s folder, subfolder="{part}"')
    content = read_json(path)
    named = content.get("_class_name") or content.get("architectures") or form.class_name
    named = named[0] if isinstance(named, list) else named
    if named not in form.classes:
        raise CheckpointError(
            f"{path} is for class {class_label(named)}; class {form.class_name} is needed here"
        )
    with _naming_config(path, form):
        check_types(get_type_hints(form.config), content)
        config = form.config.from_dict(content)
    files = WeightFiles(folder, variant, use_safetensors)
    with _naming_config(path, form):
        # Twice as many as there are tensors are enough to say which ones are missing.
        stage = _built(form, config, most=2 * len(files.shapes) + 1000)
        empty = next((name for name, tensor in stage.state_dict().items() if tensor.numel() == 0), None)
        if empty is not None:
            raise ValueError(f"the sizes leave nothing of the parameter {empty}")
    return stage, files


@contextmanager
def _naming_config(path: Path, form: Format[Any]) -> Iterator[None]:
    """Turn an error about a config's values into one that names the file."""
    try:
        yield
    except ValueError as error:
        raise CheckpointError(f"{path}: {one_line(error)}") from error
    except (TypeError, LookupError, ArithmeticError, RuntimeError, AssertionError, MemoryError) as error:
        # Sizes that a layer, rather than the config, rejects: their product is too large, for example.
        reason = f"{type(error).__name__}: {one_line(error)}"
        raise CheckpointError(
            f"{path}: the sizes are not valid for class {form.class_name} ({reason})"
        ) from error


def _built(form: Format[StageT], config: Any, most: int | None = None) -> StageT:
    """A stage on the meta device, whose parameters have names, shapes and types, but no memory.

    Args:
        form: the stage's checkpoint format.
        config: its config.
        most: a ValueError is raised when the stage has more parameters. Building modules takes time even
            without memory, and the number of layers is what a config says.
    """
    with torch.device("meta"), _SkipInit(most):
        return form.stage(config)


class _SkipInit(TorchFunctionMode):
    """Modules are built without initializing their weights, which are replaced by the checkpoint's.

    The meta device would not initialize them either, but PyTorch would import its compiler for that, which
    takes a second.
    """

    def __init__(self, most: int | None = None):
        super().__init__()
        self.most, self.made = most, 0

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        self.made += func in (torch.empty, torch.zeros, torch.ones)
        if self.most is not None and self.made > self.most:
            raise ValueError(
                f"the sizes stand for more than {self.most} parameters, many more than there are"
            )
        return func(*args, **kwargs)


def save_stage(stage: Stage[Any], folder: Path, options: SaveOptions | None = None) -> None:
    """Write a stage's config.json and weights such that diffusers or transformers can load them.

    Tensors of the reference that the stage does not have are not written: buffers that are computed here
    (CLAP's position_ids, for example) and weights that the pipeline never uses (GPT-2's word embeddings).
    transformers initializes those when it loads the folder, and reports it.

    Args:
        stage: what to write.
        folder: created if it does not exist; files of an earlier save are replaced, and its other weights of
            the same variant removed.
        options: the format of the weight files.

    Raises:
        TypeError: the stage's class has no checkpoint format, or its parameters are not those of its class;
            nothing has been written then.
    """
    _check_weights(stage)
    _write_stage(stage, folder, options or SaveOptions())


def _write_stage(stage: Stage[Any], folder: Path, options: SaveOptions) -> None:
    form = format_of(type(stage))
    weights = weight_map(form.weights).save(_weights_to_save(stage))
    folder.mkdir(parents=True, exist_ok=True)
    write_weights(folder, form.weights_file(options.safe_serialization), weights, options)
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


class Checkpoint(NamedTuple):
    """What a pipeline's checkpoint holds.

    Attributes:
        parts: the stages, tokenizers, feature extractor and scheduler, by their names in model_index.json.
        settings: the content of audioldm2.json; see `recommended`.
        revision: see `hub.revision_of`.
    """

    parts: dict[str, Any]
    settings: dict[str, Any]
    revision: str


def load_checkpoint(
    source: Source,
    dtype: Dtypes = None,
    device: torch.device | str = "cpu",
    replaced: Mapping[str, Any] | None = None,
) -> Checkpoint:
    """Find a pipeline's checkpoint, download it if necessary, and load its parts.

    Args:
        source: the checkpoint; only the needed files are downloaded.
        dtype: dtype of the weights, or one for each part; see `part_dtype`.
        device: where the weights are placed.
        replaced: parts to use as they are, in place of the checkpoint's. The checkpoint's are not needed.

    Raises:
        CheckpointError: the checkpoint cannot be found or read, or a part does not fit; the message names the
            file.
        ValueError: the dtype or the device is not supported.
    """
    parts = dict(replaced or {})
    needed = [name for name in part_classes() if name not in parts]
    folder = checkpoint_folder(
        source, ["", *needed], first_file=INDEX, check=lambda folder: read_index(folder, replaced=parts)
    )
    classes = read_index(folder, replaced=parts)
    check_folders(folder, needed)
    settings = read_settings(folder)
    log_mel_settings(folder, settings)  # an error in them is raised now, not when a sound is encoded
    # Importing transformers takes a second, during which weights are read.
    with without_garbage_collection(), ThreadPoolExecutor(max_workers=1) as pool:
        tokenizers = {
            name: pool.submit(load_tokenizer, folder / name, classes[name])
            for name in TOKENIZERS
            if name in classes
        }
        for name, forms in PARTS.items():
            if name not in classes:
                continue
            form = next(form for form in forms if classes[name] in form.classes)
            parts[name] = load_stage(
                folder / name,
                form,
                part_dtype(dtype, folder, name),
                device,
                source.variant,
                source.use_safetensors,
            )
        for name, tokenizer in tokenizers.items():
            parts[name] = tokenizer.result()
    for name, file in CONFIG_FILES.items():
        if name not in classes:
            continue
        path = folder / name / file
        content = read_json(path)
        try:
            parts[name] = (
                _load_scheduler(content, classes[name])
                if name == "scheduler"
                else ClapFeatureExtractor.from_content(content)
            )
        except (ValueError, TypeError, LookupError, ArithmeticError, RuntimeError) as error:
            raise CheckpointError(f"{path}: {one_line(error)}") from error
    check_parts(folder, parts)
    return Checkpoint(parts, settings, revision_of(folder, part_classes()))


def save_parts(
    parts: Mapping[str, Any],
    folder: str | Path,
    options: SaveOptions | None = None,
    settings: Mapping[str, Any] | None = None,
) -> None:
    """Write all parts of a pipeline into a folder that diffusers and this package can load.

    Models of diffusers and transformers, and their tokenizers, are written by their own `save_pretrained`.

    Args:
        parts: as in a `Checkpoint`, perhaps in wrappers such as that of torch.compile.
        folder: created if it does not exist; files of an earlier save are replaced, and its other weights of
            the same variant removed.
        options: the format of the weight files.
        settings: the content of audioldm2.json.

    Raises:
        TypeError: a part is of a class that cannot be written, or a stage's parameters are not those of its
            class; nothing has been written then.
        ValueError: settings that cannot be recommended; in that case nothing is written.
    """
    folder, options, settings = Path(folder), options or SaveOptions(), settings or {}
    parts = {name: unwrapped(parts[name]) for name in part_classes()}
    own = {name: part for name, part in parts.items() if isinstance(part, Stage)}
    for name, part in parts.items():
        _check_part(name, part)
    for stage in own.values():
        _check_weights(stage)
    check_recommended(settings.get(RECOMMENDED, {}))
    configs: dict[str, Mapping[str, Any]] = {}
    if isinstance(parts["feature_extractor"], ClapFeatureExtractor):
        configs["feature_extractor"] = parts["feature_extractor"].config.to_dict()
    if isinstance(parts["scheduler"], Scheduler):
        class_name = index_of(parts)["scheduler"][1]
        configs["scheduler"] = {**parts["scheduler"].config_dict(), "_class_name": class_name}

    with staging(folder) as staged:
        for name, part in parts.items():
            if name not in own and name not in configs:
                save_itself(part, staged / name, options)
                if name in PARTS:
                    _check_saved(name, part, staged / name, options)
        for name, stage in own.items():
            _write_stage(stage, folder / name, options)
        for path in sorted(staged.iterdir()):
            name = path.name
            written = take(path, folder / name)
            if name in PARTS:
                remove_stale_weights(folder / name, written, options.variant)
            elif name in TOKENIZERS:
                remove_stale_tokenizer(folder / name, written)
        for name, config in configs.items():
            (folder / name).mkdir(exist_ok=True)
            write_json(folder / name / CONFIG_FILES[name], config)
        if any(settings.values()):
            write_json(folder / SETTINGS_FILE, settings)
        else:
            (folder / SETTINGS_FILE).unlink(missing_ok=True)
        write_index(folder, index_of(parts))


def _check_part(name: str, part: Any) -> None:
    """Raise TypeError unless a checkpoint can hold a part."""
    kind = f"{name} is a {type(part).__name__}"
    if index_entry(name, part) is None:
        raise TypeError(f"{kind}, which this package cannot save as a {name}")


def _check_saved(name: str, part: Any, folder: Path, options: SaveOptions) -> None:
    """Raise TypeError unless what a part's own `save_pretrained` wrote can be loaded.

    With an adapter, for example, it writes the adapter alone.
    """
    form = part_format(name, part)
    assert form is not None
    try:
        stage, files = _open_stage(folder, form, options.variant)
        fill(stage, weight_map(form.weights), files, device="meta")
    except CheckpointError as error:
        reason = one_line(str(error).replace(f"{folder}", name))
        raise TypeError(
            f"{name} is a {type(part).__name__} that cannot be loaded again from what it saves ({reason}); "
            "first merge adapters, remove parametrizations and undo quantization"
        ) from error


def load_tokenizer(folder: Path, class_name: str) -> Any:
    """Load one of transformers' tokenizers.

    Args:
        folder: holds the tokenizer's files.
        class_name: the class that model_index.json names.

    Raises:
        CheckpointError: it cannot be read.
    """
    _check_tokenizer_files(folder)
    # Slow to import, and needed for the tokenizers only.
    import transformers

    # Fast tokenizers read tokenizer.json and need no sentencepiece. Their names end in Fast in transformers 4
    # and are the plain names in 5, whose RobertaTokenizerFast splits words into letters before 5.16
    # (transformers issue 47706). VITS has a slow tokenizer only.
    plain = class_name.removesuffix("Fast")
    tokenizer = getattr(transformers, plain)
    if not issubclass(tokenizer, transformers.PreTrainedTokenizerFast):
        tokenizer = getattr(transformers, f"{plain}Fast", tokenizer)
    with tokenizer_errors(folder, "read"):
        loaded = tokenizer.from_pretrained(folder, local_files_only=True)
    longest = loaded.model_max_length
    if not isinstance(longest, int) or isinstance(longest, bool) or longest < 1:
        raise CheckpointError(f"{folder}: model_max_length = {quoted(longest)} is not a number of tokens")
    return loaded


def _check_tokenizer_files(folder: Path) -> None:
    """Check what transformers is about to read: regular files of this folder, of limited sizes."""
    # Without a vocabulary transformers would make an empty tokenizer.
    if not any((folder / name).exists() for name in VOCABULARIES):
        raise MissingCheckpointError(
            f"{folder}: the tokenizer cannot be read: it has none of {', '.join(VOCABULARIES)}"
        )
    for path in (*folder.glob("*"), *folder.glob("additional_chat_templates/*")):
        if not path.is_dir():
            check_file(path, MAX_TOKENIZER_BYTES)
    config = folder / "tokenizer_config.json"
    content = read_json(config) if config.exists() else {}
    for key in ("vocab_file", "merges_file", "tokenizer_file", "spm_file", "fast_tokenizer_files"):
        if content.get(key) is not None:
            raise CheckpointError(f"{config}: {key} = {quoted(content[key])} names files; it must be absent")
    extra = content.get("extra_ids", 0)  # of T5; so many tokens are made
    if not isinstance(extra, int) or not 0 <= extra <= MAX_EXTRA_IDS:
        raise CheckpointError(f"{config}: extra_ids = {quoted(extra)} must be 0 to {MAX_EXTRA_IDS}")
    named = content.get("tokenizer_class")
    if named is not None and not (isinstance(named, str) and named.isidentifier()):
        raise CheckpointError(f"{config}: tokenizer_class = {quoted(named)} is not the name of a class")


def _load_scheduler(content: Mapping[str, Any], class_name: str) -> Any:
    scheduler = scheduler_class("diffusers", class_name)
    if not issubclass(scheduler, Scheduler):
        return _load_foreign_scheduler(content, scheduler)
    hints = {**get_type_hints(scheduler.__init__), "_use_default_values": tuple[str, ...]}
    # A null may stand for False, as in diffusers' signatures.
    stated = {key: value for key, value in content.items() if value is not None}
    if stated.get("lambda_min_clipped") == -math.inf:  # diffusers' default, which clips nothing
        del stated["lambda_min_clipped"]
    check_types(hints, stated)
    made = scheduler.from_config(content)
    check_scheduler(made)
    return made


def _load_foreign_scheduler(content: Mapping[str, Any], scheduler: type[Any]) -> Any:
    if content.get("num_train_timesteps") is not None:
        check_count("num_train_timesteps", content["num_train_timesteps"], highest=MAX_TRAIN_TIMESTEPS)
    try:
        return scheduler.from_config(dict(content))
    except Exception as error:  # whatever its constructor raises for settings that it does not expect
        reason = f"{type(error).__name__}: {one_line(error)}"
        raise ValueError(f"diffusers' {scheduler.__name__} refuses these settings ({reason})") from error
