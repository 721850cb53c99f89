"""scripts/bench: it runs from a plain checkout and writes what it shows."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from audioldm2 import QUALITIES
from scripts.quality_bench import key, save
from tests.scripts.helpers import load_script, run_script


@pytest.mark.slow
def test_it_measures_both_and_writes_figures_and_a_chart(tmp_path: Path):
    stages = ["--stage", "language_model", "--stage", "clip"]
    sizes = ["--model", "small", "--seconds", "0.64", "--steps", "2", "--repeat", "1"]
    done = run_script("bench", *sizes, *stages, "--out", tmp_path / "figures", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    path = tmp_path / "figures" / "bench-cpu-small-language_model-clip.json"
    written = json.loads(path.read_text())
    assert written["about"]["dtype"] == "float32"
    rows = written["rows"]
    assert list(rows) == ["language_model", "clip, 2 DPM-Solver++"]
    for name, row in rows.items():
        assert row["ours"] > 0
        assert row["theirs"] > 0
        assert row["flop"] > 1e6
        assert row["limit"] < row["ours"], "faster than the machine multiplies"
        assert f"{row['ours']:.4g}" in next(
            line for line in done.stdout.splitlines() if line.startswith(name)
        )
    assert path.with_suffix(".png").stat().st_size > 5000


def test_what_it_cannot_do_is_told(tmp_path: Path):
    done = run_script("bench", "--stage", "supper", cwd=tmp_path)
    assert done.returncode == 2
    assert "choose from" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.fixture(scope="module")
def bench() -> Any:
    return load_script("bench")


def test_options_without_effect_are_refused(
    bench: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = ("--stage unet", "--steps 20", "--batches 2", "--ddim", "--compile", "--markdown")
    refused = {
        "--write": "--write has no effect without --quality",
        "--clips 16": "--clips has no effect without --quality",
        "--seeds 3": "--seeds has no effect without --quality",
        "--quality speed --clips 16": "--clips has no effect with --quality speed",
        "--quality scores --repeat 1": "--repeat has no effect with --quality scores",
        "--quality scores --seconds 10.24": "--seconds has no effect with --quality scores",
        "--quality --write --model small": "--write needs --model base",
        "--repeat 0": "--repeat must be positive, not 0",
        "--seconds -1": "--seconds must be positive, not -1.0",
    }
    for option in plain:
        for quality in ("all", "speed", "scores"):
            name = option.split()[0]
            refused[f"--quality {quality} {option}"] = f"{name} has no effect with --quality {quality}"
    for words, message in refused.items():
        monkeypatch.setattr(sys, "argv", ["bench", *words.split()])
        with pytest.raises(SystemExit) as stop:
            bench.arguments()
        assert stop.value.code == 2
        assert message in capsys.readouterr().err.splitlines()[-1]
    monkeypatch.setattr(sys, "argv", ["bench", "--quality", "--clips", "2"])
    options = bench.arguments()
    assert (options.seconds, options.clips, options.seeds) == (10.24, 2, 3)


def test_the_documents_are_not_written_without_all_figures(
    bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a run does not measure must be there, or it is refused before it measures."""
    words = ["--write", "--dtype", "float32", "--out", str(tmp_path)]
    for quality, other in (("speed", "scores"), ("scores", "speed")):
        monkeypatch.setattr(sys, "argv", ["bench", "--quality", quality, *words])
        with pytest.raises(SystemExit, match=f"--write needs the {other} of without, float32; draft"):
            bench.measure_presets(bench.arguments(), {}, "cpu", {})
    save(tmp_path / "quality-scores.json", {"presets": {key(QUALITIES["draft"], "float32"): {}}})
    monkeypatch.setattr(sys, "argv", ["bench", "--quality", "speed", *words])
    with pytest.raises(SystemExit, match="scores of without, float32; normal, float32"):
        bench.measure_presets(bench.arguments(), {}, "cpu", {})
