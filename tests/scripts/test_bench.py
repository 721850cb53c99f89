"""scripts/bench: it runs from a plain checkout and writes what it shows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.scripts.helpers import run_script


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
