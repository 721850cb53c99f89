"""scripts/bench --quality: operations are counted exactly, and what it measured is shown."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from audioldm2 import QUALITIES, FeatureCaching, Quality
from audioldm2.guidance import ALL_STEPS
from scripts import quality_bench
from scripts.quality_bench import COMBINATIONS, REFERENCE, Parts, combination, key, operations, report
from scripts.random_checkpoint import SMALL_RANDOM
from scripts.tiny.evaluate.quality import QualityScore
from tests.helpers import ROOT
from tests.scripts.helpers import run_script

SCORE = QualityScore(0.97, (0.1, 0.2), (0.7, 0.8), 4.0, 0.7)


@pytest.mark.slow
def test_the_operations_are_those_of_the_steps() -> None:
    def count(quality: Quality) -> float:
        return operations(SMALL_RANDOM, quality, 32, 6)

    one, two, four = (count(Quality("dpmsolver++", steps)) for steps in (1, 2, 4))
    step = two - one  # without what is computed once
    assert four == one + 3 * step
    cached = count(Quality("dpmsolver++", 4, feature_cache=2))
    assert four - 2 * step < cached < four - step  # the two others run level 0 alone
    assert count(Quality("dpmsolver++", 4, feature_cache=FeatureCaching(steps=[0, 2]))) == cached
    less = count(Quality("dpmsolver++", 4, guidance_interval=(0, 0.5)))
    assert (
        four - 1.2 * step < less < four - 0.7 * step
    )  # half of each of two steps, and their keys and values


def test_the_seconds_of_a_combination_are_the_sum_of_its_steps() -> None:
    steps = {(True, True): 8.0, (True, False): 2.0, (False, True): 4.0, (False, False): 1.0}
    parts = Parts(steps, 100.0)
    assert parts.clip(Quality("unipc", 3)) == 124
    assert parts.clip(Quality("unipc", 4, feature_cache=2, guidance_interval=(0, 0.5))) == 100 + 8 + 2 + 4 + 1
    assert parts.clip(Quality("unipc", timesteps=[900, 3])) == 116


def test_the_combinations_differ() -> None:
    assert len({*COMBINATIONS}) == len(COMBINATIONS)
    assert combination("unipc", 10, found=True) == QUALITIES["normal"]


def test_the_table_and_the_plot(tmp_path: Path) -> None:
    row = {"seconds": 10.0, "gflop": 1000.0, "memory": 5.0}
    rows = {key(setting, "float32"): row for setting in (REFERENCE, *QUALITIES.values())}
    parts = {"steps": [[a, b, 1.0 + a + b] for a in (True, False) for b in (True, False)], "rest": 10.0}
    speed = {
        "about": {"machine": "a machine"},
        "rows": {"diffusers": {**row, "seconds": 25.0}, **rows},
        "parts": parts,
    }
    scores = {
        "prompts": 464,
        "presets": {key(QUALITIES["draft"], "float32"): dataclasses.asdict(SCORE)},
        "combinations": {key(q, "float32"): 1.0 + i for i, q in enumerate(COMBINATIONS)},
    }
    lines = report(speed, scores, tmp_path / "plot.png").splitlines()
    assert len(lines) == 2 + 5
    assert lines[2].startswith("| diffusers | float32 | 20 | 1000 | 25.0 | 1.00 |")
    assert lines[4].startswith("| draft | float32 | 5 | 1000 | 10.0 | 2.50 | 5.00 | 97.0 | 0.1500 ± 0.0707 |")
    assert lines[6].endswith("|  |  |  |  |  |")  # no scores of this one
    assert (tmp_path / "plot.png").stat().st_size > 10_000
    (tmp_path / "speed.md").write_text("a\n<!-- presets -->\nold\n<!-- /presets -->\nb\n")
    quality_bench.write_documents(tmp_path, "\n".join(lines), tmp_path / "plot.png")
    text = (tmp_path / "speed.md").read_text()
    assert lines[4] in text
    assert "old" not in text
    assert f"]({quality_bench.PICTURE})" in text
    assert "There are no figures" in report({}, scores, tmp_path / "none.png")


def test_best_leaves_nothing_out() -> None:
    assert QUALITIES["best"].feature_cache is False
    assert QUALITIES["best"].guidance_interval == ALL_STEPS


@pytest.mark.slow
def test_it_measures_the_presets_beside_diffusers(tmp_path: Path) -> None:
    sizes = ["--model", "small", "--seconds", "0.64", "--out", tmp_path, "--clips", "1", "--seeds", "1"]
    done = run_script("bench", "--quality", "speed", *sizes, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "| draft | float32 |" in done.stdout
    assert (tmp_path / "quality-speed-cpu.json").stat().st_size > 500
