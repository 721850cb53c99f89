"""A picture of a sound: its log-mel spectrogram as a PNG, time to the right and frequency upwards.

The only module that needs matplotlib, which is an optional extra: `pip install "audioldm2[plot]"`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from importlib.util import find_spec
from operator import index
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from audioldm2.atomic import replacing
from audioldm2.audio.log_mel import hertz_to_mel, mel_filter_bank, mel_spectrogram
from audioldm2.audio.wav import as_channels, check_writable

MELS = 128
DEPTH = 80.0  # dB below the loudest point at which the picture is black
WINDOW = 0.064  # s, rounded to a power of two samples
HOP = 0.01  # s
# Marks of the frequency axis, in Hz, as far as they lie in the picture.
MARKS = (0, 250, 500, 1000, 2000, 4000, 8000, 16000, 32000)


def decibels(waveform: Tensor, sampling_rate: int) -> Tensor:
    """The picture's values: (1, samples) -> (frames, MELS) in dB, 0 where it is loudest, -DEPTH at least."""
    n_fft = 2 ** max(4, round(math.log2(WINDOW * sampling_rate)))
    hop = max(1, round(HOP * sampling_rate))
    filters = mel_filter_bank(n_fft, MELS, sampling_rate, 0, sampling_rate / 2)
    energy = mel_spectrogram(waveform, filters, n_fft, hop, power=2, center=True, pad_mode="constant")[0]
    loudest = energy.max().clamp(min=1e-10)  # silence is then black
    return 10 * torch.log10((energy / loudest).clamp(min=10 ** (-DEPTH / 10)))


def show(axes: Any, picture: Tensor, samples: int, sampling_rate: int, marks: Sequence[int] = MARKS) -> Any:
    """Draw `decibels`' picture of so many samples into matplotlib's axes, marks in Hz; gives the image."""
    top = hertz_to_mel(torch.tensor(sampling_rate / 2.0)).item()
    image = axes.imshow(
        rearrange(picture, "t m -> m t").numpy(),
        origin="lower",
        aspect="auto",
        interpolation="nearest",
        cmap="magma",
        vmin=-DEPTH,
        vmax=0,
        extent=(0, samples / sampling_rate, 0, top),
    )
    marks = [mark for mark in marks if mark <= sampling_rate / 2]
    axes.set_yticks(hertz_to_mel(torch.tensor(marks, dtype=torch.float64)).tolist(), [f"{m}" for m in marks])
    return image


def check_can_draw() -> None:
    """Find out whether spectrograms can be drawn here; raises ImportError, with what to install, if not."""
    if find_spec("matplotlib") is None:
        raise ImportError('drawing a spectrogram needs matplotlib: pip install "audioldm2[plot]"')


def save_spectrogram(
    path: str | Path, waveform: np.ndarray | Tensor, sampling_rate: int, *, title: str | None = None
) -> None:
    """Draw a waveform's log-mel spectrogram into a PNG file, whole or not at all.

    Args:
        path: where; always PNG, whatever the name ends in.
        waveform: (samples,) or (channels, samples), numpy or torch, floating point; channels are averaged.
        sampling_rate: in Hz.
        title: stands above the picture.

    Raises:
        ImportError: matplotlib is not installed.
        OSError, TypeError, ValueError: the path or the waveform is of no use, as `write_wav` says.
    """
    check_can_draw()
    from matplotlib.figure import Figure

    sampling_rate = index(sampling_rate)
    if sampling_rate < 1:
        raise ValueError(f"the sampling rate must be positive, not {sampling_rate}")
    channels = as_channels(waveform)
    check_writable(path)
    picture = decibels(torch.from_numpy(channels.mean(0, keepdims=True)).float(), sampling_rate)

    # A Figure of its own, without pyplot: no backend is chosen for the whole program, nothing is left open.
    figure = Figure(figsize=(9, 4), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    image = show(axes, picture, channels.shape[1], sampling_rate)
    axes.set_xlabel("time (s)")
    axes.set_ylabel("frequency (Hz, mel scale)")
    if title is not None:
        axes.set_title(title, parse_math=False)
    figure.colorbar(image, ax=axes, pad=0.01, label="level (dB, loudest = 0)")
    with replacing(Path(path).resolve()) as temporary:
        figure.savefig(temporary, format="png")
