"""The Hub's checkpoint format of the pipeline: its parts, their classes, and model_index.json.

A checkpoint is a folder with one subfolder per part and a model_index.json that names the class of each part:

    model_index.json
    text_encoder/, text_encoder_2/, projection_model/, language_model/, unet/, vae/, vocoder/
                                the stages, see PARTS: config.json and weights
    tokenizer/, tokenizer_2/    transformers' tokenizers, see TOKENIZERS
    feature_extractor/          preprocessor_config.json
    scheduler/                  scheduler_config.json
    audioldm2.json              optional, see `recommended`

`PARTS` is the one table that connects a stage (`audioldm2.models`) to its checkpoints. A new stage gets one
line there; see docs/adding-a-stage.md.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Generic, TypeVar

from audioldm2.atomic import replacing
from audioldm2.audio.clap_features import ClapFeatureExtractor
from audioldm2.checkpoints.errors import (
    ORIGINAL_SUFFIXES,
    CheckpointError,
    MissingCheckpointError,
    original_format,
)
from audioldm2.checkpoints.tensors import read_json
from audioldm2.frozen import FrozenMapping
from audioldm2.models.clap import ClapConfig, ClapModel
from audioldm2.models.config import Config
from audioldm2.models.gpt2 import GPT2, GPT2Config
from audioldm2.models.hifigan import HifiGan, HifiGanConfig
from audioldm2.models.projection import ProjectionConfig, ProjectionModel
from audioldm2.models.stage import Stage
from audioldm2.models.t5 import T5Config, T5Encoder
from audioldm2.models.unet import UNet, UNetConfig
from audioldm2.models.vae import VAE, VAEConfig
from audioldm2.models.vits import VitsTextConfig, VitsTextEncoder
from audioldm2.quoting import either, one_line, quoted
from audioldm2.runtime.foreign import unwrapped
from audioldm2.schedulers import SCHEDULERS
from audioldm2.schedulers.base import Scheduler

StageT = TypeVar("StageT", bound=Stage[Any])

INDEX = "model_index.json"
PIPELINE = "AudioLDM2Pipeline"
TOKENIZERS = {
    "tokenizer": ("RobertaTokenizer", "RobertaTokenizerFast"),
    "tokenizer_2": ("T5Tokenizer", "T5TokenizerFast", "VitsTokenizer"),
}
FEATURE_EXTRACTOR = "ClapFeatureExtractor"
# Where model_index.json may say that classes are. "audioldm2" is the folder of diffusers' pipeline.
LIBRARIES = ("transformers", "diffusers", "audioldm2")
_SCHEDULER_NAME = re.compile(r"[A-Z]\w{,80}Scheduler", re.ASCII)
# The parts that have neither weights nor a vocabulary, and the file that each consists of.
CONFIG_FILES = {"feature_extractor": "preprocessor_config.json", "scheduler": "scheduler_config.json"}


@dataclass(frozen=True)
class Format(Generic[StageT]):
    """The checkpoint format of a stage.

    Attributes:
        stage: the stage's class.
        config: its config dataclass.
        weights: its weight map: a name in weights_map/, or the path of a .map file without the suffix.
        class_name: what config.json and model_index.json call the class.
        library: where model_index.json says that the class lives. It decides the style of config.json and the
            name of the weights file: transformers' own, or diffusers' for any other library.
        model_type: what a config.json of transformers has under this key.
        aliases: other classes whose checkpoints contain the stage.
    """

    stage: type[StageT]
    config: type[Config]
    weights: str
    class_name: str
    library: str = "transformers"
    model_type: str = ""
    aliases: tuple[str, ...] = ()

    @property
    def classes(self) -> tuple[str, ...]:
        """All class names that may stand in config.json and model_index.json."""
        return (self.class_name, *self.aliases)

    @property
    def identity(self) -> dict[str, Any]:
        """The entries of config.json that name the class."""
        if self.library == "transformers":
            return {"architectures": [self.class_name], "model_type": self.model_type}
        return {"_class_name": self.class_name}

    def weights_file(self, safe_serialization: bool = True) -> str:
        """The name of the weights file that the library writes: safetensors, or `.bin`."""
        suffix = "safetensors" if safe_serialization else "bin"
        if self.library != "transformers":
            return f"diffusion_pytorch_model.{suffix}"
        return f"model.{suffix}" if safe_serialization else f"pytorch_model.{suffix}"


# The parts that have weights, by their folder names on the Hub and in the order in which they run. A part
# whose checkpoints come in several classes has one format for each.
PARTS: dict[str, tuple[Format[Any], ...]] = {
    "text_encoder": (
        Format(ClapModel, ClapConfig, "text_encoder.transformers", "ClapModel", model_type="clap"),
    ),
    "text_encoder_2": (
        Format(
            T5Encoder,
            T5Config,
            "text_encoder_2.transformers",
            "T5EncoderModel",
            model_type="t5",
            aliases=("T5ForConditionalGeneration", "T5Model"),  # of the whole T5, which contains the encoder
        ),
        Format(VitsTextEncoder, VitsTextConfig, "text_encoder_2.vits", "VitsModel", model_type="vits"),
    ),
    "projection_model": (
        Format(
            ProjectionModel,
            ProjectionConfig,
            "projection_model.diffusers",
            "AudioLDM2ProjectionModel",
            library="audioldm2",
        ),
    ),
    "language_model": (
        Format(
            GPT2,
            GPT2Config,
            "language_model.transformers",
            "GPT2Model",
            model_type="gpt2",
            aliases=("GPT2LMHeadModel",),
        ),
    ),
    "unet": (
        Format(UNet, UNetConfig, "unet.diffusers", "AudioLDM2UNet2DConditionModel", library="audioldm2"),
    ),
    "vae": (Format(VAE, VAEConfig, "vae.diffusers", "AutoencoderKL", library="diffusers"),),
    "vocoder": (
        Format(
            HifiGan,
            HifiGanConfig,
            "vocoder.transformers",
            "SpeechT5HifiGan",
            model_type="speecht5_hifigan",
        ),
    ),
}


def format_of(stage: type[StageT]) -> Format[StageT]:
    """The checkpoint format of a stage's class; a subclass has that of its nearest base class in `PARTS`.

    Raises:
        TypeError: the class is not in `PARTS`.
    """
    formats = {form.stage: form for forms in PARTS.values() for form in forms}
    for base in stage.__mro__:
        if base in formats:
            return formats[base]
    raise TypeError(
        f"{stage.__name__} has no checkpoint format: it is not a stage of this package, "
        "nor registered in audioldm2.checkpoints.formats.PARTS"
    )


def part_classes() -> dict[str, tuple[str, ...]]:
    """All parts of a pipeline's checkpoint, and the classes that model_index.json may name for each.

    The scheduler can also be one of diffusers; see `scheduler_class`.
    """
    stages = {name: tuple(c for form in forms for c in form.classes) for name, forms in PARTS.items()}
    return {**stages, **TOKENIZERS, "feature_extractor": (FEATURE_EXTRACTOR,), "scheduler": tuple(SCHEDULERS)}


def read_index(folder: Path, replaced: Collection[str] = ()) -> dict[str, str]:
    """Read model_index.json.

    Args:
        folder: the checkpoint's.
        replaced: the parts that are not loaded; their entries are not checked.

    Returns:
        The class of each part that is not replaced.

    Raises:
        CheckpointError: the file is missing or is for another pipeline, or a part is missing or of a class
            that is not supported.
    """
    path = folder / INDEX
    explain_missing(path, parent_hint=f"pass {folder.parent}, which contains all parts")
    index = read_json(path)
    if "_class_name" not in index:
        raise CheckpointError(f"{path} does not say which pipeline it is for (_class_name)")
    if index["_class_name"] != PIPELINE:
        raise CheckpointError(
            f"{path} is for a {class_label(index['_class_name'])}; this package runs {PIPELINE} only"
        )
    classes = {name: supported for name, supported in part_classes().items() if name not in replaced}
    missing, wrong = [], []
    for name, supported in classes.items():
        entry = index.get(name)
        if not isinstance(entry, list) or len(entry) != 2 or entry[1] is None:
            missing.append(f"{name} is missing")
        elif entry[0] not in LIBRARIES:
            wrong.append(f"{name} is from {class_label(entry[0])}, not {either(LIBRARIES)}")
        elif name == "scheduler":
            try:
                scheduler_class(*entry)
            except ValueError as error:
                wrong.append(str(error))
        elif entry[1] not in supported:
            wrong.append(f"{name} is of class {class_label(entry[1])}, not {either(supported)}")
    if wrong or missing:
        kind = CheckpointError if wrong else MissingCheckpointError
        raise kind(f"{path}: {'; '.join([*missing, *wrong])}")
    return {name: index[name][1] for name in classes}


def class_label(value: Any) -> str:
    """A class name that a checkpoint gives, for an error message."""
    return value if isinstance(value, str) and value.isidentifier() and len(value) < 80 else quoted(value)


def explain_missing(path: Path, subfolder_hint: str = "", parent_hint: str = "") -> None:
    """Raise an error if the first file of a checkpoint is missing, with what may have been meant instead.

    Args:
        path: the file.
        subfolder_hint: what to say if its folder contains the parts of a pipeline.
        parent_hint: what to say if its folder is one of the parts of a pipeline.

    Raises:
        MissingCheckpointError: the file is missing.
    """
    try:
        if path.exists():
            return
        folder = path.parent
        original = next((p for p in sorted(folder.glob("*.*")) if p.suffix in ORIGINAL_SUFFIXES), None)
        is_pipeline = (folder / INDEX).is_file() or any((folder / p / "config.json").is_file() for p in PARTS)
        is_part = any((folder / name).is_file() for name in ("config.json", *CONFIG_FILES.values()))
        is_part = is_part and (folder.parent / INDEX).is_file()
    except OSError:
        return  # reading it raises a better error
    if original is not None:
        raise MissingCheckpointError(original_format(original))
    hint = subfolder_hint if subfolder_hint and is_pipeline else parent_hint if is_part else ""
    raise MissingCheckpointError(f"{path} is missing{f'; {hint}' if hint else ''}")


def scheduler_class(library: Any, name: Any) -> type[Any]:
    """The class of a scheduler that model_index.json names: this package's, or else that of diffusers.

    Only a scheduler of diffusers is ever imported, and only if this package has none of that name.

    Args:
        library: as in model_index.json.
        name: the class's.

    Raises:
        ValueError: there is no such class, or diffusers is not installed.
    """
    own = SCHEDULERS
    if isinstance(name, str) and name in own:
        return own[name]
    refused = ValueError(
        f"scheduler is of class {class_label(name)}, not {', '.join(own)} or another scheduler "
        "of diffusers; pass scheduler="
    )
    if library != "diffusers" or not isinstance(name, str) or not _SCHEDULER_NAME.fullmatch(name):
        raise refused
    try:
        diffusers = import_module("diffusers")
        found = getattr(diffusers, name)
        base = diffusers.SchedulerMixin
    except ModuleNotFoundError as error:
        if error.name != "diffusers":
            raise ValueError(f"scheduler is diffusers' {name}, which cannot be imported: {error}") from error
        raise ValueError(
            f"scheduler is diffusers' {name}, and diffusers is not installed; pip install diffusers, or pass "
            f"scheduler={either(own)}"
        ) from error
    except AttributeError:
        raise refused from None
    except Exception as error:  # an optional dependency of diffusers, for example
        reason = one_line(error)
        raise ValueError(f"scheduler is diffusers' {name}, which cannot be imported: {reason}") from error
    needed = ("set_timesteps", "step", "from_config")
    if (
        not isinstance(found, type)
        or not issubclass(found, base)
        or not all(hasattr(found, x) for x in needed)
    ):
        raise refused
    return found


def part_format(name: str, part: Any) -> Format[Any] | None:
    """The checkpoint format of a stage, or of a model of diffusers or transformers in a stage's place.

    Args:
        name: the stage's name in the pipeline.
        part: the stage, perhaps in a wrapper such as that of torch.compile.

    Returns:
        None if this place has no format for `part`.
    """
    part = unwrapped(part)
    if isinstance(part, Stage):
        known = {form.stage for form in PARTS[name]}
        nearest = next((base for base in type(part).__mro__ if base in known), None)
        return next((form for form in PARTS[name] if form.stage is nearest), None)
    if _library(part) in ("diffusers", "transformers") and _can_save(part):
        return next((form for form in PARTS[name] if type(part).__name__ in form.classes), None)
    return None


def index_entry(name: str, part: Any) -> tuple[str, str] | None:
    """What model_index.json says of a part: the library and the class.

    Args:
        name: the part's name in the pipeline.
        part: the part, perhaps in a wrapper such as that of torch.compile.

    Returns:
        None if a checkpoint cannot hold `part`.
    """
    part = unwrapped(part)
    class_name = type(part).__name__
    if name in PARTS:
        form = part_format(name, part)
        if form is None:
            return None
        return form.library, form.class_name if isinstance(part, Stage) else class_name
    if name in TOKENIZERS:
        return ("transformers", class_name) if class_name in TOKENIZERS[name] and _can_save(part) else None
    if name == "feature_extractor":
        known = class_name == FEATURE_EXTRACTOR and _can_save(part)
        return (
            ("transformers", FEATURE_EXTRACTOR) if known or isinstance(part, ClapFeatureExtractor) else None
        )
    if isinstance(part, Scheduler):
        # A subclass is saved as the scheduler that it extends.
        nearest = next((base for base in type(part).__mro__ if base in SCHEDULERS.values()), None)
        return None if nearest is None else ("diffusers", nearest.__name__)
    if _library(part) == "diffusers" and _can_save(part):
        found = getattr(import_module("diffusers"), class_name, None)
        return ("diffusers", class_name) if found is type(part) else None
    return None


def index_of(parts: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of model_index.json for a pipeline's parts.

    Args:
        parts: the parts by name, perhaps in wrappers; others than a pipeline's are ignored.

    Returns:
        The pipeline's class, and for each part the library and the name of its class. They are those of the
        part itself if a checkpoint cannot hold it.
    """
    entries = {
        name: index_entry(name, parts[name]) or (_library(parts[name]), type(parts[name]).__name__)
        for name in part_classes()
    }
    # diffusers expects a version; the pipeline came with 0.21.
    return {"_class_name": PIPELINE, "_diffusers_version": "0.21.0", **entries}


def pipeline_config(parts: Mapping[str, Any], name_or_path: str) -> FrozenMapping:
    """The config of a pipeline, as in diffusers: what model_index.json would say, and `_name_or_path`.

    Args:
        parts: as for `index_of`.
        name_or_path: where the pipeline was loaded from; "" if it was not.
    """
    return FrozenMapping({**index_of(parts), "_name_or_path": name_or_path})


def _library(part: Any) -> str:
    return type(part).__module__.partition(".")[0]


def _can_save(part: Any) -> bool:
    return callable(getattr(part, "save_pretrained", None))


def write_index(folder: Path, index: Mapping[str, Any]) -> None:
    """Write model_index.json.

    Args:
        folder: the checkpoint's.
        index: from `index_of`.
    """
    write_json(folder / INDEX, index)


def check_folders(folder: Path, names: Sequence[str]) -> None:
    """Check that the checkpoint has a folder for each part.

    Raises:
        CheckpointError: names all folders that are missing.
    """
    missing = [name for name in names if not (folder / name).is_dir()]
    if missing:
        raise MissingCheckpointError(f"{folder} lacks the folders of its parts: {', '.join(missing)}")


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file, as a whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
