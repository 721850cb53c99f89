"""The sounds that the tiny checkpoint learns: seventeen kinds, synthesized here; nothing is downloaded.

    rng = np.random.default_rng(0)
    scene = draw_scene(rng)         # what the clip contains
    waveform = render(scene, rng)   # (CLIP_SAMPLES,) float32 in [-1, 1], 16 kHz

A scene names a kind of sound, for most kinds a trait (how high, which direction, how fast), and a loudness.
Everything a scene does not name (the exact pitch, the start, the length, the timbre) is drawn again for each
rendering. Those ranges are narrow on purpose: a variation larger than one cell of the latents, 128 ms by 4
mel bands, takes a small UNet longer than a few hours to learn. Some scenes have two sounds, an event over a
background.

`captions.py` puts scenes into words; `evaluate/criteria.py` decides from a waveform alone whether it matches
a scene.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

SAMPLING_RATE = 16000
CLIP_SECONDS = 5.12
CLIP_SAMPLES = int(CLIP_SECONDS * SAMPLING_RATE)
# Kinds of sound and the traits each can have; () for a kind without traits.
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
TWO_SOUND_PROBABILITY = 0.15  # that a scene has two sounds
# Range of a scene's level in dB of full scale; "" is a scene whose caption does not mention loudness.
LOUDNESS_LEVELS = {"loud": (-14.0, -12.0), "": (-24.5, -22.0), "soft": (-37.0, -34.0)}
BACKGROUND_LEVELS = (-20.0, -17.0)  # dB relative to the event in front
LEVEL_WINDOW = 1024  # samples over which a level is taken: 64 ms

PITCH_RANGES = {"low": (160.0, 180.0), "middle": (670.0, 740.0), "high": (2700.0, 3000.0)}  # Hz
EVENT_RATES = {  # events per second
    "pulses": {"slow": (1.9, 2.0), "fast": (5.2, 5.3)},
    "clicks": {"slow": (1.9, 2.0), "fast": (5.2, 5.3)},
    "drums": {"slow": (1.6, 1.7), "fast": (4.6, 4.7)},
}
SCALE_SEMITONES = (0, 2, 4, 5, 7, 9, 11, 12)
ARPEGGIO_SEMITONES = (0, 4, 7, 12, 16, 19, 24)
BELL_PARTIALS = (  # frequency ratio, amplitude, decay relative to the fundamental's
    (0.5, 0.5, 1.2),
    (1.0, 1.0, 1.0),
    (1.19, 0.5, 0.8),
    (2.0, 0.6, 0.7),
    (2.74, 0.35, 0.5),
    (3.76, 0.2, 0.4),
)
STRUCK_BAR_PARTIALS = ((1.0, 1.0, 1.0), (3.93, 0.4, 0.5), (9.2, 0.1, 0.25))  # the same, of a marimba bar


@dataclass(frozen=True)
class Sound:
    """One source: its kind and, for kinds that have traits, the trait."""

    kind: str
    trait: str = ""


@dataclass(frozen=True)
class Scene:
    """What a clip contains: one sound, or an event over a background. Loudness "" is not mentioned."""

    sounds: tuple[Sound, ...]
    loudness: str = ""


# Every kind with every trait.
ALL_SOUNDS = tuple(Sound(kind, trait) for kind, traits in KINDS.items() for trait in traits or ("",))


def draw_sound(rng: np.random.Generator, kind: str) -> Sound:
    """A sound of the given kind with a random trait."""
    return Sound(kind, str(rng.choice(KINDS[kind])) if KINDS[kind] else "")


def draw_scene(rng: np.random.Generator, kind: str | None = None) -> Scene:
    """A random scene: one sound of `kind`, or by default any kind, sometimes over a background."""
    loudness = str(rng.choice(["", "loud", "soft"], p=[0.4, 0.3, 0.3]))
    if kind is not None:
        return Scene((draw_sound(rng, kind),), loudness)
    if rng.random() < TWO_SOUND_PROBABILITY:
        kinds = [str(rng.choice(FOREGROUNDS)), str(rng.choice(BACKGROUNDS))]
        if loudness == "soft":  # a background 20 dB below a soft sound would be inaudible
            loudness = ""
    else:
        kinds = [str(rng.choice([*KINDS]))]
    return Scene(tuple(draw_sound(rng, kind) for kind in kinds), loudness)


def loudest_level(waveform: np.ndarray) -> float:
    """The level of the loudest 64 ms of a waveform (samples,), in dB of full scale."""
    frames = waveform[: len(waveform) // LEVEL_WINDOW * LEVEL_WINDOW].reshape(-1, LEVEL_WINDOW)
    power = (frames.astype(np.float64) ** 2).mean(1).max()
    return float(10 * np.log10(max(power, 1e-12)))


def render(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    """Synthesize a scene: (CLIP_SAMPLES,) float32 in [-1, 1], different at every call."""
    mixed = np.zeros(CLIP_SAMPLES)
    for i, sound in enumerate(scene.sounds):
        waveform = RENDERERS[sound.kind](rng, sound.trait)
        relative_level = rng.uniform(*BACKGROUND_LEVELS) if i > 0 else 0.0
        mixed += waveform * 10 ** ((relative_level - loudest_level(waveform)) / 20)
    mixed *= 10 ** ((rng.uniform(*LOUDNESS_LEVELS[scene.loudness]) - loudest_level(mixed)) / 20)
    clip: np.ndarray = (mixed * min(1.0, 0.95 / np.abs(mixed).max())).astype(np.float32)
    return clip


# --- building blocks


def _log_uniform(rng: np.random.Generator, low: float, high: float) -> float:
    """A random number in [low, high), uniform on a logarithmic scale."""
    return float(np.exp(rng.uniform(np.log(low), np.log(high))))


def _time(seconds: float) -> np.ndarray:
    """The time of each sample in seconds."""
    return np.arange(int(seconds * SAMPLING_RATE)) / SAMPLING_RATE


def _mix(parts: list[tuple[float, np.ndarray]]) -> np.ndarray:
    """Add waveforms, each at its start in seconds, into one clip; anything beyond its end is cut off."""
    clip = np.zeros(CLIP_SAMPLES)
    for start, part in parts:
        first = int(start * SAMPLING_RATE)
        part = part[: max(0, CLIP_SAMPLES - first)]
        clip[first : first + len(part)] += part
    return clip


def _fade(waveform: np.ndarray, attack: float, release: float) -> np.ndarray:
    """Fade a waveform in over `attack` seconds and out over `release` seconds."""
    t = np.arange(len(waveform)) / SAMPLING_RATE
    rise, fall = np.clip(t / attack, 0, 1), np.clip((len(waveform) / SAMPLING_RATE - t) / release, 0, 1)
    faded: np.ndarray = waveform * np.sin(np.pi / 2 * rise) ** 2 * np.sin(np.pi / 2 * fall) ** 2
    return faded


def _harmonic_tone(frequency: np.ndarray | float, seconds: float, harmonics: tuple[float, ...]) -> np.ndarray:
    """A periodic sound. `frequency` in Hz is constant or one per sample; `harmonics` are their amplitudes."""
    frequency = np.broadcast_to(frequency, len(_time(seconds)))
    phase = 2 * np.pi * np.cumsum(frequency) / SAMPLING_RATE
    tone = np.zeros(len(phase))
    for k, amplitude in enumerate(harmonics, 1):
        tone += amplitude * np.sin(k * phase) * (k * frequency < 7500)
    return tone


def _harmonic_amplitudes(rng: np.random.Generator) -> tuple[float, ...]:
    """Amplitudes of three harmonics, the first the strongest."""
    return (1.0, rng.uniform(0.15, 0.25), rng.uniform(0.05, 0.1))


def _filtered_noise(rng: np.random.Generator, gain: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """A clip of white noise filtered by gain(Hz)."""
    spectrum = np.fft.rfft(rng.standard_normal(CLIP_SAMPLES))
    hertz = np.fft.rfftfreq(CLIP_SAMPLES, 1 / SAMPLING_RATE)
    return np.fft.irfft(spectrum * gain(hertz), CLIP_SAMPLES)


def _random_curve(rng: np.random.Generator, points: int, low: float, high: float) -> np.ndarray:
    """A curve over the clip, one value per sample, interpolated between random points."""
    positions = np.linspace(0, CLIP_SAMPLES - 1, points)
    return np.interp(np.arange(CLIP_SAMPLES), positions, rng.uniform(low, high, points))


def _nearly_full_length(rng: np.random.Generator, waveform: np.ndarray) -> np.ndarray:
    """A clip in which the waveform lasts nearly from the beginning to the end."""
    start = rng.uniform(0, 0.15)
    seconds = rng.uniform(4.6, 4.9)
    return _mix([(start, _fade(waveform[: int(seconds * SAMPLING_RATE)], 0.15, 0.2))])


def _repeat(
    rng: np.random.Generator, rate: tuple[float, float], event: Callable[[int, float], np.ndarray]
) -> np.ndarray:
    """Events at a steady rate in Hz; event(i, period in seconds) makes the i-th."""
    period = 1 / rng.uniform(*rate)
    starts = np.arange(rng.uniform(0.05, 0.12), CLIP_SECONDS - 0.3, period)
    return _mix([(start, event(i, period)) for i, start in enumerate(starts)])


# --- the kinds of sound


def _tone(rng: np.random.Generator, trait: str) -> np.ndarray:
    start, seconds = rng.uniform(0, 0.15), rng.uniform(4.1, 4.5)
    sound = _harmonic_tone(_log_uniform(rng, *PITCH_RANGES[trait]), seconds, _harmonic_amplitudes(rng))
    return _mix([(start, _fade(sound, rng.uniform(0.02, 0.1), 0.1))])


def _sweep(rng: np.random.Generator, trait: str) -> np.ndarray:
    start, seconds = rng.uniform(0, 0.15), rng.uniform(3.9, 4.3)
    ends = _log_uniform(rng, 260, 290), _log_uniform(rng, 2500, 2800)
    pitch = np.geomspace(*(ends if trait == "rising" else ends[::-1]), len(_time(seconds)))
    return _mix([(start, _fade(_harmonic_tone(pitch, seconds, _harmonic_amplitudes(rng)), 0.05, 0.1))])


def _pulses(rng: np.random.Generator, trait: str) -> np.ndarray:
    pitch, timbre = _log_uniform(rng, 860, 940), _harmonic_amplitudes(rng)
    return _repeat(
        rng,
        EVENT_RATES["pulses"][trait],
        lambda i, period: _fade(_harmonic_tone(pitch, min(0.2, 0.55 * period), timbre), 0.008, 0.01),
    )


def _clicks(rng: np.random.Generator, trait: str) -> np.ndarray:
    length = rng.uniform(0.006, 0.01)
    t = _time(0.06)
    return _repeat(
        rng,
        EVENT_RATES["clicks"][trait],
        lambda i, period: rng.choice([-1.0, 1.0], len(t)) * np.exp(-t / length),
    )


def _siren(rng: np.random.Generator, trait: str) -> np.ndarray:
    t = _time(CLIP_SECONDS)
    cycles = rng.uniform(0.65, 0.69) * t + rng.uniform(0, 0.06)
    pitch = _log_uniform(rng, 840, 900) * 2 ** (rng.uniform(0.47, 0.53) * np.sin(2 * np.pi * cycles))
    return _nearly_full_length(
        rng, _harmonic_tone(pitch, CLIP_SECONDS, (1.0, rng.uniform(0.25, 0.4), rng.uniform(0.1, 0.2)))
    )


def _bell(rng: np.random.Generator, trait: str) -> np.ndarray:
    pitch, decay = _log_uniform(rng, 580, 640), rng.uniform(1.4, 1.6)
    t = _time(CLIP_SECONDS)
    partials = [
        a * np.exp(-t / (decay * relative_decay)) * _harmonic_tone(pitch * ratio, CLIP_SECONDS, (1.0,))
        for ratio, a, relative_decay in BELL_PARTIALS
    ]
    return _mix([(rng.uniform(0.05, 0.2), _fade(sum(partials, np.zeros(len(t))), 0.004, 0.05))])


def _pluck(rng: np.random.Generator, trait: str) -> np.ndarray:
    pitch, decay = _log_uniform(rng, 280, 310), rng.uniform(0.36, 0.42)
    t = _time(2.5)
    partials = [
        np.exp(-t * (1 + 0.25 * (k - 1)) / decay) / k**1.5 * _harmonic_tone(k * pitch, 2.5, (1.0,))
        for k in range(1, 13)
    ]
    return _mix([(rng.uniform(0.05, 0.25), _fade(sum(partials, np.zeros(len(t))), 0.003, 0.05))])


def _struck(rng: np.random.Generator, trait: str) -> np.ndarray:
    pitch, decay = _log_uniform(rng, 490, 540), rng.uniform(0.11, 0.14)
    t = _time(0.8)
    partials = [
        a * np.exp(-t / (decay * relative_decay)) * _harmonic_tone(ratio * pitch, 0.8, (1.0,))
        for ratio, a, relative_decay in STRUCK_BAR_PARTIALS
    ]
    return _mix([(rng.uniform(0.05, 0.3), _fade(sum(partials, np.zeros(len(t))), 0.002, 0.05))])


def _melody(rng: np.random.Generator, trait: str, steps: tuple[int, ...], root: float) -> np.ndarray:
    steps = steps if trait == "rising" else steps[::-1]
    note_seconds, timbre, start = rng.uniform(0.41, 0.44), _harmonic_amplitudes(rng), rng.uniform(0.05, 0.15)
    t = _time(note_seconds)
    notes = [
        _fade(_harmonic_tone(root * 2 ** (step / 12), note_seconds, timbre), 0.01, 0.04) * np.exp(-t / 0.5)
        for step in steps
    ]
    return _mix([(start + i * note_seconds, note) for i, note in enumerate(notes)])


def _scale(rng: np.random.Generator, trait: str) -> np.ndarray:
    return _melody(rng, trait, SCALE_SEMITONES, _log_uniform(rng, 345, 370))


def _arpeggio(rng: np.random.Generator, trait: str) -> np.ndarray:
    return _melody(rng, trait, ARPEGGIO_SEMITONES, _log_uniform(rng, 258, 277))


def _drums(rng: np.random.Generator, trait: str) -> np.ndarray:
    t = _time(0.3)
    kick_pitch, snare_level = rng.uniform(45, 60), rng.uniform(0.5, 0.9)
    kick = _harmonic_tone(kick_pitch + 110 * np.exp(-t / 0.03), 0.3, (1.0, 0.2)) * np.exp(-t / 0.09)

    def beat(i: int, period: float) -> np.ndarray:
        snare = rng.standard_normal(len(t)) * np.exp(-t / 0.04) * snare_level
        return _fade(kick if i % 2 == 0 else snare + 0.4 * kick, 0.001, 0.05)

    return _repeat(rng, EVENT_RATES["drums"][trait], beat)


def _noise(rng: np.random.Generator, trait: str) -> np.ndarray:
    return _nearly_full_length(rng, rng.standard_normal(CLIP_SAMPLES))


def _rain(rng: np.random.Generator, trait: str) -> np.ndarray:
    bed = _filtered_noise(rng, lambda f: (f / 3000) / (1 + (f / 3000) ** 2))
    drops, t = [], _time(0.02)
    for start in rng.uniform(0, CLIP_SECONDS, rng.integers(150, 350)):
        drop = np.sin(2 * np.pi * _log_uniform(rng, 1500, 6000) * t) * np.exp(-t / rng.uniform(0.001, 0.004))
        drops.append((start, drop * _log_uniform(rng, 0.5, 4.0)))
    return _nearly_full_length(rng, bed + _mix(drops))


def _wind(rng: np.random.Generator, trait: str) -> np.ndarray:
    corner = rng.uniform(280, 350)
    low = _filtered_noise(rng, lambda f: (f > 40) / (1 + (f / corner) ** 4))
    gust = _filtered_noise(rng, lambda f: np.exp(-(((f - 1.7 * corner) / 120) ** 2)))
    return _nearly_full_length(
        rng, low * _random_curve(rng, 6, 0.5, 1.0) + gust * _random_curve(rng, 8, 0.0, 0.8)
    )


def _waves(rng: np.random.Generator, trait: str) -> np.ndarray:
    surf = _filtered_noise(rng, lambda f: 1 / (1 + (f / rng.uniform(1200, 2000)) ** 2))
    cycles = _time(CLIP_SECONDS) / rng.uniform(2.3, 2.5) + rng.uniform(0, 0.1)
    return surf * (0.06 + (0.5 - 0.5 * np.cos(2 * np.pi * cycles)) ** 2)


def _engine(rng: np.random.Generator, trait: str) -> np.ndarray:
    # Without a beat: at one frame per 32 ms, a spectrogram aliases a beat of 20 Hz into a drifting pattern.
    hum = _harmonic_tone(_log_uniform(rng, 45, 49), CLIP_SECONDS, tuple(1 / k**0.7 for k in range(1, 13)))
    return _nearly_full_length(rng, hum + 0.4 * _filtered_noise(rng, lambda f: 1 / (1 + (f / 300) ** 4)))


def _birds(rng: np.random.Generator, trait: str) -> np.ndarray:
    parts, time = [], rng.uniform(0.05, 0.15)
    while time < CLIP_SECONDS - 0.8:
        pitch, seconds, gap = _log_uniform(rng, 3200, 3600), rng.uniform(0.09, 0.1), rng.uniform(0.07, 0.08)
        for _ in range(3):
            bend = np.geomspace(pitch * rng.uniform(1.2, 1.5), pitch, len(_time(seconds)))
            parts.append((time, _fade(_harmonic_tone(bend, seconds, (1.0, 0.1)), 0.01, 0.03)))
            time += seconds + gap
        time += rng.uniform(0.38, 0.44)
    return _mix(parts)


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
