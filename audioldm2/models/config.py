"""Helpers of the stages' config dataclasses: from the content of a config.json to fields with checked values.

A stage's config is a frozen dataclass. Its fields are the keys of the Hub's config.json that change the
result, under the Hub's names and with the reference's defaults; `from_dict` picks them out of a config.json's
content and refuses values that the stage does not implement. See `models/t5.py` for a short example.
"""

from __future__ import annotations

import dataclasses
import math
import sys
import types
import typing
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, ClassVar, Protocol, TypeVar

from audioldm2.quoting import quoted

T = TypeVar("T")
# Limits of what no tensor of a checkpoint limits, far beyond any real one: a config is not trusted, and the
# sizes in it decide how much memory and time loading and generating take.
MAX_LAYERS = 1024  # repetitions of a block, in one level if there are several
MAX_ENTRIES = 64  # of a list: one entry for each level, step, kernel or transformer
MAX_SAMPLING_RATE = 768_000  # Hz
MIN_SAMPLING_RATE = 1_000
# How an error message describes the types of a config's values.
_TYPE_NAMES = {
    int: "an integer from 0 to 2147483647",
    float: "a finite number",
    str: "a string",
    bool: "true or false",
    types.NoneType: "null",
}


class Config(Protocol):
    """What every stage's config provides: it is a dataclass that can be read from a config.json."""

    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]

    @classmethod
    def from_dict(cls: type[T], content: Mapping[str, Any], /) -> T:
        """The config from the content of a config.json.

        Args:
            content: the JSON object; keys that do not change the result are ignored.

        Raises:
            ValueError: a value that the stage does not support; the message names the key.
        """
        ...


ConfigT = TypeVar("ConfigT", bound=Config)


def known_fields(config: type, content: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of a Hub config that a config dataclass has fields for, lists turned into tuples."""
    return {f.name: as_tuples(content[f.name]) for f in fields(config) if f.name in content}


def as_tuples(value: Any) -> Any:
    """A config value with its lists, nested ones too, turned into tuples."""
    return tuple(map(as_tuples, value)) if isinstance(value, list | tuple) else value


def refuse_unsupported(content: Mapping[str, Any], supported: Mapping[str, tuple[Any, ...]]) -> None:
    """Check the keys of a Hub config of which a stage implements only some values.

    Args:
        content: a Hub config.
        supported: the allowed values of each key; a key that is absent from `content` is fine.

    Raises:
        ValueError: names the key, its value and what is supported.
    """
    for key, allowed in supported.items():
        if key in content and content[key] not in allowed:
            choices = " or ".join(map(repr, allowed))
            raise ValueError(f"{key} = {quoted(content[key])} is not supported; it must be {choices}")


def check_sizes(
    config: Any, *, layers: tuple[str, ...] = (), zero: tuple[str, ...] = (), positive: tuple[str, ...] = ()
) -> None:
    """Check the ranges of a config's numbers, for what no shape of a tensor can check.

    Args:
        config: a dataclass. Every integer in it must be at least 1, and no list may be empty or have more
            than `MAX_ENTRIES` entries.
        layers: fields that count repetitions of a block: at most `MAX_LAYERS`.
        zero: fields of integers that may be 0.
        positive: fields of floating-point numbers that must be greater than 0 and finite.

    Raises:
        ValueError: names the field, its value and what it must be.
    """
    for field in fields(config):
        name, value = field.name, getattr(config, field.name)
        if isinstance(value, tuple) and not 1 <= len(value) <= MAX_ENTRIES:
            raise ValueError(f"{name} has {len(value)} entries; it must have 1 to {MAX_ENTRIES}")
        lowest = 0 if name in zero else 1
        highest = MAX_LAYERS if name in layers else 2**31 - 1
        if not all(lowest <= number <= highest for number in _integers(value)):
            limits = f"from {lowest} to {highest}" if name in layers else f"at least {lowest}"
            raise ValueError(f"{name} = {quoted(value)} is not supported; it must be {limits}")
        if name in positive and not (value > 0 and math.isfinite(value)):
            raise ValueError(f"{name} = {quoted(value)} is not supported; it must be a positive number")


def check_sampling_rate(value: int, name: str = "sampling_rate") -> None:
    """Raise ValueError unless `value` is a plausible sampling rate in Hz."""
    if not MIN_SAMPLING_RATE <= value <= MAX_SAMPLING_RATE:
        raise ValueError(
            f"{name} = {value} is not supported; it must be from {MIN_SAMPLING_RATE} to "
            f"{MAX_SAMPLING_RATE} Hz"
        )


def _integers(value: Any) -> list[int]:
    """The integers in a config's value, in nested tuples too."""
    if isinstance(value, tuple):
        return [number for entry in value for number in _integers(entry)]
    return [value] if isinstance(value, int) and not isinstance(value, bool) else []


def check_types(hints: Mapping[str, Any], content: Mapping[str, Any], prefix: str = "") -> None:
    """Check that the values of a JSON object have the types that a config declares for them.

    Args:
        hints: the type of each key: int, float, str, bool, None, tuple[X, ...], a union or a dataclass, as
            `typing.get_type_hints` of a dataclass gives them.
        content: the JSON object; keys that are absent are fine, and so are keys without a hint.
        prefix: put before a key's name in the error message, for an object inside another.

    Raises:
        ValueError: names the key, its value and the type it must have.
    """
    for key in (key for key in hints if key in content):
        hint, value = hints[key], content[key]
        if dataclasses.is_dataclass(hint):
            if isinstance(value, Mapping):
                check_types(typing.get_type_hints(hint), value, f"{prefix}{key}.")
                continue
            fits, expected = value is None, "an object or null"
        else:
            fits, expected = _fits(value, hint), _describe(hint)
        if not fits:
            raise ValueError(f"{prefix}{key} = {quoted(value)} is not supported; it must be {expected}")


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value read from JSON is of a dataclass field's type."""
    options = typing.get_args(hint)
    if isinstance(hint, types.UnionType):
        return any(_fits(value, option) for option in options)
    if options:  # tuple[X, ...], a list in JSON
        return isinstance(value, list | tuple) and all(_fits(entry, options[0]) for entry in value)
    if hint is float:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        # An integer can be too large for a float; then it has no finite value.
        return number and abs(value) <= sys.float_info.max
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31
    return isinstance(value, hint)


def _describe(hint: Any) -> str:
    options = typing.get_args(hint)
    if isinstance(hint, types.UnionType):
        return " or ".join(map(_describe, options))
    return f"a list (of {_describe(options[0])})" if options else _TYPE_NAMES.get(hint, hint.__name__)
