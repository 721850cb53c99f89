"""Pictures of sounds: waveforms, spectrograms, and both.

Each `plot_...` returns a matplotlib Figure, which a notebook shows and whose `savefig` writes a file.
Functions that draw one panel also take `axes=`, to draw into a figure of the caller's. The extra "plot"
installs matplotlib, which is imported when something is drawn. pyplot is not used: no backend is selected for
the whole program, and no figure has to be closed.

    >>> output = pipe("A bell over rain", **pipe.recommended)
    >>> plot_sound(output.audios[0], output.sampling_rate).savefig("bell.png")
"""

from __future__ import annotations

import io
import textwrap
import warnings
from collections.abc import Sequence
from functools import partial
from operator import index
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from audioldm2.atomic import check_writable, replacing
from audioldm2.audio.decibels import RANGE_DB, decibels
from audioldm2.audio.file_types import image_type
from audioldm2.audio.mel import hertz_to_mel
from audioldm2.audio.wav import as_channels
from audioldm2.extras import import_extra
from audioldm2.quoting import shortened

Sound = np.ndarray[Any, Any] | Tensor

DPI = 120
WIDTH, HEIGHT = 9.0, 4.0  # of a figure with one panel, in inches
CHARACTERS_PER_INCH = 11  # of a title, about; longer ones are wrapped
MAX_TITLE = 300  # characters
TICKS = (0, 250, 500, 1000, 2000, 4000, 8000, 16000, 32000)  # of the frequency axis, in Hz
WAVEFORM_COLUMNS = 2000  # of longer waveforms, the extremes of so many parts are drawn
WAVEFORM_COLOR = "#4c3a8c"  # a dark tone of the spectrograms' color map
TIME_LABEL = "time (s)"
FREQUENCY_LABEL = "frequency (Hz, mel scale)"
LEVEL_LABEL = "level (dB, loudest = 0)"


def plot_waveform(audio: Sound, sampling_rate: int, *, title: str | None = None, axes: Any = None) -> Any:
    """Plot a waveform over time.

    Of a long one, the smallest and the largest sample of each of 2000 equal parts are drawn.

    Args:
        audio: floating-point waveform (samples,) or (channels, samples), numpy or torch; channels are
            averaged.
        sampling_rate: in Hz.
        title: text above it.
        axes: matplotlib Axes to draw into; a figure of its own by default.

    Returns:
        The matplotlib Figure.

    Raises:
        ImportError: matplotlib is not installed or is broken.
        TypeError: the waveform is not floating point, or the sampling rate is not an integer.
        ValueError: the waveform has another shape, no samples, NaN or infinity; or the sampling rate is not
            positive.

    Example:
        >>> plot_waveform(output.audios[0], output.sampling_rate, title="A bell")
    """
    samples, sampling_rate = _mono(audio, sampling_rate)
    axes = _figure().add_subplot() if axes is None else axes
    _draw_waveform(axes, samples, sampling_rate)
    axes.set_xlabel(TIME_LABEL)
    _set_title(axes, title)
    return axes.figure


def plot_spectrogram(audio: Sound, sampling_rate: int, *, title: str | None = None, axes: Any = None) -> Any:
    """Plot the log-mel spectrogram of a waveform, in seconds and hertz.

    Levels are relative to the maximum, and shown down to -80 dB.

    Args:
        audio: floating-point waveform (samples,) or (channels, samples), numpy or torch; channels are
            averaged.
        sampling_rate: in Hz.
        title: text above it.
        axes: matplotlib Axes to draw into, without a color bar; a figure of its own with one by default.

    Returns:
        The matplotlib Figure.

    Raises:
        ImportError: matplotlib is not installed or is broken.
        TypeError: the waveform is not floating point, or the sampling rate is not an integer.
        ValueError: the waveform has another shape, no samples, NaN or infinity; or the sampling rate is not
            positive.

    Example:
        >>> plot_spectrogram(output.audios[0], output.sampling_rate).savefig("bell.png")
    """
    samples, sampling_rate = _mono(audio, sampling_rate)
    own = axes is None
    axes = _figure().add_subplot() if own else axes
    image = _draw_levels_of(axes, samples, sampling_rate)
    axes.set_xlabel(TIME_LABEL)
    axes.set_ylabel(FREQUENCY_LABEL)
    _set_title(axes, title)
    if own:
        axes.figure.colorbar(image, ax=axes, pad=0.01, label=LEVEL_LABEL)
    return axes.figure


def plot_sound(audio: Sound, sampling_rate: int, *, title: str | None = None) -> Any:
    """Plot a waveform above its log-mel spectrogram, over the same time axis.

    Args:
        audio: floating-point waveform (samples,) or (channels, samples), numpy or torch; channels are
            averaged.
        sampling_rate: in Hz.
        title: text above both.

    Returns:
        The matplotlib Figure.

    Raises:
        ImportError: matplotlib is not installed or is broken.
        TypeError: the waveform is not floating point, or the sampling rate is not an integer.
        ValueError: the waveform has another shape, no samples, NaN or infinity; or the sampling rate is not
            positive.

    Example:
        >>> plot_sound(output.audios[0], output.sampling_rate, title="A bell over rain")
    """
    samples, sampling_rate = _mono(audio, sampling_rate)
    figure = _figure(height=1.35 * HEIGHT)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(1, 2.4))
    _draw_waveform(upper, samples, sampling_rate)
    image = _draw_levels_of(lower, samples, sampling_rate)
    lower.set_xlabel(TIME_LABEL)
    lower.set_ylabel(FREQUENCY_LABEL)
    _set_title(upper, title)
    figure.colorbar(image, ax=lower, pad=0.01, label=LEVEL_LABEL)
    return figure


# --- files


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


def save_figure(path: str | Path, figure: Any) -> None:
    """Save a figure as an image. On failure, no partial file is left.

    Args:
        path: path of the file; its suffix decides the type, PNG by default.
        figure: a matplotlib Figure.

    Raises:
        OSError: the file cannot be written.
        ValueError: the suffix is unknown.
    """
    kind = image_type(path)
    check_writable(path)
    with replacing(path) as temporary:
        _write(figure, temporary, kind)


def save_spectrogram(
    path: str | Path, waveform: Sound, sampling_rate: int, *, title: str | None = None
) -> None:
    """Save the log-mel spectrogram of a waveform as an image. On failure, no partial file is left.

    Args:
        path: path of the file; its suffix decides the type, PNG by default.
        waveform: as in `plot_spectrogram`.
        sampling_rate: in Hz.
        title: text above the image.

    Raises:
        ImportError: matplotlib is not installed or is broken.
        OSError: the file cannot be written.
        TypeError: the waveform is not floating point, or the sampling rate is not an integer.
        ValueError: the waveform has another shape, no samples, NaN or infinity; or the sampling rate is not
            positive, or the suffix is unknown.
    """
    image_type(path)  # before anything is drawn
    save_figure(path, plot_spectrogram(waveform, sampling_rate, title=title))


def png(figure: Any) -> bytes:
    """A figure as a PNG file."""
    file = io.BytesIO()
    _write(figure, file, "png")
    return file.getvalue()


def _write(figure: Any, file: Any, kind: str) -> None:
    with warnings.catch_warnings():
        # A title may have characters that the font lacks. They are drawn as boxes.
        warnings.filterwarnings("ignore", message="Glyph")
        figure.savefig(file, format=kind)


# --- parts of pictures


def draw_spectrogram(
    axes: Any, levels: Tensor, seconds: float, highest: float, ticks: Sequence[int] = TICKS
) -> Any:
    """Draw a mel spectrogram into matplotlib axes: time to the right, frequency upwards.

    Args:
        axes: matplotlib's Axes.
        levels: in dB relative to the maximum, (frames, mels), with bands that are evenly spaced on the mel
            scale.
        seconds: duration of the sound.
        highest: upper edge of the bands in Hz; the lower one is 0.
        ticks: of the frequency axis, in Hz; those above `highest` are left out.

    Returns:
        matplotlib's AxesImage, for a color bar.
    """
    top = hertz_to_mel(torch.tensor(float(highest))).item()
    image = axes.imshow(
        rearrange(levels, "t m -> m t").numpy(),
        origin="lower",
        aspect="auto",
        interpolation="nearest",
        cmap="magma",
        vmin=-RANGE_DB,
        vmax=0,
        extent=(0, seconds, 0, top),
    )
    ticks = [tick for tick in ticks if tick <= highest]
    axes.set_yticks(hertz_to_mel(torch.tensor(ticks, dtype=torch.float64)).tolist(), [f"{t}" for t in ticks])
    return image


def _draw_levels_of(axes: Any, samples: np.ndarray[Any, Any], sampling_rate: int) -> Any:
    levels = decibels(torch.from_numpy(samples[None]).float(), sampling_rate)
    return draw_spectrogram(axes, levels, len(samples) / sampling_rate, sampling_rate / 2)


def _draw_waveform(axes: Any, samples: np.ndarray[Any, Any], sampling_rate: int) -> None:
    seconds = len(samples) / sampling_rate
    if len(samples) <= 2 * WAVEFORM_COLUMNS:
        axes.plot(np.arange(len(samples)) / sampling_rate, samples, color=WAVEFORM_COLOR, linewidth=0.7)
    else:
        starts = np.linspace(0, len(samples), WAVEFORM_COLUMNS, endpoint=False).astype(np.int64)
        lowest, highest = np.minimum.reduceat(samples, starts), np.maximum.reduceat(samples, starts)
        times = starts / sampling_rate
        axes.fill_between(times, lowest, highest, color=WAVEFORM_COLOR, linewidth=0.4)
    peak = float(np.abs(samples).max())
    limit = 1.05 * peak if peak > 0 else 1.0
    axes.set_xlim(0, seconds)
    axes.set_ylim(-limit, limit)
    axes.set_ylabel("amplitude")


def _mono(audio: Sound, sampling_rate: int) -> tuple[np.ndarray[Any, Any], int]:
    """A caller's sound as samples (N,) and its rate, both checked; the channels are averaged."""
    sampling_rate = index(sampling_rate)
    if sampling_rate < 1:
        raise ValueError(f"the sampling rate must be positive, got {sampling_rate}")
    return as_channels(audio).mean(0), sampling_rate


def _figure(width: float = WIDTH, height: float = HEIGHT) -> Any:
    """An empty figure without pyplot, which a notebook shows as a PNG image."""
    module = import_extra("matplotlib.figure", "plot", "drawing a spectrogram")
    figure = module.Figure(figsize=(width, height), dpi=DPI, layout="constrained")
    # IPython knows by itself how to show a Figure only after pyplot was imported.
    figure._repr_png_ = partial(png, figure)
    return figure


def _set_title(axes: Any, title: str | None) -> None:
    """Set the title of axes, on several lines if it is long."""
    if title is None:
        return
    width = max(10, int(CHARACTERS_PER_INCH * axes.bbox.width / axes.figure.dpi))
    lines = textwrap.wrap(shortened(title, MAX_TITLE), width) or [""]
    axes.set_title("\n".join(lines), parse_math=False)
