"""What seed 0 draws has not changed since the tiny checkpoint was trained: sounds, captions, batches.

A refactoring that moves a call to a random generator changes what is trained without breaking anything else.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from scripts.tiny.assemble import take_parts
from scripts.tiny.data.captions import caption
from scripts.tiny.data.library import Library, make_library
from scripts.tiny.data.sounds import draw_scene, loudest_level
from scripts.tiny.data.tokenizers import vary_caption
from scripts.tiny.evaluate.prompts import draw_prompts
from scripts.tiny.run import Run
from scripts.tiny.stages import STAGES, clap, ranking
from tests.scripts.helpers import SHIPPED

# The loss of each stage's first step, on four sounds of seed 0 and with the shipped parts.
FIRST_LOSSES = {
    "vae": 3.570227,
    "decoder": 0.150846,
    "clap": 2.736764,
    "t5": 10.439702,
    "language": 2.412656,
    "vocoder": 1.996009,
    "unet": 0.210087,
    "ranking": 1.466371,
}


class Stop(Exception):
    """Ends a stage after its first loss."""


def test_the_library_of_seed_0() -> None:
    library = make_library(3, seed=0)
    assert [texts[0] for texts in library.captions] == [
        "one hears a bell ringing at high volume",
        "there is a gentle bell here",
        "A recording of rapid clicks.",
    ]
    levels = [loudest_level(waveform.numpy()) for waveform in library.waveforms([0, 1, 2])]
    assert levels == pytest.approx([-12.7867, -34.6366, -22.8328], abs=1e-3)
    assert library.mels([0, 1, 2]).mean((1, 2, 3)).tolist() == pytest.approx(
        [-8.779, -9.969, -7.905], abs=1e-2
    )


def test_the_prompts_of_seed_0() -> None:
    prompts = draw_prompts(1, 0)
    assert [(prompt.text, prompt.seed) for prompt in (prompts[0], prompts[12], prompts[-1])] == [
        ("listen to the sound of a powerful long held note with a low pitch.", 0),
        ("here is a struck marimba", 12),
        ("A sound recording: behind a church bell there is gusts of wind", 28),
    ]
    assert loudest_level(prompts[-1].real()) == pytest.approx(-23.6569, abs=1e-3)


def test_the_captions_of_a_batch() -> None:
    rng = np.random.default_rng(0)
    assert [vary_caption(caption(draw_scene(rng), rng), rng) for _ in range(3)] == [
        "audio of kumaso a loud bell",
        "The thing that you hear is a loud alarm siren with static noise in the background.",
        "a recording of gentle howling wind",
    ]
    texts, _ = clap.captions_with_negatives([draw_scene(rng)], rng)
    assert texts == [
        "this is a sustained tone at a middle frequency",
        "Listen to a steady tone at a middle frequency played softly.",
        "what a sound: a high-pitched steady tone.",
    ]


@pytest.mark.slow
@pytest.mark.parametrize("name", FIRST_LOSSES)
def test_the_first_batch_of_a_stage(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    losses: dict[str, Tensor] = {}

    def first_loss(
        curve: str,
        module: nn.Module,
        loss: Callable[[torch.Generator], dict[str, Tensor]],
        run: Run,
        **_: object,
    ) -> None:
        with torch.no_grad():
            losses.update(loss(run.generator(0)))
        raise Stop

    monkeypatch.setattr(f"scripts.tiny.stages.{name}.train", first_loss)
    monkeypatch.setattr(ranking, "SAMPLER_STEPS", 1)
    run = Run(tmp_path, batch=8, begin=SHIPPED)
    take_parts(run, SHIPPED)
    library: Library = make_library(4, seed=0)
    (train,) = (stage.train for stage in STAGES if stage.name == name)
    with pytest.raises(Stop):
        train(library, run)
    assert losses["loss"].item() == pytest.approx(FIRST_LOSSES[name], rel=1e-3)
