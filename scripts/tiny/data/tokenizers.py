"""The two tokenizers of the tiny checkpoint, trained on the library's captions, and their use in training.

Both know every letter, so that a word that no caption has is read in pieces and never becomes <unk>. Prompts
of users are less tidy than captions; `varied` makes captions so: small words are left out now and then, words
that mean nothing stand between, and capitals and full stops come and go.
"""

from __future__ import annotations

import string
from typing import Any

import numpy as np
from torch import Tensor

from audioldm2.checkpoints.formats import TOKENIZERS
from scripts.random_tokenizers import write_roberta_tokenizer, write_t5_tokenizer
from scripts.tiny.data.library import Library
from scripts.tiny.loop import Run
from scripts.tiny.sizes import TOKENS, VOCABULARIES

# Words that a prompt loses nothing with.
SMALL = frozenset(
    ("a", "an", "the", "of", "is", "are", "be", "there", "this", "with", "here", "sound", "you", "one")
)
LEFT_OUT = 0.1  # of the small words
PUT_IN = 0.03  # meaningless words for each word
CAPITALS = {"as it is": 0.4, "none": 0.3, "first": 0.3}


def write_tokenizers(library: Library, run: Run) -> None:
    """Write `tokenizer` (CLAP's) and `tokenizer_2` (T5's) into the run's checkpoint, where none are yet.

    They stay when the library changes: to encoders that learnt with them, other numbers would be other words.
    """
    if all((run.checkpoint / name).is_dir() for name in TOKENIZERS):
        return
    captions = [caption for captions in library.captions for caption in captions]
    texts = captions + [text.lower() for text in captions]
    letters = string.ascii_letters + string.digits + string.punctuation
    # Unigram's training does better from each word once: it has few words to choose its pieces for.
    words = sorted({word for text in texts for word in text.split()})
    write_roberta_tokenizer(run.checkpoint / "tokenizer", [*texts, letters], VOCABULARIES[0], TOKENS[0])
    write_t5_tokenizer(run.checkpoint / "tokenizer_2", [*words, letters], VOCABULARIES[1], TOKENS[1])


def read_tokenizers(run: Run) -> tuple[Any, Any]:
    """CLAP's and T5's tokenizers of a run's checkpoint, as the pipeline reads them."""
    from transformers import RobertaTokenizerFast, T5TokenizerFast

    return (
        RobertaTokenizerFast.from_pretrained(run.checkpoint / "tokenizer"),
        T5TokenizerFast.from_pretrained(run.checkpoint / "tokenizer_2"),
    )


def tokenize(tokenizer: Any, texts: list[str], device: str) -> tuple[Tensor, Tensor]:
    """Ids and mask, (B, N) both, padded to the longest as in the pipeline."""
    limit = tokenizer.model_max_length
    tokens = tokenizer(texts, padding=True, max_length=limit, truncation=True, return_tensors="pt")
    return tokens.input_ids.to(device), tokens.attention_mask.to(device)


def varied(caption: str, rng: np.random.Generator) -> str:
    """A caption as somebody in a hurry, or in a flow of words, would write it."""
    words: list[str] = []
    for word in caption.split():
        if word.lower() in SMALL and rng.random() < LEFT_OUT:
            continue
        if rng.random() < PUT_IN:
            words.append(_meaningless(rng))
        words.append(word)
    text = " ".join(words)
    case = rng.choice([*CAPITALS], p=[*CAPITALS.values()])
    if case == "none":
        text = text.lower()
    elif case == "first":
        text = text[:1].upper() + text[1:]
    return text.rstrip(".") + rng.choice(["", "."])


def _meaningless(rng: np.random.Generator) -> str:
    """A word of two to eight letters that can be spoken but means nothing."""
    syllables = rng.integers(1, 5)
    return "".join(rng.choice(list("bcdfghklmnprstvw")) + rng.choice(list("aeiou")) for _ in range(syllables))
