"""scripts/evaluate_tiny: what it prints, draws and writes, at toy size with a random checkpoint."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from audioldm2 import AudioLDM2Pipeline, DPMSolverMultistepScheduler
from scripts.random_checkpoint import write_small_checkpoint
from scripts.tiny.data.sounds import KINDS, SAMPLES
from scripts.tiny.evaluate.evaluation import (
    CONTENTS,
    TWO,
    batches,
    by_row,
    draw_prompts,
    generate,
    judge,
    ranking,
    retrieval,
    share,
    shuffled,
    through,
)
from scripts.tiny.evaluate.pictures import tile
from scripts.tiny.evaluate.trade import SETTINGS, Setting, draw, table, trade
from tests.helpers import ROOT

# The random checkpoint reads 32 tokens, which some captions are longer than.
pytestmark = pytest.mark.filterwarnings("ignore:.*is longer than")
COMMAND = ROOT / "scripts" / "evaluate_tiny"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random checkpoint."""
    folder = tmp_path_factory.mktemp("evaluate") / "random"
    write_small_checkpoint(folder)
    return folder


@pytest.fixture
def pipe(checkpoint: Path) -> AudioLDM2Pipeline:
    return loaded(checkpoint)


def loaded(checkpoint: Path, dtype: torch.dtype = torch.float32) -> AudioLDM2Pipeline:
    pipe = AudioLDM2Pipeline.from_pretrained(checkpoint, torch_dtype=dtype)
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def command(*arguments: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONPATH", None)
    line = [sys.executable, str(COMMAND), *map(str, arguments)]
    return subprocess.run(line, cwd=cwd, env=environment, capture_output=True, text=True, timeout=500)


# --- prompts


def test_prompts_are_seeded_and_have_all_contents():
    prompts = draw_prompts(2, 0)
    assert prompts == draw_prompts(2, 0)
    assert prompts != draw_prompts(2, 1)
    assert len({prompt.seed for prompt in prompts}) == len(prompts) == 2 * len(CONTENTS) + 8
    for sound in CONTENTS:
        assert sum(prompt.scene.sounds == (sound,) for prompt in prompts) == 2
    assert sum(prompt.row == TWO for prompt in prompts) == 8
    assert {prompt.row for prompt in prompts} == {*KINDS, TWO}


def test_more_prompts_have_the_fewer_ones_scenes_among_them():
    scenes = [prompt.text for prompt in draw_prompts(2, 0)]
    assert {prompt.text for prompt in draw_prompts(1, 0, two=0)} <= {*scenes}


def test_no_prompt_keeps_its_place_when_they_are_shuffled():
    prompts = draw_prompts(1, 0)
    others = shuffled(prompts, 0)
    assert sorted(p.seed for p in others) == sorted(p.seed for p in prompts)
    assert all(a != b for a, b in zip(prompts, others, strict=True))


def test_a_table_counts_rows_and_what_was_missed():
    prompts = draw_prompts(1, 0, two=1)
    right = [{"kind": prompt.row != "bell", "loudness": True} for prompt in prompts]
    rows = by_row(prompts, right=right, floor=[{"kind": False}] * len(prompts))
    assert [*rows] == [*KINDS, TWO, "all"]
    assert rows["tone"] == {"prompts": 3, "right": 1, "floor": 0, "missed": {}}
    assert rows["bell"] == {"prompts": 1, "right": 0, "floor": 0, "missed": {"kind": 1}}
    assert rows["all"]["right"] == pytest.approx(1 - 1 / len(prompts)) == share(right)


def test_real_sounds_are_right():
    prompts = draw_prompts(1, 3, two=4)
    sounds = [prompt.real() for prompt in prompts]
    assert share(judge(prompts, sounds, "")) >= 0.95
    assert share(judge(shuffled(prompts, 0), sounds, "")) <= 0.15


# --- generating


def test_a_clip_depends_on_its_prompt_and_seed_alone(pipe: AudioLDM2Pipeline):
    prompts = draw_prompts(1, 0, two=0)[:6]
    groups = [*batches(pipe, prompts, 4)]
    assert sorted(i for group in groups for i in group) == [*range(6)]
    assert max(len(group) for group in groups) <= 4
    together = generate(pipe, prompts, steps=2, guidance=2.0, batch=4)
    alone = generate(pipe, prompts[2:3], steps=2, guidance=2.0, batch=1)
    assert together.shape == (6, 1, SAMPLES)
    np.testing.assert_allclose(together[2, 0], alone[0, 0], atol=2e-4)


def test_the_parts_are_measured(pipe: AudioLDM2Pipeline):
    sounds = np.stack([prompt.real() for prompt in draw_prompts(1, 0, two=0)[:2]])
    out, errors = through(pipe, sounds, vae=True)
    assert out.shape == sounds.shape
    assert errors["mel_dB"] > 1
    assert errors["picture_dB"] > 1
    assert through(pipe, sounds, vae=False)[1]["picture_dB"] == 0
    assert 0 <= retrieval(pipe, 1, 0) < 0.6
    ranked = ranking(pipe, draw_prompts(1, 0, two=0)[:1], steps=1, guidance=1.0, batch=4, candidates=2)
    assert 0 <= ranked["any"] <= ranked["possible"] <= 1


def test_samplers_and_precisions_are_compared(checkpoint: Path, tmp_path: Path):
    prompts = draw_prompts(1, 0, two=0)[:2]
    settings = (Setting("DDIM", 3), Setting("DPM-Solver++", 3), Setting("DPM-Solver++", 3, "bfloat16"))
    outcomes = trade(
        lambda dtype: loaded(checkpoint, dtype), prompts, guidance=2.0, batch=2, settings=settings
    )
    assert [outcome.setting for outcome in outcomes] == [*settings]
    assert outcomes[0].distance == 0
    assert all(outcome.distance > 0 and outcome.seconds > 0 for outcome in outcomes[1:])
    assert table(outcomes).count("\n") == 4
    draw(outcomes, tmp_path / "trade.png")
    assert Image.open(tmp_path / "trade.png").size[0] > 500
    assert SETTINGS[0] == Setting("DDIM", 200)


def test_the_pictures_are_small_and_as_large_as_they_should_be(tmp_path: Path):
    sounds = [prompt.real() for prompt in draw_prompts(1, 0, two=0)]
    tile([f"{sound.kind} {sound.trait}" for sound in CONTENTS], sounds, tmp_path / "kinds.png")
    assert (tmp_path / "kinds.png").stat().st_size < 200_000
    assert Image.open(tmp_path / "kinds.png").size[0] > 800


# --- the command


def test_it_measures_prints_draws_and_writes(checkpoint: Path, tmp_path: Path):
    card, readme = tmp_path / "audioldm2" / "tiny" / "README.md", tmp_path / "README.md"
    card.parent.mkdir(parents=True)
    card.write_text("before\n<!-- scores -->\nold\n<!-- /scores -->\nafter\n")
    readme.write_text("<!-- tiny: trade -->\n<!-- /tiny: trade -->\n")
    size = ["--clips", "1", "--steps", "1", "--quick", "--batch", "25", "--guidance", "1"]
    writing = ["--pictures", "--write", tmp_path, "--json", tmp_path / "x.json", "--out", tmp_path / "out"]
    done = command("--model", checkpoint, *size, *writing, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    scores = next(line for line in done.stdout.splitlines() if line.startswith("| all | 29 |"))
    assert card.read_text().startswith("before\n<!-- scores -->\n\n| sound | prompts |")
    assert card.read_text().endswith("\n\n<!-- /scores -->\nafter\n")
    assert scores in card.read_text()
    assert "old" not in card.read_text()
    assert (tmp_path / "docs" / "tiny-kinds.png").stat().st_size > 10_000
    content = json.loads((tmp_path / "x.json").read_text())
    assert len(content["prompts"]) == content["rows"]["all"]["prompts"] == 29
    assert content["rows"]["all"]["ceiling"] > 0.9
    assert content["rows"]["all"]["right"] < 0.3


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--clips", "0"], "--clips must be at least 1"),
        (["--model", "nowhere/at all"], "evaluate_tiny: error: "),
        (["--supper"], "unrecognized arguments"),
    ],
)
def test_what_it_cannot_do_is_told(arguments: list[str], told: str, tmp_path: Path):
    done = command(*arguments, cwd=tmp_path)
    assert done.returncode != 0
    assert told in done.stderr
    assert "Traceback" not in done.stderr
