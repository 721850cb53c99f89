"""A pipeline of the trained parts: what the last stage trains with, and what is shipped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from audioldm2 import AudioLDM2Pipeline, ClapFeatureExtractor, DDIMScheduler
from audioldm2.audio.log_mel import ClapFeatureExtractorConfig
from audioldm2.models import PARTS
from scripts.tiny.sizes import FEATURES, SCHEDULER, SIZES
from scripts.tiny.tokenizers import read_tokenizers
from scripts.tiny.training import Run


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
