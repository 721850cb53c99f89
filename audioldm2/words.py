"""Words of a prompt with weights.

A word of weight w has its T5 states multiplied by w, where the UNet attends to them. CLAP and GPT-2 read the
prompt without weights: on "tiny" it made no clear difference to pass the weighted states on to GPT-2.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from audioldm2.arguments import is_finite
from audioldm2.quoting import quoted

WordWeights = Mapping[str, float] | Sequence[Mapping[str, float] | None]


def word_weights_of(value: Any, prompts: Sequence[str]) -> list[dict[str, float]] | None:
    """The weights of words for each prompt.

    Args:
        value: None; a dict from words or phrases to weights, for all prompts; or a list with one for each.
        prompts: B texts.

    Returns:
        For each prompt, the words that it has. None if there are none.

    Raises:
        TypeError: `value` is something else.
        ValueError: a weight is negative or not a number, a word is empty or not in a prompt, or the list has
            another length.
    """
    if value is None:
        return None
    shared = isinstance(value, Mapping)
    if not shared and not isinstance(value, list | tuple):
        raise TypeError(
            f'word_weights must be a dict such as {{"rain": 1.5}}, or a list, got {quoted(value)}'
        )
    if not shared and len(value) != len(prompts):
        raise ValueError(
            f"got {len(value)} word_weights for {len(prompts)} prompts; pass one dict, or one per prompt"
        )
    each: list[Any] = [value] * len(prompts) if shared else [{} if one is None else one for one in value]
    found: list[dict[str, float]] = []
    for prompt, weights in zip(prompts, each, strict=True):
        if not isinstance(weights, Mapping):
            raise TypeError(f"word_weights must hold dicts, got {quoted(weights)}")
        for word, weight in weights.items():
            if not isinstance(word, str) or not word.strip():
                raise TypeError(f"word_weights must have words as keys, got {quoted(word)}")
            if not is_finite(weight) or weight < 0:
                raise ValueError(
                    "word_weights must be numbers of at least 0, but that of "
                    f"{quoted(word)} is {quoted(weight)}"
                )
            if not shared and not occurrences(prompt, word):
                raise ValueError(f"word_weights has {quoted(word)}, which is not a word of {quoted(prompt)}")
        found.append({word: float(w) for word, w in weights.items() if occurrences(prompt, word)})
    for word in value if shared else ():
        if not any(word in weights for weights in found):
            raise ValueError(f"word_weights has {quoted(word)}, which is not a word of the prompt")
    return found


def occurrences(prompt: str, word: str) -> list[tuple[int, int]]:
    """Where a word or phrase occurs in a text as whole words, in any case: the first index and the end."""
    words = r"\s+".join(map(re.escape, word.split()))
    return [match.span() for match in re.finditer(rf"(?<!\w){words}(?!\w)", prompt, flags=re.IGNORECASE)]


def token_weights(tokenizer: Any, prompt: str, weights: Mapping[str, float], tokens: int) -> list[float]:
    """The weight of each token of a prompt.

    Args:
        tokenizer: the second one.
        prompt: the text.
        weights: of its words and phrases; a token of several has the product of their weights.
        tokens: the number of tokens that are read, of a longer text the first ones, or to which a shorter
            one is padded.

    Raises:
        ValueError: the tokenizer cannot tell which token a word is in, or a word is cut off.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError("word_weights needs a fast tokenizer (of the tokenizers library) as tokenizer_2")
    encoded = tokenizer(prompt, max_length=tokens, truncation=True, return_offsets_mapping=True)
    found = [1.0] * tokens
    for word, weight in weights.items():
        indices = [
            index
            for index, (start, end) in enumerate(encoded.offset_mapping)
            if any(start < last and end > first for first, last in occurrences(prompt, word))
        ]
        if not indices:
            raise ValueError(
                f"word_weights has {quoted(word)}, which is beyond the {tokens} tokens that are read of "
                f"{quoted(prompt)}"
            )
        for index in indices:
            found[index] *= weight
    return found
