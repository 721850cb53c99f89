"""Log-mel spectrograms as image files.

In: a waveform. Out: an image, with time from left to right and frequency from bottom to top.

This is the only module that needs matplotlib, which the extra "plot" installs.
"""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Sequence
from operator import index
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from audioldm2.atomic import check_writable, replacing
from audioldm2.audio.file_types import image_type
from audioldm2.audio.mel import hertz_to_mel, mel_filter_bank, mel_spectrogram
from audioldm2.audio.wav import as_channels
from audioldm2.extras import import_extra

N_MELS = 128
RANGE_DB = 80.0  # dynamic range of the image: levels this far below the maximum are black
WINDOW_S = 0.064  # in seconds; rounded to a power of two in samples
HOP_S = 0.01  # in seconds
TICKS = (0, 250, 500, 1000, 2000, 4000, 8000, 16000, 32000)  # of the frequency axis, in Hz


def decibels(waveform: Tensor, sampling_rate: int) -> Tensor:
    """The log-mel spectrogram of a waveform, relative to its maximum.

    Args:
        waveform: floating-point waveform of shape (1, samples).
        sampling_rate: in Hz.

    Returns:
        Levels in dB of shape (frames, N_MELS), from -RANGE_DB to 0; -RANGE_DB everywhere if it is silent.
    """
    n_fft = 2 ** max(4, round(math.log2(WINDOW_S * sampling_rate)))
    hop = max(1, round(HOP_S * sampling_rate))
    filters = mel_filter_bank(n_fft, N_MELS, sampling_rate, 0, sampling_rate / 2)
    energy = mel_spectrogram(waveform, filters, n_fft, hop, power=2, center=True, pad_mode="constant")[0]
    maximum = energy.max().clamp(min=1e-10)
    return 10 * torch.log10((energy / maximum).clamp(min=10 ** (-RANGE_DB / 10)))


def show(
    axes: Any, spectrogram: Tensor, samples: int, sampling_rate: int, ticks: Sequence[int] = TICKS
) -> Any:
    """Draw a spectrogram into matplotlib axes.

    Args:
        axes: matplotlib's Axes.
        spectrogram: levels from `decibels`, (frames, N_MELS).
        samples: length of the waveform.
        sampling_rate: of the waveform, in Hz.
        ticks: of the frequency axis, in Hz; those above half the sampling rate are left out.

    Returns:
        matplotlib's AxesImage, for a color bar.
    """
    top = hertz_to_mel(torch.tensor(sampling_rate / 2.0)).item()
    image = axes.imshow(
        rearrange(spectrogram, "t m -> m t").numpy(),
        origin="lower",
        aspect="auto",
        interpolation="nearest",
        cmap="magma",
        vmin=-RANGE_DB,
        vmax=0,
        extent=(0, samples / sampling_rate, 0, top),
    )
    ticks = [tick for tick in ticks if tick <= sampling_rate / 2]
    axes.set_yticks(hertz_to_mel(torch.tensor(ticks, dtype=torch.float64)).tolist(), [f"{t}" for t in ticks])
    return image


def check_can_draw(path: str | Path = "") -> None:
    """Check that spectrograms can be drawn, by drawing an empty image.

    Args:
        path: path of the file, which is not touched; its suffix decides the type.

    Raises:
        ImportError: matplotlib is not installed or is broken; the message says how to install it.
        ValueError: the suffix is unknown.
    """
    kind = image_type(path)
    figure = _figure()
    try:
        figure.savefig(io.BytesIO(), format=kind)
    except Exception as error:  # of a library for images, for example
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ImportError(f"matplotlib cannot write {kind} files here ({reason})") from error


def _figure() -> Any:
    # A Figure made without pyplot selects no backend for the whole program and needs no closing.
    figure = import_extra("matplotlib.figure", "plot", "drawing a spectrogram")
    return figure.Figure(figsize=(9, 4), dpi=120, layout="constrained")


def save_spectrogram(
    path: str | Path, waveform: np.ndarray | Tensor, sampling_rate: int, *, title: str | None = None
) -> None:
    """Save the log-mel spectrogram of a waveform as an image. On failure, no partial file is left.

    Args:
        path: path of the file; its suffix decides the type, PNG by default.
        waveform: floating-point waveform (samples,) or (channels, samples), numpy or torch; channels are
            averaged.
        sampling_rate: in Hz.
        title: text above the image.

    Raises:
        ImportError: matplotlib is not installed or is broken.
        OSError: the file cannot be written.
        TypeError: the waveform is not floating point, or the sampling rate is not an integer.
        ValueError: the waveform has another shape, no samples, NaN or infinity; or the sampling rate is not
            positive, or the suffix is unknown.
    """
    kind = image_type(path)
    figure = _figure()
    sampling_rate = index(sampling_rate)
    if sampling_rate < 1:
        raise ValueError(f"the sampling rate must be positive, got {sampling_rate}")
    channels = as_channels(waveform)
    check_writable(path)
    spectrogram = decibels(torch.from_numpy(channels.mean(0, keepdims=True)).float(), sampling_rate)

    axes = figure.add_subplot()
    image = show(axes, spectrogram, channels.shape[1], sampling_rate)
    axes.set_xlabel("time (s)")
    axes.set_ylabel("frequency (Hz, mel scale)")
    if title is not None:
        axes.set_title(title, parse_math=False)
    figure.colorbar(image, ax=axes, pad=0.01, label="level (dB relative to the maximum)")
    with replacing(path) as temporary, warnings.catch_warnings():
        # A title may have characters that the font lacks. They are drawn as boxes.
        warnings.filterwarnings("ignore", message="Glyph")
        figure.savefig(temporary, format=kind)
