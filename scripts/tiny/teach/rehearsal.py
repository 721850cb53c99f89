"""A table of sounds that the tiny checkpoint knows, to be rehearsed while it learns another one."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from scripts.tiny.data.captions import caption
from scripts.tiny.data.sounds import ALL_SOUNDS, Scene, draw_scene, render
from scripts.tiny.teach.table import write_clips

REHEARSAL_STREAM = 13  # second in every seed sequence here: none of these sounds is scored
TWO_SOUND_SHARE = 0.15


def write_rehearsal(folder: Path, clips: int, seed: int) -> Path:
    """Write clips of every kind with every trait, in turn, and of two sounds; returns the table's path."""

    def draw(i: int) -> tuple[np.ndarray, str]:
        rng = np.random.default_rng([seed, REHEARSAL_STREAM, i])
        sound = ALL_SOUNDS[i % len(ALL_SOUNDS)]
        scene = Scene((sound,), draw_scene(rng, sound.kind).loudness)
        while i >= (1 - TWO_SOUND_SHARE) * clips and len(scene.sounds) == 1:
            scene = draw_scene(rng)
        return render(scene, rng), caption(scene, rng)

    return write_clips(folder, "known", map(draw, range(clips)))
