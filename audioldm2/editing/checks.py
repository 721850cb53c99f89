"""The arguments of an edit, checked without the sound.

Imports only the standard library, so that the command line, the tables of batches and the web page can refuse
them before PyTorch is imported.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from audioldm2.arguments import MAX_LENGTH_IN_S, as_texts, check_choice, check_number, is_finite
from audioldm2.quoting import quoted

Span = tuple[float, float]
# As a caller passes them: one pair or several.
Spans = Sequence[float | None] | Sequence[Sequence[float | None]]
EXAMPLES = {"keep": "[(0.0, 2.5)]", "replace": "[(2.5, 4.0)]", "replace_band": "(4000, 8000)"}
# Arguments that say what is done with a sound, and those that go with a sound.
OF_EDITS = ("strength", *EXAMPLES, "extend")
OF_AUDIO = ("sampling_rate", *OF_EDITS)
LENGTHS = ("audio_length_in_s", "latents")  # arguments that say how long a sound becomes
STRENGTH = 0.5  # of a variation, by default
# Of inversion, the better method first; each with the share of the steps that an edit leaves out by default:
# more of DDIM's steps decide what the sound is (measured on "tiny").
SKIP = {"ddpm": 0.4, "ddim": 0.2}
METHODS = tuple(SKIP)
_NUMBER = r"(\d+(?:\.\d*)?|\.\d+)"
_DASH = "\\s*[-\N{EN DASH}]\\s*"
_PAIR = re.compile(rf"\s*{_NUMBER}{_DASH}{_NUMBER}?\s*")


def pairs(name: str, value: Any) -> list[Span]:
    """A caller's spans or bands: one pair of numbers or several, as a list.

    Args:
        name: the argument's, from `EXAMPLES`.
        value: each pair is from a smaller number to a larger one. The end of a span may be None, for the end
            of the sound.

    Returns:
        The pairs; None as infinity.

    Raises:
        ValueError: anything else.
    """
    example, open_end = EXAMPLES[name], name != "replace_band"
    listed = value.tolist() if hasattr(value, "tolist") else value
    if not isinstance(listed, list | tuple) or not listed:
        raise ValueError(f"{name} must be pairs of numbers such as {example}, got {quoted(value)}")
    if not isinstance(listed[0], list | tuple):
        listed = [listed]
    found = []
    for pair in listed:
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise ValueError(f"{name} must be pairs of numbers such as {example}, got {quoted(value)}")
        start, end = pair
        if end is None and open_end:
            end = math.inf
        valid = is_finite(start) and (is_finite(end) or (end == math.inf and open_end))
        if not valid or not 0 <= start < end:
            raise ValueError(
                f"{name} has the pair {quoted(pair)}; the first number must be at least 0, and less than the "
                "second"
            )
        found.append((float(start), float(end)))
    return found


def read_pair(name: str, text: str) -> tuple[float, float | None]:
    """A span or a band that is written as text: "0-2.5", or "4-" for one up to the end of the sound.

    Args:
        name: the argument's, from `EXAMPLES`.
        text: what was written.

    Raises:
        ValueError: anything else.
    """
    found = _PAIR.fullmatch(text)
    if found is None or (found[2] is None and name == "replace_band"):
        what = "a band in Hz, as in 4000-8000" if name == "replace_band" else "seconds, as in 0-2.5 or 4-"
        raise ValueError(f"{name} must be {what}, got {quoted(text)}")
    pair = float(found[1]), None if found[2] is None else float(found[2])
    pairs(name, pair)
    return pair


def read_pairs(name: str, text: str) -> list[tuple[float, float | None]]:
    """Several of `read_pair`, separated by commas, semicolons or spaces.

    Example:
        >>> read_pairs("keep", "0-2.5, 4-")
        [(0.0, 2.5), (4.0, None)]
    """
    # Spaces separate, but not within "0 - 2.5".
    joined = re.sub(rf"{_DASH}(?=[\d.])", "-", text.strip())
    return [read_pair(name, part) for part in re.split(r"\s*[,;]\s*|\s+", joined)]


def check_edit(has_audio: bool, given: Mapping[str, Any], loop: Any = False) -> None:
    """Check the arguments of the pipeline that go with a sound.

    Args:
        has_audio: whether there is a sound.
        given: those of `OF_AUDIO` and `LENGTHS` by their names; None, or no value, is the default. Others
            are ignored.
        loop: whether the result is to repeat.

    Raises:
        ValueError: an argument that cannot be used; the message names it.
    """
    lengths = [name for name in LENGTHS if given.get(name) is not None]
    given = {name: given[name] for name in OF_AUDIO if given.get(name) is not None}
    if not has_audio:
        for name in given:
            raise ValueError(f"{name} goes with audio, the sound to edit, which is missing")
        return
    if "keep" in given and "replace" in given:
        raise ValueError("keep and replace say the same in two ways; pass one of them")
    regions = [name for name in EXAMPLES if name in given]
    for name in regions:
        pairs(name, given[name])
    if "extend" in given:
        extend = given["extend"]
        if not is_finite(extend) or not 0 < extend <= MAX_LENGTH_IN_S:
            raise ValueError(
                f"extend must be a number of seconds, more than 0 and at most {MAX_LENGTH_IN_S:g}, got "
                f"{quoted(extend)}"
            )
        for name in ("strength", *regions):
            if name in given:
                raise ValueError(f"extend keeps all of audio, so leave out {name}")
        for name in lengths:
            raise ValueError(f"extend says how long the sound becomes, so leave out {name}")
    if loop and regions:
        raise ValueError(
            "loop goes with audio and strength, or with extend; with keep, replace or replace_band, the seam "
            "would be in what is kept"
        )
    if "strength" in given:
        check_strength(given["strength"])


def strength_of(given: Mapping[str, Any]) -> float:
    """The strength of an edit: by default `STRENGTH`, or 1 for what is replaced or added."""
    if given.get("strength") is not None:
        return float(given["strength"])
    return 1.0 if any(given.get(name) is not None for name in (*EXAMPLES, "extend")) else STRENGTH


def check_strength(strength: Any) -> None:
    """Raise ValueError unless `strength` is a number from 0 to 1."""
    _check_between("strength", strength, "the sound itself", "the prompt")


def check_skip(skip: Any) -> None:
    """Raise ValueError unless `skip` is a number from 0 to 1."""
    _check_between("skip", skip, "all steps", "none")


def _check_between(name: str, value: Any, at_0: str, at_1: str) -> None:
    check_number(name, value)
    if not 0 <= value <= 1:
        raise ValueError(f"{name} must lie between 0 ({at_0}) and 1 ({at_1}), got {value}")


def check_inversion(has_audio: bool, invert: Any, given: Mapping[str, Any]) -> None:
    """Check the settings of an edit by inversion, as the command line and batches have them.

    Args:
        has_audio: whether there is a sound.
        invert: the method, from `METHODS`; None for another edit.
        given: all settings by their names; None, or no value, is the default.

    Raises:
        TypeError, ValueError: a setting that cannot be used; the message names it.
    """
    if invert is None:
        for name in ("source_prompt", "skip"):
            if given.get(name) is not None:
                raise ValueError(f"{name} goes with invert, which is missing")
        return
    check_choice("invert", invert, METHODS)
    if not has_audio:
        raise ValueError("invert goes with audio, the sound to edit, which is missing")
    for name in (*OF_EDITS, "loop", "window", "eta"):
        if given.get(name) or (name == "strength" and given.get(name) is not None):
            raise ValueError(f"invert edits all of the sound, so leave out {name}")
    if invert == "ddim" and (given.get("num_waveforms_per_prompt") or 1) > 1:
        raise ValueError("invert with ddim has no candidates, which would be equal; ddpm has")
    if given.get("source_prompt") is not None:
        as_texts("source_prompt", given["source_prompt"], empty=True)
    if given.get("skip") is not None:
        check_skip(given["skip"])
