"""The spectrograms of all kinds of sound side by side in one PNG file."""

from __future__ import annotations

import io
from collections.abc import Sequence
from math import ceil
from pathlib import Path

import numpy as np
import torch

from audioldm2.audio.decibels import decibels
from audioldm2.plots import draw_spectrogram
from scripts.pictures import save_small
from scripts.tiny.data.sounds import SAMPLING_RATE

GRID_COLUMNS = 5
PALETTE_SIZE = 48  # colors in the file: enough for the eye, and a small file
FREQUENCY_TICKS = (0, 500, 1000, 2000, 4000, 8000)  # Hz


def draw_spectrograms(titles: Sequence[str], waveforms: Sequence[np.ndarray], path: Path) -> None:
    """Draw log-mel spectrograms in a grid with common axes.

    Args:
        titles: one per spectrogram.
        waveforms: (samples,) each, 16 kHz.
        path: of the PNG file.
    """
    from matplotlib.figure import Figure

    rows = ceil(len(titles) / GRID_COLUMNS)
    figure = Figure(figsize=(10, 1.85 * rows + 0.7), dpi=90, layout="constrained")
    grid = figure.subplots(rows, GRID_COLUMNS, sharex=True, sharey=True, squeeze=False)
    for axes in grid.flat[len(titles) :]:
        axes.set_axis_off()
    for axes, title, waveform in zip(grid.flat, titles, waveforms, strict=False):
        spectrogram = decibels(torch.from_numpy(waveform[None]).float(), SAMPLING_RATE)
        image = draw_spectrogram(
            axes, spectrogram, len(waveform) / SAMPLING_RATE, SAMPLING_RATE / 2, FREQUENCY_TICKS
        )
        axes.set_title(title, fontsize=7, parse_math=False)
        axes.tick_params(labelsize=7)
    figure.supxlabel("time (s)", fontsize=9)
    figure.supylabel("frequency (Hz, mel scale)", fontsize=9)
    bar = figure.colorbar(image, ax=grid, pad=0.01, aspect=50)
    bar.set_label("level (dB, loudest = 0)", fontsize=9)
    bar.ax.tick_params(labelsize=7)
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png")
    drawn.seek(0)
    save_small(drawn, path, PALETTE_SIZE)
