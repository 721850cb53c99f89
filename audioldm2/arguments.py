"""Checks of arguments. The error is one line that names the argument. Imports only the standard library."""

from __future__ import annotations

import functools
import inspect
import math
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from difflib import get_close_matches
from numbers import Real
from typing import Any, TypeVar, cast

from audioldm2.quoting import quoted

FunctionT = TypeVar("FunctionT", bound=Callable[..., Any])
GUIDANCE = 3.5  # the guidance scale by default, unless the checkpoint recommends another
MAX_SEED = 2**63 - 1
MAX_LENGTH_IN_S = 3600.0  # a larger value is probably a number of samples or milliseconds
MAX_GUIDANCE = 100.0  # of a recommendation, and of the web page


def as_texts(name: str, value: Any, empty: bool = False) -> list[str]:
    """One string or several, as a list.

    Args:
        name: the argument's name, for error messages.
        value: a string, or a list or tuple of strings.
        empty: whether empty strings are allowed.

    Raises:
        TypeError: `value` is something else.
        ValueError: there are no strings, or one is empty or not valid Unicode.
    """
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
        raise TypeError(f"{name} must be a string or a list of strings, got {quoted(value)}")
    if not texts:
        raise ValueError(f"{name} is an empty list; pass at least one string")
    if not empty and not all(text.strip() for text in texts):
        raise ValueError(f"{name} is empty; describe the sound")
    for text in texts:
        # Python decodes bytes of a command line that are not UTF-8 as lone surrogates.
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise ValueError(f"{name} is not valid UTF-8 text: {quoted(text)}")
    return list(texts)


def as_negatives(value: Any, batch: int) -> list[str]:
    """One negative prompt for each of `batch` prompts.

    Args:
        value: None (empty negative prompts), a string for all prompts, or a list with one string per prompt.
        batch: number of prompts.

    Raises:
        TypeError: `value` is something else.
        ValueError: the list has another length, or a string is not valid Unicode.
    """
    texts = as_texts("negative_prompt", "" if value is None else value, empty=True)
    if value is None or isinstance(value, str):
        return texts * batch
    if len(texts) != batch:
        raise ValueError(
            f"got {len(texts)} negative prompts for {batch} prompts; pass one, or one per prompt"
        )
    return texts


def as_integer(value: Any) -> int | None:
    """An integer of any type (Python's, NumPy's, a tensor of one element) as int; None if it is not one."""
    if isinstance(value, bool) or "bool" in str(getattr(value, "dtype", "")):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None


def check_count(name: str, value: Any, lowest: int = 1, highest: int | None = None) -> None:
    """Raise ValueError unless `value` is an integer, of any type, from `lowest` to `highest`."""
    number = as_integer(value)
    if number is None or number < lowest or (highest is not None and number > highest):
        limits = f"of at least {lowest}" if highest is None else f"from {lowest} to {highest}"
        raise ValueError(f"{name} must be an integer {limits}, got {quoted(value)}")


def check_length(seconds: Any, shortest: float = 0.0) -> None:
    """Raise ValueError unless `seconds` is a number from `shortest` to MAX_LENGTH_IN_S, and positive."""
    if not is_finite(seconds):
        raise ValueError(f"audio_length_in_s must be a number of seconds, got {quoted(seconds)}")
    if not 0 < float(seconds) <= MAX_LENGTH_IN_S or float(seconds) < shortest:
        raise ValueError(
            f"audio_length_in_s must be from {shortest:g} to {MAX_LENGTH_IN_S:g} seconds, got {seconds}"
        )


def check_number(name: str, value: Any) -> None:
    """Raise ValueError unless `value` is a finite number."""
    if not is_finite(value):
        raise ValueError(f"{name} must be a finite number, got {quoted(value)}")


def check_share(name: str, value: Any) -> None:
    """Raise ValueError unless `value` is a number from 0 to less than 1."""
    check_number(name, value)
    if not 0 <= value < 1:
        raise ValueError(f"{name} must be from 0 to less than 1, got {quoted(value)}")


def is_finite(value: Any) -> bool:
    """Whether a value is a finite real number, and not a bool."""
    try:
        return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # an integer beyond the largest float
        return False


def check_choice(name: str, value: Any, choices: Sequence[object]) -> None:
    """Raise ValueError unless `value` is one of `choices`."""
    if not any(isinstance(value, type(choice)) and value == choice for choice in choices):
        raise ValueError(f"{name} must be one of {', '.join(map(str, choices))}; got {quoted(value)}")


def check_flag(name: str, value: Any) -> bool:
    """A flag as bool, False for None; NumPy's are flags, too.

    Raises:
        TypeError: `value` is not a flag.
    """
    if not isinstance(value, bool | None) and type(value).__name__ not in ("bool", "bool_"):
        raise TypeError(f"{name} must be True or False, got {quoted(value)}")
    return bool(value)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The end of an error about an unknown name: the nearest known one, or "" if none is near.

    Example:
        >>> did_you_mean("promt", ["prompt", "latents"])
        '; did you mean prompt?'
    """
    nearest = next(iter(get_close_matches(name, list(known), n=1)), None)
    return f"; did you mean {nearest}?" if nearest else ""


def naming_unknown(name: str, instead: Mapping[str, str]) -> Callable[[FunctionT], FunctionT]:
    """Decorator: the error of an unknown keyword argument says which known one is meant.

    Args:
        name: what is called, in the error.
        instead: what to write in place of an argument that other libraries have.
    """

    def decorate(function: FunctionT) -> FunctionT:
        known = inspect.signature(function).parameters

        @functools.wraps(function)
        def checked(*args: Any, **kwargs: Any) -> Any:
            unknown = next((one for one in kwargs if one not in known), None)
            if unknown is not None:
                hint = f"; write {instead[unknown]}" if unknown in instead else did_you_mean(unknown, known)
                raise TypeError(f"{name} has no argument {quoted(unknown)}{hint}")
            return function(*args, **kwargs)

        return cast(FunctionT, checked)

    return decorate
