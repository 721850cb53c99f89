"""The sound library of the tiny checkpoint: seventeen kinds of sound, synthesised, never downloaded.

    rng = np.random.default_rng(0)
    scene = draw_scene(rng)         # what is to be heard
    waveform = render(scene, rng)   # (SAMPLES,) float32 in [-1, 1], 16 kHz

A scene names a kind, for most kinds a trait (how high, which way, how fast), and a loudness; all that a scene
does not name (pitch within the trait's range, beginning, length, timbre) is drawn anew for each rendering.
Its ranges are narrow: what varies by more than a cell of the latents, 128 ms by 4 mel bands, takes a small
UNet longer than hours to learn. A part of the scenes has two sounds, an event over a background.
`captions.py` puts scenes into words and `measures.py` finds out from a waveform alone whether it is what a
scene says.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

SAMPLING_RATE = 16000
SECONDS = 5.12
SAMPLES = int(SECONDS * SAMPLING_RATE)
# Kinds and what each can be; () where a kind is always alike.
KINDS: dict[str, tuple[str, ...]] = {
    "tone": ("low", "middle", "high"),
    "sweep": ("rising", "falling"),
    "pulses": ("slow", "fast"),
    "clicks": ("slow", "fast"),
    "siren": (),
    "bell": (),
    "pluck": (),
    "struck": (),
    "scale": ("rising", "falling"),
    "arpeggio": ("rising", "falling"),
    "drums": ("slow", "fast"),
    "noise": (),
    "rain": (),
    "wind": (),
    "waves": (),
    "engine": (),
    "birds": (),
}
FOREGROUNDS = ("tone", "siren", "bell", "pluck", "birds")  # of scenes with two sounds
BACKGROUNDS = ("noise", "rain", "wind", "waves", "engine")
MIXED = 0.15  # the part of the scenes that has two sounds
# Range of a scene's level, in dB of full scale; "" is where the caption does not say.
LEVELS = {"loud": (-14.0, -12.0), "": (-24.5, -22.0), "soft": (-37.0, -34.0)}
BEHIND = (-20.0, -17.0)  # dB, level of a background against what is heard over it
FRAME = 1024  # samples over which a level is taken

PITCHES = {"low": (160.0, 180.0), "middle": (670.0, 740.0), "high": (2700.0, 3000.0)}  # Hz
RATES = {  # events a second
    "pulses": {"slow": (1.9, 2.0), "fast": (5.2, 5.3)},
    "clicks": {"slow": (1.9, 2.0), "fast": (5.2, 5.3)},
    "drums": {"slow": (1.6, 1.7), "fast": (4.6, 4.7)},
}
SCALE = (0, 2, 4, 5, 7, 9, 11, 12)  # semitones
ARPEGGIO = (0, 4, 7, 12, 16, 19, 24)
BELL = (
    (0.5, 0.5, 1.2),
    (1.0, 1.0, 1.0),
    (1.19, 0.5, 0.8),
    (2.0, 0.6, 0.7),
    (2.74, 0.35, 0.5),
    (3.76, 0.2, 0.4),
)


@dataclass(frozen=True)
class Sound:
    """One source: its kind and, of kinds that have traits, the trait."""

    kind: str
    trait: str = ""


@dataclass(frozen=True)
class Scene:
    """What is to be heard: one sound, or an event over a background; loud, soft or, where "", not said."""

    sounds: tuple[Sound, ...]
    loudness: str = ""


def draw_sound(rng: np.random.Generator, kind: str) -> Sound:
    """A sound of a kind, its trait drawn."""
    return Sound(kind, str(rng.choice(KINDS[kind])) if KINDS[kind] else "")


def draw_scene(rng: np.random.Generator, kind: str | None = None) -> Scene:
    """A scene: of one sound of `kind` where it is given, or else of any kind, some with a background."""
    loudness = str(rng.choice(["", "loud", "soft"], p=[0.4, 0.3, 0.3]))
    if kind is not None:
        return Scene((draw_sound(rng, kind),), loudness)
    if rng.random() < MIXED:
        kinds = [str(rng.choice(FOREGROUNDS)), str(rng.choice(BACKGROUNDS))]
        if loudness == "soft":  # what is 20 dB behind a soft sound is not heard
            loudness = ""
    else:
        kinds = [str(rng.choice([*KINDS]))]
    return Scene(tuple(draw_sound(rng, kind) for kind in kinds), loudness)


def level(waveform: np.ndarray) -> float:
    """The level of the loudest 64 ms of a waveform (samples,), in dB of full scale."""
    frames = waveform[: len(waveform) // FRAME * FRAME].reshape(-1, FRAME).astype(np.float64)
    return 10 * np.log10(max((frames**2).mean(1).max(), 1e-12))


def render(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    """A waveform of a scene, (SAMPLES,) float32 in [-1, 1]; another one at each call."""
    mixed = np.zeros(SAMPLES)
    for i, sound in enumerate(scene.sounds):
        waveform = RENDERERS[sound.kind](rng, sound.trait)
        behind = rng.uniform(*BEHIND) if i > 0 else 0.0
        mixed += waveform * 10 ** ((behind - level(waveform)) / 20)
    mixed *= 10 ** ((rng.uniform(*LEVELS[scene.loudness]) - level(mixed)) / 20)
    return (mixed * min(1.0, 0.95 / np.abs(mixed).max())).astype(np.float32)


# --- what sounds are made of


def _between(rng: np.random.Generator, low: float, high: float) -> float:
    """A number between two, evenly on a logarithmic scale."""
    return float(np.exp(rng.uniform(np.log(low), np.log(high))))


def _time(seconds: float) -> np.ndarray:
    return np.arange(int(seconds * SAMPLING_RATE)) / SAMPLING_RATE


def _place(parts: list[tuple[float, np.ndarray]]) -> np.ndarray:
    """Waveforms at their beginnings (s), in a clip; what goes beyond its end is cut."""
    clip = np.zeros(SAMPLES)
    for start, part in parts:
        at = int(start * SAMPLING_RATE)
        part = part[: max(0, SAMPLES - at)]
        clip[at : at + len(part)] += part
    return clip


def _faded(waveform: np.ndarray, attack: float, release: float) -> np.ndarray:
    """Let a waveform begin and end gently, over so many seconds."""
    t = np.arange(len(waveform)) / SAMPLING_RATE
    rise, fall = np.clip(t / attack, 0, 1), np.clip((len(waveform) / SAMPLING_RATE - t) / release, 0, 1)
    return waveform * np.sin(np.pi / 2 * rise) ** 2 * np.sin(np.pi / 2 * fall) ** 2


def _voice(frequency: np.ndarray | float, seconds: float, harmonics: tuple[float, ...]) -> np.ndarray:
    """A periodic sound of a frequency in Hz, fixed or one a sample, with the strengths of its harmonics."""
    frequency = np.broadcast_to(frequency, len(_time(seconds)))
    phase = 2 * np.pi * np.cumsum(frequency) / SAMPLING_RATE
    return sum(a * np.sin(k * phase) * (k * frequency < 7500) for k, a in enumerate(harmonics, 1))


def _timbre(rng: np.random.Generator) -> tuple[float, ...]:
    """Strengths of three harmonics, the first the strongest."""
    return (1.0, rng.uniform(0.15, 0.25), rng.uniform(0.05, 0.1))


def _filtered_noise(rng: np.random.Generator, gain: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """A clip of noise whose spectrum has the form gain(Hz)."""
    spectrum = np.fft.rfft(rng.standard_normal(SAMPLES))
    return np.fft.irfft(spectrum * gain(np.fft.rfftfreq(SAMPLES, 1 / SAMPLING_RATE)), SAMPLES)


def _slow_curve(rng: np.random.Generator, points: int, low: float, high: float) -> np.ndarray:
    """A curve over the clip through random points."""
    at = np.linspace(0, SAMPLES - 1, points)
    return np.interp(np.arange(SAMPLES), at, rng.uniform(low, high, points))


def _whole(rng: np.random.Generator, waveform: np.ndarray) -> np.ndarray:
    """A clip that lasts (nearly) from beginning to end."""
    start = rng.uniform(0, 0.15)
    seconds = rng.uniform(4.6, 4.9)
    return _place([(start, _faded(waveform[: int(seconds * SAMPLING_RATE)], 0.15, 0.2))])


def _repeated(
    rng: np.random.Generator, rate: tuple[float, float], event: Callable[[int, float], np.ndarray]
) -> np.ndarray:
    """Events at a steady rate (Hz); `event` makes the i-th, given the time between two (s)."""
    period = 1 / rng.uniform(*rate)
    starts = np.arange(rng.uniform(0.05, 0.12), SECONDS - 0.3, period)
    return _place([(start, event(i, period)) for i, start in enumerate(starts)])


# --- the kinds


def _tone(rng: np.random.Generator, trait: str) -> np.ndarray:
    start, seconds = rng.uniform(0, 0.15), rng.uniform(4.1, 4.5)
    sound = _voice(_between(rng, *PITCHES[trait]), seconds, _timbre(rng))
    return _place([(start, _faded(sound, rng.uniform(0.02, 0.1), 0.1))])


def _sweep(rng: np.random.Generator, trait: str) -> np.ndarray:
    start, seconds = rng.uniform(0, 0.15), rng.uniform(3.9, 4.3)
    ends = _between(rng, 260, 290), _between(rng, 2500, 2800)
    way = np.geomspace(*(ends if trait == "rising" else ends[::-1]), len(_time(seconds)))
    return _place([(start, _faded(_voice(way, seconds, _timbre(rng)), 0.05, 0.1))])


def _pulses(rng: np.random.Generator, trait: str) -> np.ndarray:
    pitch, timbre = _between(rng, 860, 940), _timbre(rng)
    return _repeated(
        rng,
        RATES["pulses"][trait],
        lambda i, period: _faded(_voice(pitch, min(0.2, 0.55 * period), timbre), 0.008, 0.01),
    )


def _clicks(rng: np.random.Generator, trait: str) -> np.ndarray:
    length = rng.uniform(0.006, 0.01)
    t = _time(0.06)
    return _repeated(
        rng,
        RATES["clicks"][trait],
        lambda i, period: rng.choice([-1.0, 1.0], len(t)) * np.exp(-t / length),
    )


def _siren(rng: np.random.Generator, trait: str) -> np.ndarray:
    t = _time(SECONDS)
    turns = rng.uniform(0.65, 0.69) * t + rng.uniform(0, 0.06)
    pitch = _between(rng, 840, 900) * 2 ** (rng.uniform(0.47, 0.53) * np.sin(2 * np.pi * turns))
    return _whole(rng, _voice(pitch, SECONDS, (1.0, rng.uniform(0.25, 0.4), rng.uniform(0.1, 0.2))))


def _bell(rng: np.random.Generator, trait: str) -> np.ndarray:
    pitch, decay = _between(rng, 580, 640), rng.uniform(1.4, 1.6)
    t = _time(SECONDS)
    partials = [
        a * np.exp(-t / (decay * lasting)) * _voice(pitch * ratio, SECONDS, (1.0,))
        for ratio, a, lasting in BELL
    ]
    return _place([(rng.uniform(0.05, 0.2), _faded(sum(partials), 0.004, 0.05))])


def _pluck(rng: np.random.Generator, trait: str) -> np.ndarray:
    pitch, decay = _between(rng, 280, 310), rng.uniform(0.36, 0.42)
    t = _time(2.5)
    partials = [
        np.exp(-t * (1 + 0.25 * (k - 1)) / decay) / k**1.5 * _voice(k * pitch, 2.5, (1.0,))
        for k in range(1, 13)
    ]
    return _place([(rng.uniform(0.05, 0.25), _faded(sum(partials), 0.003, 0.05))])


def _struck(rng: np.random.Generator, trait: str) -> np.ndarray:
    pitch, decay = _between(rng, 490, 540), rng.uniform(0.11, 0.14)
    t = _time(0.8)
    partials = [
        a * np.exp(-t / (decay * lasting)) * _voice(ratio * pitch, 0.8, (1.0,))
        for ratio, a, lasting in ((1.0, 1.0, 1.0), (3.93, 0.4, 0.5), (9.2, 0.1, 0.25))
    ]
    return _place([(rng.uniform(0.05, 0.3), _faded(sum(partials), 0.002, 0.05))])


def _melody(rng: np.random.Generator, trait: str, steps: tuple[int, ...], root: float) -> np.ndarray:
    steps = steps if trait == "rising" else steps[::-1]
    each, timbre, start = rng.uniform(0.41, 0.44), _timbre(rng), rng.uniform(0.05, 0.15)
    t = _time(each)
    notes = [
        _faded(_voice(root * 2 ** (step / 12), each, timbre), 0.01, 0.04) * np.exp(-t / 0.5) for step in steps
    ]
    return _place([(start + i * each, note) for i, note in enumerate(notes)])


def _scale(rng: np.random.Generator, trait: str) -> np.ndarray:
    return _melody(rng, trait, SCALE, _between(rng, 345, 370))


def _arpeggio(rng: np.random.Generator, trait: str) -> np.ndarray:
    return _melody(rng, trait, ARPEGGIO, _between(rng, 258, 277))


def _drums(rng: np.random.Generator, trait: str) -> np.ndarray:
    t = _time(0.3)
    depth, rattle = rng.uniform(45, 60), rng.uniform(0.5, 0.9)
    kick = _voice(depth + 110 * np.exp(-t / 0.03), 0.3, (1.0, 0.2)) * np.exp(-t / 0.09)

    def beat(i: int, period: float) -> np.ndarray:
        snare = rng.standard_normal(len(t)) * np.exp(-t / 0.04) * rattle
        return _faded(kick if i % 2 == 0 else snare + 0.4 * kick, 0.001, 0.05)

    return _repeated(rng, RATES["drums"][trait], beat)


def _noise(rng: np.random.Generator, trait: str) -> np.ndarray:
    return _whole(rng, rng.standard_normal(SAMPLES))


def _rain(rng: np.random.Generator, trait: str) -> np.ndarray:
    bed = _filtered_noise(rng, lambda f: (f / 3000) / (1 + (f / 3000) ** 2))
    drops, t = [], _time(0.02)
    for start in rng.uniform(0, SECONDS, rng.integers(150, 350)):
        drop = np.sin(2 * np.pi * _between(rng, 1500, 6000) * t) * np.exp(-t / rng.uniform(0.001, 0.004))
        drops.append((start, drop * _between(rng, 0.5, 4.0)))
    return _whole(rng, bed + _place(drops))


def _wind(rng: np.random.Generator, trait: str) -> np.ndarray:
    corner = rng.uniform(280, 350)
    low = _filtered_noise(rng, lambda f: (f > 40) / (1 + (f / corner) ** 4))
    gust = _filtered_noise(rng, lambda f: np.exp(-(((f - 1.7 * corner) / 120) ** 2)))
    return _whole(rng, low * _slow_curve(rng, 6, 0.5, 1.0) + gust * _slow_curve(rng, 8, 0.0, 0.8))


def _waves(rng: np.random.Generator, trait: str) -> np.ndarray:
    surf = _filtered_noise(rng, lambda f: 1 / (1 + (f / rng.uniform(1200, 2000)) ** 2))
    turns = _time(SECONDS) / rng.uniform(2.3, 2.5) + rng.uniform(0, 0.1)
    return surf * (0.06 + (0.5 - 0.5 * np.cos(2 * np.pi * turns)) ** 2)


def _engine(rng: np.random.Generator, trait: str) -> np.ndarray:
    # It turns evenly: a picture with a frame in 32 ms shows a beat of 20 Hz as a pattern that drifts.
    hum = _voice(_between(rng, 45, 49), SECONDS, tuple(1 / k**0.7 for k in range(1, 13)))
    return _whole(rng, hum + 0.4 * _filtered_noise(rng, lambda f: 1 / (1 + (f / 300) ** 4)))


def _birds(rng: np.random.Generator, trait: str) -> np.ndarray:
    parts, at = [], rng.uniform(0.05, 0.15)
    while at < SECONDS - 0.8:
        pitch, seconds, gap = _between(rng, 3200, 3600), rng.uniform(0.09, 0.1), rng.uniform(0.07, 0.08)
        for _ in range(3):
            bend = np.geomspace(pitch * rng.uniform(1.2, 1.5), pitch, len(_time(seconds)))
            parts.append((at, _faded(_voice(bend, seconds, (1.0, 0.1)), 0.01, 0.03)))
            at += seconds + gap
        at += rng.uniform(0.38, 0.44)
    return _place(parts)


RENDERERS: dict[str, Callable[[np.random.Generator, str], np.ndarray]] = {
    "tone": _tone,
    "sweep": _sweep,
    "pulses": _pulses,
    "clicks": _clicks,
    "siren": _siren,
    "bell": _bell,
    "pluck": _pluck,
    "struck": _struck,
    "scale": _scale,
    "arpeggio": _arpeggio,
    "drums": _drums,
    "noise": _noise,
    "rain": _rain,
    "wind": _wind,
    "waves": _waves,
    "engine": _engine,
    "birds": _birds,
}
