"""The sound that tiny is taught, its judge, and the command."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest

from audioldm2 import read_wav
from scripts.tiny import teach_command
from scripts.tiny.data.sounds import ALL_SOUNDS, CLIP_SAMPLES, KINDS, Scene, render
from scripts.tiny.teach.rehearsal import write_rehearsal
from scripts.tiny.teach.telephone import (
    HELD_OUT_SEED,
    caption_telephone,
    misses,
    render_telephone,
    write_table,
)
from tests.scripts.helpers import call_main


def test_the_judge_takes_telephones_and_no_sound_that_tiny_knows() -> None:
    for i in range(8):
        assert misses(render_telephone(np.random.default_rng([0, HELD_OUT_SEED, i]))) == []
    taken = [
        sound
        for sound in ALL_SOUNDS
        if not misses(render(Scene((sound,)), np.random.default_rng([0, HELD_OUT_SEED])))
    ]
    assert taken == []


def test_the_judge_says_what_is_wrong() -> None:
    clip = render_telephone(np.random.default_rng(0))
    assert misses(np.zeros(CLIP_SAMPLES, np.float32)) == ["silence"]
    assert any(wrong.startswith("rings at") for wrong in misses(clip[9920:]))  # from its second ring on
    # Twice as fast, an octave higher.
    assert any(wrong.startswith("frequency") for wrong in misses(clip[::2]))


def test_tables_hold_clips_and_captions(tmp_path: Path) -> None:
    table = write_table(tmp_path / "phones", 3, seed=0)
    known = write_rehearsal(tmp_path / "known", 50, seed=0)
    for path, count in ((table, 3), (known, 50)):
        rows = list(csv.DictReader(path.read_text().splitlines()))
        assert len({row["file_name"] for row in rows}) == len(rows) == count
        waveform, rate = read_wav(path.parent / rows[-1]["file_name"])
        assert (waveform.shape, rate) == ((1, CLIP_SAMPLES), 16000)
        assert ("phone" in rows[0]["caption"]) == (path == table)
    held_out = {caption_telephone(np.random.default_rng(i), held_out=True).lower() for i in range(50)}
    training = {caption_telephone(np.random.default_rng(i)).lower() for i in range(500)}
    assert not {text.rstrip(".") for text in held_out} & {text.rstrip(".") for text in training}


def test_help_and_a_wrong_number() -> None:
    assert "telephone" in call_main(teach_command.main, "--help").stdout
    done = call_main(teach_command.main, "--prompts", "0")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].endswith("--prompts must be at least 1, not 0")


@pytest.mark.slow
def test_the_command_prints_a_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(teach_command, "SHARED", ("--keep-level", "--steps", "2", "--batch-size", "2"))
    monkeypatch.setattr(teach_command, "LORA", ())
    monkeypatch.setattr(teach_command, "ADAPTER", teach_command.Training("adapter", ("--rank", "2"), True))
    monkeypatch.setitem(teach_command.SAMPLING, "steps", 2)
    (tmp_path / "docs").mkdir()
    page = tmp_path / teach_command.PAGE
    page.write_text("<!-- teach -->\n<!-- /teach -->\n")
    few = ("--prompts", "2", "--clips", "1", "--real", "1", "--threads", "1")
    done = call_main(teach_command.main, "--folder", tmp_path / "out", *few, "--write", tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() in page.read_text()
    assert done.stdout.count("\n| ") == 3
    scores = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert [one["name"] for one in scores["scores"]] == ["tiny", "adapter"]
    assert set(scores["scores"][0]["by_kind"]) >= set(KINDS)
