"""Captions as the UNet attends to them, encoded once before a training."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm.auto import tqdm

from audioldm2.conditioning import token_limit
from audioldm2.pipeline import AudioLDM2Pipeline
from audioldm2.runtime.foreign import setting

ENCODED_AT_ONCE = 256  # captions of small encoders; large ones take as long in smaller batches


@dataclass(frozen=True)
class EncodedTexts:
    """What the encoders make of n texts.

    Attributes:
        states: T5's states, (m, M, 1024) float16; the first n rows are the texts', the others empty prompts'.
        mask: their mask, (m, M).
        vectors: GPT-2's vectors, (m, 8, 768).
        uncond: (n,), the row of an empty prompt padded to the text's length.
    """

    states: Tensor
    mask: Tensor
    vectors: Tensor
    uncond: Tensor

    def select(self, rows: Tensor, device: str | torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Vectors, states and mask of some rows, in the order of the UNet's arguments.

        They are as long as the longest text of all, not of these rows: with one shape, a UNet is compiled
        once.
        """
        return self.vectors[rows].to(device), self.states[rows].float().to(device), self.mask[rows].to(device)


@torch.no_grad()
def encode_texts(
    pipe: AudioLDM2Pipeline, texts: list[str], at_once: int = ENCODED_AT_ONCE, show: bool | None = None
) -> EncodedTexts:
    """Encode texts, and empty prompts to go with them, as the pipeline does for guidance.

    Only texts of the same length are encoded together. Padding a text to a longer one would shift the
    positions of the vectors that GPT-2 generates.

    Args:
        pipe: the pipeline; its own progress bars are not shown.
        texts: n captions. Those that are too long for the encoders are cut off, with a warning.
        at_once: texts that are encoded at once, at most.
        show: whether to show a progress bar; None is on a terminal.
    """
    limit = token_limit(pipe, pipe.tokenizer_2)
    text_lengths = [len(ids) for ids in pipe.tokenizer_2(texts, truncation=True, max_length=limit).input_ids]
    bars = pipe.progress_bar_config
    width, longest = setting(pipe.projection_model, "text_encoder_1_dim"), max(text_lengths)
    lengths = sorted(set(text_lengths))
    count = len(texts) + len(lengths)
    states = torch.zeros(count, longest, width, dtype=torch.float16)
    mask = torch.zeros(count, longest, dtype=torch.long)
    gpt2 = pipe.language_model.config
    vectors = torch.zeros(count, gpt2.max_new_tokens, gpt2.n_embd)
    uncond = torch.tensor([len(texts) + lengths.index(length) for length in text_lengths])
    hidden = None if show is None else not show
    pipe.set_progress_bar_config(disable=True)
    try:
        with tqdm(total=len(texts), desc="Encoding captions", disable=hidden) as bar:
            for length in lengths:
                same = torch.tensor([i for i, n in enumerate(text_lengths) if n == length])
                for rows in same.split(at_once):
                    batch = [texts[i] for i in rows]
                    encoded = pipe.encode_prompt(batch, pipe.device, 1, True, negative_prompt="")
                    both_rows = torch.cat([uncond[rows], rows])  # negative prompts come first
                    for target, values in zip((states, mask, vectors), encoded, strict=True):
                        target[:, : values.shape[1]][both_rows] = values.to("cpu", target.dtype)
                    bar.update(len(rows))
    finally:
        pipe.set_progress_bar_config(**bars)
    return EncodedTexts(states, mask, vectors, uncond)
