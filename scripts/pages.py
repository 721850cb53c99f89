"""The pages of docs/ whose cells run: their code, what it prints, and their pictures.

A page is Markdown. Its ```python blocks are cells, which run in order in one namespace, as in a notebook. A
```text block right after a cell is what the cell prints. A block under the name of a file, on a line of its
own, is not a cell: it quotes that file, and `...` stands for lines that are left out. The pictures that the
cells save are shown from the folder that is named after the page.
"""

from __future__ import annotations

import contextlib
import io
import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

BLOCK = re.compile(
    r"(?:^\[?`(?P<file>[\w./]+)`(?:\]\([\w./]+\))?:\n\n)?"  # a name, or a link to the file
    r"^```(?P<kind>\w+)\n(?P<code>.*?)^```$"
    r"(?:\n\n^```text\n(?P<output>.*?)^```$)?",
    re.M | re.S,
)
PICTURE = re.compile(r"!\[[^\]]+\]\((?P<path>[^)]+)\)")
LEFT_OUT = "..."


@dataclass(frozen=True)
class Cell:
    """A piece of a page's code, and what the page says that it prints."""

    code: str
    output: str
    line: int  # of its first line, from 1


def cells(page: Path) -> list[Cell]:
    """The cells of a page."""
    text = page.read_text(encoding="utf-8")
    return [
        Cell(block["code"], block["output"] or "", text.count("\n", 0, block.start("code")) + 1)
        for block in BLOCK.finditer(text)
        if block["kind"] == "python" and not block["file"]
    ]


def run(page: Path) -> Iterator[tuple[Cell, str]]:
    """Run a page's cells one after the other. They write into the working directory.

    Args:
        page: a Markdown file.

    Yields:
        Each cell after it ran, and what it printed.
    """
    names: dict[str, object] = {"__name__": "__main__"}
    for cell in cells(page):
        # The empty lines make tracebacks name the line of the page.
        code = compile("\n" * (cell.line - 1) + cell.code, str(page), "exec")
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(code, names)
        yield cell, printed.getvalue()


def with_outputs(page: Path, outputs: list[str]) -> str:
    """The page's text with other outputs, one for each cell."""
    remaining = iter(outputs)

    def replaced(block: re.Match[str]) -> str:
        if block["kind"] != "python" or block["file"]:
            return block[0]
        output = next(remaining)
        cell = f"```python\n{block['code']}```"
        return f"{cell}\n\n```text\n{output}```" if output else cell

    return BLOCK.sub(replaced, page.read_text(encoding="utf-8"))


def quotes(page: Path) -> list[tuple[str, str]]:
    """The name of each file that a page quotes, and the quoted lines."""
    blocks = BLOCK.finditer(page.read_text(encoding="utf-8"))
    return [(block["file"], block["code"]) for block in blocks if block["file"]]


def stands_in(quote: str, source: str) -> bool:
    """Whether a source file has the lines of a quote, in their order and with their relative indentation."""
    position = 0
    for part in re.split(rf"^ *{re.escape(LEFT_OUT)}\n", quote, flags=re.M):
        lines = textwrap.dedent(part).strip("\n").split("\n")
        pattern = r"\n".join(rf"(?P=indent){re.escape(line)}" if line else "" for line in lines)
        pattern = pattern.replace("(?P=indent)", "(?P<indent> *)", 1)
        found = re.compile(rf"^{pattern}$", re.M).search(source, position)
        if found is None:
            return False
        position = found.end()
    return True


def pictures(page: Path) -> list[Path]:
    """The files of the pictures that a page shows, in its order."""
    return [page.parent / match["path"] for match in PICTURE.finditer(page.read_text(encoding="utf-8"))]


def problems(page: Path, root: Path) -> list[str]:
    """What is wrong with a page as it stands, without running it.

    Args:
        page: a Markdown file.
        root: the checkout, which has the files that the page quotes.

    Returns:
        One line for each picture that is missing or is not shown, and for each quote that its file does not
        have.
    """
    shown = pictures(page)
    found = [f"{page.name} shows {path.name}, which is missing" for path in shown if not path.is_file()]
    for path in sorted((page.parent / page.stem).glob("*")):
        if path not in shown:
            found.append(f"{page.name} does not show {path.parent.name}/{path.name}")
    for name, quote in quotes(page):
        source = root / name
        if not source.is_file() or not stands_in(quote, source.read_text(encoding="utf-8")):
            first = quote.strip().split("\n")[0]
            found.append(f"{page.name} quotes lines that {name} does not have, from {first!r} on")
    return found
