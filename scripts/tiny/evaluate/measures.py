"""Measurements of a waveform by plain signal processing, with nothing learned.

`measure` computes some twenty quantities: the pitch over time, onsets, decay, the shape of the spectrum.
`noise_bands` finds what lies behind an event. criteria.py decides from them whether a sound matches a scene.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

import numpy as np
import torch

from scripts.tiny.data.sounds import SAMPLING_RATE, loudest_level

STFT_WINDOW = 1024  # samples: 64 ms
STFT_HOP = 160  # samples: 10 ms
HERTZ_PER_BIN = SAMPLING_RATE / STFT_WINDOW
FRAMES_PER_SECOND = SAMPLING_RATE / STFT_HOP
MEASURED_DEPTH = 20.0  # dB below the loudest point down to which a sound is measured
ATTACK_FRAMES = 3  # an onset rises within these: 30 ms


@dataclass(frozen=True)
class Measured:
    """The quantities of a waveform.

    "Sounding" frames are those less than `depth` dB below the loudest. The pitch is that of the strongest
    partial.

    Attributes:
        level: dB of full scale, of the loudest 64 ms.
        lasting: duration of all sounding frames in s.
        held: share of the time from the first to the last sounding frame within 7 dB of full level.
        frequency: median pitch in Hz.
        tonality: share of the power at the pitch (within 60 Hz or 5 %), median over frames.
        steadiness: share of the frames whose pitch is within a semitone of the median.
        span: semitones from the 3rd to the 97th percentile of the pitch.
        direction: rank correlation of pitch and time (Spearman 1904); 1 rises, -1 falls throughout.
        stepping: share of the pitch's movement made by its fastest fifth; high for notes, low for a glide.
        notes: stretches of at least 0.1 s in which the pitch stays within 0.6 semitones.
        turns: how often the pitch reverses, by at least 3 semitones.
        onsets: rises of 6 dB within 30 ms, or within 50 ms over a background.
        rate: onsets per second, from the median interval between two.
        regularity: share of the intervals between onsets within 25 % of the median.
        decay: s in which the sound would fall by 60 dB, from its slope after the loudest point (ISO 3382-1).
        flatness: geometric over arithmetic mean of the power spectrum, 100 to 7500 Hz (Wiener entropy).
        centroid: mean frequency by power in Hz.
        low: share of the power below 300 Hz.
        high: share of the power above 1 kHz.
        tilt: mean power per bin of 100 to 700 Hz relative to that of 2 to 4 kHz, in dB.
        hum: highest autocorrelation of the waveform at lags of 1/65 to 1/28 s.
        swelling: dB between the 10th and the 90th percentile of the level smoothed over 0.3 s.
        swells: stretches of at least 0.3 s above the middle between those percentiles.
    """

    level: float
    lasting: float
    held: float
    frequency: float
    tonality: float
    steadiness: float
    span: float
    direction: float
    stepping: float
    notes: int
    turns: int
    onsets: int
    rate: float
    regularity: float
    decay: float
    flatness: float
    centroid: float
    low: float
    high: float
    tilt: float
    hum: float
    swelling: float
    swells: int


def measure(waveform: np.ndarray, depth: float = MEASURED_DEPTH, attack: int = ATTACK_FRAMES) -> Measured:
    """Measure a waveform.

    Args:
        waveform: (samples,), 16 kHz.
        depth: dB; only frames less than this below the loudest are measured.
        attack: frames of 10 ms within which an onset rises.
    """
    power, levels = spectrogram(waveform), envelope(waveform)
    sounding = levels > levels.max() - depth
    pitch = pitch_contour(power)
    share = tonality(power, pitch)[sounding]
    pitch = median_filter(pitch, 5)[sounding]
    notes = 12 * np.log2(pitch / 440)  # semitones from A4
    starts = onset_times(levels, depth, attack)
    intervals = np.diff(starts) if len(starts) > 1 else np.array([inf])
    spectrum = power[sounding].mean(0)
    first, last = np.flatnonzero(sounding)[[0, -1]]
    inner = levels[first : last + 1]
    swelling, swells = swell(inner)
    return Measured(
        level=loudest_level(waveform),
        lasting=float(sounding.sum() / FRAMES_PER_SECOND),
        held=float((inner > np.percentile(levels[sounding], 95) - 7).mean()),
        frequency=float(np.median(pitch)),
        tonality=float(np.median(share)),
        steadiness=float((np.abs(notes - np.median(notes)) < 1).mean()),
        span=float(np.ptp(np.percentile(notes, [3, 97]))),
        direction=rank_correlation(notes),
        stepping=stepping(notes),
        notes=count_notes(notes),
        turns=count_turns(notes),
        onsets=len(starts),
        rate=float(1 / np.median(intervals)),
        regularity=float((np.abs(intervals / np.median(intervals) - 1) < 0.25).mean())
        if len(starts) > 2
        else 0.0,
        decay=decay_time(levels, depth),
        flatness=flatness(spectrum[band(100, 7500)]),
        centroid=float((spectrum * np.arange(len(spectrum))).sum() / spectrum.sum() * HERTZ_PER_BIN),
        low=float(spectrum[band(0, 300)].sum() / spectrum.sum()),
        high=float(spectrum[band(1000, 8000)].sum() / spectrum.sum()),
        tilt=float(10 * np.log10(spectrum[band(100, 700)].mean() / spectrum[band(2000, 4000)].mean())),
        hum=periodicity(waveform, 28, 65),
        swelling=swelling,
        swells=swells,
    )


def band(low: float, high: float) -> slice:
    """The slice of bins between two frequencies in Hz."""
    return slice(round(low / HERTZ_PER_BIN), round(high / HERTZ_PER_BIN) + 1)


def spectrogram(waveform: np.ndarray) -> np.ndarray:
    """Power every 10 ms, (frames, STFT_WINDOW // 2 + 1), never 0; frame i is centered on i * STFT_HOP."""
    spectrum = torch.stft(
        torch.from_numpy(np.ascontiguousarray(waveform, dtype=np.float32)),
        STFT_WINDOW,
        STFT_HOP,
        window=torch.hann_window(STFT_WINDOW),
        pad_mode="constant",
        return_complex=True,
    )
    power: np.ndarray = (spectrum.real**2 + spectrum.imag**2 + 1e-12).T.numpy()
    return power


def envelope(waveform: np.ndarray) -> np.ndarray:
    """The level of each 20 ms in dB of full scale, (frames,), aligned with the frames of `spectrogram`."""
    energy = np.concatenate([[0.0], np.cumsum(waveform.astype(np.float64) ** 2)])
    middle = np.arange(len(waveform) // STFT_HOP + 1) * STFT_HOP
    start, end = np.maximum(middle - STFT_HOP, 0), np.minimum(middle + STFT_HOP, len(waveform))
    levels: np.ndarray = 10 * np.log10(np.maximum((energy[end] - energy[start]) / (2 * STFT_HOP), 1e-12))
    return levels


def pitch_contour(power: np.ndarray) -> np.ndarray:
    """The frequency of each frame's strongest partial in Hz, (frames,), from 30 Hz up.

    Interpolated between bins with a parabola through three logarithms (Smith and Serra 1987, "PARSHL").
    """
    rows = np.arange(len(power))
    bins = power[:, 2:-1].argmax(1) + 2
    left, middle, right = (np.log(power[rows, bins + i]) for i in (-1, 0, 1))
    shift = 0.5 * (left - right) / np.minimum(left - 2 * middle + right, -1e-6)
    pitch: np.ndarray = (bins + np.clip(shift, -0.5, 0.5)) * HERTZ_PER_BIN
    return pitch


def tonality(power: np.ndarray, pitch: np.ndarray) -> np.ndarray:
    """The share of each frame's power within 60 Hz or 5 % of its pitch in Hz: near 1 for a single partial."""
    total = np.pad(power.cumsum(1, dtype=np.float64), ((0, 0), (1, 0)))
    rows, width = np.arange(len(power)), np.maximum(60, 0.05 * pitch)
    start = np.ceil((pitch - width) / HERTZ_PER_BIN).astype(int).clip(0, power.shape[1])
    end = np.floor((pitch + width) / HERTZ_PER_BIN).astype(int).clip(-1, power.shape[1] - 1) + 1
    share: np.ndarray = (total[rows, end] - total[rows, start]) / total[:, -1]
    return share


def median_filter(x: np.ndarray, width: int) -> np.ndarray:
    """The running median of `width` values along the last axis, padded to keep its length."""
    ends = [(0, 0)] * (x.ndim - 1) + [(width // 2, width // 2)]
    windows = np.lib.stride_tricks.sliding_window_view(np.pad(x, ends, "edge"), width, axis=-1)
    median: np.ndarray = np.median(windows, axis=-1)
    return median


def rank_correlation(x: np.ndarray) -> float:
    """Spearman's correlation of a sequence with its order: 1 if it only rises, -1 if it only falls."""
    if len(x) < 3 or np.ptp(x) < 1e-9:
        return 0.0
    ranks = x.argsort(kind="stable").argsort(kind="stable")
    return float(np.corrcoef(ranks, np.arange(len(x)))[0, 1])


def stepping(notes: np.ndarray) -> float:
    """The share of a contour's movement (over 50 ms) made by its fastest fifth: 0.2 if even, 1 for steps."""
    moves = np.sort(np.abs(notes[5:] - notes[:-5]))
    if len(moves) < 10 or moves.sum() <= 1e-9:
        return 0.0
    return float(moves[-len(moves) // 5 :].sum() / moves.sum())


def count_notes(notes: np.ndarray, within: float = 0.6, shortest: int = 10) -> int:
    """The number of stretches of a contour (semitones, every 10 ms) that stay near their own running mean."""
    count, length, mean = 0, 0, 0.0
    for note in [*notes.tolist(), inf]:
        if length and abs(note - mean) > within:
            count += length >= shortest
            length, mean = 0, 0.0
        length += 1
        mean += (note - mean) / length
    return count


def count_turns(notes: np.ndarray, least: float = 3.0) -> int:
    """How often a contour (semitones) reverses; movements smaller than `least` do not count."""
    count, direction, lowest, highest = 0, 0, notes[0], notes[0]
    for note in notes.tolist():
        lowest, highest = min(lowest, note), max(highest, note)
        if direction <= 0 and note > lowest + least:
            count, direction, highest = count + (direction < 0), 1, note
        elif direction >= 0 and note < highest - least:
            count, direction, lowest = count + (direction > 0), -1, note
    return count


def onset_times(levels: np.ndarray, depth: float, attack: int, rise: float = 6.0) -> np.ndarray:
    """Times in s at which the level (dB, every 10 ms) rises by `rise` dB within `attack` frames.

    They are at least 110 ms apart. Anything more than `depth` dB below the loudest frame counts as silence.
    """
    levels = np.maximum(levels, levels.max() - depth)
    rises = levels - np.concatenate([np.full(attack, levels.max() - depth), levels[:-attack]])
    found, frame = [], 0
    while frame < len(rises):
        if rises[frame] >= rise:
            frame += int(rises[frame : frame + 6].argmax())
            found.append(frame)
            frame += 11
        else:
            frame += 1
    return np.array(found) / FRAMES_PER_SECOND


def decay_time(levels: np.ndarray, depth: float) -> float:
    """Seconds in which the level (dB, every 10 ms) would fall by 60 dB, from its first `depth` dB of decay.

    A straight line is fitted to the decay after the loudest frame, as ISO 3382-1 does for rooms (T20). 0 if
    the decay is too short to have a slope, infinite if nothing decays.
    """
    peak = int(levels.argmax())
    after = levels[peak + 2 :]
    below = np.flatnonzero(after < levels[peak] - depth)
    falling = after[: below[0] if len(below) else len(after)]
    if len(falling) < 3:
        return 0.0
    slope = np.polyfit(np.arange(len(falling)) / FRAMES_PER_SECOND, falling, 1)[0]
    return float(-60 / slope) if slope < 0 else inf


def flatness(spectrum: np.ndarray) -> float:
    """Geometric over arithmetic mean of a power spectrum; 1 for a flat one (Gray and Markel 1974)."""
    return float(np.exp(np.log(spectrum).mean()) / spectrum.mean())


def periodicity(waveform: np.ndarray, low: float, high: float) -> float:
    """The highest autocorrelation of a waveform at the periods of `low` to `high` Hz."""
    spectrum = torch.fft.rfft(
        torch.from_numpy(np.ascontiguousarray(waveform, dtype=np.float32)), 2 * len(waveform)
    )
    correlation = torch.fft.irfft(spectrum.real**2 + spectrum.imag**2)
    periods = slice(int(SAMPLING_RATE / high), int(SAMPLING_RATE / low) + 1)
    return float(correlation[periods].max() / correlation[0].clamp(min=1e-12))


def swell(levels: np.ndarray) -> tuple[float, int]:
    """How far a level (dB, every 10 ms), smoothed over 0.3 s, swells in dB, and how often.

    The extent is from the 10th to the 90th percentile; a swell is a stretch of 0.3 s or more above their
    middle.
    """
    power = np.convolve(10 ** (levels / 10), np.ones(30) / 30, mode="same")
    smooth = 10 * np.log10(power)
    quiet, loud = np.percentile(smooth, [10, 90])
    edges = np.flatnonzero(np.diff(smooth > (quiet + loud) / 2, prepend=False, append=False))
    return float(loud - quiet), int((np.diff(edges)[::2] >= 30).sum())


def noise_bands(waveform: np.ndarray) -> dict[str, tuple[float, float]]:
    """The level of the noise in three bands, relative to the loudest frame: (quiet, loud) in dB.

    Quiet and loud are the 30th and the 75th percentile over time, and events are too short to raise the
    30th. Partials are narrow, so they are excluded by taking the lower quartile of the bins in each block of
    250 Hz. "low" is up to 500 Hz, "dull" 250 to 3000 Hz and "bright" from 2500 Hz up. Of "dull" and "bright"
    it is the median of their blocks, so an event may fill some of them.
    """
    power = spectrogram(waveform)
    inner = power[len(power) // 10 : -len(power) // 6]  # a background need not reach the ends of the clip
    blocks = (
        np.partition(inner[:, 1:].reshape(len(inner), -1, 16), 4, axis=2)[:, :, 4] * 16 / power.sum(1).max()
    )
    bands = {
        "low": blocks[:, :2].sum(1),
        "dull": np.median(blocks[:, 1:12], axis=1) * 11,
        "bright": np.median(blocks[:, 10:], axis=1) * 22,
    }
    levels = {name: 10 * np.log10(np.percentile(strength, [30, 75])) for name, strength in bands.items()}
    return {name: (float(quiet), float(loud)) for name, (quiet, loud) in levels.items()}
