"""The Hub's checkpoint format of the pipeline: its parts, their classes, and model_index.json.

A checkpoint is a folder with one subfolder per part and a model_index.json that names the class of each part:

    model_index.json
    text_encoder/, text_encoder_2/, projection_model/, language_model/, unet/, vae/, vocoder/
                                the stages, see PARTS: config.json and weights
    tokenizer/, tokenizer_2/    transformers' tokenizers, see TOKENIZERS
    feature_extractor/          preprocessor_config.json
    scheduler/                  scheduler_config.json

`PARTS` is the one table that connects a stage (`audioldm2.models`) to its checkpoints. A new stage gets one
line there; see docs/adding-a-stage.md.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from audioldm2.atomic import replacing
from audioldm2.checkpoints.errors import CheckpointError
from audioldm2.checkpoints.tensors import read_json
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
from audioldm2.schedulers import SCHEDULERS

StageT = TypeVar("StageT", bound=Stage[Any])

INDEX = "model_index.json"
PIPELINE = "AudioLDM2Pipeline"
TOKENIZERS = {
    "tokenizer": ("RobertaTokenizer", "RobertaTokenizerFast"),
    "tokenizer_2": ("T5Tokenizer", "T5TokenizerFast", "VitsTokenizer"),
}
FEATURE_EXTRACTOR = "ClapFeatureExtractor"
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

    @property
    def weights_file(self) -> str:
        """The name of the weights file that the library writes."""
        stem = "model" if self.library == "transformers" else "diffusion_pytorch_model"
        return f"{stem}.safetensors"


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
    """All parts of a pipeline's checkpoint, and the classes that model_index.json may name for each."""
    stages = {name: tuple(c for form in forms for c in form.classes) for name, forms in PARTS.items()}
    return {**stages, **TOKENIZERS, "feature_extractor": (FEATURE_EXTRACTOR,), "scheduler": tuple(SCHEDULERS)}


def read_index(folder: Path) -> dict[str, str]:
    """Read model_index.json.

    Args:
        folder: the checkpoint's.

    Returns:
        The class of each part.

    Raises:
        CheckpointError: the file is missing or is for another pipeline, or a part is missing or of a class
            that is not supported.
    """
    path = folder / INDEX
    index = read_json(path)
    if "_class_name" not in index:
        raise CheckpointError(f"{path} does not say which pipeline it is for (_class_name)")
    if index["_class_name"] != PIPELINE:
        raise CheckpointError(f"{path} is for a {index['_class_name']}; this package runs {PIPELINE} only")
    classes = part_classes()
    wrong = []
    for name, supported in classes.items():
        entry = index.get(name)
        if not isinstance(entry, list) or len(entry) != 2 or entry[1] is None:
            wrong.append(f"{name} is missing")
        elif entry[1] not in supported:
            wrong.append(f"{name} is of class {entry[1]}, not {' or '.join(supported)}")
    if wrong:
        raise CheckpointError(f"{path}: {'; '.join(wrong)}")
    return {name: index[name][1] for name in classes}


def write_index(folder: Path, classes: Mapping[str, tuple[str, str]]) -> None:
    """Write model_index.json.

    Args:
        folder: the checkpoint's.
        classes: for each part, the library and the name of its class.
    """
    parts = {name: [library, class_name] for name, (library, class_name) in classes.items()}
    # diffusers expects a version; the pipeline came with 0.21.
    write_json(folder / INDEX, {"_class_name": PIPELINE, "_diffusers_version": "0.21.0", **parts})


def check_folders(folder: Path, names: Sequence[str]) -> None:
    """Check that the checkpoint has a folder for each part.

    Raises:
        CheckpointError: names all folders that are missing.
    """
    missing = [name for name in names if not (folder / name).is_dir()]
    if missing:
        raise CheckpointError(f"{folder} lacks the folders of its parts: {', '.join(missing)}")


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file, as a whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
