"""The spectrograms of all kinds of sound in one picture, so that one sees that a sweep rises."""

from __future__ import annotations

import io
from collections.abc import Sequence
from math import ceil
from pathlib import Path

import numpy as np
import torch

from audioldm2.atomic import replacing
from audioldm2.audio.spectrogram_image import decibels, show
from scripts.tiny.data.sounds import SAMPLING_RATE

COLUMNS = 5
COLOURS = 48  # of the picture: enough for the eye, and a small file
MARKS = (0, 500, 1000, 2000, 4000, 8000)  # Hz


def tile(titles: Sequence[str], waveforms: Sequence[np.ndarray], path: Path) -> None:
    """Draw log-mel spectrograms side by side into a PNG file, each with its title; all with the same axes."""
    from matplotlib.figure import Figure
    from PIL import Image

    rows = ceil(len(titles) / COLUMNS)
    figure = Figure(figsize=(10, 1.85 * rows + 0.7), dpi=90, layout="constrained")
    grid = figure.subplots(rows, COLUMNS, sharex=True, sharey=True, squeeze=False)
    for axes in grid.flat[len(titles) :]:
        axes.set_axis_off()
    for axes, title, waveform in zip(grid.flat, titles, waveforms, strict=False):
        picture = decibels(torch.from_numpy(waveform[None]).float(), SAMPLING_RATE)
        image = show(axes, picture, len(waveform), SAMPLING_RATE, MARKS)
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
    with replacing(path.resolve()) as temporary:
        few = Image.open(drawn).convert("RGB").quantize(COLOURS, dither=Image.Dither.NONE)
        few.save(temporary, format="png", optimize=True)
