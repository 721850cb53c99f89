"""The tasks: cases, methods with their settings, and what is right."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from scripts.tiny.data.sounds import CLIP_SECONDS, SAMPLING_RATE, Scene
from scripts.tiny.evaluate.criteria import matches
from scripts.tiny.evaluate.editing import cases as draw, judges
from scripts.tiny.evaluate.editing.cases import BEAT_SECONDS, CUTOFF, GAP, Case
from scripts.tiny.evaluate.editing.methods import (
    Method,
    appended_text,
    band_of_text,
    crossfaded_text,
    edited,
    edited_by_other_text,
    from_text,
    inverted,
    padded,
    pasted_text,
    round_trip,
    unchanged,
)

Checks = dict[str, bool]
INVERSION_GUIDANCE = (2.0, 4.0)
LONG_SECONDS = 4 * CLIP_SECONDS
BANDS = tuple({"replace_band": (low, 8000.0)} for low in (4000.0, 2500.0, 1500.0))


@dataclass(frozen=True)
class Task:
    """What is asked of the pipeline, and how it is judged.

    Attributes:
        name: of the option --kinds.
        title: in the document.
        about: what is right, and what the figure is; in the document.
        make: makes the i-th case.
        judge: what is right about a sound.
        unit: of the figure.
        figure: of a sound; the less the better.
        floor: without editing.
        ceiling: from text alone.
        methods: the features, of which the best settings are chosen.
    """

    name: str
    title: str
    about: str
    make: Callable[[np.random.Generator, int], Case]
    judge: Callable[[Case, np.ndarray], Checks]
    unit: str
    figure: Callable[[Case, np.ndarray], float]
    floor: Method
    ceiling: Method
    methods: tuple[Method, ...]


# --- what is right


def judge_scene(case: Case, sound: np.ndarray) -> Checks:
    return matches(case.scene, sound)


def judge_bell(case: Case, sound: np.ndarray) -> Checks:
    return {
        **matches(case.scene, sound),
        "pitch": judges.pitch_error(case.source, sound) < 0.035,
        "onset": judges.onset_error(case.source, sound) <= 0.04,
        "level": judges.level_error(case.source, sound) < 3,
    }


def judge_gap(case: Case, sound: np.ndarray) -> Checks:
    inside = slice(*draw.samples(GAP))
    original, filled = case.original[inside], sound[inside]
    checks = {
        "level": abs(judges.level(filled) - judges.level(original)) < 3,
        "no hole": judges.deepest_dip(sound, GAP[0] - 0.1, GAP[1] + 0.1) < 9,
    }
    if case.scene.sounds[0].kind == "tone":
        checks["pitch"] = judges.pitch_error(original, filled) < 0.035
    else:
        checks["color"] = judges.color_error(original, filled) < 4
    return checks


def judge_beat(case: Case, sound: np.ndarray) -> Checks:
    before, after = joined_beats(case, sound)
    same = np.isfinite(after.period) and abs(after.period / before.period - 1) < 0.06
    return {
        "rate": bool(same),
        "regular": after.regularity >= 0.6,
        "to the end": bool(np.any(after.onsets > len(sound) / SAMPLING_RATE - 1)),
    }


def joined_beats(case: Case, sound: np.ndarray) -> tuple[judges.Beat, judges.Beat]:
    """The beat of the source, and that after it."""
    joint = len(case.source) / SAMPLING_RATE
    return judges.beat(case.source), judges.beat(sound, joint + 0.03)


def judge_loop(case: Case, sound: np.ndarray) -> Checks:
    half = len(sound) // 2
    seconds = half / SAMPLING_RATE
    turned = np.concatenate([sound[-half:], sound[:half]])  # the seam in the middle
    return {
        "kind": matches(case.scene, sound)["kind"],
        "spectrum": judges.seam_jump(sound) <= 1,
        "samples": judges.sample_step(sound) <= 1,
        "no hole": judges.deepest_dip(turned, seconds - 0.1, seconds + 0.1) < 9,
    }


def judge_quarters(case: Case, sound: np.ndarray) -> Checks:
    return {f"quarter {i + 1}": right for i, right in enumerate(quarters(case.scene, sound))}


def quarters(scene: Scene, sound: np.ndarray) -> list[bool]:
    """Whether each 5.12 s of a sound match a scene."""
    count = max(1, round(len(sound) / SAMPLING_RATE / CLIP_SECONDS))
    return [all(matches(scene, part).values()) for part in np.array_split(sound, count)]


def share_wrong(case: Case, sound: np.ndarray) -> float:
    return 100 * (1 - float(np.mean(quarters(case.scene, sound))))


def high_band_error(case: Case, sound: np.ndarray) -> float:
    return judges.spectrum_error(case.original, sound, CUTOFF, 8000)


def gap_level_error(case: Case, sound: np.ndarray) -> float:
    inside = slice(*draw.samples(GAP))
    return abs(judges.level(sound[inside]) - judges.level(case.original[inside]))


def beat_error(case: Case, sound: np.ndarray) -> float:
    return 100 * judges.phase_error(*joined_beats(case, sound))


def kept_bell_error(case: Case, sound: np.ndarray) -> float:
    return judges.spectrum_error(case.source[:SAMPLING_RATE], sound[:SAMPLING_RATE], 400, 2500)


# --- the tasks


def variations(*strengths: float) -> Method:
    return Method("variation", edited, tuple({"strength": strength} for strength in strengths))


def inversions(*skips: float) -> tuple[Method, ...]:
    settings = tuple({"skip": skip, "guidance_scale": w} for skip in skips for w in INVERSION_GUIDANCE)
    return tuple(Method(f"{name.upper()} inversion", inverted(name), settings) for name in ("ddpm", "ddim"))


NO_EDITING = Method("no editing", round_trip)
FROM_TEXT = Method("from text alone", from_text)
TASKS = (
    Task(
        name="sweep",
        title="A rising sweep made falling",
        about="Right: a falling sweep, as loud as the prompt says. The figure is by how much its level "
        "differs from that of the source.",
        make=draw.sweep,
        judge=judge_scene,
        unit="dB",
        figure=lambda case, sound: judges.level_error(case.source, sound),
        floor=NO_EDITING,
        ceiling=FROM_TEXT,
        methods=(variations(0.5, 0.6, 0.7, 0.8, 0.9), *inversions(0.4, 0.3, 0.2, 0.1)),
    ),
    Task(
        name="bell",
        title="Rain put over a kept bell",
        about="Right: a bell over rain, with the pitch (within 3.5 %), the onset (40 ms) and the level "
        "(3 dB) of the source. The figure is the distance of the spectrograms' first second, 400 "
        "to 2500 Hz.",
        make=draw.bell,
        judge=judge_bell,
        unit="dB",
        figure=kept_bell_error,
        floor=NO_EDITING,
        ceiling=FROM_TEXT,
        methods=(
            variations(0.4, 0.5, 0.6, 0.7),
            Method("a band, with the prompt for the whole", edited, BANDS),
            Method("a band, with a prompt for the band", edited_by_other_text, BANDS),
            *inversions(0.6, 0.5, 0.4, 0.3),
        ),
    ),
    Task(
        name="gap",
        title="A gap in a steady sound filled",
        about="Right: in the gap of 1.3 s, the level of the original (within 3 dB), no hole, and the "
        "pitch of a tone (3.5 %) or the color of a noise (4 dB). The figure is by how much the "
        "level in the gap differs.",
        make=draw.gap,
        judge=judge_gap,
        unit="dB",
        figure=gap_level_error,
        floor=Method("no editing", unchanged),
        ceiling=Method("from text alone, pasted", pasted_text),
        methods=(
            Method("inpainting", edited, ({"replace": [GAP]},)),
            Method("the original, encoded and decoded", round_trip),
        ),
    ),
    Task(
        name="beat",
        title="A beat continued at its own rate",
        about="Right: in all of what is added, events at the rate of the source (within 6 %). The figure "
        "is how far the first four are from where the source's beat has them (25 % by chance).",
        make=draw.beats,
        judge=judge_beat,
        unit="% of the period",
        figure=beat_error,
        floor=Method("no editing: silence", padded),
        ceiling=Method("from text alone, appended", appended_text),
        methods=(
            Method("continued, in one window", edited, ({"extend": BEAT_SECONDS},)),
            Method("continued, in several windows", edited, ({"extend": 3 * BEAT_SECONDS},)),
            Method("the prompt not saying how fast", edited_by_other_text, ({"extend": BEAT_SECONDS},)),
        ),
    ),
    Task(
        name="loop",
        title="A sound that repeats without a seam",
        about="Right: the kind of the prompt, and when the sound is repeated, no hole at the seam and "
        "no larger change, of the spectrum or from sample to sample, than the largest 5 % "
        "elsewhere. The figure is the change of the spectrum, as a multiple of that.",
        make=draw.looped,
        judge=judge_loop,
        unit="times",
        figure=lambda case, sound: judges.seam_jump(sound),
        floor=Method("no loop: from text alone, repeated", from_text),
        ceiling=Method("from text alone, crossfaded by hand", crossfaded_text),
        methods=(
            Method("loop, from text", from_text, ({"loop": True},)),
            Method("loop, of a sound", edited, ({"loop": True, "strength": 0.5},)),
        ),
    ),
    Task(
        name="long",
        title="Long pieces",
        about=f"Right: each 5.12 s of {LONG_SECONDS:g} s match the prompt. The figure is the share of "
        "them that do not.",
        make=draw.lasting,
        judge=judge_quarters,
        unit="%",
        figure=share_wrong,
        floor=Method("at once", from_text, ({"seconds": LONG_SECONDS},)),
        ceiling=Method("5.12 s alone", from_text),
        methods=(
            Method(
                "in windows",
                from_text,
                ({"seconds": LONG_SECONDS, "window": CLIP_SECONDS},),
            ),
        ),
    ),
    Task(
        name="band",
        title="High frequencies restored",
        about=f"The source has nothing above {CUTOFF:g} Hz. Right: the kind, rate and loudness of the "
        "original. The figure is the distance of the spectrograms above that frequency.",
        make=draw.dulled,
        judge=judge_scene,
        unit="dB",
        figure=high_band_error,
        floor=Method("no editing", unchanged),
        ceiling=Method("from text alone, its band", band_of_text),
        methods=(
            Method("`replace_band`", edited, ({"replace_band": (CUTOFF, 8000.0)},)),
            Method("the original, encoded and decoded", round_trip),
        ),
    ),
)
