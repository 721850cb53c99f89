"""Errors and warnings as one line: with the options' names, without secrets and control characters."""

from __future__ import annotations

import os
import re
import sys
import traceback
from collections.abc import Mapping
from typing import Any

from audioldm2.checkpoints.errors import CheckpointError
from audioldm2.cli.commands import PROGRAM as PROGRAM
from audioldm2.quoting import printable, shortened

MAX_LENGTH = 600  # of an error, in characters
MAX_QUOTATION = 80  # in a warning
# The pipeline's arguments, by which its errors name them, and the options that set them.
OPTIONS = {
    "audio_length_in_s": "--duration",
    "exact_decoding": "--windowed-decoding",
    "feature_cache": "--cache",
    "guidance_interval": "--guidance-interval",
    "guidance_rescale": "--guidance-rescale",
    "guidance_scale": "--guidance",
    "negative_prompt": "--negative",
    "num_inference_steps": "--steps",
    "num_waveforms_per_prompt": "--candidates",
    "replace_band": "--replace-band",
    "source_prompt": "--source-prompt",
    "torch_dtype": "--dtype",
    "transcription": "--transcription",
    "word_weights": "--word-weights",
}
# Those that are also words: only a message that begins with one of them is about an argument.
WORDS = {
    "audio": "--from",
    "blend": "--blend",
    "extend": "--extend",
    "invert": "--invert",
    "keep": "--keep",
    "loop": "--loop",
    "quality": "--quality",
    "replace": "--replace",
    "skip": "--skip",
    "strength": "--strength",
    "timesteps": "--timesteps",
    "unconditional": "--unconditional",
    "window": "--window",
}
_ARGUMENT = re.compile(rf"(?<![\w-])({'|'.join(OPTIONS)})(?!\w)")
_ALL = {**OPTIONS, **WORDS}
_COLUMNS = {name: option.strip("-").replace("-", "_") for name, option in _ALL.items()}
_COLUMNS["exact_decoding"] = "exact_decoding"
_ANY = re.compile(rf"(?<![\w-])({'|'.join(_ALL)})(?!\w)")
_BEGINNING = re.compile(rf"({'|'.join([*WORDS, 'replace_band', 'source_prompt', 'word_weights'])}) ")
_QUOTATION = re.compile(rf"""(['"])((?:(?!\1).){{{MAX_QUOTATION},}})\1""")
_TOKEN = re.compile(r"hf_[A-Za-z0-9]{6,}|(?<=[Bb]earer )[^\s'\"\\]+")
_TOKEN_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")


def clean(text: str) -> str:
    """A text that is safe to print: access tokens are left out, and control characters are escaped."""
    for name in _TOKEN_VARIABLES:
        token = os.environ.get(name, "").strip()
        if len(token) >= 4:
            text = text.replace(token, "***")
    return printable(_TOKEN.sub("***", text), limit=None)


def shorten_quotations(text: str) -> str:
    """A text with the middle of long quotations left out, such as that of a prompt."""
    return _QUOTATION.sub(lambda match: match[1] + shortened(match[2], MAX_QUOTATION) + match[1], text)


def summary(text: str) -> str:
    """A text of several lines as one: the first two, and how many more there are."""
    lines = [line.strip() for line in text.strip().splitlines()]
    start = " ".join(lines[:2])
    if len(lines) > 2:
        start = f"{shortened(start, MAX_LENGTH)} (and {len(lines) - 2} more lines; --debug prints them)"
    return clean(shortened(start, MAX_LENGTH + 60))


def reason(error: Exception) -> str:
    """An error as one line."""
    if type(error).__name__ == "OutOfMemoryError":
        return "out of memory; try --dtype float16, a shorter --duration or fewer --candidates"
    if isinstance(error, OSError) and error.filename is not None:
        return summary(f"{error.filename}: {error.strerror}")
    if isinstance(error, OSError) and error.strerror:
        return summary(error.strerror)
    return summary(str(error)) or type(error).__name__


def with_option_names(error: Exception) -> str | None:
    """The error of an invalid argument with the option's name instead of the argument's; None for others."""
    text = str(error)
    if isinstance(error, CheckpointError) or not (_BEGINNING.match(text) or _ARGUMENT.search(text)):
        return None
    return summary(named(text))


def named(text: str, names: Mapping[str, str] = _ALL) -> str:
    """A message with the options' names, or others, instead of the pipeline's arguments'."""
    pattern = _ANY if _BEGINNING.match(text) else _ARGUMENT
    return pattern.sub(lambda match: names[match[1]], text)


def with_column_names(text: str) -> str:
    """A message about a row of a table, with the columns' names instead of the pipeline's arguments'."""
    return named(text, _COLUMNS)


def counted(number: int, noun: str) -> str:
    """A number with its noun: "1 row", "2 rows"."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def say(text: str, quiet: bool = False) -> None:
    """Print a message, unless `quiet`."""
    if not quiet:
        print(f"{PROGRAM}: {clean(text)}", file=sys.stderr)


def print_traceback(debug: bool) -> None:
    """Print the traceback of the error that is being handled, if `debug`."""
    for line in traceback.format_exc().splitlines() if debug else []:
        print(clean(line), file=sys.stderr)


def print_error(text: str, debug: bool = False) -> None:
    """Print an error, which is one line, and before it the traceback if `debug`."""
    print_traceback(debug)
    print(f"{PROGRAM}: error: {clean(text)}", file=sys.stderr)


def say_beside_bars(text: str) -> None:
    """Print a message without breaking the progress bars."""
    from tqdm import tqdm

    tqdm.write(f"{PROGRAM}: {clean(text)}", file=sys.stderr)


class Warnings:
    """Prints warnings as one line each; takes the place of `warnings.showwarning`.

    A warning that begins like an earlier one is not printed, such as that of a prompt that is used again.
    """

    def __init__(self) -> None:
        self.seen: set[str] = set()

    def __call__(self, message: Warning | str, *where: Any, **more: Any) -> None:
        text = named(" ".join(str(message).split()))
        text = shorten_quotations(text)
        text = clean(shortened(text, MAX_LENGTH))
        beginning = text[: MAX_QUOTATION // 2]
        if beginning not in self.seen:
            self.seen.add(beginning)
            say_beside_bars(f"warning: {text}")
