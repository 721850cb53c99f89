"""docs/metrics.md: its cells print what the page says, and its commands run."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from audioldm2 import cli
from scripts.pages import BLOCK, problems, run
from tests.helpers import ROOT
from tests.metrics.test_evaluation import folder, sounds

PAGE = ROOT / "docs" / "metrics.md"


@pytest.mark.filterwarnings("default:.* sounds are few")
def test_cells_and_commands_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    printed = [(cell.output, text) for cell, text in run(PAGE)]
    assert len(printed) == 2
    for expected, text in printed:
        assert text == expected
    folder(tmp_path / "sounds", sounds())
    folder(tmp_path / "recordings", sounds(seed=1))
    (code,) = [b["code"] for b in BLOCK.finditer(PAGE.read_text("utf-8")) if b["kind"] == "bash"]
    for line in code.splitlines():
        assert cli.main([*shlex.split(line)[1:], "--quiet", "--device", "cpu"]) == 0
    assert problems(PAGE, ROOT) == []
