"""What a batch generates: jobs, and the tables they are read from.

    prompts.csv, .tsv     a header, then a job on each line; an empty cell is the default
    prompts.jsonl         a JSON object, or a prompt as a string, on each line
    prompts.txt           a prompt on each line, or prompt|file name as in the original repository

The columns are the fields of `Job`, also under the names of the command line's options (`COLUMNS`). Imports
only the standard library, so that mistakes are found before anything is loaded.
"""

from __future__ import annotations

import csv
import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from operator import index
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from audioldm2.arguments import (
    MAX_SEED,
    as_texts,
    check_choice,
    check_count,
    check_length,
    check_number,
    did_you_mean,
)
from audioldm2.quoting import listed, one_line, quoted
from audioldm2.schedulers import SAMPLERS

MAX_NAME = 1000  # characters; a longer text is probably not meant as a name
BATCH_SIZE = 8  # by default
MAX_CANDIDATES = 1000  # of a job; a larger number is probably a mistake
TABLES = ("csv", "tsv", "jsonl", "txt")


class Failure(NamedTuple):
    """A job that has no sound.

    Attributes:
        where: the file and line of the job, such as "prompts.csv:3", or its number in the list, "job 3".
        reason: the error, as one line.
        details: the traceback, if its generation failed.
    """

    where: str
    reason: str
    details: str = ""

    def __str__(self) -> str:
        return f"{self.where}: {self.reason}"


@dataclass(frozen=True)
class Job:
    """A prompt and the settings of its sound. None stands for the default.

    The arguments of a generation have the names and meanings that they have in `AudioLDM2Pipeline.__call__`.

    Args:
        prompt: the description of the sound.
        name: of the file, with or without the suffix of a sound file; made from the prompt by default.
        negative_prompt: what to steer away from.
        transcription: the words to speak, for the speech checkpoints.
        audio_length_in_s: length of the sound in seconds.
        num_inference_steps: steps of the sampler.
        guidance_scale: 1 or less disables guidance.
        num_waveforms_per_prompt: number of candidates, which CLAP ranks.
        eta: how much noise a DDIM step adds.
        max_new_tokens: how many vectors GPT-2 generates.
        scheduler: the name of a sampler in `SAMPLERS`; the pipeline's own by default.
        seed: of the random numbers, from 0 to 2^63 - 1. By default it is made from the other fields, so that
            another run makes the same sound.
        where: the file and line that the job was read from, for messages.

    Raises:
        TypeError, ValueError: a value that cannot be used; the message names the field.
    """

    prompt: str
    name: str | None = None
    negative_prompt: str | None = None
    transcription: str | None = None
    audio_length_in_s: float | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    num_waveforms_per_prompt: int | None = None
    eta: float | None = None
    max_new_tokens: int | None = None
    scheduler: str | None = None
    seed: int | None = None
    where: str = dataclasses.field(default="", compare=False)

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name != "where" and (value is not None or field.name == "prompt"):
                _CHECKS[field.name](field.name, value)
                # NumPy's numbers as Python's, which JSON can hold.
                convert = _NUMBERS.get(field.name, lambda value: value)
                object.__setattr__(self, field.name, convert(value))

    def with_defaults(self, defaults: Mapping[str, Any]) -> Job:
        """The job with the values of `defaults` for the fields that are None."""
        missing = {name: value for name, value in defaults.items() if getattr(self, name) is None}
        return dataclasses.replace(self, **missing)

    @classmethod
    def of(cls, value: Job | Mapping[str, Any] | str, where: str = "") -> Job:
        """A job from a prompt, or from a mapping of fields or of the columns in `COLUMNS`.

        Raises:
            TypeError, ValueError: a name that is not known, or a value that cannot be used; the message has
                the name as the mapping has it.
        """
        if isinstance(value, Job):
            return value if value.where else dataclasses.replace(value, where=where)
        if isinstance(value, str):
            return cls(value, where=where)
        if not isinstance(value, Mapping):
            raise TypeError(f"a job is a prompt, a mapping or a Job, got {quoted(value)}")
        check_columns(value)
        named = {COLUMNS[column]: column for column in value}
        if len(named) < len(value):
            raise ValueError(f"{listed(value)}: two names of the same setting; keep one")
        if value.get("prompt") is None:
            raise ValueError("the prompt is missing")
        try:
            return cls(**{COLUMNS[column]: cell for column, cell in value.items()}, where=where)
        except (TypeError, ValueError) as error:
            message = str(error)
            for field, column in named.items():
                if message.startswith(field):
                    message = column + message.removeprefix(field)
                    break
            raise type(error)(message) from error


def _text(name: str, value: Any) -> None:
    if not isinstance(value, str):
        raise TypeError(f"{name} must be text, got {quoted(value)}")
    as_texts(name, value, empty=name == "negative_prompt")
    if "\0" in value:
        raise ValueError(f"{name} has a NUL character; the text is perhaps UTF-16, save it as UTF-8")


def _name(name: str, value: Any) -> None:
    if isinstance(value, str) and not value.strip():
        raise ValueError(f"{name} is empty; without one, the file is named after the prompt")
    _text(name, value)
    if len(value) > MAX_NAME:
        raise ValueError(f"{name} has {len(value)} characters; at most {MAX_NAME} are allowed")


_CHECKS: dict[str, Callable[[str, Any], None]] = {
    "prompt": _text,
    "name": _name,
    "negative_prompt": _text,
    "transcription": _text,
    "audio_length_in_s": lambda name, value: check_length(value),
    "num_inference_steps": check_count,
    "guidance_scale": check_number,
    "num_waveforms_per_prompt": lambda name, value: check_count(name, value, 1, MAX_CANDIDATES),
    "eta": check_number,
    "max_new_tokens": check_count,
    "scheduler": lambda name, value: check_choice(name, value, tuple(SAMPLERS)),
    "seed": lambda name, value: check_count(name, value, 0, MAX_SEED),
}
# What a cell of a table is read as.
_NUMBERS: dict[str, Callable[[Any], Any]] = {
    "audio_length_in_s": float,
    "num_inference_steps": index,
    "guidance_scale": float,
    "num_waveforms_per_prompt": index,
    "eta": float,
    "max_new_tokens": index,
    "seed": index,
}
COLUMNS = {
    **{name: name for name in _CHECKS},
    "negative": "negative_prompt",
    "duration": "audio_length_in_s",
    "steps": "num_inference_steps",
    "guidance": "guidance_scale",
    "candidates": "num_waveforms_per_prompt",
}


# One name of each setting, in the order of the help.
SHOWN_COLUMNS = (
    *("prompt", "name", "negative", "transcription", "duration", "seed"),
    *("steps", "guidance", "candidates", "scheduler", "eta", "max_new_tokens"),
)


def check_columns(names: Iterable[str]) -> None:
    """Raise ValueError unless all names are those of columns."""
    for name in names:
        if name not in COLUMNS:
            hint = did_you_mean(str(name), COLUMNS) or f"; the columns are {', '.join(SHOWN_COLUMNS)}"
            raise ValueError(f"unknown column {quoted(name)}{hint}")


# --- tables


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
        return parse_jobs(file, kind, str(path))


def parse_jobs(file: TextIO, kind: str, name: str) -> tuple[list[Job], list[Failure]]:
    """Read the jobs of an open table.

    Args:
        file: opened with newline="".
        kind: one of `TABLES`.
        name: of the file, for messages.

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
                jobs.append(Job.of(row, where))
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
    reader = csv.reader(file, delimiter=separator, strict=True)
    try:
        header = [cell.strip() for cell in next(reader, [])]
    except csv.Error as error:
        raise ValueError(f"the first line, which names the columns, is broken: {error}") from error
    if "prompt" not in header:
        separators = " (the cells must be separated by commas)" if ";" in "".join(header) else ""
        first_line = quoted(separator.join(header))
        raise ValueError(
            f"the first line must name the columns, one of them prompt{separators}; it is {first_line}"
        )
    check_columns(header)
    if len({COLUMNS[column] for column in header}) < len(header):
        raise ValueError(f"two columns of the same setting in {listed(header)}; keep one")
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
            yield line, ValueError(f"the row has {len(cells)} cells, and the header {len(header)}")
            continue
        try:
            yield line, {name: _value(name, cell) for name, cell in zip(header, cells, strict=True) if cell}
        except ValueError as error:
            yield line, error


def _value(column: str, cell: str) -> Any:
    """A cell as a value of its column."""
    convert = _NUMBERS.get(COLUMNS[column])
    if convert is None:
        return cell
    try:
        return float(cell) if convert is float else int(cell)
    except ValueError:
        what = "a number" if convert is float else "an integer"
        raise ValueError(f"{column} must be {what}, got {quoted(cell)}") from None


def _read_json_lines(file: TextIO) -> Rows:
    for line, text in enumerate(file, 1):
        if not text.strip():
            continue
        try:
            row = json.loads(text)
        except (ValueError, RecursionError) as error:
            yield line, ValueError(f"not JSON: {one_line(error)}")
            continue
        if isinstance(row, dict):
            yield line, {name: value for name, value in row.items() if value is not None}
        elif isinstance(row, str):
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
    "csv": lambda file: _read_separated(file, ","),
    "tsv": lambda file: _read_separated(file, "\t"),
    "jsonl": _read_json_lines,
    "txt": _read_lines,
}
