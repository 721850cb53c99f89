"""scripts/bench --quality: operations are counted exactly, and what it measured is shown."""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path
from typing import Any

import pytest

from audioldm2 import QUALITIES, FeatureCaching, Quality
from audioldm2.guidance import ALL_STEPS
from audioldm2.schedulers.timesteps import optimized_timesteps
from scripts import quality_bench
from scripts.quality_bench import REFERENCE, Parts, key, operations, points, report, resumed, save
from scripts.quality_plot import COMBINATIONS, Point, combination, draw, frontier, is_optimized
from scripts.random_checkpoint import SMALL_RANDOM
from scripts.tiny.evaluate.quality import QualityScore
from tests.helpers import ROOT
from tests.scripts.helpers import run_script

SCORE = QualityScore((0.96, 0.98), (0.1, 0.2), (0.7, 0.8), 4.0, 0.7)


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
    optimized = combination("unipc", 10, optimized=True)
    assert optimized.timesteps == tuple(optimized_timesteps(10))
    assert is_optimized(optimized)
    for even in (combination("unipc", 10), Quality("unipc", timesteps=[999, 799, 599, 399, 199])):
        assert not is_optimized(even)
    assert not is_optimized(Quality("unipc", timesteps=[*range(60)][::-1]))


def test_no_point_beats_one_of_the_frontier() -> None:
    quality = Quality("unipc", 5)
    pairs = [(3.0, 2.0), (1.0, 5.0), (2.0, 6.0), (2.0, 4.0), (2.0, 3.0), (4.0, 2.0), (5.0, 1.0)]
    found = frontier([Point(*pair, quality) for pair in pairs])
    assert [point[:2] for point in found] == [(1.0, 5.0), (2.0, 3.0), (3.0, 2.0), (5.0, 1.0)]
    assert frontier([]) == []


def figures(dtype: str = "float32") -> tuple[dict[str, Any], dict[str, Any]]:
    """Figures of speed and scores; only draft has a score."""
    row = {"seconds": 10.0, "gflop": 1000.0, "memory": 5.0}
    speed = {
        "about": {"machine": "a machine", "torch": "2.9", "device": "cpu"},
        "rows": {
            "diffusers": {**row, "seconds": 25.0},
            **{key(quality, dtype): row for quality in (REFERENCE, *QUALITIES.values())},
        },
        "parts": {"steps": [[a, b, 1.0 + a + b] for a in (True, False) for b in (True, False)], "rest": 10.0},
    }
    scores = {
        "prompts": 464,
        "presets": {key(QUALITIES["draft"], dtype): dataclasses.asdict(SCORE)},
        "combinations": {key(q, "float32"): 1.0 + i for i, q in enumerate(COMBINATIONS)},
    }
    return speed, scores


def test_the_table() -> None:
    speed, scores = figures()
    where, empty, *lines = report(speed, scores).splitlines()
    assert where == "a machine, torch 2.9:"
    assert not empty
    assert len(lines) == 2 + 5
    assert lines[2].startswith("| diffusers | float32 | 20 | 1000 | 25.0 | 1.00 |")
    assert lines[4].startswith(f"| draft | float32 | {QUALITIES['draft'].steps}")
    assert "| 1000 | 10.0 | 2.50 | 5.00 | 97.0 ± 1.4 | 0.1500 ± 0.0707 |" in lines[4]
    assert lines[6].endswith("|  |  |  |  |  |")  # no scores of this one
    assert "There are no figures" in report({}, scores)


def test_a_gpu_is_told() -> None:
    speed, scores = figures("float16")
    speed["about"] = {"machine": "a GPU", "device": "cuda", "model": "base", "seconds": 10.24}
    speed["rows"]["diffusers"]["dtype"] = "float16"
    speed["rows"][key(QUALITIES["draft"], "float16")] |= {"diffusers": 40.0}  # in a run of its own
    where, _, head, _, theirs, *_, best = report(speed, scores).splitlines()
    assert where == "a GPU, base checkpoint, clips of 10.24 s:"
    assert "| peak GPU memory, GiB |" in head
    assert theirs.startswith("| diffusers | float16 |")
    assert "| 10.0 | 4.00 |" in best
    del speed["about"]
    assert report(speed, scores).startswith("| preset |")


def test_the_plot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    speed, scores = figures()
    drawn, picture = points(speed, scores), tmp_path / "plot.png"
    assert [point.quality for point in drawn[: len(COMBINATIONS)]] == [*COMBINATIONS]
    assert drawn[0].seconds == 10 + 3 * (COMBINATIONS[0].steps or 0)
    assert points({}, scores) == points(speed, {}) == []
    assert draw(drawn, picture, quality_bench.seconds_label(speed))
    assert picture.stat().st_size > 10_000
    (tmp_path / "speed.md").write_text("a\n<!-- presets -->\nold\n<!-- /presets -->\nb\n")
    quality_bench.write_documents(tmp_path, "the table", picture)
    text = (tmp_path / "speed.md").read_text()
    assert "the table" in text
    assert "old" not in text
    assert f"]({quality_bench.PICTURE})" in text
    assert (tmp_path / quality_bench.PICTURE).read_bytes() == picture.read_bytes()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert not draw(drawn, tmp_path / "none.png", "seconds")


def test_the_table_is_not_written_without_the_plot(tmp_path: Path) -> None:
    page = tmp_path / "speed.md"
    page.write_text("<!-- presets -->\nold\n<!-- /presets -->\n")
    with pytest.raises(FileNotFoundError):
        quality_bench.write_documents(tmp_path, "the table", tmp_path / "absent.png")
    assert "old" in page.read_text()
    assert [*tmp_path.iterdir()] == [page]


def test_figures_are_added_to_those_of_the_same_machine(tmp_path: Path) -> None:
    path, about = tmp_path / "figures.json", {"machine": "a", "torch": "2.9", "seconds": 10.24}
    fresh: dict[str, Any] = {"about": about, "rows": {}}
    assert resumed(path, fresh) == fresh
    save(path, {"about": {"machine": "a", "torch": "2.9"}, "rows": {"old": 1}})
    assert resumed(path, fresh) == {"about": about, "rows": {"old": 1}}
    save(path, {"about": {**about, "device": "cpu"}, "rows": {"old": 1}})
    assert resumed(path, fresh) == {"about": about, "rows": {"old": 1}}
    for other in ({"machine": "b"}, {"torch": "2.8"}, {"seconds": 5.0}):
        save(path, {"about": {**about, **other}, "rows": {"old": 1}})
        assert resumed(path, fresh) == fresh
    scores = {"about": about, "prompts": 464, "seeds": 3, "presets": {}}
    save(path, {"prompts": 464, "seeds": 3, "presets": {"old": 1}})
    assert resumed(path, scores) == {**scores, "presets": {"old": 1}}
    save(path, {"prompts": 464, "seeds": 2, "presets": {"old": 1}})
    assert resumed(path, scores) == scores


def test_the_dtypes_are_those_that_a_device_multiplies(monkeypatch: pytest.MonkeyPatch) -> None:
    for hardware, expected in ((False, ["float32"]), (True, ["float32", "bfloat16"])):
        monkeypatch.setattr(quality_bench, "multiplies_bfloat16", lambda hardware=hardware: hardware)
        assert quality_bench.default_dtypes("cpu") == expected
        assert quality_bench.default_dtypes("cuda:0") == ["float16", "bfloat16"]
    assert quality_bench.diffusers_dtype("cpu") == "float32"
    assert quality_bench.diffusers_dtype("cuda") == "float16"


def test_best_leaves_nothing_out() -> None:
    assert QUALITIES["best"].feature_cache is False
    assert QUALITIES["best"].guidance_interval == ALL_STEPS


@pytest.mark.slow
def test_it_measures_the_presets_beside_diffusers(tmp_path: Path) -> None:
    sizes = ["--model", "small", "--seconds", "0.64", "--out", tmp_path]
    for dtype in ("float32", "bfloat16"):
        done = run_script("bench", "--quality", "speed", *sizes, "--dtype", dtype, cwd=ROOT)
        assert done.returncode == 0, done.stderr
        assert "| diffusers | float32 |" in done.stdout
        assert f"| draft | {dtype} |" in done.stdout
        assert "no plot" in done.stdout
    assert "| draft | float32 |" in done.stdout  # of the run before
    content = quality_bench.load(tmp_path / "quality-speed-cpu-small.json")
    assert len(content["rows"]) == 1 + 2 * (1 + len(QUALITIES))
    assert content["parts"]["dtype"] == "float32"
