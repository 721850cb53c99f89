"""The text encoder of VITS (Kim et al. 2021, section 2.5.2), for the transcriptions of speech checkpoints.

In: phoneme ids (B, N) with their mask (B, N).
Out: one state for each phoneme, (B, N, C), zero at padding.

A transformer encoder of the older, post-norm form,

    x = norm(x + attention(x)),   x = norm(x + feed_forward(x))

whose feed-forward layers are convolutions over the sequence, and whose attention knows places only relative
to each other (Shaw et al. 2018, equations 3 and 4): key and value of a pair of places no further apart than
`window_size` get a learned vector of their distance added,

    score_ij = q_i · (k_j + a_{j-i}) / sqrt(d),   out_i = sum_j p_ij (v_j + b_{j-i}).

In VITS there are no such vectors beyond the window, where Shaw et al. repeat the outermost one.

A checkpoint holds a whole VITS; only its text encoder, up to the states, is used. There is no dropout.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from audioldm2.models.config import known_fields
from audioldm2.models.layers import activation, mask_bias
from audioldm2.models.stage import Stage


@dataclass(frozen=True)
class VitsTextConfig:
    """The sizes, under the names of VitsModel's config.json."""

    vocab_size: int = 38
    hidden_size: int = 192
    num_hidden_layers: int = 6
    num_attention_heads: int = 2
    window_size: int = 4
    use_bias: bool = True
    ffn_dim: int = 768
    ffn_kernel_size: int = 3
    hidden_act: str = "relu"
    layer_norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        activation(self.hidden_act, "hidden_act")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size = {self.hidden_size} does not divide into "
                f"num_attention_heads = {self.num_attention_heads} heads"
            )
        if not self.window_size or self.window_size < 1:
            raise ValueError(f"window_size = {self.window_size} is not supported; 1 or more is")

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> VitsTextConfig:
        """From a config.json's content; the keys of the other parts of VITS are passed over.

        Raises:
            ValueError: another activation, no window, or sizes that do not go together.
        """
        return cls(**known_fields(cls, content))


class RelativeAttention(nn.Module):
    """Self-attention with relative positions, (B, N, C) -> (B, N, C).

    The probabilities themselves are needed for the values' part, so this cannot go through
    scaled_dot_product_attention, which keeps them to itself.
    """

    def __init__(self, config: VitsTextConfig):
        super().__init__()
        self.heads = config.num_attention_heads
        self.window = config.window_size
        width = config.hidden_size
        distances = 2 * config.window_size + 1
        self.qkv = nn.Linear(width, 3 * width, bias=config.use_bias)
        self.out = nn.Linear(width, width, bias=config.use_bias)
        # One vector for each distance j - i = -window ... window, shared by the heads.
        self.key_distances = nn.Parameter(torch.zeros(1, distances, width // self.heads))
        self.value_distances = nn.Parameter(torch.zeros(1, distances, width // self.heads))

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        q, k, v = rearrange(self.qkv(x), "b n (three h d) -> three b h n d", three=3, h=self.heads)
        q = q / math.sqrt(q.shape[-1])
        batch, heads, length, _ = q.shape
        place = torch.arange(length, device=x.device)

        # Scores by distance (B, h, N, 2w+1), spread out to scores by place (B, h, N, N), none beyond the
        # window.
        distance = rearrange(place, "m -> 1 m") - rearrange(place, "n -> n 1")  # (N, N)
        within = distance.abs() <= self.window
        column = (distance + self.window).clamp(0, 2 * self.window).expand(batch, heads, length, length)
        by_distance = q @ self.key_distances.mT
        scores = q @ k.mT + by_distance.gather(-1, column).masked_fill(~within, 0)

        probabilities = torch.softmax(scores + bias, dim=-1)  # (B, h, N, N)

        # The probabilities of the places i - w ... i + w (B, h, N, 2w+1), none outside the sequence.
        neighbor = rearrange(place, "n -> n 1") + torch.arange(-self.window, self.window + 1, device=x.device)
        inside = (neighbor >= 0) & (neighbor < length)
        column = neighbor.clamp(0, length - 1).expand(batch, heads, length, 2 * self.window + 1)
        near = probabilities.gather(-1, column).masked_fill(~inside, 0)
        out = probabilities @ v + near @ self.value_distances
        return self.out(rearrange(out, "b h n d -> b n (h d)"))


class ConvFeedForward(nn.Module):
    """Two convolutions over the sequence that never see padding: (B, N, C) -> (B, N, C)."""

    def __init__(self, config: VitsTextConfig):
        super().__init__()
        kernel = config.ffn_kernel_size
        self.padding = ((kernel - 1) // 2, kernel // 2)  # left and right, to keep the length
        self.up = nn.Conv1d(config.hidden_size, config.ffn_dim, kernel)
        self.down = nn.Conv1d(config.ffn_dim, config.hidden_size, kernel)
        self.activation = activation(config.hidden_act)

    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
        x, tokens = rearrange(x, "b n c -> b c n"), rearrange(tokens, "b n 1 -> b 1 n")
        x = self.activation(self.up(F.pad(x * tokens, self.padding)))
        x = self.down(F.pad(x * tokens, self.padding)) * tokens
        return rearrange(x, "b c n -> b n c")


class Layer(nn.Module):
    """One layer of the encoder, (B, N, C) -> (B, N, C)."""

    def __init__(self, config: VitsTextConfig):
        super().__init__()
        self.attention = RelativeAttention(config)
        self.attention_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.feed_forward = ConvFeedForward(config)
        self.feed_forward_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, x: Tensor, tokens: Tensor, bias: Tensor) -> Tensor:
        x = self.attention_norm(x + self.attention(x, bias))
        return self.feed_forward_norm(x + self.feed_forward(x, tokens))


class VitsTextEncoder(Stage[VitsTextConfig]):
    """The text encoder of VITS: phoneme ids to states."""

    def __init__(self, config: VitsTextConfig):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([Layer(config) for _ in range(config.num_hidden_layers)])

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """The states of a batch of phoneme sequences.

        Args:
            input_ids: (B, N), ids below vocab_size.
            attention_mask: (B, N), 1 for phonemes and 0 for padding.

        Returns:
            (B, N, hidden_size); zero at padding.

        Raises:
            ValueError: a shape is not (B, N), or the two differ.
        """
        if input_ids.dim() != 2 or attention_mask.shape != input_ids.shape:
            raise ValueError(
                f"input_ids has shape {tuple(input_ids.shape)} and attention_mask "
                f"{tuple(attention_mask.shape)}; "
                "both must be (batch, tokens)"
            )
        x = self.embedding(input_ids) * math.sqrt(self.config.hidden_size)  # (B, N, C)
        # Half of the lowest number: with a score added it is still finite.
        bias = mask_bias(attention_mask, x.dtype, torch.finfo(x.dtype).min / 2)
        tokens = rearrange(attention_mask, "b n -> b n 1").to(x.dtype)
        for layer in self.layers:
            x = layer(x, tokens, bias)
        return x * tokens
