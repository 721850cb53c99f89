"""docs/adding-a-stage.md: what it says, done in a copy of the package, adds a stage that works."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from tests.helpers import ROOT, run_python

PAGE = (ROOT / "docs" / "adding-a-stage.md").read_text(encoding="utf-8")
BLOCK = re.compile(r"(?:^`(?P<file>[\w./]+)`:\n\n)?^```(?P<kind>\w+)\n(?P<code>.*?)^```$", re.M | re.S)


def apply(diff: str, path: Path) -> None:
    """Apply a diff without line numbers, whose hunks are separated by blank lines."""
    for hunk in diff.strip("\n").split("\n\n"):
        lines = hunk.split("\n")
        assert any(line.startswith("+") for line in lines)
        before = "\n".join(line[1:] for line in lines if not line.startswith("+"))
        text = path.read_text(encoding="utf-8")
        assert text.count(before) == 1, f"{path} should contain this once:\n{before}"
        path.write_text(text.replace(before, "\n".join(line[1:] for line in lines)), encoding="utf-8")


def follow(page: str, checkout: Path) -> str:
    """Write the page's files and lines into a copy of the package, and return the rest of its code."""
    script = []
    for block in BLOCK.finditer(page):
        file, kind, code = block.group("file", "kind", "code")
        if file:
            path = checkout / file
            assert not path.exists(), f"{file} exists already"
            path.write_text(code, encoding="utf-8")
        elif kind == "diff":
            apply(code, checkout / "audioldm2" / "checkpoints" / "formats.py")
        else:
            assert kind == "python"
            script.append(code)
    return "\n".join(script)


def test_the_page_adds_a_stage_that_works(tmp_path: Path) -> None:
    checkout = tmp_path / "checkout"
    for name in ("audioldm2", "weights_map"):
        shutil.copytree(ROOT / name, checkout / name, ignore=shutil.ignore_patterns("__pycache__"))
    script = follow(PAGE, checkout)
    assert script.count("assert ") >= 5
    run_python("-c", script, cwd=tmp_path, path=checkout)
    assert (tmp_path / "tiny-with-vocos" / "vocoder" / "diffusion_pytorch_model.safetensors").is_file()
    assert '"Vocos"' in (tmp_path / "tiny-with-vocos" / "model_index.json").read_text()
