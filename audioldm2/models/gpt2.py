"""GPT-2 as AudioLDM 2 uses it: a generator of vectors, not of words.

In: the projection model's sequence, (B, T, C), with its mask (B, T).
Out: `max_new_tokens` vectors (B, max_new_tokens, C), an estimate of the "language of audio" that the UNet
attends to (Liu et al. 2023, "AudioLDM 2", on translating conditions to the language of audio with GPT-2).

The network is the decoder of Radford et al. 2019: blocks of

    x = x + attention(norm(x)),   x = x + feed_forward(norm(x))

with causal attention, learned positions and a final norm. What differs from the textbook is the loop: no word
is ever sampled. The last state after the final norm is itself the next input,

    x_{T+1} = GPT2(x_1 ... x_T)_T

so the word embeddings and the output layer of a checkpoint are not used. Every element of the sequence has a
position, padding included; padding is only masked in attention.

There is no dropout: the `*_pdrop` keys of a config matter in training only.
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
from audioldm2.models.layers import activation, attention
from audioldm2.models.stage import Stage


@dataclass(frozen=True)
class GPT2Config:
    """The sizes, under the names of GPT-2's config.json.

    `reorder_and_upcast_attn` changes nothing here, because scaled_dot_product_attention computes scores and
    softmax in float32 anyway. It is stored, like `vocab_size`, so that a saved config is complete.
    """

    vocab_size: int = 50257
    n_positions: int = 1024
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    n_inner: int | None = None  # 4 · n_embd if None
    activation_function: str = "gelu_new"
    layer_norm_epsilon: float = 1e-5
    scale_attn_weights: bool = True
    scale_attn_by_inverse_layer_idx: bool = False
    reorder_and_upcast_attn: bool = False
    max_new_tokens: int = 8

    def __post_init__(self) -> None:
        check_sizes(self, layers=("n_layer",), positive=("layer_norm_epsilon",))
        activation(self.activation_function, "activation_function")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd = {self.n_embd} does not divide into n_head = {self.n_head} heads")

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> GPT2Config:
        """The config from a config.json.

        Args:
            content: the JSON object; keys that do not change the result are ignored.

        Raises:
            ValueError: cross-attention or another activation, which are not supported, or sizes that do not
                fit.
        """
        if content.get("add_cross_attention"):
            raise ValueError(
                "add_cross_attention = True is not supported; GPT-2 attends to its own sequence only"
            )
        # In some checkpoints a null stands for the default.
        return cls(**{key: value for key, value in known_fields(cls, content).items() if value is not None})


class Cache:
    """The keys and values of one layer for a sequence of fixed length M: (B, M, 2C)."""

    def __init__(self, batch: int, length: int, width: int, like: Tensor):
        self.kv = like.new_zeros(batch, length, 2 * width)

    def write(self, positions: Tensor, kv: Tensor) -> Tensor:
        """Store the keys and values (B, N, 2C) of `positions` (N,); return all of them, (B, M, 2C)."""
        kv = kv.to(self.kv.dtype)
        # Autograd needs the keys and values of every step, so with gradients nothing is overwritten.
        if torch.is_grad_enabled():
            self.kv = self.kv.index_copy(1, positions, kv)
        else:
            self.kv.index_copy_(1, positions, kv)
        return self.kv


class CausalAttention(nn.Module):
    """Causal self-attention, (B, N, C) -> (B, N, C); with a cache, also to the positions of earlier calls."""

    def __init__(self, config: GPT2Config, layer: int):
        super().__init__()
        self.heads = config.n_head
        self.scale = 1 / math.sqrt(config.n_embd // config.n_head) if config.scale_attn_weights else 1.0
        if config.scale_attn_by_inverse_layer_idx:
            self.scale /= layer + 1
        self.qkv = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.out = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x: Tensor, bias: Tensor, positions: Tensor, cache: Cache | None) -> Tensor:
        width = x.shape[-1]
        q, kv = self.qkv(x).split([width, 2 * width], dim=-1)
        if cache is not None:
            kv = cache.write(positions, kv)  # (B, M, 2C)
        k, v = kv.chunk(2, dim=-1)
        out: Tensor = self.out(attention(q, k, v, self.heads, bias, self.scale))
        return out


class GPT2Block(nn.Module):
    """Attention and feed-forward, pre-norm with residual connections: (B, N, C) -> (B, N, C)."""

    def __init__(self, config: GPT2Config, layer: int):
        super().__init__()
        width, hidden = config.n_embd, config.n_inner or 4 * config.n_embd
        self.attention_norm = nn.LayerNorm(width, eps=config.layer_norm_epsilon)
        self.attention = CausalAttention(config, layer)
        self.feed_forward_norm = nn.LayerNorm(width, eps=config.layer_norm_epsilon)
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)
        self.activation = activation(config.activation_function)

    def forward(self, x: Tensor, bias: Tensor, positions: Tensor, cache: Cache | None) -> Tensor:
        x = x + self.attention(self.attention_norm(x), bias, positions, cache)
        out: Tensor = x + self.down(self.activation(self.up(self.feed_forward_norm(x))))
        return out


def causal_bias(positions: Tensor, visible: Tensor, dtype: torch.dtype) -> Tensor:
    """The bias of causal attention: 0 where a query may attend, a large negative number elsewhere.

    Args:
        positions: the queries' positions in the sequence, (N,).
        visible: (B, M), False for padding.
        dtype: the queries' dtype.

    Returns:
        (B, 1, N, M): a query attends to itself and to the positions before it, except padding.
    """
    past = torch.arange(visible.shape[1], device=positions.device) <= rearrange(positions, "n -> n 1")
    seen = past & rearrange(visible, "b m -> b 1 1 m")
    # Half of the lowest number is still finite with a score added, so a row that is all masked gives no NaN.
    low = torch.finfo(dtype).min / 2
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(~seen, low)


class GPT2(Stage[GPT2Config]):
    """The language model of AudioLDM 2: a sequence of vectors (B, T, C) -> new vectors (B, 8, C).

    Args:
        config: sizes, kept as `gpt2.config`.

    Example:
        >>> gpt2 = GPT2.from_pretrained("tiny", subfolder="language_model")  # or "cvssp/audioldm2"
        >>> sequence = torch.randn(1, 25, gpt2.config.n_embd)  # from a ProjectionModel
        >>> gpt2.generate(sequence).shape  # the new vectors
        torch.Size([1, 8, 128])
        >>> gpt2(sequence).shape  # one pass, without generation
        torch.Size([1, 25, 128])
    """

    def __init__(self, config: GPT2Config):
        super().__init__()
        self.config = config
        self.position_embedding = nn.Embedding(config.n_positions, config.n_embd)
        self.blocks = nn.ModuleList([GPT2Block(config, layer) for layer in range(config.n_layer)])
        self.norm = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)

    def forward(
        self,
        inputs_embeds: Tensor,
        attention_mask: Tensor | None = None,
        *,
        positions: Tensor | None = None,
        caches: list[Cache] | None = None,
    ) -> Tensor:
        """The states of a sequence, or of a part of it whose past is cached.

        Args:
            inputs_embeds: (B, N, C).
            attention_mask: (B, M), 1 for tokens and 0 for padding; None if there is no padding. M is N, or
                the caches' length.
            positions: the inputs' positions in the sequence, (N,); 0 to N - 1 by default.
            caches: one per layer, into which the inputs' keys and values are written.

        Returns:
            The states after the final norm, (B, N, C).

        Raises:
            ValueError: a shape that does not fit, or more than n_positions.
        """
        mask = self._mask(inputs_embeds, attention_mask, caches[0].kv.shape[1] if caches else None)
        if positions is None:
            positions = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device)
        x = inputs_embeds + self.position_embedding(positions)
        bias = causal_bias(positions, mask, x.dtype)
        for layer, block in enumerate(self.blocks):
            x = block(x, bias, positions, None if caches is None else caches[layer])
        states: Tensor = self.norm(x)
        return states

    def generate(
        self, inputs_embeds: Tensor, attention_mask: Tensor | None = None, max_new_tokens: int | None = None
    ) -> Tensor:
        """Continue the sequence: each new vector is the last state of everything before it.

        Keys and values are computed once for each position and cached while this call runs. The result is
        that of calling `forward` on the growing sequence.

        Args:
            inputs_embeds: (B, T, C).
            attention_mask: (B, T), 1 for tokens and 0 for padding; new vectors count as tokens.
            max_new_tokens: how many vectors; the config's number by default.

        Returns:
            The new vectors, (B, max_new_tokens, C).

        Raises:
            ValueError: a shape that does not fit, max_new_tokens below 1, or more than n_positions.
        """
        new = self.config.max_new_tokens if max_new_tokens is None else max_new_tokens
        if new < 1:
            raise ValueError(f"max_new_tokens is {new}; it should be at least 1")
        mask = self._mask(inputs_embeds, attention_mask)
        batch, length, width = inputs_embeds.shape
        total = length + new - 1  # the last new vector is not fed back
        if total > self.config.n_positions:
            raise ValueError(
                f"{length} inputs and max_new_tokens = {new} need {total} positions; this GPT-2 has "
                f"n_positions = {self.config.n_positions}"
            )
        mask = F.pad(mask, (0, new - 1), value=True)  # (B, total)
        caches = [Cache(batch, total, width, like=inputs_embeds) for _ in self.blocks]
        positions = torch.arange(total, device=inputs_embeds.device)
        x = self(inputs_embeds, mask, positions=positions[:length], caches=caches)[:, -1:]
        # Contiguous like the later vectors: torch.compile would compile again for other strides.
        x = x.clone(memory_format=torch.contiguous_format)
        generated = [x]
        for position in range(length, total):
            x = self(x, mask, positions=positions[position : position + 1], caches=caches)
            generated.append(x)
        return torch.cat(generated, dim=1)

    def _mask(self, inputs_embeds: Tensor, attention_mask: Tensor | None, total: int | None = None) -> Tensor:
        """Check the inputs' shapes; the mask as booleans, (B, total), where `total` is T by default."""
        width, limit = self.config.n_embd, self.config.n_positions
        if inputs_embeds.dim() != 3 or inputs_embeds.shape[1] < 1 or inputs_embeds.shape[2] != width:
            raise ValueError(
                f"inputs_embeds has shape {tuple(inputs_embeds.shape)}; it should be (batch, tokens, {width})"
            )
        shape = (len(inputs_embeds), total or inputs_embeds.shape[1])
        if shape[1] > limit:
            raise ValueError(
                f"{shape[1]} inputs need as many positions; this GPT-2 has n_positions = {limit}"
            )
        if attention_mask is None:
            return torch.ones(shape, dtype=torch.bool, device=inputs_embeds.device)
        if attention_mask.shape != shape:
            raise ValueError(f"attention_mask has shape {tuple(attention_mask.shape)}; it should be {shape}")
        return attention_mask.bool()
