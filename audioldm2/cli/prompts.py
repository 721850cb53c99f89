"""Prompts from text files and standard input, and the weights of prompts and words."""

from __future__ import annotations

import argparse
import sys
from typing import BinaryIO

from audioldm2.cli.commands import PROGRAM
from audioldm2.cli.messages import say, with_option_names
from audioldm2.cli.options import Parser, reading
from audioldm2.prompt_weights import check_weights, weights_of

STANDARD_INPUT = ("-", "/dev/stdin", "/dev/fd/0", "/proc/self/fd/0")
MAX_BYTES = 100_000  # of a prompt


def standard_input(instead: str) -> BinaryIO:
    """Standard input, for reading bytes.

    Args:
        instead: what to do if it is closed.

    Raises:
        OSError: it is closed.
    """
    if sys.stdin is None:
        raise OSError(f"standard input is closed; {instead}")
    return sys.stdin.buffer


def read_prompt(name: str) -> str:
    """Read the only line of a file.

    Args:
        name: of a text file in UTF-8; - is standard input. From a terminal, one line is read.

    Returns:
        The line, without the white space around it.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not a text of one line.
    """
    if name not in STANDARD_INPUT:
        with open(name, "rb") as file:
            return _one_line(file.read(MAX_BYTES + 1), name)
    stdin = standard_input("write the prompt, or name a file with --from-file")
    if stdin.isatty():
        say("describe the sound in one line, then press Enter")
        return _one_line(stdin.readline(MAX_BYTES + 1), "standard input")
    return _one_line(stdin.read(MAX_BYTES + 1), "standard input")


def _one_line(data: bytes, name: str) -> str:
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        # A file that is too large was cut, maybe within a character: the errors below say more.
        text = data[: error.start].decode("utf-8-sig") if error.start >= MAX_BYTES - 3 else "\0"
    if "\0" in text:
        raise ValueError(f"{name} is not a text file in UTF-8")
    lines = [line for line in text.splitlines() if line.strip()]
    if not lines:
        raise ValueError(f"{name} is empty; it must have a description of the sound")
    if len(lines) > 1:
        raise ValueError(
            f"{name} has several lines; a prompt is one line. {PROGRAM} batch makes a sound for each line"
        )
    if len(data) > MAX_BYTES:
        raise ValueError(f"{name} is larger than {MAX_BYTES:,} bytes; a prompt has a sentence or two")
    return lines[0].strip()


def add_weight_options(p: argparse.ArgumentParser) -> None:
    """Add the options of blends and of word weights."""
    mix = p.add_argument_group("prompts and words with weights")
    mix.add_argument(
        "--blend",
        type=reading("blend", weights_of),
        action="extend",
        metavar="TEXT:WEIGHT",
        help='another prompt to mix in, as in "a bell: 0.3". The prompt has the rest, here 0.7. '
        'May be given several times, or several at once, as in "a bell: 0.3, wind: 0.1"',
    )
    mix.add_argument(
        "--word-weights",
        type=reading("word_weights", weights_of),
        action="extend",
        metavar="WORD:WEIGHT",
        help="how strongly words or phrases of the prompt act, compared with 1, as in "
        '"siren: 1.5, rain: 0.5". May be given several times',
    )


def check_prompt_weights(p: Parser, options: argparse.Namespace) -> None:
    """Check the options of `add_weight_options` with the prompt, and make them `Weights`.

    Raises:
        SystemExit: with code 2 for what cannot be used.
    """
    try:
        for name in ("blend", "word_weights"):
            setattr(options, name, weights_of(name, getattr(options, name) or ()))
        check_weights(options.prompt, options.blend, options.word_weights, options.transcription)
    except ValueError as error:
        p.error(with_option_names(error) or str(error))
