"""docs/training.md: its cells run and print what the page says, and its links and sources exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from scripts.pages import BLOCK, problems, run
from tests.helpers import ROOT

PAGE = ROOT / "docs" / "training.md"
PARTS = ("VAE", "Vocoder", "CLAP", "GPT-2 and the language of audio", "UNet")


def test_every_cell_trains_its_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for cell, printed in run(PAGE):
        assert printed == cell.output, f"line {cell.line}"
    trained = {path.stem for path in (tmp_path / "runs").glob("*.pt")}
    assert trained == {"vae", "vocoder", "clap", "forced", "generated"}


def test_links_lead_somewhere_and_every_figure_names_its_source() -> None:
    assert problems(PAGE, ROOT) == []
    text = BLOCK.sub("", PAGE.read_text(encoding="utf-8"))
    for file, anchor in re.findall(r"\]\(([^)#:]*)(?:#([^)]+))?\)", text):
        target = PAGE.parent / file if file else PAGE
        assert target.exists(), file
        headings = re.findall(r"^#+ (.+)$", target.read_text(encoding="utf-8"), re.M) if anchor else []
        anchors = [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]
        assert not anchor or anchor in anchors, anchor
    sections = dict(re.findall(r"^## ([^\n]+)\n(.*?)(?=^## |\Z)", text, re.M | re.S))
    listed = set(re.findall(r"^\| ([A-Z]) \|", sections["Sources"], re.M))
    cited = set()
    for part in PARTS:
        assert "**What one would change.**" in sections[part]
        assert "**What it costs.**" in sections[part]
        (rows,) = re.findall(r"^\| ---.*\n((?:\|.*\n)+)", sections[part], re.M)
        for name, *cells in (row.strip("| ").split(" | ") for row in rows.splitlines()):
            for cell in cells:
                sources = re.findall(r"\[([A-Z](?:, [A-Z])*)\]", cell)
                assert sources or cell == "-" or "$`\\beta`$" in name, (name, cell)  # beta is computed
                cited |= {letter for group in sources for letter in group.split(", ")}
    assert cited == listed
