"""Weights of prompts and of words as a user writes them: "a bell: 0.3, wind: 0.1".

The command line, the tables of batches and the web page take

    blend           prompts that are mixed into the main one, which has the rest of the weight, here 0.6
    word_weights    words of the prompt, and by what their effect is multiplied

Imports only the standard library, so that mistakes are found before PyTorch is imported.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from audioldm2.arguments import as_texts, is_finite
from audioldm2.quoting import quoted
from audioldm2.words import word_weights_of

Weights = tuple[tuple[str, float], ...]
FORMS = {
    "blend": "prompts and their weights, as in 'a bell: 0.3, wind: 0.1'",
    "word_weights": "words and their weights, as in 'siren: 1.5, rain: 0.5'",
}
_NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
# Only what follows a weight separates, so that a prompt can have commas and colons in it.
_ENTRY = re.compile(rf"\s*(\S(?:.*?\S)??)\s*:\s*({_NUMBER})\s*(?:[,;\n]|$)", re.DOTALL)
SMALLEST_REST = 1e-6  # of the weight, for the main prompt


def weights_of(name: str, value: Any) -> Weights:
    """Texts and their weights, in the order in which they are written.

    Args:
        name: the argument's, from `FORMS`.
        value: a text such as "a bell: 0.3, wind: 0.1", a mapping, or a list of pairs.

    Raises:
        TypeError: it is something else.
        ValueError: an entry without a text or a number, or two of the same text.

    Example:
        >>> weights_of("blend", "Birds, a river: 0.25; a bell: 0.5")
        (('Birds, a river', 0.25), ('a bell', 0.5))
    """
    if isinstance(value, str):
        entries: Sequence[Any] = _read(name, value)
    elif isinstance(value, Mapping):
        entries = list(value.items())
    elif isinstance(value, list | tuple):
        entries = value
    else:
        raise TypeError(f"{name} must be {FORMS[name]}, got {quoted(value)}")
    found: dict[str, float] = {}
    for entry in entries:
        is_pair = isinstance(entry, list | tuple) and len(entry) == 2
        if not is_pair or not isinstance(entry[0], str) or not is_finite(entry[1]):
            raise ValueError(f"{name} must be {FORMS[name]}, got {quoted(entry)}")
        (text,) = as_texts(name, entry[0])
        if text in found:
            raise ValueError(f"{name} has {quoted(text)} twice; keep one")
        found[text] = float(entry[1])
    return tuple(found.items())


def _read(name: str, text: str) -> list[tuple[str, float]]:
    entries: list[tuple[str, float]] = []
    position = 0
    while text[position:].strip() or not entries:
        match = _ENTRY.match(text, position)
        if match is None:
            raise ValueError(f"{name} must be {FORMS[name]}, got {quoted(text[position:].strip())}")
        entries.append((match[1], float(match[2])))
        position = match.end()
    return entries


def check_weights(prompt: str, blend: Weights, word_weights: Weights, transcription: Any = None) -> None:
    """Check a prompt's weights.

    Args:
        prompt: the main prompt.
        blend: others and their weights; () for none.
        word_weights: words of the prompt and their weights; () for none.
        transcription: the words that are spoken, if there are any.

    Raises:
        ValueError: weights that cannot be used; the message names the argument.
    """
    if blend and word_weights:
        raise ValueError("word_weights is for the words of a single prompt, so leave out blend")
    for name, weights in (("blend", blend), ("word_weights", word_weights)):
        if weights and transcription is not None:
            raise ValueError(f"{name} does not go with transcription: it is not for speech")
    for text, weight in blend:
        if not weight > 0:
            raise ValueError(f"blend must have weights above 0, but that of {quoted(text)} is {weight:g}")
    total = sum(weight for _, weight in blend)
    if total > 1 - SMALLEST_REST:
        raise ValueError(
            f"blend must have weights that add up to less than 1, as the prompt has the rest; they are "
            f"{total:g} together"
        )
    word_weights_of(dict(word_weights), [prompt])


def blend_of(prompt: str, others: Weights) -> list[tuple[str, float]]:
    """The main prompt and others, as `pipe.blend` takes them.

    Example:
        >>> blend_of("Rain", (("a bell", 0.25),))
        [('Rain', 0.75), ('a bell', 0.25)]
    """
    return [(prompt, 1 - sum(weight for _, weight in others)), *others]
