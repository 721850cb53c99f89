"""Tables of sound files and their captions: reading one, and holding out a part.

The table is a .csv, .tsv or .jsonl file, or a folder with a metadata.csv or metadata.jsonl (a Hugging Face
audio folder). File names are relative to the table's folder. Imports only the standard library, so that
mistakes are found before anything is loaded.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from audioldm2.quoting import one_line, quoted
from audioldm2.table_rows import SEPARATORS, HeaderError, json_rows, separated_rows

FILE_COLUMNS = ("file_name", "file", "audio", "path")  # the first is that of Hugging Face's audio folders
CAPTION_COLUMNS = ("caption", "text", "prompt")
METADATA = ("metadata.csv", "metadata.jsonl")  # of an audio folder


class Item(NamedTuple):
    """A row of a table.

    Attributes:
        path: of the sound file.
        caption: what it sounds like.
        where: the table and line, for messages.
    """

    path: Path
    caption: str
    where: str


def read_table(source: str | Path, folder: str | Path | None = None) -> list[Item]:
    """Read a table of sound files and their captions.

    Args:
        source: a .csv, .tsv or .jsonl file in UTF-8 with the columns file_name (or file, audio, path) and
            caption (or text, prompt), of which others are ignored; or a folder with metadata.csv or
            metadata.jsonl.
        folder: to which the names of files are relative; that of the table by default.

    Returns:
        The rows in their order. The files exist, and the captions are not empty.

    Raises:
        OSError: the table cannot be read.
        ValueError: it has another format, no rows, or a row that cannot be used; the message names the line.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        found = [path / name for name in METADATA if (path / name).is_file()]
        if not found:
            raise ValueError(f"{path} has no metadata.csv, which names the files and their captions")
        path = found[0]
    kind = path.suffix.lower().removeprefix(".")
    if kind not in (*SEPARATORS, "jsonl"):
        raise ValueError(
            f"{path}: unknown type of table; use .csv, .tsv, .jsonl or a folder with metadata.csv"
        )
    items = []
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            rows = json_rows(file) if kind == "jsonl" else separated_rows(file, SEPARATORS[kind])
            for line, row in rows:
                items.append(_item(row, Path(folder or path.parent), f"{path}:{line}"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error.reason}); save it as UTF-8") from error
    except HeaderError as error:
        raise ValueError(f"{path}: {one_line(error)}") from error
    if not items:
        raise ValueError(f"{path} has no rows")
    return items


def _item(row: Any, folder: Path, where: str) -> Item:
    if isinstance(row, Exception):
        raise ValueError(f"{where}: {one_line(row)}") from row
    if not isinstance(row, dict):
        raise ValueError(f"{where}: each line is a JSON object, got {quoted(row)}")
    name, caption = (_cell(row, names, where) for names in (FILE_COLUMNS, CAPTION_COLUMNS))
    path = folder / Path(name).expanduser()
    if not path.is_file():
        raise ValueError(f"{where}: there is no file {path}")
    return Item(path, caption, where)


def _cell(row: Mapping[str, Any], names: Sequence[str], where: str) -> str:
    """The text in the first of some columns that a row has."""
    column = next((name for name in names if name in row), None)
    if column is None:
        raise ValueError(
            f"{where}: there is no {names[0]}; a row needs one of the columns {', '.join(names)}"
        )
    value = row[column]
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{where}: {column} must be a text, got {quoted(value)}")
    return value.strip()


def hold_out(items: Sequence[Item], share: float, seed: int) -> tuple[list[Item], list[Item]]:
    """Split items for a validation, all rows of a file into the same part.

    Args:
        items: all of them.
        share: of the files that are held out, rounded, but at least one unless it is 0.
        seed: decides which.

    Returns:
        The items to train on, and those that are held out.

    Raises:
        ValueError: nothing would be left to train on.
    """
    paths = [*dict.fromkeys(item.path for item in items)]
    count = max(1, round(share * len(paths))) if share else 0
    if count >= len(paths):
        raise ValueError(
            f"a validation share of {share:g} leaves none of {len(paths)} files to train on; set it to 0"
        )
    held = {*random.Random(seed).sample(paths, count)}
    return [i for i in items if i.path not in held], [i for i in items if i.path in held]
