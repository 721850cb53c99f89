"""Writing clips and the table of them, as `audioldm2 finetune` reads it."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from audioldm2 import write_wav
from scripts.tiny.data.sounds import SAMPLING_RATE


def write_clips(folder: Path, name: str, clips: Iterable[tuple[np.ndarray, str]]) -> Path:
    """Write clips as WAV files, with their captions in a table.

    Args:
        folder: created if it does not exist.
        name: the beginning of the files' names.
        clips: waveforms (samples,), 16 kHz, and captions.

    Returns:
        The path of the table, data.csv in the folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    table = folder / "data.csv"
    with open(table, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["file_name", "caption"])
        for i, (waveform, caption) in enumerate(clips):
            write_wav(folder / f"{name}-{i:03}.wav", waveform, SAMPLING_RATE)
            writer.writerow([f"{name}-{i:03}.wav", caption])
    return table
