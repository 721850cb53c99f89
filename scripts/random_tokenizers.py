"""Small tokenizers of the two kinds that AudioLDM 2 uses, trained on the spot on a handful of captions.

A checkpoint needs tokenizers to take prompts, and the real ones are only on the Hub.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

EXAMPLE_CAPTIONS = (
    "The sound of a hammer hitting a wooden surface.",
    "A dog barks loudly while rain falls on a tin roof.",
    "Techno music with a strong, upbeat tempo and high melodic riffs.",
    "A bell rings over wind and waves; birds chirp, an engine hums.",
    "Low quality, average quality, noisy and dull.",
)


def write_roberta_tokenizer(
    folder: Path, captions: Iterable[str] = EXAMPLE_CAPTIONS, vocab_size: int = 400, max_length: int = 64
) -> int:
    """Train byte-level BPE like RoBERTa's, the `tokenizer` of a checkpoint.

    Args:
        folder: where to write it; created if missing.
        captions: texts to train on.
        vocab_size: maximum number of tokens in the vocabulary.
        max_length: maximum number of tokens of a prompt.

    Returns:
        The number of tokens in the vocabulary.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<s>", "<pad>", "</s>", "<unk>", "<mask>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(captions, trainer)
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    config = {
        "tokenizer_class": "RobertaTokenizer",
        "bos_token": "<s>",
        "cls_token": "<s>",
        "eos_token": "</s>",
        "sep_token": "</s>",
        "unk_token": "<unk>",
        "pad_token": "<pad>",
        "mask_token": "<mask>",
        "add_prefix_space": False,
        "trim_offsets": True,
        "errors": "replace",
        "model_max_length": max_length,
    }
    _write(folder, tokenizer, config)
    tokenizer.model.save(str(folder))  # vocab.json and merges.txt, which some releases of transformers read
    return int(tokenizer.get_vocab_size())


def write_t5_tokenizer(
    folder: Path, captions: Iterable[str] = EXAMPLE_CAPTIONS, vocab_size: int = 160, max_length: int = 32
) -> int:
    """Train a unigram tokenizer like T5's, the `tokenizer_2` of a checkpoint.

    Args:
        folder: where to write it; created if missing.
        captions: texts to train on.
        vocab_size: maximum number of tokens in the vocabulary.
        max_length: maximum number of tokens of a prompt.

    Returns:
        The number of tokens in the vocabulary.
    """
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()]
    )
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=vocab_size,
        special_tokens=["<pad>", "</s>", "<unk>"],
        unk_token="<unk>",
        show_progress=False,
    )
    tokenizer.train_from_iterator(captions, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    config = {
        "tokenizer_class": "T5Tokenizer",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "pad_token": "<pad>",
        "extra_ids": 0,
        "additional_special_tokens": [],
        "model_max_length": max_length,
    }
    _write(folder, tokenizer, config)
    return int(tokenizer.get_vocab_size())


def _write(folder: Path, tokenizer: Tokenizer, config: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    content = json.loads(tokenizer.to_str())
    if "merges" in content["model"]:
        # As "a b" instead of ["a", "b"], which tokenizers before 0.20 cannot read. The two are equivalent,
        # because the byte-level alphabet has no space.
        merges = content["model"]["merges"]
        content["model"]["merges"] = [
            merge if isinstance(merge, str) else " ".join(merge) for merge in merges
        ]
    text = json.dumps(content, indent=2, ensure_ascii=False)
    (folder / "tokenizer.json").write_text(text, encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
