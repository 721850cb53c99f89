"""docs/adding-a-stage.md: what it says, done in a copy of the package, adds a stage that works."""

from __future__ import annotations

from pathlib import Path

from tests.helpers import ROOT, run_python
from tests.pages import follow


def test_the_page_adds_a_stage_that_works(tmp_path: Path) -> None:
    checkout = tmp_path / "checkout"
    script = follow(ROOT / "docs" / "adding-a-stage.md", checkout, "checkpoints/formats.py")
    assert script.count("assert ") >= 5
    run_python("-c", script, cwd=tmp_path, path=checkout)
    assert (tmp_path / "tiny-with-vocos" / "vocoder" / "diffusion_pytorch_model.safetensors").is_file()
    assert '"Vocos"' in (tmp_path / "tiny-with-vocos" / "model_index.json").read_text()
