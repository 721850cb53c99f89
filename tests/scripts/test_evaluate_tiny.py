"""scripts/evaluate_tiny: what it prints, draws and writes, on few clips of a random checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from audioldm2 import AudioLDM2Pipeline, DPMSolverMultistepScheduler
from scripts.random_checkpoint import write_random_checkpoint
from scripts.tiny import evaluate_command
from scripts.tiny.data.sounds import ALL_SOUNDS, CLIP_SAMPLES, KINDS
from scripts.tiny.evaluate.evaluation import (
    by_row,
    clap_retrieval,
    judge,
    rank_candidates,
    reconstruct,
    share_right,
)
from scripts.tiny.evaluate.generation import equal_length_batches, generate
from scripts.tiny.evaluate.pictures import draw_spectrograms
from scripts.tiny.evaluate.prompts import TWO_SOUNDS, draw_prompts, shuffled
from scripts.tiny.evaluate.trade import SETTINGS, Setting, draw_trade, measure_trade, trade_table
from tests.scripts.helpers import call_main, run_script

# Some captions are longer than the 32 tokens that the random checkpoint reads.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:.*is longer than")]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random checkpoint."""
    folder = tmp_path_factory.mktemp("evaluate") / "random"
    write_random_checkpoint(folder)
    return folder


@pytest.fixture
def pipe(checkpoint: Path) -> AudioLDM2Pipeline:
    return loaded(checkpoint)


def loaded(checkpoint: Path, dtype: torch.dtype = torch.float32) -> AudioLDM2Pipeline:
    pipe = AudioLDM2Pipeline.from_pretrained(checkpoint, torch_dtype=dtype)
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def width(picture: Path) -> int:
    with Image.open(picture) as image:
        return image.size[0]


# --- prompts


def test_prompts_are_seeded_and_cover_all_sounds():
    prompts = draw_prompts(2, 0)
    assert prompts == draw_prompts(2, 0)
    assert prompts != draw_prompts(2, 1)
    assert len({prompt.seed for prompt in prompts}) == len(prompts) == 2 * len(ALL_SOUNDS) + 8
    for sound in ALL_SOUNDS:
        assert sum(prompt.scene.sounds == (sound,) for prompt in prompts) == 2
    assert sum(prompt.row == TWO_SOUNDS for prompt in prompts) == 8
    assert {prompt.row for prompt in prompts} == {*KINDS, TWO_SOUNDS}


def test_more_prompts_include_the_texts_of_fewer():
    scenes = [prompt.text for prompt in draw_prompts(2, 0)]
    assert {prompt.text for prompt in draw_prompts(1, 0, two=0)} <= {*scenes}


def test_shuffling_moves_every_prompt():
    prompts = draw_prompts(1, 0)
    others = shuffled(prompts, 0)
    assert sorted(p.seed for p in others) == sorted(p.seed for p in prompts)
    assert all(a != b for a, b in zip(prompts, others, strict=True))


def test_the_table_counts_prompts_and_failed_checks():
    prompts = draw_prompts(1, 0, two=1)
    right = [{"kind": prompt.row != "bell", "loudness": True} for prompt in prompts]
    rows = by_row(prompts, right=right, floor=[{"kind": False}] * len(prompts))
    assert [*rows] == [*KINDS, TWO_SOUNDS, "all"]
    assert rows["tone"] == {"prompts": 3, "right": 1, "floor": 0, "missed": {}}
    assert rows["bell"] == {"prompts": 1, "right": 0, "floor": 0, "missed": {"kind": 1}}
    assert rows["all"]["right"] == pytest.approx(1 - 1 / len(prompts)) == share_right(right)


def test_real_sounds_are_right():
    prompts = draw_prompts(1, 3, two=4)
    sounds = [prompt.real() for prompt in prompts]
    assert share_right(judge(prompts, sounds, "")) >= 0.95
    assert share_right(judge(shuffled(prompts, 0), sounds, "")) <= 0.15


# --- generating


def test_a_clip_depends_only_on_its_prompt_and_seed(pipe: AudioLDM2Pipeline):
    prompts = draw_prompts(1, 0, two=0)[:6]
    groups = [*equal_length_batches(pipe, prompts, 4)]
    assert sorted(i for group in groups for i in group) == [*range(6)]
    assert max(len(group) for group in groups) <= 4
    together = generate(pipe, prompts, steps=2, guidance=2.0, batch=4)
    alone = generate(pipe, prompts[2:3], steps=2, guidance=2.0, batch=1)
    assert together.shape == (6, 1, CLIP_SAMPLES)
    np.testing.assert_allclose(together[2, 0], alone[0, 0], atol=2e-4)


def test_the_parts_are_measured(pipe: AudioLDM2Pipeline):
    sounds = np.stack([prompt.real() for prompt in draw_prompts(1, 0, two=0)[:2]])
    out, errors = reconstruct(pipe, sounds, vae=True)
    assert out.shape == sounds.shape
    assert errors["mel_dB"] > 1
    assert errors["vae_dB"] > 1
    assert reconstruct(pipe, sounds, vae=False)[1]["vae_dB"] == 0
    assert 0 <= clap_retrieval(pipe, 1, 0) < 0.6
    ranked = rank_candidates(
        pipe, draw_prompts(1, 0, two=0)[:1], steps=1, guidance=1.0, batch=4, candidates=2
    )
    assert 0 <= ranked["any"] <= ranked["possible"] <= 1


def test_samplers_and_precisions_are_compared(checkpoint: Path, tmp_path: Path):
    prompts = draw_prompts(1, 0, two=0)[:2]
    settings = (Setting("DDIM", 3), Setting("DPM-Solver++", 3), Setting("DPM-Solver++", 3, "float64"))
    results = measure_trade(
        lambda dtype: loaded(checkpoint, dtype), prompts, guidance=2.0, batch=2, settings=settings
    )
    assert [result.setting for result in results] == [*settings]
    assert results[0].distance == 0
    assert all(result.distance > 0 and result.seconds > 0 for result in results[1:])
    assert trade_table(results).count("\n") == 4
    draw_trade(results, tmp_path / "trade.png")
    assert width(tmp_path / "trade.png") > 500
    assert SETTINGS[0] == Setting("DDIM", 200)


def test_the_picture_is_wide_and_its_file_small(tmp_path: Path):
    sounds = [prompt.real() for prompt in draw_prompts(1, 0, two=0)]
    draw_spectrograms([f"{sound.kind} {sound.trait}" for sound in ALL_SOUNDS], sounds, tmp_path / "kinds.png")
    assert (tmp_path / "kinds.png").stat().st_size < 200_000
    assert width(tmp_path / "kinds.png") > 800


# --- the command


def test_help_shows_examples():
    done = run_script("evaluate_tiny", "--help")
    assert done.returncode == 0
    assert evaluate_command.EXAMPLES in done.stdout


def test_the_command_updates_documents_and_writes_figures(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(evaluate_command, "ALL_SOUNDS", ALL_SOUNDS[:4])  # in the picture
    card, readme = tmp_path / "audioldm2" / "tiny" / "README.md", tmp_path / "README.md"
    card.parent.mkdir(parents=True)
    card.write_text("before\n<!-- scores -->\nold\n<!-- /scores -->\nafter\n")
    readme.write_text("<!-- tiny: trade -->\n<!-- /tiny: trade -->\n")
    size = ["--clips", "1", "--steps", "1", "--quick", "--batch", "25", "--guidance", "1"]
    writing = ["--pictures", "--write", tmp_path, "--json", tmp_path / "x.json", "--out", tmp_path / "out"]
    done = call_main(evaluate_command.main, "--model", checkpoint, *size, *writing)
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
    ("arguments", "message"),
    [
        (["--clips", "0"], "--clips must be at least 1"),
        (["--model", "nowhere/at all"], "evaluate_tiny: error: "),
        (["--supper"], "unrecognized arguments"),
    ],
)
def test_invalid_arguments_are_refused(arguments: list[str], message: str, tmp_path: Path):
    done = call_main(evaluate_command.main, *arguments, "--out", tmp_path)
    assert done.returncode != 0
    assert message in done.stderr
    assert "Traceback" not in done.stderr
