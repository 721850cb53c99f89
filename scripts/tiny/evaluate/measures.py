"""What a sound is, found out from its waveform alone: signal processing with plain rules, and nothing learnt.

    matches(scene, waveform)    # {"kind": True, "rate": True, "loudness": False}: right when all of it is
    misses(scene, waveform)     # the same with reasons: {"kind": [], ..., "loudness": ["level -24, not ..."]}

`measure` takes some twenty quantities of a waveform: pitch over time, onsets, decay, colour of the spectrum.
KINDS and TRAITS say between which bounds they lie for each kind of sound. The bounds lie outside of what the
renderings of `sounds.py` span, so that a sound is not refused for the faults that generated ones have: noise
30 dB below, a time smeared by 20 ms, a pitch that is 2 % off. They are narrow enough to refuse every other
kind.

Of two sounds the foreground is measured in its loudest 13 dB; the background, 17 to 20 dB below, is not heard
there. Of the background it is found out whether one is there and how it is coloured: low (engine, wind), dull
(waves) or bright (rain, noise), not which of the two it is. Where the event hides it (low under a low tone,
waves under drums) it is not looked for, and "background" is missing from what `matches` says.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

import numpy as np
import torch

from scripts.tiny.data.sounds import SAMPLING_RATE, Scene, Sound, level

WINDOW = 1024  # samples of a spectrum: 64 ms
HOP = 160  # samples from one to the next: 10 ms
HERTZ = SAMPLING_RATE / WINDOW  # a bin
FRAMES = SAMPLING_RATE / HOP  # a second
DEPTH = 20.0  # dB below the loudest point to which a sound is measured
DEPTH_OVER = 13.0  # the same, of a sound over a background
ATTACK = 3  # frames in which a sound begins: 30 ms
ATTACK_OVER = 5  # the same over a background: it hides the first decibels of a rise that the VAE smears
SILENCE = -55.0  # dB of full scale, below which nothing is heard


@dataclass(frozen=True)
class Measured:
    """The quantities of a waveform. "Sounding" are the frames less than `depth` dB below the loudest.

    The pitch is that of the strongest partial, and is compared in semitones.
    """

    level: float  # dB of full scale, of the loudest 64 ms
    lasting: float  # s, of the sounding frames
    held: float  # share of the time from the first to the last sounding frame that is at full level, to -7 dB
    frequency: float  # Hz, the median pitch
    tonality: float  # share of the power that lies at the pitch (within 60 Hz or 5 %), median over frames
    steadiness: float  # share of the frames whose pitch lies within a semitone of the median
    span: float  # semitones, from the 3rd to the 97th percentile of the pitch
    direction: float  # rank correlation of pitch and time (Spearman 1904): 1 rises throughout, -1 falls
    stepping: float  # share of all movement of the pitch that its fastest fifth makes: much of it in notes
    notes: int  # stretches of at least 0.1 s in which the pitch stays within 0.6 semitones
    turns: int  # how often the pitch turns round, by 3 semitones at least
    onsets: int  # beginnings: rises of 6 dB within 30 ms, over a background 50 ms
    rate: float  # onsets a second, from the median time between two
    regularity: float  # share of the times between onsets that lie within 25 % of the median
    decay: (
        float  # s in which the sound would fall by 60 dB, from its slope after the loudest point (ISO 3382-1)
    )
    flatness: float  # geometric over arithmetic mean of the power spectrum, 100 to 7500 Hz (Wiener entropy)
    centroid: float  # Hz, mean frequency by power
    low: float  # share of the power below 300 Hz
    high: float  # share of the power above 1 kHz
    tilt: float  # dB, 100 to 700 Hz against 2 to 4 kHz, by power a bin
    hum: float  # correlation of the waveform with itself 1/65 to 1/28 s later, the highest
    swelling: (
        float  # dB between the loud (90th percentile) and the quiet (10th) of a level smoothed over 0.3 s
    )
    swells: int  # stretches of at least 0.3 s above the middle of that


# Bounds of each kind's quantities.
Bounds = dict[str, tuple[float, float]]
LASTING: Bounds = {"lasting": (3.0, inf), "held": (0.5, 1)}
NOTE: Bounds = {"onsets": (1, 1), "held": (0, 0.85), "steadiness": (0.5, 1), "tonality": (0.3, 1)}
MELODY: Bounds = {"lasting": (1.6, inf), "tonality": (0.5, 1), "stepping": (0.45, 1), "notes": (5, 11)}
KINDS: dict[str, Bounds] = {
    "tone": {"lasting": (2.2, inf), "held": (0.7, 1), "steadiness": (0.85, 1), "tonality": (0.6, 1)},
    "sweep": {
        "lasting": (1.8, inf),
        "tonality": (0.5, 1),
        "stepping": (0, 0.6),
        "span": (17, inf),
    },
    "pulses": {
        "onsets": (4, inf),
        "regularity": (0.6, 1),
        "frequency": (400, 1900),
        "steadiness": (0.85, 1),
        "tonality": (0.5, 1),
    },
    "clicks": {"onsets": (4, inf), "regularity": (0.6, 1), "flatness": (0.6, 1), "low": (0, 0.15)},
    "siren": {
        **LASTING,
        "frequency": (550, 1300),
        "tonality": (0.45, 1),
        "span": (6, 18),
        "stepping": (0, 0.65),
        "turns": (2, 9),
        "direction": (-0.6, 0.6),
    },
    "bell": {**NOTE, "decay": (4.8, 30)},
    "pluck": {**NOTE, "decay": (1.5, 4.8)},
    "struck": {**NOTE, "decay": (0.25, 1.5)},
    "scale": {**MELODY, "span": (8.5, 17)},
    "arpeggio": {**MELODY, "stepping": (0.6, 1), "span": (18, 30)},
    "drums": {"onsets": (4, inf), "regularity": (0.6, 1), "low": (0.4, 1), "high": (0.04, 1)},
    "noise": {**LASTING, "held": (0.7, 1), "flatness": (0.6, 1), "tilt": (-5, 6)},
    "rain": {**LASTING, "flatness": (0.4, 1), "tilt": (-22, -6), "centroid": (2700, 5200)},
    "wind": {
        **LASTING,
        "centroid": (150, 550),
        "tonality": (0, 0.6),
        "swelling": (1.2, 12),
    },
    "waves": {"centroid": (550, 2300), "tonality": (0, 0.4), "swelling": (10, inf), "swells": (1, 4)},
    "engine": {
        **LASTING,
        "low": (0.55, 1),
        "centroid": (50, 240),
        "hum": (0.12, 1),
        "frequency": (25, 112),
        "swelling": (0, 1.6),
    },
    "birds": {
        "onsets": (4, inf),
        "frequency": (2500, 6000),
        "tonality": (0.35, 1),
        "span": (3, 14),
        "steadiness": (0, 0.8),
    },
}
# The quantity by which a kind's traits are told apart, and its bounds for each.
DIRECTION = ("direction", {"rising": (0.85, 1), "falling": (-1, -0.85)})
TRAITS: dict[str, tuple[str, Bounds]] = {
    "tone": ("frequency", {"low": (105, 285), "middle": (440, 1150), "high": (1750, 4600)}),
    "sweep": DIRECTION,
    "scale": DIRECTION,
    "arpeggio": DIRECTION,
    "pulses": ("rate", {"slow": (1.2, 3.2), "fast": (3.8, 8.0)}),
    "clicks": ("rate", {"slow": (1.2, 3.2), "fast": (3.8, 8.0)}),
    "drums": ("rate", {"slow": (0.9, 2.7), "fast": (3.3, 7.5)}),
}
LOUDNESS = {"loud": (-21.5, inf), "soft": (SILENCE, -25.5)}  # dB of full scale
# No louder can what is loud for an instant be, such as a click: from this peak on, it is loud at any level.
FULL = 0.6


def matches(scene: Scene, waveform: np.ndarray) -> dict[str, bool]:
    """Whether a waveform (samples,), 16 kHz, is what a scene says: its "kind", and what else the scene names.

    That is "frequency", "direction" or "rate" for a trait, "background" and "loudness".
    """
    return {name: not missed for name, missed in misses(scene, waveform).items()}


def misses(scene: Scene, waveform: np.ndarray) -> dict[str, list[str]]:
    """What `matches` checks, and what is wrong in words: ["onsets 1, not 4 to inf"]; [] where it is right."""
    sound = scene.sounds[0]
    measured = measure(waveform) if len(scene.sounds) == 1 else measure(waveform, DEPTH_OVER, ATTACK_OVER)
    found = {"kind": _outside(measured, KINDS[sound.kind])}
    if measured.level < SILENCE:
        found["kind"] = ["silence"]
    if sound.trait:
        quantity, bounds = TRAITS[sound.kind]
        found[quantity] = _outside(measured, {quantity: bounds[sound.trait]})
    if len(scene.sounds) > 1:
        behind = _without(scene.sounds[1], sound, waveform)
        if behind is not None:
            found["background"] = behind
    if scene.loudness:
        full = scene.loudness == "loud" and np.abs(waveform).max() >= FULL
        found["loudness"] = [] if full else _outside(measured, {"level": LOUDNESS[scene.loudness]})
    return found


def _outside(measured: Measured, bounds: Bounds) -> list[str]:
    values = {name: (getattr(measured, name), *between) for name, between in bounds.items()}
    return [f"{n} {v:.3g}, not {a:g} to {b:g}" for n, (v, a, b) in values.items() if not a <= v <= b]


# --- the quantities


def measure(waveform: np.ndarray, depth: float = DEPTH, attack: int = ATTACK) -> Measured:
    """Measure a waveform (samples,), 16 kHz, where it is less than `depth` dB below its loudest point.

    Onsets rise within `attack` frames.
    """
    power, levels = spectrogram(waveform), envelope(waveform)
    sounding = levels > levels.max() - depth
    pitch = pitch_contour(power)
    share = tonality(power, pitch)[sounding]
    pitch = median_filter(pitch, 5)[sounding]
    notes = 12 * np.log2(pitch / 440)  # semitones from A4
    starts = onsets(levels, depth, attack)
    between = np.diff(starts) if len(starts) > 1 else np.array([inf])
    spectrum = power[sounding].mean(0)
    heard = levels[slice(*np.flatnonzero(sounding)[[0, -1]] + [0, 1])]
    swelling, swells = swell(heard)
    return Measured(
        level=float(level(waveform)),
        lasting=float(sounding.sum() / FRAMES),
        held=float((heard > np.percentile(levels[sounding], 95) - 7).mean()),
        frequency=float(np.median(pitch)),
        tonality=float(np.median(share)),
        steadiness=float((np.abs(notes - np.median(notes)) < 1).mean()),
        span=float(np.ptp(np.percentile(notes, [3, 97]))),
        direction=rank_correlation(notes),
        stepping=stepping(notes),
        notes=count_notes(notes),
        turns=turns(notes),
        onsets=len(starts),
        rate=float(1 / np.median(between)),
        regularity=float((np.abs(between / np.median(between) - 1) < 0.25).mean())
        if len(starts) > 2
        else 0.0,
        decay=decay_time(levels, depth),
        flatness=flatness(spectrum[band(100, 7500)]),
        centroid=float((spectrum * np.arange(len(spectrum))).sum() / spectrum.sum() * HERTZ),
        low=float(spectrum[band(0, 300)].sum() / spectrum.sum()),
        high=float(spectrum[band(1000, 8000)].sum() / spectrum.sum()),
        tilt=float(10 * np.log10(spectrum[band(100, 700)].mean() / spectrum[band(2000, 4000)].mean())),
        hum=periodicity(waveform, 28, 65),
        swelling=swelling,
        swells=swells,
    )


def band(low: float, high: float) -> slice:
    """The bins between two frequencies in Hz."""
    return slice(round(low / HERTZ), round(high / HERTZ) + 1)


def spectrogram(waveform: np.ndarray) -> np.ndarray:
    """Power, (frames, WINDOW // 2 + 1), every 10 ms; frame i has its middle at i * HOP. Never quite 0."""
    spectrum = torch.stft(
        torch.from_numpy(np.ascontiguousarray(waveform, dtype=np.float32)),
        WINDOW,
        HOP,
        window=torch.hann_window(WINDOW),
        pad_mode="constant",
        return_complex=True,
    )
    power: np.ndarray = (spectrum.real**2 + spectrum.imag**2 + 1e-12).T.numpy()
    return power


def envelope(waveform: np.ndarray) -> np.ndarray:
    """The level of each 20 ms in dB of full scale, (frames,), every 10 ms as `spectrogram`'s frames."""
    energy = np.concatenate([[0.0], np.cumsum(waveform.astype(np.float64) ** 2)])
    middle = np.arange(len(waveform) // HOP + 1) * HOP
    start, end = np.maximum(middle - HOP, 0), np.minimum(middle + HOP, len(waveform))
    return 10 * np.log10(np.maximum((energy[end] - energy[start]) / (2 * HOP), 1e-12))


def pitch_contour(power: np.ndarray) -> np.ndarray:
    """The strongest partial of each frame in Hz, (frames,), from 30 Hz on.

    Between bins by a parabola through the logarithms of three (Smith and Serra 1987, "PARSHL").
    """
    rows = np.arange(len(power))
    bins = power[:, 2:-1].argmax(1) + 2
    left, middle, right = (np.log(power[rows, bins + i]) for i in (-1, 0, 1))
    shift = 0.5 * (left - right) / np.minimum(left - 2 * middle + right, -1e-6)
    return (bins + np.clip(shift, -0.5, 0.5)) * HERTZ


def tonality(power: np.ndarray, pitch: np.ndarray) -> np.ndarray:
    """Of each frame the share of its power within 60 Hz or 5 % of a pitch in Hz: near 1 for one partial."""
    total = np.pad(power.cumsum(1, dtype=np.float64), ((0, 0), (1, 0)))
    rows, width = np.arange(len(power)), np.maximum(60, 0.05 * pitch)
    start = np.ceil((pitch - width) / HERTZ).astype(int).clip(0, power.shape[1])
    end = np.floor((pitch + width) / HERTZ).astype(int).clip(-1, power.shape[1] - 1) + 1
    share: np.ndarray = (total[rows, end] - total[rows, start]) / total[:, -1]
    return share


def median_filter(x: np.ndarray, width: int) -> np.ndarray:
    """The median of each `width` neighbours along the last axis, which keeps its length."""
    ends = [(0, 0)] * (x.ndim - 1) + [(width // 2, width // 2)]
    return np.median(
        np.lib.stride_tricks.sliding_window_view(np.pad(x, ends, "edge"), width, axis=-1), axis=-1
    )


def rank_correlation(x: np.ndarray) -> float:
    """Spearman's correlation of a sequence with its order: 1 where it only rises, -1 where it only falls."""
    if len(x) < 3 or np.ptp(x) < 1e-9:
        return 0.0
    ranks = x.argsort(kind="stable").argsort(kind="stable")
    return float(np.corrcoef(ranks, np.arange(len(x)))[0, 1])


def stepping(notes: np.ndarray) -> float:
    """Share of a contour's movement (over 50 ms) that its fastest fifth makes: 0.2 in a glide, 1 in steps."""
    moves = np.sort(np.abs(notes[5:] - notes[:-5]))
    return (
        float(moves[-len(moves) // 5 :].sum() / moves.sum())
        if len(moves) >= 10 and moves.sum() > 1e-9
        else 0.0
    )


def count_notes(notes: np.ndarray, within: float = 0.6, shortest: int = 10) -> int:
    """Stretches of a contour (semitones, every 10 ms) that stay within so much of their own mean so far."""
    count, length, mean = 0, 0, 0.0
    for note in [*notes.tolist(), inf]:
        if length and abs(note - mean) > within:
            count += length >= shortest
            length, mean = 0, 0.0
        length += 1
        mean += (note - mean) / length
    return count


def turns(notes: np.ndarray, least: float = 3.0) -> int:
    """How often a contour (semitones) turns round; movements smaller than `least` do not count."""
    count, way, lowest, highest = 0, 0, notes[0], notes[0]
    for note in notes.tolist():
        lowest, highest = min(lowest, note), max(highest, note)
        if way <= 0 and note > lowest + least:
            count, way, highest = count + (way < 0), 1, note
        elif way >= 0 and note < highest - least:
            count, way, lowest = count + (way > 0), -1, note
    return count


def onsets(levels: np.ndarray, depth: float, attack: int, rise: float = 6.0) -> np.ndarray:
    """Times (s) at which the level (dB, every 10 ms) rises by `rise` dB within `attack` frames.

    They are at least 110 ms apart. What lies more than `depth` dB below the loudest point counts as silence.
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
    return np.array(found) / FRAMES


def decay_time(levels: np.ndarray, depth: float) -> float:
    """Seconds in which the level (dB, every 10 ms) falls by 60 dB, from the slope of its first `depth` dB.

    A straight line through the decay after the loudest point, as ISO 3382-1 has it for rooms (T20). 0 where
    the fall is too short to have a slope, infinite where nothing falls.
    """
    peak = int(levels.argmax())
    after = levels[peak + 2 :]
    below = np.flatnonzero(after < levels[peak] - depth)
    falling = after[: below[0] if len(below) else len(after)]
    if len(falling) < 3:
        return 0.0
    slope = np.polyfit(np.arange(len(falling)) / FRAMES, falling, 1)[0]
    return float(-60 / slope) if slope < 0 else inf


def flatness(spectrum: np.ndarray) -> float:
    """Geometric over arithmetic mean of a power spectrum, 1 if it is flat (Gray and Markel 1974)."""
    return float(np.exp(np.log(spectrum).mean()) / spectrum.mean())


def periodicity(waveform: np.ndarray, low: float, high: float) -> float:
    """The highest correlation of a waveform with itself a period later, for periods of `low` to `high` Hz."""
    spectrum = torch.fft.rfft(
        torch.from_numpy(np.ascontiguousarray(waveform, dtype=np.float32)), 2 * len(waveform)
    )
    correlation = torch.fft.irfft(spectrum.real**2 + spectrum.imag**2)
    periods = slice(int(SAMPLING_RATE / high), int(SAMPLING_RATE / low) + 1)
    return float(correlation[periods].max() / correlation[0].clamp(min=1e-12))


def swell(levels: np.ndarray) -> tuple[float, int]:
    """How far a level (dB, every 10 ms) swells, in dB, once smoothed over 0.3 s, and how many times.

    From its 10th to its 90th percentile; a swell is a stretch of 0.3 s or more above their middle.
    """
    power = np.convolve(10 ** (levels / 10), np.ones(30) / 30, mode="same")
    smooth = 10 * np.log10(power)
    quiet, loud = np.percentile(smooth, [10, 90])
    edges = np.flatnonzero(np.diff(smooth > (quiet + loud) / 2, prepend=False, append=False))
    return float(loud - quiet), int((np.diff(edges)[::2] >= 30).sum())


# --- what is heard behind an event

COLOURS = {"engine": "low", "wind": "low", "waves": "dull", "rain": "bright", "noise": "bright"}
# dB against the loudest point, from which on a background is there. VAE and vocoder let it sink by some.
PRESENT = {"low": -35.0, "dull": -36.0, "bright": -36.0}


def bands_behind(waveform: np.ndarray) -> dict[str, tuple[float, float]]:
    """The level of what is noise, in three bands, against the loudest frame: (quiet, loud), dB.

    That is the 30th and the 75th percentile over time. Partials do not count, for they are narrow: of
    each 250 Hz the level is that which a quarter of the bins stays below. Nor do events, which are too
    short to move the 30th percentile. "low" is up to 500 Hz, "dull" 250 to 3000 Hz and "bright" from 2500
    Hz on; of the latter two it is the median of their blocks of 250 Hz that counts, so that an event may
    fill some.
    """
    power = spectrogram(waveform)
    inner = power[len(power) // 10 : -len(power) // 6]  # backgrounds need not fill the clip to its ends
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


def _without(background: Sound, event: Sound, waveform: np.ndarray) -> list[str] | None:
    """What speaks against a background; None where the event hides it: low under low, waves under drums.

    A low tone's own noise is low, and tells nothing of what is bright.
    """
    colour, low_tone = COLOURS[background.kind], event == Sound("tone", "low")
    if (colour == "low" and low_tone) or (colour == "dull" and event.kind == "drums"):
        return None
    bands = bands_behind(waveform)
    (low, _), (dull, dull_loud), (bright, bright_loud) = bands.values()
    level, fits = {
        "low": (low, low > bright),
        "dull": (dull_loud, dull_loud > bright_loud and dull_loud > dull + 4),  # which comes and goes
        "bright": (bright, bright > low or low_tone),
    }[colour]
    if level >= PRESENT[colour] and fits:
        return []
    return [
        f"nothing {colour} behind it, but "
        + ", ".join(f"{n} {a:.0f} to {b:.0f} dB" for n, (a, b) in bands.items())
    ]
