"""Checks of a documentation page: its cells print what it says, its commands run, its links are valid."""

from __future__ import annotations

import shlex
from pathlib import Path

from audioldm2 import cli
from scripts.pages import BLOCK, problems, run
from tests.helpers import ROOT


def check_page(page: Path, cells: int, *options: str) -> None:
    """Run a page's cells, and the commands of its only bash block with further options, in this folder."""
    printed = [(cell.output, text) for cell, text in run(page)]
    assert len(printed) == cells
    for expected, text in printed:
        assert text == expected
    (code,) = [b["code"] for b in BLOCK.finditer(page.read_text("utf-8")) if b["kind"] == "bash"]
    for line in code.splitlines():
        assert cli.main([*shlex.split(line, comments=True)[1:], *options]) == 0
    assert problems(page, ROOT) == []
