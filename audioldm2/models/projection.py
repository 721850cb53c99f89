"""projection_model: joins the outputs of the two text encoders into one sequence, the input of GPT-2.

    CLAP's embedding (B, N, D), N = 1, and the second text encoder's states (B, M, D1)  ->  (B, N + M + 4, C)

The second text encoder is Flan-T5, or VITS's text encoder for speech. Both inputs are projected to GPT-2's
width C, and a learned vector before and after each tells GPT-2 where one ends and the other begins:

    start, W x + b (N), end, start_1, W_1 x_1 + b_1 (M), end_1

See Liu et al. 2023, section III, on translating conditions to the language of audio with GPT-2. The speech
checkpoints also add a learned position embedding to the second encoder's states, before the projection.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange, repeat
from torch import Tensor, nn

from audioldm2.models.config import check_sizes
from audioldm2.models.stage import Stage

# The joined sequence has the second encoder's states and these: CLAP's vector and four learned ones.
NUM_ADDED_VECTORS = 5


@dataclass(frozen=True)
class ProjectionConfig:
    """Sizes: the keys of the projection model's config.json (`langauge_model_dim` is the Hub's spelling).

    As in diffusers, any `use_learned_position_embedding` other than None switches the position embedding on.
    The second input then must have exactly `max_seq_length` positions.
    """

    text_encoder_dim: int
    text_encoder_1_dim: int
    langauge_model_dim: int
    use_learned_position_embedding: bool | None = None
    max_seq_length: int | None = None

    def __post_init__(self) -> None:
        check_sizes(self)
        if self.use_learned_position_embedding is not None and self.max_seq_length is None:
            raise ValueError(
                f"use_learned_position_embedding = {self.use_learned_position_embedding} needs "
                "max_seq_length, the number of positions"
            )

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> ProjectionConfig:
        """The config from a config.json.

        Args:
            content: the JSON object; other keys are ignored.

        Raises:
            ValueError: a size is missing, or a position embedding has no length.
        """
        required = ("text_encoder_dim", "text_encoder_1_dim", "langauge_model_dim")
        missing = [key for key in required if content.get(key) is None]
        if missing:
            raise ValueError(f"the config of the projection model lacks {', '.join(missing)}")
        return cls(
            **{key: content[key] for key in required},
            use_learned_position_embedding=content.get("use_learned_position_embedding"),
            max_seq_length=content.get("max_seq_length"),
        )


def _check(name: str, states: Tensor, width: int, mask_name: str, mask: Tensor | None) -> None:
    if states.dim() != 3 or states.shape[-1] != width:
        raise ValueError(f"{name} has shape {tuple(states.shape)}; it must be (batch, tokens, {width})")
    if mask is not None and mask.shape != states.shape[:2]:
        raise ValueError(
            f"{mask_name} has shape {tuple(mask.shape)}; for {name} it must be {tuple(states.shape[:2])}"
        )


class ProjectionModel(Stage[ProjectionConfig]):
    """Joins two sequences of states into one, with a learned vector before and after each.

    Args:
        config: sizes, kept as `projection.config`.

    Example:
        >>> projection = ProjectionModel.from_pretrained("tiny", subfolder="projection_model")
        >>> clap = torch.randn(2, 1, projection.config.text_encoder_dim)  # text_features[:, None]
        >>> t5 = torch.randn(2, 6, projection.config.text_encoder_1_dim)  # hidden states
        >>> states, mask = projection(clap, t5, torch.ones(2, 1), torch.ones(2, 6))
        >>> states.shape, mask.shape  # 1 + 6 tokens and 4 learned vectors
        (torch.Size([2, 11, 128]), torch.Size([2, 11]))
    """

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
            # (1, D1, positions): channels first, as in the checkpoints
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
            attention_mask: (B, N), 1 for tokens and 0 for padding; None stands for no padding.
            attention_mask_1: (B, M), the same for the second.

        Returns:
            states: (B, N + M + 4, langauge_model_dim).
            mask: (B, N + M + 4), in which the four learned vectors count as tokens; None if neither mask was
                given.

        Raises:
            ValueError: a shape does not fit the config or the other inputs.
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
            raise ValueError(f"hidden_states has a batch of {batch} and hidden_states_1 one of {batch_1}")
        if config.use_learned_position_embedding is not None:
            if tokens_1 != config.max_seq_length:
                raise ValueError(
                    f"hidden_states_1 has {tokens_1} tokens and the learned position embedding "
                    f"{config.max_seq_length}; pad to max_seq_length={config.max_seq_length}"
                )
            hidden_states_1 = hidden_states_1 + rearrange(self.positions, "1 d m -> 1 m d")

        x, x_1 = self.projection(hidden_states), self.projection_1(hidden_states_1)
        start, end, start_1, end_1 = (
            repeat(vector, "c -> b 1 c", b=batch).to(x.dtype)
            for vector in (self.start, self.end, self.start_1, self.end_1)
        )
        states = torch.cat([start, x, end, start_1, x_1, end_1], dim=1)  # (B, N + M + 4, C)

        given = attention_mask if attention_mask is not None else attention_mask_1
        if given is None:
            return states, None
        if attention_mask is None:
            attention_mask = given.new_ones(batch, tokens)
        if attention_mask_1 is None:
            attention_mask_1 = given.new_ones(batch, tokens_1)
        one, two = given.new_ones(batch, 1), given.new_ones(batch, 2)
        return states, torch.cat([one, attention_mask, two, attention_mask_1, one], dim=1)
