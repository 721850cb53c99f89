"""A pipeline from the trained parts: the UNet and ranking stages train with it, and it is what is shipped."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch

from audioldm2 import AudioLDM2Pipeline, ClapFeatureExtractor, DDIMScheduler, DPMSolverMultistepScheduler
from audioldm2.audio.clap_features import ClapFeatureExtractorConfig
from audioldm2.checkpoints.formats import PARTS, TOKENIZERS
from audioldm2.frozen import FrozenMapping
from scripts.tiny.data.tokenizers import read_tokenizers
from scripts.tiny.run import Run
from scripts.tiny.sizes import FEATURE_EXTRACTOR, RECOMMENDED, SCHEDULER, TINY


def pipeline(run: Run) -> AudioLDM2Pipeline:
    """A float32 pipeline of the parts in `run.checkpoint`; untrained parts have random weights."""
    stages: dict[str, Any] = {}
    for name, (form, *_) in PARTS.items():
        folder = run.checkpoint / name
        if folder.is_dir():
            stages[name] = form.stage.from_pretrained(folder, device=run.device)
        else:
            stages[name] = form.stage(form.config.from_dict(TINY[name])).to(run.device).eval()
    tokenizer, tokenizer_2 = read_tokenizers(run)
    return AudioLDM2Pipeline(
        **stages,
        tokenizer=tokenizer,
        tokenizer_2=tokenizer_2,
        feature_extractor=ClapFeatureExtractor(ClapFeatureExtractorConfig.from_dict(FEATURE_EXTRACTOR)),
        scheduler=DDIMScheduler(**SCHEDULER),
    )


def parts_in(folder: Path) -> set[str]:
    """The names of the parts and tokenizers that a folder in the Hub's layout holds."""
    return {name for name in (*PARTS, *TOKENIZERS) if (folder / name).is_dir()}


def take_parts(run: Run, folder: Path) -> set[str]:
    """Copy trained parts from a folder in the Hub's layout into the run's checkpoint, as float32.

    Args:
        run: parts that its checkpoint has already are left alone.
        folder: holds some parts, each in a subfolder of its name.

    Returns:
        The names of the parts in `folder`.

    Raises:
        FileNotFoundError: it holds no part.
        CheckpointError: a part cannot be read.
    """
    found = parts_in(folder)
    if not found:
        raise FileNotFoundError(f"{folder} holds no part of a checkpoint, such as {folder / 'vae'}")
    for name in found - parts_in(run.checkpoint):
        if name in PARTS:
            stage = PARTS[name][0].stage.from_pretrained(folder / name, torch_dtype=torch.float32)
            stage.save_pretrained(run.checkpoint / name)
        else:
            shutil.copytree(folder / name, run.checkpoint / name)
    return found


def assemble(run: Run, folder: Path) -> None:
    """Write the trained checkpoint, float16, in the Hub's layout, with DPM-Solver++ and `RECOMMENDED`.

    Args:
        run: whose parts to take.
        folder: where to write; created if missing.

    Raises:
        FileNotFoundError: a part is not trained yet.
    """
    trained = parts_in(run.checkpoint)
    missing = [name for name in PARTS if name not in trained]
    if missing:
        raise FileNotFoundError(f"{run.checkpoint} lacks {', '.join(missing)}; train the missing parts first")
    pipe = pipeline(run).to(torch.float16)
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    pipe.recommended = FrozenMapping(RECOMMENDED)
    pipe.save_pretrained(folder)
