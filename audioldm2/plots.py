"""Plots of sounds and of how they are generated.

Each `plot_...` returns a matplotlib Figure, which a notebook shows and whose `savefig` writes a file.
Functions that draw one panel also take `axes=`, to draw into a figure of the caller's. The extra "plot"
installs matplotlib, which is imported when something is drawn, without pyplot.

    >>> from audioldm2.plots import plot_sound
    >>> output = pipe("A bell over rain", **pipe.recommended)
    >>> plot_sound(output.audios[0], output.sampling_rate).savefig("bell.png")
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import index
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from audioldm2.arguments import check_choice, check_count
from audioldm2.attention import AttentionLayer, AttentionRecord, Word
from audioldm2.audio.decibels import DECIBELS_PER_NEPER, RANGE_DB, decibels
from audioldm2.audio.file_types import image_type
from audioldm2.audio.mel import hertz_to_mel
from audioldm2.audio.wav import as_channels
from audioldm2.figures import (
    HEIGHT,
    SMALL,
    WIDTH,
    check_can_draw as check_can_draw,
    color_bar,
    new_figure,
    save_figure as save_figure,
    set_heading,
    set_title,
    small_panels,
)
from audioldm2.output import AudioPipelineOutput
from audioldm2.quoting import shortened
from audioldm2.sampling import LatentRecorder

Sound = np.ndarray[Any, Any] | Tensor

TICKS = (0, 250, 500, 1000, 2000, 4000, 8000, 16000, 32000)  # of the frequency axis, in Hz
FEWER_TICKS = (0, 500, 1000, 2000, 4000, 8000, 16000, 32000)  # of small panels
WAVEFORM_COLUMNS = 2000  # of longer waveforms, the extremes of so many parts are drawn
WAVEFORM_COLOR = "#4c3a8c"  # a dark tone of the spectrograms' color map
TIME_LABEL = "time (s)"
FREQUENCY_LABEL = "frequency (Hz, mel scale)"
LEVEL_LABEL = "level (dB, loudest = 0)"
WORDS_LABEL, T5_LABEL, GPT2_LABEL = "words", "T5's tokens", "GPT-2's vectors"
MAX_LABEL = 20  # characters of a word beside a row


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
    axes = new_figure().add_subplot() if axes is None else axes
    _draw_waveform(axes, samples, sampling_rate)
    axes.set_xlabel(TIME_LABEL)
    set_title(axes, title)
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
    axes = new_figure().add_subplot() if own else axes
    image = _draw_levels_of(axes, samples, sampling_rate)
    axes.set_xlabel(TIME_LABEL)
    axes.set_ylabel(FREQUENCY_LABEL)
    set_title(axes, title)
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
    figure = new_figure(height=1.35 * HEIGHT)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(1, 2.4))
    _draw_waveform(upper, samples, sampling_rate)
    image = _draw_levels_of(lower, samples, sampling_rate)
    lower.set_xlabel(TIME_LABEL)
    lower.set_ylabel(FREQUENCY_LABEL)
    set_title(upper, title)
    figure.colorbar(image, ax=lower, pad=0.01, label=LEVEL_LABEL)
    return figure


def plot_candidates(output: AudioPipelineOutput, *, prompt: str | None = None) -> Any:
    """Plot the log-mel spectrograms of a generation's sounds side by side, with their scores.

    Args:
        output: what the pipeline returned, with waveforms.
        prompt: text above all of them.

    Returns:
        The matplotlib Figure.

    Raises:
        ImportError: matplotlib is not installed or is broken.
        TypeError: `output` is not what a pipeline returns.
        ValueError: it has latents, or waveforms that cannot be drawn.

    Example:
        >>> output = pipe("A bell over rain", num_waveforms_per_prompt=3, **pipe.recommended)
        >>> plot_candidates(output, prompt="A bell over rain")
    """
    if not isinstance(output, AudioPipelineOutput):
        raise TypeError(f"output must be what a pipeline returns, got {type(output).__name__}")
    audios, scores = output.audios, output.scores
    if audios.ndim != 2:
        raise ValueError(
            f"output has latents of shape {tuple(audios.shape)}; decode them with pipe.decode_latents"
        )
    figure, panels = small_panels(len(audios), rows_high=2.2)
    for number, (axes, audio) in enumerate(zip(panels, audios, strict=True)):
        samples, rate = _mono(audio, output.sampling_rate)
        image = _draw_levels_of(axes, samples, rate, FEWER_TICKS)
        score = "" if scores is None else f": score {float(scores[number]):.3f}"
        set_title(axes, f"{number + 1}{score}", SMALL + 1)
    _label_panels(figure, panels, image)
    set_heading(figure, prompt)
    return figure


def plot_denoising(
    recorder: LatentRecorder, pipe: Any, *, sound: int = 0, panels: int = 6, title: str | None = None
) -> Any:
    """Plot how a sound emerges from noise: the spectrograms of the latents after some of the steps.

    The latents of each step are decoded with the VAE. Levels are relative to the maximum after the last step.

    Args:
        recorder: the callback of a generation.
        pipe: the pipeline that generated, which decodes.
        sound: which of the B sounds, in the order before candidates are ranked.
        panels: how many steps to show at most; the last one, and others at even distances before it.
        title: text above all of them.

    Returns:
        The matplotlib Figure.

    Raises:
        ImportError: matplotlib is not installed or is broken.
        ValueError: nothing was recorded, there is no such sound, or `panels` is not positive.

    Example:
        >>> recorder = LatentRecorder()
        >>> pipe("A bell over rain", callback=recorder, **pipe.recommended)
        >>> plot_denoising(recorder, pipe)
    """
    check_count("panels", panels)
    if not recorder.latents:
        raise ValueError("recorder has no latents; run the pipeline with callback=recorder")
    check_count("sound", sound, lowest=0, highest=len(recorder.latents[-1]) - 1)
    last = len(recorder.latents) - 1
    shown = sorted({round(last * i / max(1, panels - 1)) for i in range(panels)} | {last})[-panels:]
    latents = torch.stack([recorder.latents[i][sound] for i in shown])
    mels = pipe.decode(latents.to(pipe.device)).float().cpu()[:, 0]  # natural logarithm, (steps, T, F)
    levels = DECIBELS_PER_NEPER * (mels - mels[-1].max())
    vocoder = pipe.part("vocoder")
    rate = vocoder.config.sampling_rate
    seconds = mels.shape[1] * vocoder.hop_length / rate
    figure, axes = small_panels(len(shown), rows_high=2.2, columns=3)
    for one, i, level in zip(axes, shown, levels, strict=True):
        image = draw_spectrogram(one, level.clamp(-RANGE_DB, 0), seconds, rate / 2, FEWER_TICKS)
        set_title(one, f"step {recorder.steps[i] + 1}, t = {recorder.timesteps[i]:g}", SMALL + 1)
    _label_panels(figure, axes, image)
    set_heading(figure, title)
    return figure


def plot_attention(
    attention: AttentionRecord,
    prompt: str | None = None,
    *,
    by: str = "layer",
    sound: int = 0,
    step: int | None = None,
    title: str | None = None,
) -> Any:
    """Plot how much the words of the prompt, and GPT-2's vectors, matter at each time of a sound.

    Each panel shows the weights of cross-attentions, averaged over heads and frequencies: those to T5's
    states on the left, where a word's weight is the sum of its tokens', and those to GPT-2's vectors on the
    right. In each column of a panel they sum to 1.

    Args:
        attention: from `record_attention`.
        prompt: what the sound was generated from; without it, T5's tokens have numbers instead of words.
        by: a row of panels for each "layer", or for the mean of each "level" or of "all" layers.
        sound: which of the B sounds, in the order before candidates are ranked.
        step: which step, from 0; the mean over all by default.
        title: text above all of them.

    Returns:
        The matplotlib Figure.

    Raises:
        ImportError: matplotlib is not installed or is broken.
        IndexError: there is no such step.
        ValueError: nothing was recorded, or an argument that cannot be used; the message names it.

    Example:
        >>> with record_attention(pipe) as attention:
        ...     output = pipe("A bell over rain", **pipe.recommended)
        >>> plot_attention(attention, "A bell over rain")
    """
    check_choice("by", by, ("layer", "level", "all"))
    columns = {
        label: found
        for condition, label in (("t5", T5_LABEL if prompt is None else WORDS_LABEL), ("gpt2", GPT2_LABEL))
        if (found := _attention_panels(attention, condition, prompt, by, sound, step))
    }
    rows = max(len(panels) for panels in columns.values())
    most = max(len(panels[0].labels) for panels in columns.values())
    figure = new_figure(WIDTH, 0.9 + rows * (0.4 + max(0.8, 0.15 * most)))
    grid = figure.subplots(rows, len(columns), sharex=True, squeeze=False)
    highest = max(float(panel.weights.max()) for panels in columns.values() for panel in panels)
    for (label, panels), below in zip(columns.items(), grid.T, strict=True):
        for axes in below[len(panels) :]:
            axes.set_axis_off()
        for axes, panel in zip(below, panels, strict=False):
            count = len(panel.labels)
            image = axes.imshow(
                panel.weights.numpy(),
                aspect="auto",
                interpolation="nearest",
                cmap="viridis",
                vmin=0,
                vmax=highest,
                extent=(0, attention.seconds, count, 0),
            )
            axes.set_yticks([i + 0.5 for i in range(count)], panel.labels, parse_math=False)
            axes.tick_params(labelsize=SMALL)
            axes.tick_params(axis="y", length=0)
            axes.set_ylabel(label, fontsize=SMALL)
            set_title(axes, panel.title, SMALL)
    figure.supxlabel(TIME_LABEL, fontsize=SMALL + 1)
    color_bar(figure, image, grid, "weight of the attention")
    set_heading(figure, title)
    return figure


# --- files


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


# --- drawing


def draw_spectrogram(
    axes: Any, levels: Tensor, seconds: float, highest: float, ticks: Sequence[int] = TICKS
) -> Any:
    """Draw a mel spectrogram into matplotlib axes: time to the right, frequency upwards.

    Args:
        axes: matplotlib's Axes.
        levels: in dB relative to the maximum, (frames, mels), with bands that are evenly spaced on the mel
            scale from 0 Hz.
        seconds: duration of the sound.
        highest: upper edge of the bands in Hz.
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


def _draw_levels_of(
    axes: Any, samples: np.ndarray[Any, Any], sampling_rate: int, ticks: Sequence[int] = TICKS
) -> Any:
    levels = decibels(torch.from_numpy(samples[None]).float(), sampling_rate)
    return draw_spectrogram(axes, levels, len(samples) / sampling_rate, sampling_rate / 2, ticks)


def _draw_waveform(axes: Any, samples: np.ndarray[Any, Any], sampling_rate: int) -> None:
    seconds = len(samples) / sampling_rate
    if len(samples) <= 2 * WAVEFORM_COLUMNS:
        axes.plot(np.arange(len(samples)) / sampling_rate, samples, color=WAVEFORM_COLOR, linewidth=0.7)
    else:
        starts = np.linspace(0, len(samples), WAVEFORM_COLUMNS, endpoint=False).astype(np.int64)
        lowest, highest = np.minimum.reduceat(samples, starts), np.maximum.reduceat(samples, starts)
        axes.fill_between(starts / sampling_rate, lowest, highest, color=WAVEFORM_COLOR, linewidth=0.4)
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


def _label_panels(figure: Any, panels: Sequence[Any], image: Any) -> None:
    """The labels that panels of spectrograms share, and their color bar."""
    figure.supxlabel(TIME_LABEL, fontsize=SMALL + 1)
    figure.supylabel(FREQUENCY_LABEL, fontsize=SMALL + 1)
    color_bar(figure, image, panels, LEVEL_LABEL)


class _AttentionPanel(NamedTuple):
    title: str
    labels: list[str]  # of its rows: words, or numbers of vectors
    weights: Tensor  # (rows, time)


def _attention_panels(
    attention: AttentionRecord, condition: str, prompt: str | None, by: str, sound: int, step: int | None
) -> list[_AttentionPanel]:
    """A panel for each layer that attends to a condition, or for each group of them."""
    groups: dict[str, list[str | AttentionLayer]] = {}
    for layer in attention.layers:
        if layer.condition == condition:
            name = layer.name.removesuffix(".cross_attention")
            groups.setdefault({"layer": name, "level": layer.level}.get(by, "all layers"), []).append(layer)
    panels = []
    for title, layers in groups.items():
        weights = attention.mean(condition, layers, step)  # (B, time, tokens)
        check_count("sound", sound, lowest=0, highest=len(weights) - 1)
        rows = attention.words(prompt, sound) if prompt is not None and condition == "t5" else None
        if rows is None:
            count = attention.tokens(sound) if condition == "t5" else weights.shape[2]
            rows = [Word(f"{i + 1}", (i,)) for i in range(count)]
        by_row = [weights[sound][:, list(row.tokens)].sum(-1) for row in rows]
        labels = [shortened(row.text, MAX_LABEL) for row in rows]
        panels.append(_AttentionPanel(title, labels, torch.stack(by_row)))
    return panels
