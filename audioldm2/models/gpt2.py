"""GPT-2 as AudioLDM 2 uses it: a generator of vectors, not of words.

In: the projection model's sequence, (B, T, C), with its mask (B, T).
Out: `max_new_tokens` vectors (B, max_new_tokens, C), an estimate of the "language of audio" (Liu et al. 2023,
on translating conditions to the language of audio with GPT-2) that the UNet attends to.

The network is the decoder of Radford et al. 2019: blocks of

    x = x + attention(norm(x)),   x = x + feed_forward(norm(x))

with causal attention, learned positions and a last norm. What differs from the textbook is the loop: no word
is ever picked. The last vector after the last norm is itself the next input,

    x_{T+1} = GPT2(x_1 ... x_T)_T

so the word embeddings and the output layer of the checkpoints have nothing to do. Positions count every place
of the sequence, padding included; padding is only hidden from attention.

There is no dropout: the `*_pdrop` of a config change training only.
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

from audioldm2.models.layers import activation, attention, known_fields


@dataclass(frozen=True)
class GPT2Config:
    """The sizes, under the names of GPT-2's config.json.

    `reorder_and_upcast_attn` changes nothing here: scaled_dot_product_attention takes its scores and their
    softmax in float32 anyway. It is kept so that a saved config is whole, as is `vocab_size`.
    """

    vocab_size: int = 50257
    n_positions: int = 1024
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    n_inner: int | None = None  # 4 · n_embd where None
    activation_function: str = "gelu_new"
    layer_norm_epsilon: float = 1e-5
    scale_attn_weights: bool = True
    scale_attn_by_inverse_layer_idx: bool = False
    reorder_and_upcast_attn: bool = False
    max_new_tokens: int = 8

    def __post_init__(self) -> None:
        activation(self.activation_function, "activation_function")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd = {self.n_embd} does not divide into n_head = {self.n_head} heads")

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> GPT2Config:
        """From a config.json's content; keys that change nothing are passed over.

        Raises:
            ValueError: cross-attention, another activation, or sizes that do not go together.
        """
        if content.get("add_cross_attention"):
            raise ValueError(
                "add_cross_attention = True is not supported; GPT-2 attends to its own sequence only"
            )
        # Some checkpoints carry a null where the default is meant.
        return cls(**{key: value for key, value in known_fields(cls, content).items() if value is not None})


class Cache:
    """The keys and values of one layer, for as many positions as there will be: (B, M, 2C)."""

    def __init__(self, like: Tensor, places: int):
        batch, _, width = like.shape
        self.kv = like.new_zeros(batch, places, 2 * width)

    def write(self, positions: Tensor, kv: Tensor) -> Tensor:
        """Put the keys and values (B, N, 2C) of `positions` (N,) in their places; returns all, (B, M, 2C)."""
        kv = kv.to(self.kv.dtype)
        # A gradient needs what attention saw at each step, so there every step makes a cache of its own.
        if torch.is_grad_enabled():
            self.kv = self.kv.index_copy(1, positions, kv)
        else:
            self.kv.index_copy_(1, positions, kv)
        return self.kv


class CausalAttention(nn.Module):
    """Self-attention, (B, N, C) -> (B, N, C); with a cache, over the keys of earlier calls too."""

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
        return self.out(attention(q, k, v, self.heads, bias, self.scale))


class Block(nn.Module):
    """One layer, (B, N, C) -> (B, N, C)."""

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
        return x + self.down(self.activation(self.up(self.feed_forward_norm(x))))


def causal_bias(positions: Tensor, visible: Tensor, dtype: torch.dtype) -> Tensor:
    """What is added to attention's scores: 0 where a query may look and a large negative number where not.

    Args:
        positions: the queries' places in the sequence, (N,).
        visible: (B, M), true for the places that are no padding.
        dtype: the queries' dtype.

    Returns:
        (B, 1, N, M): a query sees itself and what lies before it, padding excepted.
    """
    past = torch.arange(visible.shape[1], device=positions.device) <= rearrange(positions, "n -> n 1")
    seen = past & rearrange(visible, "b m -> b 1 1 m")
    # Half of the lowest number: with a score added it is still finite, so a row that sees nothing gives no
    # NaN.
    low = torch.finfo(dtype).min / 2
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(~seen, low)


class GPT2(nn.Module):
    """The language model: vectors in, vectors out."""

    def __init__(self, config: GPT2Config):
        super().__init__()
        self.config = config
        self.position_embedding = nn.Embedding(config.n_positions, config.n_embd)
        self.blocks = nn.ModuleList([Block(config, layer) for layer in range(config.n_layer)])
        self.norm = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)

    def forward(self, inputs_embeds: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """The whole sequence at once.

        Args:
            inputs_embeds: (B, T, C).
            attention_mask: (B, T), 1 for tokens and 0 for padding; None if all are tokens.

        Returns:
            The states after the last norm, (B, T, C).

        Raises:
            ValueError: a shape does not fit, or T is more than n_positions.
        """
        visible = self._visible(inputs_embeds, attention_mask, new=0)
        positions = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device)
        return self.states(inputs_embeds, positions, visible, caches=None)

    def generate(
        self,
        inputs_embeds: Tensor,
        attention_mask: Tensor | None = None,
        max_new_tokens: int | None = None,
        spare: int = 0,
    ) -> Tensor:
        """Continue the sequence with vectors: each is the last state of all before it, after the last norm.

        Keys and values are computed once a position and kept in a cache of fixed shape, so the result is that
        of running `forward` on the growing sequence, for the work of running it once.

        Args:
            inputs_embeds: (B, T, C).
            attention_mask: (B, T), 1 for tokens and 0 for padding; what is generated counts as tokens.
            max_new_tokens: how many vectors; the config's number where None.
            spare: places to add at the end, as far as there are positions, so that sequences of about one
                length run in the same shapes (for a compiled stage). The numbers stay: what is in the added
                places lies in the future of all that is used, until it is written over.

        Returns:
            The new vectors, (B, max_new_tokens, C).

        Raises:
            ValueError: a shape does not fit, max_new_tokens is less than 1, or there are not positions
                enough.
        """
        new = self.config.max_new_tokens if max_new_tokens is None else max_new_tokens
        if new < 1:
            raise ValueError(f"max_new_tokens is {new}; at least 1 is needed")
        # The last vector is not fed back, so it takes no place.
        visible = self._visible(inputs_embeds, attention_mask, new=new - 1)
        length = inputs_embeds.shape[1]
        spare = min(spare, self.config.n_positions - visible.shape[1])
        visible, x = F.pad(visible, (0, spare), value=True), F.pad(inputs_embeds, (0, 0, 0, spare))
        places = visible.shape[1]
        caches = [Cache(inputs_embeds, places) for _ in self.blocks]
        positions = torch.arange(places, device=inputs_embeds.device)
        x = self.states(x, positions[: length + spare], visible, caches)[:, length - 1 : length]
        # The first vector lies in memory as the ones after it do: to a compiler, strides are part of a shape.
        x = x.clone(memory_format=torch.contiguous_format)
        generated = [x]
        for place in range(length, length + new - 1):
            x = self.states(x, positions[place : place + 1], visible, caches)
            generated.append(x)
        return torch.cat(generated, dim=1)

    def states(self, x: Tensor, positions: Tensor, visible: Tensor, caches: list[Cache] | None) -> Tensor:
        """The states (B, N, C) of N inputs at `positions` (N,), which go into the caches on the way.

        `visible` (B, M) says which of the M places are no padding.
        """
        x = x + self.position_embedding(positions)
        bias = causal_bias(positions, visible, x.dtype)
        for layer, block in enumerate(self.blocks):
            x = block(x, bias, positions, None if caches is None else caches[layer])
        return self.norm(x)

    def _visible(self, inputs_embeds: Tensor, attention_mask: Tensor | None, new: int) -> Tensor:
        """Which places are no padding, (B, T + new), the new ones among them; checks the inputs' shapes."""
        width, limit = self.config.n_embd, self.config.n_positions
        if inputs_embeds.dim() != 3 or inputs_embeds.shape[1] < 1 or inputs_embeds.shape[2] != width:
            raise ValueError(
                f"inputs_embeds has shape {tuple(inputs_embeds.shape)}; (batch, tokens, {width}) is needed"
            )
        batch, length, _ = inputs_embeds.shape
        if length + new > limit:
            raise ValueError(
                f"{length} inputs and {new} vectors to feed back need {length + new} positions; "
                f"this GPT-2 has n_positions={limit}"
            )
        if attention_mask is None:
            return torch.ones(batch, length + new, dtype=torch.bool, device=inputs_embeds.device)
        if attention_mask.shape != (batch, length):
            raise ValueError(
                f"attention_mask has shape {tuple(attention_mask.shape)}; ({batch}, {length}) is needed"
            )
        return F.pad(attention_mask.bool(), (0, new), value=True)
