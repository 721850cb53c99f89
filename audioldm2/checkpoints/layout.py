"""The Hub's layout of a pipeline: a subfolder a part, and model_index.json, which names the class of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from audioldm2.checkpoints.errors import CheckpointError
from audioldm2.checkpoints.stage import write_json
from audioldm2.checkpoints.tensors import read_json

INDEX = "model_index.json"
PIPELINE = "AudioLDM2Pipeline"
TOKENIZERS = {
    "tokenizer": ("RobertaTokenizer", "RobertaTokenizerFast"),
    "tokenizer_2": ("T5Tokenizer", "T5TokenizerFast", "VitsTokenizer"),
}
VOCABULARIES = ("tokenizer.json", "vocab.json", "spiece.model")
# Where a class lives, for diffusers; all others live in transformers.
LIBRARIES = {
    "AutoencoderKL": "diffusers",
    "AudioLDM2ProjectionModel": "audioldm2",
    "AudioLDM2UNet2DConditionModel": "audioldm2",
    "DDIMScheduler": "diffusers",
    "DPMSolverMultistepScheduler": "diffusers",
}


def read_index(folder: Path, known: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """The class of each part, as model_index.json says.

    Args:
        folder: where it lies.
        known: for each part that is needed, the classes that it may be of.

    Raises:
        CheckpointError: another pipeline's checkpoint, a part that is missing or of a class that is not
            known.
    """
    path = folder / INDEX
    index = read_json(path)
    if "_class_name" not in index:
        raise CheckpointError(f"{path} does not say which pipeline it is for (_class_name)")
    if index["_class_name"] != PIPELINE:
        raise CheckpointError(f"{path} is for a {index['_class_name']}; this package runs {PIPELINE} only")
    wrong = []
    for name, classes in known.items():
        entry = index.get(name)
        if not isinstance(entry, list) or len(entry) != 2 or entry[1] is None:
            wrong.append(f"{name} is missing")
        elif entry[1] not in classes:
            wrong.append(f"{name} is a {entry[1]}, not a {' or '.join(classes)}")
    if wrong:
        raise CheckpointError(f"{path}: {'; '.join(wrong)}")
    return {name: index[name][1] for name in known}


def write_index(folder: Path, classes: Mapping[str, str]) -> None:
    """Write model_index.json: the class of each part."""
    parts = {name: [LIBRARIES.get(kind, "transformers"), kind] for name, kind in classes.items()}
    # The release that brought the pipeline; readers of theirs want one.
    write_json(folder / INDEX, {"_class_name": PIPELINE, "_diffusers_version": "0.21.0", **parts})


def check_folders(folder: Path, names: Sequence[str]) -> None:
    """Refuse a checkpoint that lacks the folder of a part."""
    missing = [name for name in names if not (folder / name).is_dir()]
    if missing:
        raise CheckpointError(f"{folder} lacks the folders of its parts: {', '.join(missing)}")


def load_tokenizer(folder: Path, class_name: str) -> Any:
    """A tokenizer of transformers, from its folder.

    Raises:
        CheckpointError: it cannot be read.
    """
    # transformers makes an empty tokenizer where there is no vocabulary.
    if not any((folder / name).is_file() for name in VOCABULARIES):
        raise CheckpointError(
            f"{folder}: the tokenizer cannot be read: there is none of {', '.join(VOCABULARIES)}"
        )
    # transformers takes a second to import; only its tokenizers are used.
    import transformers

    # The fast kind is read from tokenizer.json and needs no sentencepiece; VITS has only the one.
    fast = class_name if class_name.endswith("Fast") else f"{class_name}Fast"
    tokenizer = getattr(transformers, fast, None) or getattr(transformers, class_name)
    try:
        return tokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        # transformers documents no errors of its own here: a broken tokenizer.json raises a bare Exception.
        raise CheckpointError(f"{folder}: the tokenizer cannot be read: {error}") from error
