"""Checks of docs/ pages: run their cells and commands, or write their files into a copy of the package."""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path

from audioldm2 import cli
from scripts.pages import BLOCK, problems, run
from tests.helpers import ROOT, run_python


def files_of(page: Path) -> Iterator[tuple[str, str]]:
    """The name and the content of each file that a page shows."""
    for block in BLOCK.finditer(page.read_text(encoding="utf-8")):
        if block["file"]:
            yield block["file"], block["code"]


def apply(diff: str, path: Path) -> None:
    """Apply a diff without line numbers, whose hunks are separated by blank lines."""
    for hunk in diff.strip("\n").split("\n\n"):
        lines = hunk.split("\n")
        assert any(line.startswith("+") for line in lines)
        before = "\n".join(line[1:] for line in lines if not line.startswith("+"))
        text = path.read_text(encoding="utf-8")
        assert text.count(before) == 1, f"{path} should contain this once:\n{before}"
        path.write_text(text.replace(before, "\n".join(line[1:] for line in lines)), encoding="utf-8")


def follow(page: Path, checkout: Path, table: str) -> str:
    """Write a page's files and its lines of a table into a copy of the package, and lint the files.

    Args:
        page: a Markdown file.
        checkout: where to copy the package to.
        table: the file in the package that the page's diffs change.

    Returns:
        The rest of the page's code, as one Python script.
    """
    for name in ("audioldm2", "weights_map"):
        shutil.copytree(ROOT / name, checkout / name, ignore=shutil.ignore_patterns("__pycache__"))
    script, modules = [], []
    for block in BLOCK.finditer(page.read_text(encoding="utf-8")):
        file, kind, code = block.group("file", "kind", "code")
        if file:
            assert not (checkout / file).exists(), f"{file} exists already"
            (checkout / file).write_text(code, encoding="utf-8")
            if kind == "python":
                modules.append(checkout / file)
        elif kind == "diff":
            apply(code, checkout / "audioldm2" / table)
        elif kind == "bash":
            program, *arguments = shlex.split(code)
            assert program == "audioldm2"
            arguments += ["--device", "cpu"]
            script.append(f"from audioldm2 import cli\nassert cli.main({arguments}) == 0\n")
        else:
            assert kind == "python"
            script.append(code)
    for command in (["check"], ["format", "--check"]):
        run_python("-m", "ruff", *command, "--config", ROOT / "pyproject.toml", *modules)
    return "\n".join(script)


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
