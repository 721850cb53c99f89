"""The cases of a task: a source, the prompt of the edit, and what the result is compared with."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from scripts.tiny.data.captions import caption
from scripts.tiny.data.sounds import SAMPLING_RATE, Scene, Sound, render
from scripts.tiny.evaluate.prompts import HELD_OUT_SEED

EDITING_STREAM = 5  # third in every seed sequence here; evaluation.py and prompts.py have those up to 4


@dataclass(frozen=True)
class Case:
    """One sound to edit.

    Attributes:
        scene: what the result should be.
        text: a prompt that says so.
        source: the sound to edit, (samples,) at 16 kHz.
        source_text: a description of the source, for inversion.
        original: what the source was made from, (samples,).
        seed: of the noise.
        other_text: another prompt for the same, of tasks that compare two.
    """

    scene: Scene
    text: str
    source: np.ndarray
    source_text: str
    original: np.ndarray
    seed: int
    other_text: str = ""


def draw_cases(
    name: str, make: Callable[[np.random.Generator, int], Case], count: int, seed: int, chosen_on: bool
) -> list[Case]:
    """Draw the cases of a task.

    Args:
        name: of the task.
        make: makes the i-th case from a random generator.
        count: how many.
        seed: of everything.
        chosen_on: whether settings are chosen on them; they are others then.
    """
    task = zlib.crc32(name.encode())
    return [
        make(np.random.default_rng([seed, HELD_OUT_SEED, EDITING_STREAM, task, int(chosen_on), i]), i)
        for i in range(count)
    ]


def draw_seed(rng: np.random.Generator) -> int:
    return int(rng.integers(2**31))


def loudness(rng: np.random.Generator) -> str:
    """That of a source: what is "soft" is too quiet for a good result."""
    return "loud" if rng.random() < 0.5 else ""


def changed_word(before: Scene, after: Scene, rng: np.random.Generator) -> tuple[str, str]:
    """Captions of two scenes in the same phrasing, which differ in the word for a trait only."""
    seed = draw_seed(rng)  # of two random generators, so that both make the same choices
    first, second = (caption(scene, np.random.default_rng(seed), held_out=True) for scene in (before, after))
    return first, second


def sweep(rng: np.random.Generator, index: int) -> Case:
    """A rising sweep that should fall."""
    level = loudness(rng)
    rising, falling = (Scene((Sound("sweep", trait),), level) for trait in ("rising", "falling"))
    source = render(rising, rng)
    source_text, text = changed_word(rising, falling, rng)
    return Case(falling, text, source, source_text, source, draw_seed(rng))


def bell(rng: np.random.Generator, index: int) -> Case:
    """A bell over which there should be rain."""
    level = loudness(rng)
    alone, over_rain = Scene((Sound("bell"),), level), Scene((Sound("bell"), Sound("rain")), level)
    source = render(alone, rng)
    return Case(
        over_rain,
        caption(over_rain, rng, held_out=True),
        source,
        caption(alone, rng, held_out=True),
        source,
        draw_seed(rng),
        caption(Scene((Sound("rain"),)), rng, held_out=True),
    )


STEADY = (
    Sound("tone", "low"),
    Sound("noise"),
    Sound("tone", "middle"),
    Sound("rain"),
    Sound("tone", "high"),
    Sound("engine"),
)
GAP = (1.792, 3.072)  # s


def gap(rng: np.random.Generator, index: int) -> Case:
    """A steady sound with a gap."""
    scene = Scene((STEADY[index % len(STEADY)],), loudness(rng))
    original = render(scene, rng)
    source = original.copy()
    source[slice(*samples(GAP))] = 0
    text = caption(scene, rng, held_out=True)
    return Case(scene, text, source, text, original, draw_seed(rng))


BEATS = tuple(Sound(kind, trait) for trait in ("slow", "fast") for kind in ("drums", "pulses", "clicks"))
BEAT_SECONDS = 2.56  # of the source: as much as `extend` keeps in each window


def beats(rng: np.random.Generator, index: int) -> Case:
    """The beginning of a beat, to be continued. The other prompt does not say how fast it is."""
    sound, level = BEATS[index % len(BEATS)], loudness(rng)
    scene = Scene((sound,), level)
    original = render(scene, rng)
    text = caption(scene, rng, held_out=True)
    source = original[: samples((BEAT_SECONDS,))[0]]
    paceless = caption(Scene((Sound(sound.kind),), level), rng, held_out=True)
    return Case(scene, text, source, text, original, draw_seed(rng), paceless)


DULLED = (
    Sound("noise"),
    Sound("rain"),
    Sound("clicks", "slow"),
    Sound("drums", "slow"),
    Sound("clicks", "fast"),
    Sound("drums", "fast"),
)
CUTOFF = 2000.0  # Hz


def dulled(rng: np.random.Generator, index: int) -> Case:
    """A sound without its high frequencies."""
    scene = Scene((DULLED[index % len(DULLED)],), loudness(rng))
    original = render(scene, rng)
    text = caption(scene, rng, held_out=True)
    source = original - above(original, CUTOFF)
    return Case(scene, text, source.astype(np.float32), text, original, draw_seed(rng))


LASTING = (*STEADY, *BEATS, Sound("wind"), Sound("waves"), Sound("siren"), Sound("birds"))


def lasting(rng: np.random.Generator, index: int) -> Case:
    """A sound that can go on for as long as one likes."""
    scene = Scene((LASTING[index % len(LASTING)],))
    text = caption(scene, rng, held_out=True)
    original = render(scene, rng)
    return Case(scene, text, original, text, original, draw_seed(rng))


LOOPED = (Sound("noise"), Sound("rain"), Sound("wind"), Sound("engine"), *STEADY[::2])


def looped(rng: np.random.Generator, index: int) -> Case:
    """A sound without events."""
    scene = Scene((LOOPED[index % len(LOOPED)],))
    text = caption(scene, rng, held_out=True)
    original = render(scene, rng)
    return Case(scene, text, original, text, original, draw_seed(rng))


def samples(seconds: tuple[float, ...]) -> tuple[int, ...]:
    """Times in samples."""
    return tuple(round(time * SAMPLING_RATE) for time in seconds)


def above(waveform: np.ndarray, hertz: float) -> np.ndarray:
    """The part of a waveform above a frequency, with zero phase."""
    spectrum = np.fft.rfft(waveform)
    spectrum[np.fft.rfftfreq(len(waveform), 1 / SAMPLING_RATE) < hertz] = 0
    return np.fft.irfft(spectrum, len(waveform))
