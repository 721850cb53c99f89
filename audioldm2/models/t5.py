"""text_encoder_2: the Flan-T5 encoder, from token ids to one vector a token.

    input_ids (B, N), attention_mask (B, N)  ->  hidden states (B, N, d_model)

T5 (Raffel et al. 2020, "Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer",
section 2.1) in its version 1.1 form, fine-tuned as Flan-T5 (Chung et al. 2022). AudioLDM 2 (Liu et al. 2023,
section III) reads the prompt with it twice: as an input of GPT-2, and in the UNet's cross-attention.

Where it differs from the textbook transformer:

* Positions enter only as a bias on the attention scores, one number a head and a bucket of distances. The
  first block's table serves every block, so the bias is computed once.
* Scores are not divided by sqrt(d); the training's initialization accounts for that.
* Normalization is by the root mean square alone, before each sublayer, and no linear map has a bias.
* The feed-forward is GELU(x W_0) * (x W_1), then W_o (Shazeer 2020, GEGLU), with GELU's tanh approximation.

In half precision the sum that runs through the blocks is kept in float32, because it may outgrow float16's
65504. Dropout, which acts in training only, is left out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from audioldm2.models.config import known_fields
from audioldm2.models.layers import attention
from audioldm2.models.stage import Stage

# feed_forward_proj -> what transformers derives from it: (dense_act_fn, is_gated_act)
FEED_FORWARDS = {"gated-gelu": ("gelu_new", True), "relu": ("relu", False)}


@dataclass(frozen=True)
class T5Config:
    """Sizes of the encoder; the fields are the keys of the Hub's config.json, the defaults transformers'."""

    vocab_size: int = 32128
    d_model: int = 512
    d_kv: int = 64
    d_ff: int = 2048
    num_layers: int = 6
    num_heads: int = 8
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6
    feed_forward_proj: str = "relu"
    pad_token_id: int = 0

    def __post_init__(self) -> None:
        if self.feed_forward_proj not in FEED_FORWARDS:
            raise ValueError(
                f"feed_forward_proj {self.feed_forward_proj!r} is not supported; "
                f"it must be {' or '.join(FEED_FORWARDS)}"
            )
        buckets, reach = self.relative_attention_num_buckets, self.relative_attention_max_distance
        if buckets < 4:
            raise ValueError(f"relative_attention_num_buckets {buckets} is too few; at least 4 are supported")
        if reach <= buckets // 4:
            raise ValueError(
                f"relative_attention_max_distance {reach} is not supported with {buckets} buckets; "
                f"it must be more than {buckets // 4}"
            )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> T5Config:
        """The config from a config.json; keys about the decoder, generation and training are ignored.

        Raises:
            ValueError: a key has a value that is not supported.
        """
        config = cls(**known_fields(cls, values))
        act, gated = FEED_FORWARDS[config.feed_forward_proj]
        for key, supported in {"is_decoder": False, "dense_act_fn": act, "is_gated_act": gated}.items():
            if values.get(key, supported) != supported:
                raise ValueError(
                    f"{key} {values[key]!r} is not supported with feed_forward_proj "
                    f"{config.feed_forward_proj!r}; {supported!r} is"
                )
        return config


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last axis (Zhang and Sennrich 2019), in float32.

    (..., C) in float32 -> (..., C) in the weight's dtype.
    """

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        x = x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + self.eps)
        return self.weight * x.to(self.weight.dtype)


class RelativePositionBias(nn.Module):
    """A bias on the attention scores for each head and distance: N -> (1, heads, N, N) (T5, section 2.1).

    Half of the buckets are for keys after the query, half for the others. In each half the first half of the
    buckets hold one distance each; the others grow logarithmically up to `reach`; the last holds the rest.
    """

    def __init__(self, buckets: int, reach: int, heads: int):
        super().__init__()
        self.buckets = buckets
        self.reach = reach
        self.table = nn.Embedding(buckets, heads)

    def bucket(self, distance: Tensor) -> Tensor:
        """From key position minus query position (integers of any shape) to bucket numbers."""
        half = self.buckets // 2
        exact = half // 2
        size = distance.abs()
        # The clamp keeps the logarithm finite where its value is not used.
        log = torch.log(size.clamp(min=exact).float() / exact) / math.log(self.reach / exact)
        far = (exact + (log * (half - exact)).long()).clamp(max=half - 1)
        return torch.where(distance > 0, half, 0) + torch.where(size < exact, size, far)

    def forward(self, length: int) -> Tensor:
        position = torch.arange(length, device=self.table.weight.device)
        distance = position[None, :] - position[:, None]  # (query, key)
        return rearrange(self.table(self.bucket(distance)), "q k h -> 1 h q k")


class SelfAttention(nn.Module):
    """Self-attention without scaling: (B, N, C), bias broadcast to (B, heads, N, N) -> (B, N, C)."""

    def __init__(self, width: int, heads: int, head_width: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * heads * head_width, bias=False)
        self.out = nn.Linear(heads * head_width, width, bias=False)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        return self.out(attention(q, k, v, self.heads, bias=bias, scale=1.0))


class GatedFeedForward(nn.Module):
    """GELU(x W_gate) * (x W_gated), then W_down: (B, N, C) -> (B, N, C) in the dtype of W_down."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.gate = nn.Linear(width, hidden, bias=False)
        self.gated = nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        # Converted before the product, which may exceed float16's range too.
        gate, gated = (up(x).to(_dtype_of(self.down)) for up in (self.gate, self.gated))
        out: Tensor = self.down(F.gelu(gate, approximate="tanh") * gated)
        return out


class FeedForward(nn.Module):
    """ReLU(x W_up), then W_down, T5's first form: (B, N, C) -> (B, N, C) in the dtype of W_down."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.up = nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(F.relu(self.up(x)).to(_dtype_of(self.down)))
        return out


def _dtype_of(linear: nn.Module) -> torch.dtype:
    """The dtype that a linear layer takes; a dynamically quantized one has no weight and takes float32."""
    weight = linear.weight
    return weight.dtype if isinstance(weight, Tensor) else torch.float32


class Block(nn.Module):
    """Self-attention and feed-forward, each added to what it read: (B, N, C) in float32 -> the same."""

    def __init__(self, config: T5Config):
        super().__init__()
        gated = FEED_FORWARDS[config.feed_forward_proj][1]
        self.attention_norm = RMSNorm(config.d_model, config.layer_norm_epsilon)
        self.attention = SelfAttention(config.d_model, config.num_heads, config.d_kv)
        self.feed_forward_norm = RMSNorm(config.d_model, config.layer_norm_epsilon)
        self.feed_forward = (GatedFeedForward if gated else FeedForward)(config.d_model, config.d_ff)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        x = x + _finite(self.attention(self.attention_norm(x), bias))
        return x + _finite(self.feed_forward(self.feed_forward_norm(x)))


def _finite(x: Tensor) -> Tensor:
    """What overflowed float16 comes back as its largest number; other dtypes pass."""
    if x.dtype != torch.float16:
        return x
    largest = torch.finfo(x.dtype).max
    return x.clamp(-largest, largest)


class T5Encoder(Stage[T5Config]):
    """The Flan-T5 encoder: token ids (B, N) and their mask (B, N) -> hidden states (B, N, d_model).

    Runs in float32, bfloat16 or float16; the hidden states come in the dtype of the weights.
    """

    # The last matrix of each feed-forward makes numbers too large for float16; transformers keeps it so too.
    float32_parameters: ClassVar[tuple[str, ...]] = ("*.down.weight",)

    def __init__(self, config: T5Config):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.d_model)
        self.position_bias = RelativePositionBias(
            config.relative_attention_num_buckets, config.relative_attention_max_distance, config.num_heads
        )
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.d_model, config.layer_norm_epsilon)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Encode token ids.

        Args:
            input_ids: (B, N), integers.
            attention_mask: (B, N), 1 or True for tokens, 0 for padding; padding may be anywhere.

        Returns:
            (B, N, d_model). Padded positions get a state too; a mask must go with it.

        Raises:
            ValueError: the two differ in shape, or are not (B, N).
        """
        if input_ids.dim() != 2 or input_ids.shape != attention_mask.shape:
            raise ValueError(
                f"input_ids and attention_mask must both be (batch, tokens); their shapes are "
                f"{tuple(input_ids.shape)} and {tuple(attention_mask.shape)}"
            )
        x = self.embed(input_ids)
        bias = self.position_bias(input_ids.shape[1])  # (1, heads, N, N)
        # Set, not added: the sum could be -inf in float16, and a row with nothing but padding NaN.
        padding = rearrange(attention_mask == 0, "b k -> b 1 1 k")
        bias = bias.masked_fill(padding, torch.finfo(bias.dtype).min)  # (B, heads, N, N)
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        for block in self.blocks:
            x = block(x, bias)
        return self.norm(x)
