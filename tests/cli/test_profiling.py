"""`--profile`, and the ranges of the stages in torch.profiler's traces."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from audioldm2 import AudioLDM2Pipeline, cli
from audioldm2.cli.profiling import table
from audioldm2.runtime.profiling import StageTime

RANGES = {*AudioLDM2Pipeline.stage_names, "scheduler", "ranking"}


def test_a_trace_has_a_range_for_each_stage_and_the_table_their_times(
    random_checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    quick = ["--model", str(random_checkpoint), "--duration", "0.3", "--steps", "2", "--candidates", "2"]
    for name in ("trace.txt", "-", "audio.wav"):
        with pytest.raises(SystemExit):
            cli.main(["rain", "--profile", name, "--model", "nothing"])
    assert cli.main(["rain", "--profile", "nowhere/trace.json", "--model", "nothing"]) == 1
    err = capsys.readouterr().err
    assert "--profile: a trace is a .json or .json.gz file, got 'trace.txt'" in err
    assert "nowhere: the folder of the output path does not exist" in err
    assert "loading" not in err, "the name is checked before the checkpoint"

    assert cli.main(["rain", "--profile", "trace.json.gz", *quick]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"audio.wav", "trace.json.gz"}
    out, err = capsys.readouterr()
    assert "trace.json.gz: trace of the generation" in out
    events = json.loads(gzip.decompress(Path("trace.json.gz").read_bytes()))["traceEvents"]
    ranges = [event for event in events if event.get("name", "").startswith("audioldm2.")]
    assert {event["name"].removeprefix("audioldm2.") for event in ranges} == RANGES

    rows = [line.split() for line in err.splitlines() if line.endswith("%")]
    assert {row[0] for row in rows} == {*RANGES, "other", "total"}
    seconds = {row[0]: float(row[-2]) for row in rows}
    total = seconds.pop("total")
    assert sum(seconds.values()) == pytest.approx(total, abs=0.01), "a nested range was counted twice"
    spans = {event["name"]: event["dur"] / 1e6 for event in ranges}
    assert seconds["unet"] < spans["audioldm2.unet"], "the scheduler's time is not the UNet's"


def test_with_a_gpu_the_shares_are_those_of_its_time() -> None:
    lines = table([StageTime("unet", 1, 0.5, 3.0), StageTime("vae", 2, 0.3, 1.0)], 5.0)
    assert [line.split() for line in lines[1:]] == [
        ["unet", "1", "0.500", "3.000", "75.0%"],
        ["vae", "2", "0.300", "1.000", "25.0%"],
        ["other", "4.200", "0.000", "0.0%"],
        ["total", "5.000", "4.000", "100.0%"],
    ]
    assert len({len(line) for line in lines}) == 1
