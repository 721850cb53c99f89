"""The projection model: two encoders' states become one sequence for the language model.

In: CLAP's text embedding (B, N, D), N being 1, and the states of the second text encoder (Flan-T5, or the
text encoder of VITS for speech), (B, M, D1), each with its mask or without.
Out: one sequence of the language model's width C, (B, N + M + 4, C), and its mask:

    start, W x + b (N), end, start_1, W_1 x_1 + b_1 (M), end_1

This is the front of GPT-2's input in AudioLDM 2 (Liu et al. 2023, on translating conditions to the
language of audio with GPT-2): encoders of different widths brought to one, with a learned vector at either
end of each so that GPT-2 can tell where one stops and the other begins. The speech checkpoints also add a
learned position embedding to the states of the second encoder, before its projection.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange, repeat
from torch import Tensor, nn

from audioldm2.models.stage import Stage


@dataclass(frozen=True)
class ProjectionConfig:
    """The sizes. `langauge_model_dim` is spelled as the Hub's configs spell it.

    `use_learned_position_embedding` is on for any value but None, as in the checkpoints' own code;
    `max_seq_length` is then the number of positions, which every input must have exactly.
    """

    text_encoder_dim: int
    text_encoder_1_dim: int
    langauge_model_dim: int
    use_learned_position_embedding: bool | None = None
    max_seq_length: int | None = None

    def __post_init__(self) -> None:
        if self.use_learned_position_embedding is not None and self.max_seq_length is None:
            raise ValueError(
                f"use_learned_position_embedding = {self.use_learned_position_embedding} needs "
                "max_seq_length, the number of positions"
            )

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> ProjectionConfig:
        """From a config.json's content; other keys change nothing.

        Raises:
            ValueError: a size is missing, or a position embedding has no length.
        """
        required = ("text_encoder_dim", "text_encoder_1_dim", "langauge_model_dim")
        missing = [key for key in required if content.get(key) is None]
        if missing:
            raise ValueError(f"the projection model's config lacks {', '.join(missing)}")
        return cls(
            **{key: content[key] for key in required},
            use_learned_position_embedding=content.get("use_learned_position_embedding"),
            max_seq_length=content.get("max_seq_length"),
        )


def _check(name: str, states: Tensor, width: int, mask_name: str, mask: Tensor | None) -> None:
    if states.dim() != 3 or states.shape[-1] != width:
        raise ValueError(f"{name} has shape {tuple(states.shape)}; (batch, tokens, {width}) is needed")
    if mask is not None and mask.shape != states.shape[:2]:
        raise ValueError(
            f"{mask_name} has shape {tuple(mask.shape)}; {name} needs one of shape {tuple(states.shape[:2])}"
        )


class ProjectionModel(Stage[ProjectionConfig]):
    """Two sequences of states to one, with a learned vector at either end of each."""

    def __init__(self, config: ProjectionConfig):
        super().__init__()
        self.config = config
        width = config.langauge_model_dim
        self.projection = nn.Linear(config.text_encoder_dim, width)
        self.projection_1 = nn.Linear(config.text_encoder_1_dim, width)
        self.start = nn.Parameter(torch.ones(width))
        self.end = nn.Parameter(torch.ones(width))
        self.start_1 = nn.Parameter(torch.ones(width))
        self.end_1 = nn.Parameter(torch.ones(width))
        if config.use_learned_position_embedding is not None and config.max_seq_length is not None:
            # (1, D1, positions), channels first as the checkpoints have it
            self.positions = nn.Parameter(torch.zeros(1, config.text_encoder_1_dim, config.max_seq_length))

    def forward(
        self,
        hidden_states: Tensor,
        hidden_states_1: Tensor,
        attention_mask: Tensor | None = None,
        attention_mask_1: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Project and join the two sequences.

        Args:
            hidden_states: (B, N, text_encoder_dim), from the first text encoder.
            hidden_states_1: (B, M, text_encoder_1_dim), from the second.
            attention_mask: (B, N), 1 for tokens and 0 for padding; None next to a given `attention_mask_1`
                means that all are tokens.
            attention_mask_1: (B, M), likewise.

        Returns:
            The states (B, N + M + 4, langauge_model_dim), and their mask (B, N + M + 4), in which the four
            learned vectors count as tokens, or None if neither mask was given.

        Raises:
            ValueError: an input's shape does not fit the config or the other inputs.
        """
        config = self.config
        _check("hidden_states", hidden_states, config.text_encoder_dim, "attention_mask", attention_mask)
        _check(
            "hidden_states_1",
            hidden_states_1,
            config.text_encoder_1_dim,
            "attention_mask_1",
            attention_mask_1,
        )
        batch, tokens, _ = hidden_states.shape
        batch_1, tokens_1, _ = hidden_states_1.shape
        if batch != batch_1:
            raise ValueError(f"hidden_states is a batch of {batch} and hidden_states_1 one of {batch_1}")
        if config.use_learned_position_embedding is not None:
            if tokens_1 != config.max_seq_length:
                raise ValueError(
                    f"hidden_states_1 has {tokens_1} tokens; the learned position embedding has "
                    f"{config.max_seq_length}, so pad to max_seq_length={config.max_seq_length}"
                )
            hidden_states_1 = hidden_states_1 + rearrange(self.positions, "1 d m -> 1 m d")

        def learned(vector: Tensor) -> Tensor:
            return repeat(vector, "c -> b 1 c", b=batch)

        x, x_1 = self.projection(hidden_states), self.projection_1(hidden_states_1)
        ends = [learned(v).to(x.dtype) for v in (self.start, self.end, self.start_1, self.end_1)]
        states = torch.cat([ends[0], x, ends[1], ends[2], x_1, ends[3]], dim=1)  # (B, N + M + 4, C)

        given = attention_mask if attention_mask is not None else attention_mask_1
        if given is None:
            return states, None
        if attention_mask is None:
            attention_mask = given.new_ones(batch, tokens)
        if attention_mask_1 is None:
            attention_mask_1 = given.new_ones(batch, tokens_1)
        one, two = given.new_ones(batch, 1), given.new_ones(batch, 2)
        return states, torch.cat([one, attention_mask, two, attention_mask_1, one], dim=1)
