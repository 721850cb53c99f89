"""The tables that jobs are read from.

    prompts.csv, .tsv     a header, then a job on each line; an empty cell is the default
    prompts.jsonl         a JSON object, or a prompt as a string, on each line
    prompts.txt           a prompt on each line, or prompt|file name as in the original repository

The columns are those of `COLUMNS`. The paths of sounds to edit are relative to the table's folder. Imports
only the standard library, so that mistakes are found before anything is loaded.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TextIO

from audioldm2.arguments import check_choice
from audioldm2.batch.jobs import COLUMNS, FLAGS, NUMBERS, Failure, Job, check_columns
from audioldm2.quoting import listed, one_line, quoted
from audioldm2.table_rows import SEPARATORS, json_rows, separated_rows

TABLES = ("csv", "tsv", "jsonl", "txt")
_CELLS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


def table_type(path: str | Path) -> str | None:
    """The type of a table by its suffix: one of `TABLES`, or None if the suffix says nothing."""
    suffix = Path(path).suffix.lower().removeprefix(".")
    return suffix if suffix in TABLES else None


def read_jobs(path: str | Path, kind: str | None = None) -> tuple[list[Job], list[Failure]]:
    """Read the jobs of a table.

    Args:
        path: the file, in UTF-8.
        kind: one of `TABLES`; by default, what the suffix says.

    Returns:
        The jobs, and the rows that are not valid.

    Raises:
        OSError: the file cannot be read.
        ValueError: the suffix is unknown; or the file is not UTF-8, has no jobs, or has no column "prompt" or
            an unknown one.

    Example:
        >>> jobs, failures = read_jobs("prompts.csv")
    """
    kind = kind or table_type(path)
    with open(path, encoding="utf-8-sig", newline="") as file:
        if kind is None:
            raise ValueError(
                f"{path}: unknown type of table; use .csv, .tsv, .jsonl or .txt, or say which it is"
            )
        return parse_jobs(file, kind, str(path), Path(path).parent)


def parse_jobs(
    file: TextIO, kind: str, name: str, folder: str | Path = ""
) -> tuple[list[Job], list[Failure]]:
    """Read the jobs of an open table.

    Args:
        file: opened with newline="".
        kind: one of `TABLES`.
        name: of the file, for messages.
        folder: to which the paths of sounds are relative; the working directory by default.

    Returns:
        As `read_jobs` does.

    Raises:
        ValueError: as in `read_jobs`.
    """
    check_choice("the type of the table", kind, TABLES)
    jobs, failures = [], []
    try:
        for line, row in _READERS[kind](file):
            where = f"{name}:{line}"
            if isinstance(row, Exception):
                failures.append(Failure(where, one_line(row)))
                continue
            try:
                job = Job.of(row, where)
                audio = None if job.audio is None else str(Path(folder) / job.audio)
                jobs.append(dataclasses.replace(job, audio=audio))
            except (TypeError, ValueError) as error:
                failures.append(Failure(where, one_line(error)))
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not UTF-8 text ({error.reason}); save it as UTF-8") from error
    except ValueError as error:
        raise ValueError(f"{name}: {one_line(error)}") from error
    if not jobs and not failures:
        raise ValueError(f"{name} has no prompts")
    return jobs, failures


# A reader yields the number of each row's first line, and the row, or what is wrong with it.
Rows = Iterator[tuple[int, Mapping[str, Any] | str | Exception]]


def _read_separated(file: TextIO, separator: str) -> Rows:
    def check_header(header: list[str]) -> None:
        if "prompt" not in header:
            separators = " (the cells must be separated by commas)" if ";" in "".join(header) else ""
            first_line = quoted(separator.join(header))
            raise ValueError(
                f"the first line must name the columns, one of them prompt{separators}; it is {first_line}"
            )
        check_columns(header)
        if len({COLUMNS[column] for column in header}) < len(header):
            raise ValueError(f"two columns of the same setting in {listed(header)}; keep one")

    for line, row in separated_rows(file, separator, check_header):
        if isinstance(row, Exception):
            yield line, row
            continue
        try:
            yield line, {name: _value(name, cell) for name, cell in row.items() if cell}
        except ValueError as error:
            yield line, error


def _value(column: str, cell: str) -> Any:
    """A cell as a value of its column."""
    if COLUMNS[column] in FLAGS:
        if cell.strip().lower() not in _CELLS:
            raise ValueError(f"{column} must be yes or no, got {quoted(cell)}")
        return _CELLS[cell.strip().lower()]
    convert = NUMBERS.get(COLUMNS[column])
    if convert is None:
        return cell
    try:
        return float(cell) if convert is float else int(cell)
    except ValueError:
        what = "a number" if convert is float else "an integer"
        raise ValueError(f"{column} must be {what}, got {quoted(cell)}") from None


def _read_json_lines(file: TextIO) -> Rows:
    for line, row in json_rows(file):
        if isinstance(row, dict):
            yield line, {name: value for name, value in row.items() if value is not None}
        elif isinstance(row, str | Exception):
            yield line, row
        else:
            yield line, ValueError(f"each line is a JSON object or a string, got {quoted(row)}")


def _looks_like(line: str) -> str | None:
    """Another type of table that a line of text seems to be the first line of."""
    cells = {name: [cell.strip() for cell in line.split(sep)] for name, sep in (("csv", ","), ("tsv", "\t"))}
    if line.lstrip().startswith('{"'):
        return "jsonl"
    return next((name for name, each in cells.items() if len(each) > 1 and "prompt" in each), None)


def _read_lines(file: TextIO) -> Rows:
    for line, text in enumerate(file, 1):
        if line == 1 and (kind := _looks_like(text)):
            raise ValueError(f"the first line looks like that of a {kind} table; say that it is one")
        prompt, bar, name = text.strip().partition("|")
        if prompt or name:
            yield line, {"prompt": prompt.strip(), "name": name.strip()} if bar else prompt


_READERS: dict[str, Callable[[TextIO], Rows]] = {
    **{kind: partial(_read_separated, separator=separator) for kind, separator in SEPARATORS.items()},
    "jsonl": _read_json_lines,
    "txt": _read_lines,
}
