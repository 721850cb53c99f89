"""Checks of what a caller passes: an error of one line that names the argument. Imports nothing heavy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real
from typing import Any

MAX_LENGTH_IN_S = 3600.0  # longer is taken for a slip: samples or milliseconds given as seconds


def as_texts(name: str, value: Any, empty: bool = False) -> list[str]:
    """One text or several, as a list; no text may be empty unless `empty`."""
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
        raise TypeError(f"{name} should be a text or a list of texts; got {value!r}")
    if not texts:
        raise ValueError(f"{name} is an empty list; give at least one text")
    if not empty and not all(text.strip() for text in texts):
        raise ValueError(f"{name} is empty; describe the sound")
    for text in texts:
        # Bytes that are no UTF-8 come from a command line as lone surrogates.
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise ValueError(f"{name} is not readable as text (UTF-8): {text!r}")
    return list(texts)


def as_negatives(value: Any, batch: int) -> list[str]:
    """A negative text for each of `batch` prompts."""
    texts = as_texts("negative_prompt", "" if value is None else value, empty=True)
    if value is None or isinstance(value, str):
        return texts * batch
    if len(texts) != batch:
        raise ValueError(f"{len(texts)} negative prompts for {batch} prompts; give one, or one a prompt")
    return texts


def check_count(name: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} should be a whole number, 1 or more; got {value!r}")


def check_length(seconds: Any, shortest: float = 0.0) -> None:
    """Refuse a length of sound that is no number of seconds, or not within reason."""
    if not isinstance(seconds, Real) or isinstance(seconds, bool) or not math.isfinite(seconds):
        raise ValueError(f"audio_length_in_s should be a number of seconds; got {seconds!r}")
    if not 0 < float(seconds) <= MAX_LENGTH_IN_S or float(seconds) < shortest:
        raise ValueError(
            f"audio_length_in_s is in seconds, from {shortest:g} to {MAX_LENGTH_IN_S:g}; got {seconds}"
        )


def check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name} should be one of {', '.join(choices)}; got {value!r}")
