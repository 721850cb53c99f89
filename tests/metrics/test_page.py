"""docs/metrics.md: its cells print what the page says, and its commands run."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers import ROOT
from tests.metrics.test_evaluation import folder, sounds
from tests.pages import check_page


@pytest.mark.filterwarnings("default:.* sounds are few")
def test_cells_and_commands_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder(tmp_path / "sounds", sounds())
    folder(tmp_path / "recordings", sounds(seed=1))
    check_page(ROOT / "docs" / "metrics.md", 2, "--quiet", "--device", "cpu")
