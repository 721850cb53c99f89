"""Figures of an edited sound beside its source, by signal processing alone.

Levels are in dB of full scale, spectra in bands of a third of an octave. Levels more than `AUDIBLE_DEPTH`
below the loudest count as silence.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from scripts.tiny.data.sounds import SAMPLING_RATE, loudest_level
from scripts.tiny.evaluate.criteria import ATTACK_OVER_BACKGROUND, DEPTH_OVER_BACKGROUND
from scripts.tiny.evaluate.measures import (
    ATTACK_FRAMES,
    FRAMES_PER_SECOND,
    HERTZ_PER_BIN,
    MEASURED_DEPTH,
    envelope,
    measure,
    onset_times,
    spectrogram,
)

AUDIBLE_DEPTH = 50.0  # dB
SEAM_FRAMES = 3  # before and after a seam, of 10 ms: the windows of the spectrogram that contain it


def level(waveform: np.ndarray) -> float:
    """The root mean square of a waveform, in dB."""
    return float(10 * np.log10(max(np.mean(np.square(waveform, dtype=np.float64)), 1e-12)))


def level_error(original: np.ndarray, waveform: np.ndarray) -> float:
    """By how many dB the levels of the loudest 64 ms differ."""
    return abs(loudest_level(waveform) - loudest_level(original))


def third_octaves(power: np.ndarray, low: float = 100.0, high: float = 8000.0) -> np.ndarray:
    """Mean power per bin in third octaves from `low` to `high` Hz, (..., bins) to (..., bands).

    Bands narrower than three bins are left out.
    """
    edges = low * 2 ** (np.arange(np.floor(3 * np.log2(high / low)) + 1) / 3)
    bins = np.round(edges / HERTZ_PER_BIN).astype(int)
    bands = [power[..., a:b].mean(-1) for a, b in pairwise(bins.tolist()) if b - a >= 3]
    return np.stack(bands, axis=-1)


def spectrum_error(original: np.ndarray, waveform: np.ndarray, low: float, high: float) -> float:
    """Root-mean-square distance of two spectrograms in third octaves from `low` to `high` Hz, in dB."""
    a, b = (third_octaves(spectrogram(sound), low, high) for sound in (original, waveform))
    quietest = a.max() * 10 ** (-AUDIBLE_DEPTH / 10)
    distance = 10 * np.log10(np.maximum(a, quietest) / np.maximum(b, quietest))
    return float(np.sqrt(np.mean(distance**2)))


def color_error(original: np.ndarray, waveform: np.ndarray) -> float:
    """Mean distance of two spectra in dB, apart from their levels, where the original has power."""
    spectra = [10 * np.log10(third_octaves(spectrogram(sound).mean(0))) for sound in (original, waveform)]
    audible = spectra[0] > spectra[0].max() - 25
    difference = (spectra[1] - spectra[0])[audible]
    return float(np.abs(difference - np.median(difference)).mean())


def pitch_error(original: np.ndarray, waveform: np.ndarray) -> float:
    """By which share the pitches of two sounds differ, over a background or not."""
    one, other = (
        measure(sound, DEPTH_OVER_BACKGROUND, ATTACK_OVER_BACKGROUND).frequency
        for sound in (original, waveform)
    )
    return abs(other / one - 1)


def onset_error(original: np.ndarray, waveform: np.ndarray) -> float:
    """By how many seconds the loudest onsets of two sounds differ, over a background or not."""
    times = []
    for sound in (original, waveform):
        levels = envelope(sound)
        onsets = onset_times(levels, DEPTH_OVER_BACKGROUND, ATTACK_OVER_BACKGROUND)
        times.append(onsets[0] if len(onsets) else np.inf)
    return float(abs(times[1] - times[0])) if np.isfinite(times).all() else float("inf")


def deepest_dip(waveform: np.ndarray, start: float, end: float) -> float:
    """By how many dB the quietest 60 ms from `start` to `end` s lie below the median of the second around."""
    power = np.convolve(10 ** (envelope(waveform) / 10), np.ones(6) / 6, mode="same")
    levels = 10 * np.log10(np.maximum(power, 1e-12))
    first, last = (round(time * FRAMES_PER_SECOND) for time in (start, end))
    around = np.concatenate([levels[first - 100 : first], levels[last : last + 100]])
    return float(np.median(around) - levels[first:last].min())


# --- beats


@dataclass(frozen=True)
class Beat:
    """Events at a steady rate.

    Attributes:
        onsets: in s.
        period: in s; infinite if there are fewer than three onsets.
        regularity: share of the intervals within 25 % of the median.
    """

    onsets: np.ndarray
    period: float
    regularity: float


def beat(waveform: np.ndarray, start: float = 0.0, end: float = float("inf")) -> Beat:
    """The beat of a sound from `start` to `end` s.

    The period is the slope of a straight line through the onsets, each at the multiple of the median interval
    that is nearest: one that is missing does not change it.
    """
    onsets = onset_times(envelope(waveform), MEASURED_DEPTH, ATTACK_FRAMES)
    onsets = onsets[(onsets >= start) & (onsets < end)]
    if len(onsets) < 3:
        return Beat(onsets, float("inf"), 0.0)
    intervals = np.diff(onsets)
    median = np.median(intervals)
    regularity = float((np.abs(intervals / median - 1) < 0.25).mean())
    numbers = np.cumsum(np.concatenate([[0], np.maximum(1, np.round(intervals / median))]))
    return Beat(onsets, float(np.polyfit(numbers, onsets, 1)[0]), regularity)


def phase_error(before: Beat, after: Beat, count: int = 4) -> float:
    """How far the first onsets after a joint are from where the beat before it has them, in periods.

    Args:
        before: the beat up to the joint.
        after: the beat from there.
        count: how many onsets are looked at.

    Returns:
        From 0, in time, to 0.5; the median of the onsets. By chance 0.25. 0.5 if either has no period.
    """
    if not np.isfinite([before.period, after.period]).all():
        return 0.5
    numbers = np.round((before.onsets - before.onsets[0]) / before.period)
    offset = float(np.mean(before.onsets - numbers * before.period))
    phases = (after.onsets[:count] - offset) / before.period
    return float(np.median(np.abs(phases - np.round(phases))))


# --- loops


def seam_jump(waveform: np.ndarray) -> float:
    """How large the jump is where a loop begins again: 1 is the largest 5 % of the jumps elsewhere.

    A jump is the mean change in dB from one spectrum to the next, 10 ms later, in third octaves; of the seam,
    and of stretches of the same length elsewhere, the largest counts.
    """
    twice = np.concatenate([waveform, waveform])
    bands = third_octaves(spectrogram(twice))
    levels = 10 * np.log10(np.maximum(bands, bands.max() * 10 ** (-AUDIBLE_DEPTH / 10)))
    changes = np.abs(np.diff(levels, axis=0)).mean(1)
    seam = round(len(waveform) / SAMPLING_RATE * FRAMES_PER_SECOND)
    width = 2 * SEAM_FRAMES
    largest = np.lib.stride_tricks.sliding_window_view(changes, width).max(1)
    # The first period alone: the second is the same, and its end is cut off.
    elsewhere = largest[width : seam - 2 * width]
    return float(largest[seam - SEAM_FRAMES] / np.percentile(elsewhere, 95))


def sample_step(waveform: np.ndarray) -> float:
    """The step from the last sample of a loop to the first, as a multiple of the steps' 99.9th percentile."""
    steps = np.abs(np.diff(waveform))
    return float(abs(float(waveform[0]) - float(waveform[-1])) / max(np.percentile(steps, 99.9), 1e-9))
