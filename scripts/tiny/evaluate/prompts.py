"""The prompts that a checkpoint is scored on: held-out phrasings, with seeds that training never used."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from scripts.tiny.data.captions import caption
from scripts.tiny.data.sounds import ALL_SOUNDS, Scene, draw_scene, render

TWO_SOUNDS = "two sounds"  # the row of the table for an event over a background
HELD_OUT_SEED = 7  # second in every seed sequence here, so that none is one of the library's


@dataclass(frozen=True)
class Prompt:
    """A scene, a held-out caption of it, and the seed of the initial noise."""

    scene: Scene
    text: str
    seed: int

    @property
    def row(self) -> str:
        """The row of the table in which it counts."""
        return self.scene.sounds[0].kind if len(self.scene.sounds) == 1 else TWO_SOUNDS

    def real(self) -> np.ndarray:
        """A synthesized sound of the scene, (CLIP_SAMPLES,)."""
        return render(self.scene, np.random.default_rng([self.seed, HELD_OUT_SEED, 1]))


def draw_prompts(clips: int, seed: int, two: int | None = None) -> list[Prompt]:
    """Draw prompts.

    Args:
        clips: how many prompts for every kind with every trait.
        seed: of scenes, captions and noise.
        two: how many prompts of an event over a background; None is 4 times `clips`.
    """
    prompts: list[Prompt] = []

    def add(scene: Scene, rng: np.random.Generator) -> None:
        prompts.append(Prompt(scene, caption(scene, rng, held_out=True), 1000 * seed + len(prompts)))

    for number, sound in enumerate(ALL_SOUNDS):
        for i in range(clips):
            rng = np.random.default_rng([seed, HELD_OUT_SEED, 0, number, i])
            add(Scene((sound,), draw_scene(rng, sound.kind).loudness), rng)
    rng = np.random.default_rng([seed, HELD_OUT_SEED, 2])
    total = len(prompts) + (4 * clips if two is None else two)
    while len(prompts) < total:
        scene = draw_scene(rng)
        if len(scene.sounds) == 2:
            add(scene, rng)
    return prompts


def shuffled(prompts: Sequence[Prompt], seed: int) -> list[Prompt]:
    """The same prompts in another order, none at its own position."""
    order = np.random.default_rng([seed, HELD_OUT_SEED, 3]).permutation(len(prompts))
    others = np.empty(len(prompts), dtype=int)
    others[order] = np.roll(order, 1)
    return [prompts[i] for i in others]
