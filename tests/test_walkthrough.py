"""The pages of docs/ whose cells run: they print what the pages say."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import matplotlib
import pytest

from audioldm2 import cli
from scripts.pages import BLOCK, cells, pictures, problems, quotes, run, stands_in, with_outputs
from tests.helpers import ROOT, run_python

NAMES = ("walkthrough", "research", "editing", "editing-by-inversion", "adapters")
WALKTHROUGH, RESEARCH, EDITING, INVERSION, ADAPTERS = (ROOT / "docs" / f"{name}.md" for name in NAMES)
PAGES = pytest.mark.parametrize(
    "page", [WALKTHROUGH, RESEARCH, EDITING, INVERSION, ADAPTERS], ids=lambda page: page.stem
)


@PAGES
def test_every_cell_runs_and_prints_what_the_page_says(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import matplotlib.pyplot as plt

    monkeypatch.chdir(tmp_path)
    matplotlib.use("Agg")
    count = 0
    for cell, printed in run(page):
        assert printed == cell.output, f"{page.name}, line {cell.line}"
        count += 1
    plt.close("all")
    assert count >= (4 if page == INVERSION else 8)
    blocks = [block["code"] for block in BLOCK.finditer(page.read_text()) if block["kind"] == "bash"]
    for command in [line for code in blocks for line in code.replace("\\\n", " ").splitlines()]:
        program, *arguments = shlex.split(command)
        assert program == "audioldm2"
        assert cli.main([*arguments, "--quiet", "--device", "cpu"]) == 0
    made = {path.name: path.stat().st_size for path in tmp_path.glob("*.png")}
    assert made.keys() == {path.name for path in pictures(page)}
    assert all(size > 3000 for size in made.values())


@PAGES
def test_pictures_quotes_and_links_are_up_to_date(page: Path) -> None:
    assert problems(page, ROOT) == []
    text = BLOCK.sub("", page.read_text(encoding="utf-8"))
    links = re.findall(r"\[[^\]]*\]\(([^)#:]*)(?:#([^)]+))?\)", text)
    assert len(links) >= (1 if page == INVERSION else 6)
    for file, anchor in links:
        target = page.parent / file if file else page
        assert target.exists(), file
        if anchor:
            headings = re.findall(r"^#+ (.+)$", target.read_text(encoding="utf-8"), flags=re.M)
            anchors = [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]
            assert anchor in anchors


def test_the_walkthrough_quotes_and_shows_every_stage() -> None:
    assert len(quotes(WALKTHROUGH)) >= 8
    assert len(pictures(WALKTHROUGH)) >= 8
    assert sum(path.stat().st_size for path in pictures(WALKTHROUGH)) < 1_200_000


def test_a_quote_stands_only_where_its_lines_do() -> None:
    source = "class A:\n    def f(self):\n        x = 1\n\n        return x\n\n    y = f(2)\n"
    assert stands_in("def f(self):\n    x = 1\n\n    return x\n", source)
    assert stands_in("x = 1\n...\ny = f(2)\n", source)
    assert not stands_in("y = f(2)\n...\nx = 1\n", source), "another order"
    assert not stands_in("x = 1\nreturn x\n", source), "a line is left out without saying so"
    assert not stands_in("def f(self):\nx = 1\n", source), "another indentation"
    assert not stands_in("y = f(.)\n", source)


def test_problems_of_a_page_are_named(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    (tmp_path / "page").mkdir()
    (tmp_path / "page" / "unused.png").touch()
    (tmp_path / "source.py").write_text("a = 1\n")
    page.write_text("![a picture](page/absent.png)\n\n`source.py`:\n\n```python\na = 2\n```\n")
    missing, unused, quote = problems(page, tmp_path)
    assert missing == "page.md shows absent.png, which is missing"
    assert unused == "page.md does not show page/unused.png"
    assert quote == "page.md quotes lines that source.py does not have, from 'a = 2' on"


def test_the_script_checks_the_pages_and_explains_itself() -> None:
    assert run_python(ROOT / "scripts" / "make_docs", "--check").stderr == ""
    text = run_python(ROOT / "scripts" / "make_docs", "--help").stdout
    assert "--check" in text
    assert max(map(len, text.splitlines())) <= 80


def test_outputs_are_written_below_their_cells(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("```python\nprint(1)\n```\n\n```text\nold\n```\n\nText.\n\n```python\nx = 2\n```\n")
    text = with_outputs(page, [printed for _, printed in run(page)])
    assert text == "```python\nprint(1)\n```\n\n```text\n1\n```\n\nText.\n\n```python\nx = 2\n```\n"
    page.write_text(text)
    assert [cell.output for cell in cells(page)] == ["1\n", ""]
    assert [cell.line for cell in cells(page)] == [2, 12]
