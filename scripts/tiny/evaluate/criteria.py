"""Whether a sound is what a scene describes, decided from the waveform alone by fixed rules.

    matches(scene, waveform)    # {"kind": True, "rate": True, "loudness": False}: right if all are
    misses(scene, waveform)     # the same with reasons: {"kind": [], ..., "loudness": ["level -24, not ..."]}

`KIND_BOUNDS` and `TRAIT_BOUNDS` give the range of the quantities of `measures.py` for each kind of sound.
The ranges are wider than what the renderings of `data/sounds.py` span, to allow for the faults of generated
sounds: noise 30 dB below, a time smeared by 20 ms, a pitch that is 2 % off. They are narrow enough to reject
every other kind.

With two sounds, the foreground is measured in its loudest 13 dB, where the background, 17 to 20 dB below,
does not interfere. Of the background, only its presence and color are checked: low (engine, wind), dull
(waves) or bright (rain, noise), not which of the two it is. If the event masks the background (low under a
low tone, waves under drums) it is not checked, and "background" is missing from the result.
"""

from __future__ import annotations

from math import inf

import numpy as np

from scripts.tiny.data.sounds import Scene, Sound
from scripts.tiny.evaluate.measures import Measured, measure, noise_bands

# For an event over a background, in place of MEASURED_DEPTH and ATTACK_FRAMES: a background hides the first
# decibels of a rise that the VAE smears.
DEPTH_OVER_BACKGROUND = 13.0  # dB
ATTACK_OVER_BACKGROUND = 5  # frames
SILENCE_LEVEL = -55.0  # dB of full scale, below which nothing is audible

# The lowest and highest value of each quantity, by its name in `Measured`.
Bounds = dict[str, tuple[float, float]]
SUSTAINED_BOUNDS: Bounds = {"lasting": (3.0, inf), "held": (0.5, 1)}
NOTE_BOUNDS: Bounds = {"onsets": (1, 1), "held": (0, 0.85), "steadiness": (0.5, 1), "tonality": (0.3, 1)}
MELODY_BOUNDS: Bounds = {"lasting": (1.6, inf), "tonality": (0.5, 1), "stepping": (0.45, 1), "notes": (5, 11)}
KIND_BOUNDS: dict[str, Bounds] = {
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
        **SUSTAINED_BOUNDS,
        "frequency": (550, 1300),
        "tonality": (0.45, 1),
        "span": (6, 18),
        "stepping": (0, 0.65),
        "turns": (2, 9),
        "direction": (-0.6, 0.6),
    },
    "bell": {**NOTE_BOUNDS, "decay": (4.8, 30)},
    "pluck": {**NOTE_BOUNDS, "decay": (1.5, 4.8)},
    "struck": {**NOTE_BOUNDS, "decay": (0.25, 1.5)},
    "scale": {**MELODY_BOUNDS, "span": (8.5, 17)},
    "arpeggio": {**MELODY_BOUNDS, "stepping": (0.6, 1), "span": (18, 30)},
    "drums": {"onsets": (4, inf), "regularity": (0.6, 1), "low": (0.4, 1), "high": (0.04, 1)},
    "noise": {**SUSTAINED_BOUNDS, "held": (0.7, 1), "flatness": (0.6, 1), "tilt": (-5, 6)},
    "rain": {**SUSTAINED_BOUNDS, "flatness": (0.4, 1), "tilt": (-22, -6), "centroid": (2700, 5200)},
    "wind": {
        **SUSTAINED_BOUNDS,
        "centroid": (150, 550),
        "tonality": (0, 0.6),
        "swelling": (1.2, 12),
    },
    "waves": {"centroid": (550, 2300), "tonality": (0, 0.4), "swelling": (10, inf), "swells": (1, 4)},
    "engine": {
        **SUSTAINED_BOUNDS,
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
# The quantity that distinguishes a kind's traits, and its bounds for each.
DIRECTION_BOUNDS = ("direction", {"rising": (0.85, 1), "falling": (-1, -0.85)})
TRAIT_BOUNDS: dict[str, tuple[str, Bounds]] = {
    "tone": ("frequency", {"low": (105, 285), "middle": (440, 1150), "high": (1750, 4600)}),
    "sweep": DIRECTION_BOUNDS,
    "scale": DIRECTION_BOUNDS,
    "arpeggio": DIRECTION_BOUNDS,
    "pulses": ("rate", {"slow": (1.2, 3.2), "fast": (3.8, 8.0)}),
    "clicks": ("rate", {"slow": (1.2, 3.2), "fast": (3.8, 8.0)}),
    "drums": ("rate", {"slow": (0.9, 2.7), "fast": (3.3, 7.5)}),
}
LOUDNESS_BOUNDS = {"loud": (-21.5, inf), "soft": (SILENCE_LEVEL, -25.5)}  # dB of full scale
# A click is too short to reach that level without clipping; from this peak on, any sound is loud.
LOUD_PEAK = 0.6
# The color that a background is recognized by.
BACKGROUND_COLORS = {"engine": "low", "wind": "low", "waves": "dull", "rain": "bright", "noise": "bright"}
# dB relative to the loudest frame, from which a background counts as present. VAE and vocoder make it softer.
BACKGROUND_THRESHOLDS = {"low": -35.0, "dull": -36.0, "bright": -36.0}


def matches(scene: Scene, waveform: np.ndarray) -> dict[str, bool]:
    """Whether a waveform is what a scene describes.

    Args:
        scene: what was asked for.
        waveform: (samples,), 16 kHz.

    Returns:
        A result for "kind" and for whatever else the scene names: "frequency", "direction" or "rate" (its
        trait), "background" and "loudness".
    """
    return {name: not missed for name, missed in misses(scene, waveform).items()}


def misses(scene: Scene, waveform: np.ndarray) -> dict[str, list[str]]:
    """What is wrong by each check of `matches`, such as ["onsets 1, not 4 to inf"]; [] if nothing is."""
    sound = scene.sounds[0]
    over_background = len(scene.sounds) > 1
    if over_background:
        measured = measure(waveform, DEPTH_OVER_BACKGROUND, ATTACK_OVER_BACKGROUND)
    else:
        measured = measure(waveform)
    found = {"kind": outside(measured, KIND_BOUNDS[sound.kind])}
    if measured.level < SILENCE_LEVEL:
        found["kind"] = ["silence"]
    if sound.trait:
        quantity, by_trait = TRAIT_BOUNDS[sound.kind]
        found[quantity] = outside(measured, {quantity: by_trait[sound.trait]})
    if over_background:
        wrong = _background_misses(scene.sounds[1], sound, waveform)
        if wrong is not None:
            found["background"] = wrong
    if scene.loudness:
        bounds = {"level": LOUDNESS_BOUNDS[scene.loudness]}
        loud_peak = scene.loudness == "loud" and np.abs(waveform).max() >= LOUD_PEAK
        found["loudness"] = [] if loud_peak else outside(measured, bounds)
    return found


def outside(measured: Measured, bounds: Bounds) -> list[str]:
    """The quantities outside their bounds, in words."""
    values = {name: (getattr(measured, name), *limits) for name, limits in bounds.items()}
    return [f"{n} {v:.3g}, not {a:g} to {b:g}" for n, (v, a, b) in values.items() if not a <= v <= b]


def _background_misses(background: Sound, event: Sound, waveform: np.ndarray) -> list[str] | None:
    """What speaks against a background; None if the event would mask it: low under low, waves under drums."""
    color, low_tone = BACKGROUND_COLORS[background.kind], event == Sound("tone", "low")
    if (color == "low" and low_tone) or (color == "dull" and event.kind == "drums"):
        return None
    bands = noise_bands(waveform)
    (low, _), (dull, dull_loud), (bright, bright_loud) = bands.values()
    level, fits = {
        "low": (low, low > bright),
        "dull": (dull_loud, dull_loud > bright_loud and dull_loud > dull + 4),  # waves come and go
        "bright": (bright, bright > low or low_tone),  # a low tone has low noise of its own
    }[color]
    if level >= BACKGROUND_THRESHOLDS[color] and fits:
        return []
    found = ", ".join(f"{name} {quiet:.0f} to {loud:.0f} dB" for name, (quiet, loud) in bands.items())
    return [f"no {color} background; found {found}"]
