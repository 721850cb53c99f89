"""docs/speed.md: its cells print what the page says, and its commands run."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from audioldm2 import cli
from scripts.pages import BLOCK, problems, run
from tests.helpers import ROOT

PAGE = ROOT / "docs" / "speed.md"


def test_cells_and_commands_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    printed = [(cell.output, text) for cell, text in run(PAGE)]
    assert len(printed) == 2
    for expected, text in printed:
        assert text == expected
    (code,) = [b["code"] for b in BLOCK.finditer(PAGE.read_text("utf-8")) if b["kind"] == "bash"]
    common = ["--model", "tiny", "--duration", "0.64", "--quiet", "--device", "cpu"]
    for line in code.splitlines():
        assert cli.main([*shlex.split(line, comments=True)[1:], *common]) == 0
    assert problems(PAGE, ROOT) == []
