"""text_encoder_2 of the speech checkpoints: the text encoder of VITS (Kim et al. 2021, section 2.5.2).

    input_ids (B, N), attention_mask (B, N)  ->  one hidden state per phoneme (B, N, C), zero at padding

It encodes the transcription, the words to be spoken. It is a transformer encoder in the post-norm form

    x = norm(x + attention(x)),   x = norm(x + feed_forward(x))

with convolutions over the sequence as feed-forward. Attention uses relative positions (Shaw et al. 2018,
equations 3 and 4): for positions i and j at most `window_size` apart, a learned vector of their distance is
added to the key and another one to the value,

    score_ij = q_i · (k_j + a_{j-i}) / sqrt(d),   out_i = sum_j p_ij (v_j + b_{j-i}).

Beyond the window VITS adds nothing, whereas Shaw et al. use the vectors of the largest distance.

A checkpoint contains a whole VITS, of which only the text encoder is used, up to its hidden states. Dropout,
which acts in training only, is left out.
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

from audioldm2.models.config import check_sizes, known_fields
from audioldm2.models.layers import activation, mask_bias
from audioldm2.models.stage import Stage


@dataclass(frozen=True)
class VitsTextConfig:
    """Sizes of the text encoder: keys of VITS's config.json, with transformers' defaults."""

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
        check_sizes(self, layers=("num_hidden_layers",), positive=("layer_norm_eps",))
        activation(self.hidden_act, "hidden_act")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"num_attention_heads = {self.num_attention_heads} must divide "
                f"hidden_size = {self.hidden_size}"
            )

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> VitsTextConfig:
        """The config from a config.json.

        Args:
            content: the JSON object; keys of the other parts of VITS are ignored.

        Raises:
            ValueError: a value that is not supported; the message names the key.
        """
        return cls(**known_fields(cls, content))


class RelativeAttention(nn.Module):
    """Self-attention with relative positions: (B, N, C) -> (B, N, C).

    The values' relative positions need the attention probabilities, which scaled_dot_product_attention does
    not return, so they are computed here.
    """

    def __init__(self, config: VitsTextConfig):
        super().__init__()
        self.heads = config.num_attention_heads
        self.window = config.window_size
        width = config.hidden_size
        distances = 2 * config.window_size + 1
        self.qkv = nn.Linear(width, 3 * width, bias=config.use_bias)
        self.out = nn.Linear(width, width, bias=config.use_bias)
        # One vector for each distance j - i from -window to window, shared by the heads.
        self.key_distances = nn.Parameter(torch.zeros(1, distances, width // self.heads))
        self.value_distances = nn.Parameter(torch.zeros(1, distances, width // self.heads))

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        q, k, v = rearrange(self.qkv(x), "b n (three h d) -> three b h n d", three=3, h=self.heads)
        q = q / math.sqrt(q.shape[-1])
        batch, heads, length, _ = q.shape
        position = torch.arange(length, device=x.device)

        # Scores by distance, (B, h, N, 2w+1), are gathered into scores by position, (B, h, N, N), which are 0
        # beyond the window.
        distance = rearrange(position, "m -> 1 m") - rearrange(position, "n -> n 1")  # (N, N)
        within = distance.abs() <= self.window
        column = (distance + self.window).clamp(0, 2 * self.window).expand(batch, heads, length, length)
        by_distance = q @ self.key_distances.mT
        scores = q @ k.mT + by_distance.gather(-1, column).masked_fill(~within, 0)

        probabilities = torch.softmax(scores + bias, dim=-1)  # (B, h, N, N)

        # The probabilities of positions i - w to i + w, (B, h, N, 2w+1), 0 outside of the sequence.
        offset = torch.arange(-self.window, self.window + 1, device=x.device)
        neighbor = rearrange(position, "n -> n 1") + offset
        inside = (neighbor >= 0) & (neighbor < length)
        column = neighbor.clamp(0, length - 1).expand(batch, heads, length, 2 * self.window + 1)
        near = probabilities.gather(-1, column).masked_fill(~inside, 0)
        out = probabilities @ v + near @ self.value_distances
        states: Tensor = self.out(rearrange(out, "b h n d -> b n (h d)"))
        return states


class ConvFeedForward(nn.Module):
    """Two convolutions over the sequence, with zeros in place of padding: (B, N, C) -> (B, N, C).

    `tokens` is the mask as (B, N, 1), in the states' dtype.
    """

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
    """Attention and feed-forward, each with a residual connection and then a norm: (B, N, C) -> (B, N, C)."""

    def __init__(self, config: VitsTextConfig):
        super().__init__()
        self.attention = RelativeAttention(config)
        self.attention_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.feed_forward = ConvFeedForward(config)
        self.feed_forward_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, x: Tensor, tokens: Tensor, bias: Tensor) -> Tensor:
        x = self.attention_norm(x + self.attention(x, bias))
        out: Tensor = self.feed_forward_norm(x + self.feed_forward(x, tokens))
        return out


class VitsTextEncoder(Stage[VitsTextConfig]):
    """The text encoder of VITS: phoneme ids to one hidden state per phoneme.

    Args:
        config: sizes, kept as `vits.config`.

    Example:
        >>> vits = VitsTextEncoder(VitsTextConfig()).eval()  # with random weights
        >>> input_ids = torch.tensor([[19, 4, 7, 7, 11]])  # from VITS's tokenizer
        >>> vits(input_ids, attention_mask=torch.ones(1, 5)).shape  # (batch, phonemes, hidden_size)
        torch.Size([1, 5, 192])
    """

    def __init__(self, config: VitsTextConfig):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([Layer(config) for _ in range(config.num_hidden_layers)])

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Encode phoneme sequences.

        Args:
            input_ids: phoneme ids, (B, N).
            attention_mask: (B, N), 1 for phonemes and 0 for padding.

        Returns:
            Hidden states, (B, N, hidden_size), zero at padding.

        Raises:
            ValueError: the shapes differ or are not (B, N).
        """
        if input_ids.dim() != 2 or attention_mask.shape != input_ids.shape:
            raise ValueError(
                f"input_ids has shape {tuple(input_ids.shape)} and attention_mask "
                f"{tuple(attention_mask.shape)}; both must be (batch, tokens)"
            )
        x: Tensor = self.embedding(input_ids) * math.sqrt(self.config.hidden_size)  # (B, N, C)
        # Half of the lowest number, so that the sum with a score is still finite.
        bias = mask_bias(attention_mask, x.dtype, torch.finfo(x.dtype).min / 2)
        tokens = rearrange(attention_mask, "b n -> b n 1").to(x.dtype)
        for layer in self.layers:
            x = layer(x, tokens, bias)
        return x * tokens
