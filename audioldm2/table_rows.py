"""The rows of tables: .csv, .tsv and .jsonl files in UTF-8. Imports only the standard library.

Readers yield the number of each row's first line, and the row, or an error that says what is wrong with it.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from typing import Any, TextIO

from audioldm2.quoting import one_line

SEPARATORS = {"csv": ",", "tsv": "\t"}


class HeaderError(ValueError):
    """The first line of a table, which names the columns, cannot be read."""


def separated_rows(
    file: TextIO, separator: str, check_header: Callable[[list[str]], object] = lambda header: None
) -> Iterator[tuple[int, dict[str, str] | Exception]]:
    """The rows of a table with a header, as cells by column. Rows of empty cells are left out.

    Args:
        file: opened with newline="".
        separator: of the cells.
        check_header: called with the names of the columns; what it raises ends the reading.

    Raises:
        HeaderError: the header cannot be read.
    """
    reader = csv.reader(file, delimiter=separator, strict=True)
    try:
        header = [cell.strip() for cell in next(reader, [])]
    except csv.Error as error:
        raise HeaderError(f"the first line, which names the columns, is broken: {error}") from error
    check_header(header)
    first = reader.line_num + 1
    while True:
        try:
            cells = next(reader, None)
        except csv.Error as error:  # the reader goes on at the next line
            yield first, error
            cells = []
        if cells is None:
            return
        line, first = first, reader.line_num + 1
        if not any(cell.strip() for cell in cells):
            continue
        if len(cells) != len(header):
            hint = (
                "; quote a cell with a comma in it" if separator == "," and len(cells) > len(header) else ""
            )
            yield line, ValueError(f"the row has {len(cells)} cells, and the header {len(header)}{hint}")
            continue
        yield line, dict(zip(header, cells, strict=True))


def json_rows(file: TextIO) -> Iterator[tuple[int, Any]]:
    """The values on the lines of a .jsonl file. Empty lines are left out."""
    for line, text in enumerate(file, 1):
        if not text.strip():
            continue
        try:
            row = json.loads(text)
        except (ValueError, RecursionError) as error:
            row = ValueError(f"not JSON: {one_line(error)}")
        yield line, row
