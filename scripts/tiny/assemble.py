"""A pipeline of the trained parts: what the last stage trains with, and what is shipped."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch

from audioldm2 import AudioLDM2Pipeline, ClapFeatureExtractor, DDIMScheduler
from audioldm2.audio.log_mel import ClapFeatureExtractorConfig
from audioldm2.checkpoints.formats import PARTS, TOKENIZERS
from scripts.tiny.data.tokenizers import read_tokenizers
from scripts.tiny.loop import Run
from scripts.tiny.sizes import FEATURES, SCHEDULER, SIZES


def pipeline(run: Run) -> AudioLDM2Pipeline:
    """A pipeline of the parts in `run.checkpoint`, float32; what is not trained yet has random weights."""
    stages: dict[str, Any] = {}
    for name, (form, *_) in PARTS.items():
        folder = run.checkpoint / name
        if folder.is_dir():
            stages[name] = form.stage.from_pretrained(folder, device=run.device)
        else:
            stages[name] = form.stage(form.config.from_dict(SIZES[name])).to(run.device).eval()
    tokenizer, tokenizer_2 = read_tokenizers(run)
    return AudioLDM2Pipeline(
        **stages,
        tokenizer=tokenizer,
        tokenizer_2=tokenizer_2,
        feature_extractor=ClapFeatureExtractor(ClapFeatureExtractorConfig.from_dict(FEATURES)),
        scheduler=DDIMScheduler(**SCHEDULER),
    )


def take_parts(run: Run, folder: Path) -> set[str]:
    """Take trained parts from a folder in the Hub's layout into the run's checkpoint, as float32.

    Args:
        run: what it has already is left alone.
        folder: holds some parts, each in a subfolder of its name.

    Returns:
        The names of the parts in `folder`.

    Raises:
        FileNotFoundError: it holds none.
        CheckpointError: one of them cannot be read.
    """
    found = {name for name in (*PARTS, *TOKENIZERS) if (folder / name).is_dir()}
    if not found:
        raise FileNotFoundError(f"{folder} holds no part of a checkpoint, such as {folder / 'vae'}")
    for name in found:
        place = run.checkpoint / name
        if place.is_dir():
            continue
        if name in PARTS:
            stage = PARTS[name][0].stage
            stage.from_pretrained(folder / name, torch_dtype=torch.float32).save_pretrained(place)
        else:
            shutil.copytree(folder / name, place)
    return found


def assemble(run: Run, folder: Path) -> None:
    """Write the trained checkpoint, float16, in the Hub's layout.

    Args:
        run: whose parts.
        folder: made where missing.

    Raises:
        FileNotFoundError: a part is not trained yet.
    """
    missing = [name for name in PARTS if not (run.checkpoint / name).is_dir()]
    if missing:
        raise FileNotFoundError(f"{run.checkpoint} lacks {', '.join(missing)}: train them first")
    pipeline(run).to(torch.float16).save_pretrained(folder)
