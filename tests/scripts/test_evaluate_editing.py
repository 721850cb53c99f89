"""scripts/evaluate_editing: its judges, on right and wrong sounds, and what it prints and writes."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from scripts.tiny import evaluate_editing_command as command
from scripts.tiny.data.sounds import CLIP_SAMPLES, SAMPLING_RATE, Scene, Sound, loudest_level, render
from scripts.tiny.evaluate.editing import details, judges
from scripts.tiny.evaluate.editing.cases import GAP, Case, draw_cases, samples
from scripts.tiny.evaluate.editing.methods import Method, from_text, unchanged
from scripts.tiny.evaluate.editing.running import Row, Score, sounds_to_make
from scripts.tiny.evaluate.editing.table import task_section, words
from scripts.tiny.evaluate.editing.tasks import TASKS, Task
from tests.helpers import ROOT
from tests.scripts.helpers import call_main

TASK = {task.name: task for task in TASKS}


def case_of(task: Task, index: int = 0) -> Case:
    return draw_cases(task.name, task.make, index + 1, 3, False)[index]


def right(task: Task, case: Case, sound: np.ndarray) -> bool:
    return all(task.judge(case, sound).values())


def rendered(scene: Scene, seed: int) -> np.ndarray:
    return render(scene, np.random.default_rng(seed))


# --- judges


def test_a_sweep_that_still_rises_is_wrong() -> None:
    case = case_of(TASK["sweep"])
    assert not right(TASK["sweep"], case, case.source)
    assert right(TASK["sweep"], case, rendered(case.scene, 1))
    assert case.text != case.source_text
    assert len(case.text.split()) == len(case.source_text.split())


def test_rain_must_be_added_and_the_bell_be_the_same() -> None:
    task = TASK["bell"]
    case = case_of(task)
    rain = rendered(Scene((Sound("rain"),)), 2)
    rain = rain * 10 ** ((loudest_level(case.source) - 18 - loudest_level(rain)) / 20)
    assert right(task, case, case.source + rain)
    assert task.judge(case, case.source)["background"] is False
    later = np.roll(case.source, SAMPLING_RATE // 5) + rain
    assert [name for name, passed in task.judge(case, later).items() if not passed] == ["onset"]
    softer = 0.5 * (case.source + rain)
    assert task.judge(case, softer)["level"] is False
    assert task.figure(case, case.source) == 0 < task.figure(case, later)


@pytest.mark.parametrize("index", [0, 1])
def test_a_gap_must_be_filled_with_the_same(index: int) -> None:
    task = TASK["gap"]
    case, other = case_of(task, index), case_of(task, 1 - index)
    assert right(task, case, case.original)
    assert not task.judge(case, case.source)["no hole"]
    filled = case.source.copy()
    inside = slice(*samples(GAP))
    filled[inside] = other.original[inside]
    assert not task.judge(case, filled)["pitch" if index == 0 else "color"]
    filled[inside] = 0.4 * case.original[inside]
    assert not task.judge(case, filled)["level"]


def test_a_beat_must_go_on_at_its_own_rate() -> None:
    task = TASK["beat"]
    slow, fast = case_of(task, 1), case_of(task, 4)
    assert right(task, slow, slow.original)
    assert task.figure(slow, slow.original) < 5
    assert not right(task, slow, np.pad(slow.source, (0, CLIP_SAMPLES // 2)))
    assert task.judge(slow, np.concatenate([slow.source, fast.original]))["rate"] is False
    stopped = np.pad(slow.original, (0, 2 * SAMPLING_RATE))
    assert task.judge(slow, stopped)["to the end"] is False
    late = np.concatenate([slow.source, np.roll(slow.original[len(slow.source) :], SAMPLING_RATE // 5)])
    assert 30 < task.figure(slow, late) < 50  # 0.2 s of 0.5 s


def test_a_loop_must_not_have_a_seam() -> None:
    task = TASK["loop"]
    case = case_of(task)  # noise, which is faded in and out
    noise = np.random.default_rng(0).standard_normal(CLIP_SAMPLES).astype(np.float32) / 20
    assert right(task, case, noise)
    assert task.judge(case, case.original)["no hole"] is False
    spectrum = np.fft.rfft(noise)
    hertz = np.fft.rfftfreq(CLIP_SAMPLES, 1 / SAMPLING_RATE)
    duller = np.fft.irfft(spectrum * (hertz < 2000), CLIP_SAMPLES)
    half = CLIP_SAMPLES // 2
    changed = np.concatenate([noise[:half], np.linspace(1, 0, half) * noise[half:]])
    changed[half:] += np.linspace(0, 1, half) * duller[half:]
    assert task.judge(case, changed)["spectrum"] is False
    ramp = noise / 50 + np.linspace(0, 0.5, CLIP_SAMPLES)
    assert judges.sample_step(noise) <= 1 < judges.sample_step(ramp)


def test_every_part_of_a_long_piece_counts() -> None:
    task = TASK["long"]
    case = case_of(task, 1)
    four = np.tile(case.original, 4)
    assert right(task, case, four)
    assert right(task, case, case.original)
    four[2 * CLIP_SAMPLES : 3 * CLIP_SAMPLES] = rendered(Scene((Sound("bell"),)), 1)
    assert task.judge(case, four) == {
        "quarter 1": True,
        "quarter 2": True,
        "quarter 3": False,
        "quarter 4": True,
    }
    assert task.figure(case, four) == 25


def test_high_frequencies_must_be_there() -> None:
    task = TASK["band"]
    case = case_of(task)
    assert not right(task, case, case.source)
    assert right(task, case, case.original)
    assert task.figure(case, case.original) == 0
    assert task.figure(case, case.source) > 20


# --- cases and results


def test_settings_are_chosen_on_other_cases_than_those_reported() -> None:
    task = TASK["bell"]
    reported, chosen = (draw_cases(task.name, task.make, 2, 0, chosen) for chosen in (False, True))
    again = draw_cases(task.name, task.make, 1, 0, False)[0]
    assert np.array_equal(again.source, reported[0].source)
    assert again.seed == reported[0].seed
    seeds = {case.seed for case in (*reported, *chosen)}
    assert len(seeds) == 4


def test_the_section_shows_what_was_chosen() -> None:
    task = TASK["sweep"]
    grid = [({"strength": 0.5}, Score(0.25, 1.0, {})), ({"strength": 0.7}, Score(1.0, 2.0, {}))]
    rows = [Row("variation", {"strength": 0.7}, Score(0.75, 2.5, {"kind": 1, "direction": 3}), grid)]
    text = task_section(task, rows, 16, 8, "20 steps.")
    assert "| variation | `strength=0.7` | 75 % | 2.5 | direction 3, kind 1 |" in text
    assert "- variation: `strength=0.5`: 25 % (1.0); `strength=0.7`: 100 % (2.0)" in text
    assert words({"replace": [(0.0, 1.25)], "loop": True}) == "`replace=[(0, 1.25)]`, `loop=True`"


def test_the_page_has_a_block_of_every_kind() -> None:
    page = (ROOT / command.PAGE).read_text(encoding="utf-8")
    for name in TASK:
        start, end = f"<!-- editing: {name} -->", f"<!-- /editing: {name} -->"
        assert page.count(start) == page.count(end) == 1
        assert page.index(start) < page.index(end)


# --- the script


def test_the_script_measures_and_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gap = TASK["gap"]
    few = Task(**{**vars(gap), "methods": (Method("text", from_text, ({}, {"guidance_scale": 1.0})),)})
    few = Task(**{**vars(few), "ceiling": Method("the source again", unchanged)})
    monkeypatch.setattr(command, "TASKS", (few,))
    assert sounds_to_make([few], 1, 1) == 5
    page = tmp_path / command.PAGE
    page.parent.mkdir()
    page.write_text("before\n<!-- editing: gap -->\n<!-- /editing: gap -->\nafter\n", encoding="utf-8")
    done = call_main(
        command.main, "--kinds", "gap", "--cases", "1", "--steps", "1", "--threads", "1", "--write", tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert "| no editing |  | 0 % |" in done.stdout
    assert "- text: default: " in done.stdout
    assert "`guidance_scale=1`" in done.stdout
    written = page.read_text(encoding="utf-8")
    assert written.startswith("before\n")
    assert written.endswith("after\n")
    assert done.stdout.strip() in written


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--cases", "0"], "--cases must be at least 1, not 0"),
        (["--chosen-on", "0"], "--chosen-on must be at least 1, not 0"),
        (["--kinds", "song"], "invalid choice: 'song'"),
    ],
)
def test_wrong_arguments_are_one_line(arguments: list[str], message: str) -> None:
    done = call_main(command.main, *arguments)
    assert done.returncode == 2
    assert message in done.stderr.strip().splitlines()[-1]


# --- tables inside of documents


def test_levels_and_spectrograms_that_differ_by_known_amounts() -> None:
    tone = 0.1 * np.sin(2 * np.pi * 480 * np.arange(16000) / SAMPLING_RATE)
    louder = np.concatenate([tone[:8000], 10 ** (6 / 20) * tone[8000:]])
    changes = details.level_changes(louder, 1000)
    np.testing.assert_allclose(changes, [0] * 7 + [6] + [0] * 7, atol=1e-6)
    mel = torch.linspace(-8, 0, 50).expand(1, 1, 4, 50)
    assert details.mel_distance(mel, mel) == 0
    assert details.mel_distance(mel, mel + math.log(10) / 20) == pytest.approx(1, abs=1e-4)
    # What is 80 dB below the maximum counts as silence.
    quiet = torch.cat([mel, mel - 20], dim=2)
    assert details.mel_distance(quiet, torch.cat([mel, mel - 30], dim=2)) == 0


def test_the_seam_of_a_loop() -> None:
    noise = np.random.default_rng(0).normal(scale=0.1, size=SAMPLING_RATE).astype(np.float32)
    level_step, elsewhere, spectrum_step, spectrum_elsewhere, gap = details.seam(noise)
    assert level_step < 3 * elsewhere < 3
    assert spectrum_step < 2 * spectrum_elsewhere
    assert gap < 3
    faded = noise * np.minimum(1, np.linspace(0, 10, len(noise)))
    level_step, elsewhere, _, _, gap = details.seam(faded)
    assert level_step > 4 > elsewhere
    assert gap > 7


@pytest.mark.slow
def test_the_tables_are_put_into_their_documents(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "docs").mkdir()
    for page in {detail.page for detail in details.DETAILS}:
        shutil.copy(ROOT / page, tmp_path / page)
    names = [detail.name for detail in details.DETAILS]
    command.main(["--details", *names, "--cases", "2", "--steps", "2", "--write", str(tmp_path)])
    printed = capsys.readouterr().out
    for detail in details.DETAILS:
        text = (tmp_path / detail.page).read_text(encoding="utf-8")
        start, end = f"<!-- detail: {detail.name} -->", f"<!-- /detail: {detail.name} -->"
        assert text.split(start)[1].split(end)[0].strip() in printed
    assert printed.count("| --- |") == 3
