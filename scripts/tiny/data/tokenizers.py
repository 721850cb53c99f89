"""The two tokenizers of the tiny checkpoint, trained on the library's captions, and their use in training.

Both know every letter, so an unknown word is split into pieces and never becomes <unk>. Users' prompts are
less tidy than captions; `vary_caption` imitates that in training: it drops function words now and then,
inserts meaningless words, and changes capitals and full stops.
"""

from __future__ import annotations

import string
from typing import Any

import numpy as np
import torch
from torch import Tensor

from audioldm2.checkpoints.folder import load_tokenizer
from audioldm2.checkpoints.formats import TOKENIZERS
from scripts.random_tokenizers import write_roberta_tokenizer, write_t5_tokenizer
from scripts.tiny.data.library import Library
from scripts.tiny.run import Run
from scripts.tiny.sizes import MAX_TOKENS, VOCABULARY_SIZES

# Words without which a caption means the same.
FUNCTION_WORDS = frozenset(
    ("a", "an", "the", "of", "is", "are", "be", "there", "this", "with", "here", "sound", "you", "one")
)
DROP_PROBABILITY = 0.1  # of each function word
INSERT_PROBABILITY = 0.03  # of a meaningless word before each word
CASE_PROBABILITIES = {"unchanged": 0.4, "lower": 0.3, "capitalized": 0.3}


def write_tokenizers(library: Library, run: Run) -> None:
    """Write `tokenizer` (CLAP's) and `tokenizer_2` (T5's) into the run's checkpoint unless they are there.

    Existing ones are kept even if the library has changed: the encoders were trained with them, and to an
    encoder other token ids are other words.
    """
    if all((run.checkpoint / name).is_dir() for name in TOKENIZERS):
        return
    captions = [caption for captions in library.captions for caption in captions]
    texts = captions + [text.lower() for text in captions]
    letters = string.ascii_letters + string.digits + string.punctuation
    # Unigram chooses better pieces from a list of distinct words: there are few words to learn from.
    words = sorted({word for text in texts for word in text.split()})
    write_roberta_tokenizer(
        run.checkpoint / "tokenizer", [*texts, letters], VOCABULARY_SIZES[0], MAX_TOKENS[0]
    )
    write_t5_tokenizer(run.checkpoint / "tokenizer_2", [*words, letters], VOCABULARY_SIZES[1], MAX_TOKENS[1])


def read_tokenizers(run: Run) -> tuple[Any, Any]:
    """CLAP's and T5's tokenizers of a run's checkpoint, as the pipeline reads them."""
    return (
        load_tokenizer(run.checkpoint / "tokenizer", "RobertaTokenizer"),
        load_tokenizer(run.checkpoint / "tokenizer_2", "T5Tokenizer"),
    )


def tokenize(tokenizer: Any, texts: list[str], device: str = "cpu") -> tuple[Tensor, Tensor]:
    """Token ids and mask, both (B, N), padded to the longest text as in the pipeline."""
    limit = tokenizer.model_max_length
    tokens = tokenizer(texts, padding=True, max_length=limit, truncation=True)
    return torch.tensor(tokens.input_ids, device=device), torch.tensor(tokens.attention_mask, device=device)


def vary_caption(caption: str, rng: np.random.Generator) -> str:
    """The caption as a hurried or a wordy user might type it."""
    words: list[str] = []
    for word in caption.split():
        if word.lower() in FUNCTION_WORDS and rng.random() < DROP_PROBABILITY:
            continue
        if rng.random() < INSERT_PROBABILITY:
            words.append(_nonsense_word(rng))
        words.append(word)
    text = " ".join(words)
    case = rng.choice([*CASE_PROBABILITIES], p=[*CASE_PROBABILITIES.values()])
    if case == "lower":
        text = text.lower()
    elif case == "capitalized":
        text = text[:1].upper() + text[1:]
    return text.rstrip(".") + str(rng.choice(["", "."]))


def _nonsense_word(rng: np.random.Generator) -> str:
    """A pronounceable word of two to eight letters that means nothing."""
    syllables = rng.integers(1, 5)
    return "".join(rng.choice(list("bcdfghklmnprstvw")) + rng.choice(list("aeiou")) for _ in range(syllables))
