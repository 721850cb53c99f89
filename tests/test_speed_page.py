"""docs/speed.md: its cells print what the page says, and its commands run."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers import ROOT
from tests.pages import check_page


def test_cells_and_commands_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    options = ["--model", "tiny", "--duration", "0.64", "--quiet", "--device", "cpu"]
    check_page(ROOT / "docs" / "speed.md", 2, *options)
