"""A ringing telephone: its sound, captions of it, a table to train on, and a judge of it.

    write_table(folder, clips=40, seed=0)   # folder/data.csv and the clips
    misses(waveform)                        # what speaks against a ringing telephone; [] if nothing does

It rings as British telephones do: two tones together, twice for 0.4 s with 0.2 s between, then a pause. None
of the seventeen kinds that the checkpoint knows (`data/sounds.py`) has such a rhythm, and none of their
captions names a telephone.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from scripts.tiny.data.captions import HELD_OUT_TEMPLATES, TEMPLATES
from scripts.tiny.data.sounds import (
    CLIP_SAMPLES,
    CLIP_SECONDS,
    LOUDNESS_LEVELS,
    SAMPLING_RATE,
    loudest_level,
)
from scripts.tiny.evaluate.criteria import SILENCE_LEVEL, Bounds, outside
from scripts.tiny.evaluate.measures import ATTACK_FRAMES, MEASURED_DEPTH, envelope, measure, onset_times
from scripts.tiny.teach.table import write_clips

RING, GAP = 0.4, 0.2  # s, of a ring and between two of a pair
PAUSE = (1.38, 1.42)  # s, after a pair
PITCH = (430.0, 450.0)  # Hz, of the lower tone
INTERVAL = (38.0, 42.0)  # Hz, from the lower to the higher tone
START = (0.05, 0.12)  # s; a cell of the latents is 0.13 s long
HARMONICS = (1.0, 0.15, 0.05)  # amplitudes
EDGE = 0.015  # s in which a ring begins and ends

NOUNS = (
    "a telephone",
    "a ringing telephone",
    "a telephone ringing",
    "a phone ringing",
    "a ringing phone",
    "a telephone bell",
    "an old telephone",
    "a telephone that rings",
)
HELD_OUT_SEED = 11  # second in every seed sequence of what training does not see

TONES: Bounds = {"frequency": (380, 560), "tonality": (0.5, 1), "steadiness": (0.8, 1)}
SHORT, LONG = (0.45, 0.78), (1.4, 2.3)  # s, from one ring to the next, within a pair and after it


def render_telephone(rng: np.random.Generator) -> np.ndarray:
    """Synthesize a clip: (CLIP_SAMPLES,) float32 in [-1, 1], different at every call."""
    time = np.arange(CLIP_SAMPLES) / SAMPLING_RATE
    low = rng.uniform(*PITCH)
    pause, start = rng.uniform(*PAUSE), rng.uniform(*START)
    tone = np.zeros(CLIP_SAMPLES)
    for frequency in (low, low + rng.uniform(*INTERVAL)):
        for k, amplitude in enumerate(HARMONICS, 1):
            tone += amplitude * np.sin(2 * np.pi * k * frequency * time + rng.uniform(0, 2 * np.pi))
    gate = np.zeros(CLIP_SAMPLES)
    while start < CLIP_SECONDS - RING:
        for begin in (start, start + RING + GAP):
            inside = np.minimum(time - begin, begin + RING - time)
            gate += np.sin(np.pi / 2 * np.clip(inside / EDGE, 0, 1)) ** 2
        start += 2 * RING + GAP + pause
    clip = tone * gate
    clip *= 10 ** ((rng.uniform(*LOUDNESS_LEVELS[""]) - loudest_level(clip)) / 20)
    return clip.astype(np.float32)


def caption_telephone(rng: np.random.Generator, held_out: bool = False) -> str:
    """A caption of a ringing telephone, in the templates of the other kinds' captions.

    Args:
        rng: chooses among the phrasings.
        held_out: use a template that no training caption has.
    """
    templates = HELD_OUT_TEMPLATES if held_out else TEMPLATES
    text = templates[rng.integers(len(templates))].format(NOUNS[rng.integers(len(NOUNS))])
    if rng.random() < 0.5:
        text = text[0].upper() + text[1:]
    return text + ("", ".")[rng.integers(2)]


def write_table(folder: Path, clips: int, seed: int) -> Path:
    """Write clips as WAV files and a table of them, data.csv; returns the table's path."""

    def draw(i: int) -> tuple[np.ndarray, str]:
        rng = np.random.default_rng([seed, i])
        return render_telephone(rng), caption_telephone(rng)

    return write_clips(folder, "telephone", map(draw, range(clips)))


def misses(waveform: np.ndarray) -> list[str]:
    """What speaks against a ringing telephone, such as ["rings at 0.1, 0.6 s"]; [] if nothing does.

    The rings of a pair must be a short time apart and the pairs a long one, from the first ring of the clip
    on, each a steady tone at the telephone's pitch.

    Args:
        waveform: (samples,), 16 kHz.
    """
    measured = measure(waveform)
    if measured.level < SILENCE_LEVEL:
        return ["silence"]
    wrong = outside(measured, TONES)
    starts = onset_times(envelope(waveform), MEASURED_DEPTH, ATTACK_FRAMES)
    intervals = np.diff(starts)
    bounds = [(SHORT, LONG)[i % 2] for i in range(len(intervals))]
    in_pairs = all(low <= x <= high for x, (low, high) in zip(intervals, bounds, strict=True))
    if len(starts) < 3 or not in_pairs:
        wrong.append(f"rings at {', '.join(f'{start:.2f}' for start in starts)} s")
    return wrong
