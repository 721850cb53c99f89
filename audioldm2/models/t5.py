"""text_encoder_2: the encoder of Flan-T5, from token ids to one hidden state per token.

    input_ids (B, N), attention_mask (B, N)  ->  hidden states (B, N, d_model)

T5 (Raffel et al. 2020, "Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer",
section 2.1) in version 1.1, fine-tuned as Flan-T5 (Chung et al. 2022). AudioLDM 2 (Liu et al. 2023, section
III) uses the hidden states of the prompt twice: as an input of GPT-2, and in the UNet's cross-attention.

Differences from the original transformer (Vaswani et al. 2017):

* Positions enter only as a bias on the attention scores: one number per head and bucket of distances. All
  blocks share the first block's table, so the bias is computed once.
* Scores are not divided by sqrt(d); the initialization before training accounts for that.
* Norms divide by the root mean square (RMSNorm) and precede each sublayer; no linear layer has a bias.
* The feed-forward is GELU(x W_0) * (x W_1), then W_o (Shazeer 2020, GEGLU), with GELU's tanh approximation.

In half precision the residual stream stays in float32, because it can exceed float16's largest number, 65504.
Dropout, which acts in training only, is left out.
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

from audioldm2.models.config import check_sizes, known_fields
from audioldm2.models.layers import attention
from audioldm2.models.stage import Stage

# feed_forward_proj -> what transformers derives from it: (dense_act_fn, is_gated_act)
FEED_FORWARDS = {"gated-gelu": ("gelu_new", True), "relu": ("relu", False)}


@dataclass(frozen=True)
class T5Config:
    """Sizes of the encoder: the keys of T5's config.json, with transformers' defaults.

    d_model is the width of the hidden states, d_kv the width of one attention head, d_ff that of the
    feed-forward.
    """

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
        check_sizes(self, layers=("num_layers",), zero=("pad_token_id",), positive=("layer_norm_epsilon",))
        if self.feed_forward_proj not in FEED_FORWARDS:
            raise ValueError(
                f"feed_forward_proj = {self.feed_forward_proj!r} is not supported; "
                f"it must be {' or '.join(FEED_FORWARDS)}"
            )
        buckets, reach = self.relative_attention_num_buckets, self.relative_attention_max_distance
        if buckets < 4:
            raise ValueError(
                f"relative_attention_num_buckets = {buckets} is not supported; it must be at least 4"
            )
        if reach <= buckets // 4:
            raise ValueError(
                f"relative_attention_max_distance = {reach} is not supported with {buckets} buckets; "
                f"it must be more than {buckets // 4}"
            )

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> T5Config:
        """The config from a config.json.

        Args:
            content: the JSON object; keys of the decoder, of generation and of training are ignored.

        Raises:
            ValueError: a value that is not supported; the message names the key.
        """
        config = cls(**known_fields(cls, content))
        act, gated = FEED_FORWARDS[config.feed_forward_proj]
        for key, supported in {"is_decoder": False, "dense_act_fn": act, "is_gated_act": gated}.items():
            if content.get(key, supported) != supported:
                raise ValueError(
                    f"{key} = {content[key]!r} is not supported with feed_forward_proj = "
                    f"{config.feed_forward_proj!r}; it must be {supported!r}"
                )
        return config


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) * weight over the last axis (Zhang and Sennrich 2019).

    (..., C) in float32 -> (..., C) in the weight's dtype; the norm itself is computed in float32.
    """

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        x = x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + self.eps)
        return self.weight * x.to(self.weight.dtype)


class RelativePositionBias(nn.Module):
    """A learned bias on the attention scores: sequence length N -> (1, heads, N, N) (T5, section 2.1).

    Distances share a bias by buckets. Half of the buckets are for keys after the query, half for the others.
    In either half, the first half of the buckets hold one distance each; the others grow logarithmically up
    to `max_distance`; the last one holds all greater distances.

    Args:
        buckets: number of buckets.
        max_distance: from this distance on, all distances share the last bucket.
        heads: number of attention heads.
    """

    def __init__(self, buckets: int, max_distance: int, heads: int):
        super().__init__()
        self.buckets = buckets
        self.max_distance = max_distance
        self.table = nn.Embedding(buckets, heads)

    def bucket(self, distance: Tensor) -> Tensor:
        """The bucket of each distance, key position minus query position (integers of any shape)."""
        half = self.buckets // 2
        exact = half // 2
        size = distance.abs()
        # The clamp keeps the logarithm finite where its value is not used.
        log = torch.log(size.clamp(min=exact).float() / exact) / math.log(self.max_distance / exact)
        logarithmic = (exact + (log * (half - exact)).long()).clamp(max=half - 1)
        return torch.where(distance > 0, half, 0) + torch.where(size < exact, size, logarithmic)

    def forward(self, length: int) -> Tensor:
        position = torch.arange(length, device=self.table.weight.device)
        distance = position[None, :] - position[:, None]  # (query, key)
        bias: Tensor = rearrange(self.table(self.bucket(distance)), "q k h -> 1 h q k")
        return bias


class T5Attention(nn.Module):
    """Self-attention without scaling: (B, N, C), bias broadcast to (B, heads, N, N) -> (B, N, C)."""

    def __init__(self, width: int, heads: int, head_width: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * heads * head_width, bias=False)
        self.out = nn.Linear(heads * head_width, width, bias=False)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        out: Tensor = self.out(attention(q, k, v, self.heads, bias=bias, scale=1.0))
        return out


class T5GatedFeedForward(nn.Module):
    """(GELU(x W_gate) * (x W_gated)) W_down: (B, N, C) -> (B, N, C) in the dtype of W_down."""

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


class T5FeedForward(nn.Module):
    """ReLU(x W_up) W_down, as in T5 version 1.0: (B, N, C) -> (B, N, C) in the dtype of W_down."""

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


class T5Block(nn.Module):
    """Self-attention and feed-forward, pre-norm with residual connections: (B, N, C) -> (B, N, C).

    Input and output, the residual stream, are float32.
    """

    def __init__(self, config: T5Config):
        super().__init__()
        gated = FEED_FORWARDS[config.feed_forward_proj][1]
        self.attention_norm = RMSNorm(config.d_model, config.layer_norm_epsilon)
        self.attention = T5Attention(config.d_model, config.num_heads, config.d_kv)
        self.feed_forward_norm = RMSNorm(config.d_model, config.layer_norm_epsilon)
        self.feed_forward = (T5GatedFeedForward if gated else T5FeedForward)(config.d_model, config.d_ff)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        x = x + _finite(self.attention(self.attention_norm(x), bias))
        return x + _finite(self.feed_forward(self.feed_forward_norm(x)))


def _finite(x: Tensor) -> Tensor:
    """Replace infinities in float16, which come from overflow, with its largest number."""
    if x.dtype != torch.float16:
        return x
    largest = torch.finfo(x.dtype).max
    return x.clamp(-largest, largest)


class T5Encoder(Stage[T5Config]):
    """The Flan-T5 encoder: token ids and their mask to one hidden state per token.

    Works in float32, bfloat16 or float16; the hidden states have the dtype of the weights.

    Args:
        config: sizes, kept as `t5.config`.

    Example:
        >>> t5 = T5Encoder.from_pretrained("tiny", subfolder="text_encoder_2")  # or "cvssp/audioldm2"
        >>> input_ids = torch.tensor([[37, 12, 5, 1], [8, 1, 0, 0]])  # from T5's tokenizer
        >>> t5(input_ids, attention_mask=input_ids != 0).shape  # (batch, tokens, d_model)
        torch.Size([2, 4, 96])
    """

    # The last matrix of each feed-forward has outputs beyond float16's range. In transformers it stays
    # in float32, too.
    float32_parameters: ClassVar[tuple[str, ...]] = ("*.down.weight",)

    def __init__(self, config: T5Config):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.d_model)
        self.position_bias = RelativePositionBias(
            config.relative_attention_num_buckets, config.relative_attention_max_distance, config.num_heads
        )
        self.blocks = nn.ModuleList(T5Block(config) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.d_model, config.layer_norm_epsilon)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Encode token ids.

        Args:
            input_ids: token ids of T5's tokenizer, (B, N).
            attention_mask: (B, N), 1 or True for tokens and 0 for padding; padding may be anywhere.

        Returns:
            Hidden states, (B, N, d_model). Those at padded positions have no meaning and must be masked.

        Raises:
            ValueError: the shapes differ or are not (B, N).
        """
        if input_ids.dim() != 2 or input_ids.shape != attention_mask.shape:
            raise ValueError(
                f"input_ids and attention_mask must both be (batch, tokens); their shapes are "
                f"{tuple(input_ids.shape)} and {tuple(attention_mask.shape)}"
            )
        x = self.embed(input_ids)
        bias = self.position_bias(input_ids.shape[1])  # (1, heads, N, N)
        # Set rather than added: in float16 the sum could be -inf, and a row of padding alone NaN.
        padding = rearrange(attention_mask == 0, "b k -> b 1 1 k")
        bias = bias.masked_fill(padding, torch.finfo(bias.dtype).min)  # (B, heads, N, N)
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        for block in self.blocks:
            x = block(x, bias)
        out: Tensor = self.norm(x)
        return out
