"""What several stages share: attention, and the blocks that the UNet and the VAE have in common.

B is the batch, N and M are numbers of tokens, C is a width, H and W the height and width of a feature map.
For AudioLDM 2 a feature map is a picture of sound: H is time and W is frequency.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

# By the names that the Hub's configs give them ("swish" is an older name of SiLU).
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "swish": F.silu,
    "mish": F.mish,
    "gelu": F.gelu,
    "gelu_new": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
}


def attention(
    q: Tensor, k: Tensor, v: Tensor, heads: int, bias: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """Multi-head attention, softmax(q k^T · scale + bias) v (Vaswani et al. 2017, eq. 1).

    Args:
        q: queries, (B, N, heads · d).
        k: keys, (B, M, heads · d).
        v: values, (B, M, heads · d).
        heads: number of heads; d is the width of one.
        bias: added to the scores before the softmax, broadcast to (B, heads, N, M); a mask is a bias of large
            negative numbers.
        scale: 1/sqrt(d) unless told; T5 uses 1.

    Returns:
        (B, N, heads · d).
    """
    q, k, v = (rearrange(x, "b n (h d) -> b h n d", h=heads) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)
    return rearrange(out, "b h n d -> b n (h d)")


def mask_bias(mask: Tensor, dtype: torch.dtype, low: float) -> Tensor:
    """From a mask (B, M), 1 for tokens to attend to and 0 for padding, to an attention bias (B, 1, 1, M).

    Padding gets `low`: finite, so that a row with nothing to attend to gives a mean and not NaN.
    """
    return rearrange((1 - mask.to(dtype)) * low, "b m -> b 1 1 m")


def activation(name: str, key: str = "act_fn") -> Callable[[Tensor], Tensor]:
    """The activation function that a config calls `name`, under its key `key`.

    Raises:
        ValueError: there is none of that name.
    """
    if not isinstance(name, str) or name.lower() not in ACTIVATIONS:
        raise ValueError(f"{key} = {name!r} is not supported; use one of {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name.lower()]


class SelfAttention(nn.Module):
    """Attention of tokens to one another: (B, N, C) -> (B, N, C), queries, keys and values from one product.

    Args:
        width: C.
        heads: number of heads; has to divide C.
        bias: whether the queries, keys and values have biases (the output always has one).
    """

    def __init__(self, width: int, heads: int, bias: bool = False):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=bias)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        return self.out(attention(q, k, v, self.heads))


class CrossAttention(nn.Module):
    """Attention of the feature map to a condition: (B, N, C) -> (B, N, C).

    The keys and values do not depend on the feature map: `kv` makes them from the condition's states,
    (B, M, context_width) -> (B, M, 2C), and they can be kept for all the steps of a generation.
    """

    def __init__(self, width: int, context_width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(width, width, bias=False)
        self.kv = nn.Linear(context_width, 2 * width, bias=False)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, kv: Tensor, bias: Tensor | None) -> Tensor:
        k, v = kv.chunk(2, dim=-1)
        return self.out(attention(self.q(x), k, v, self.heads, bias))


class GatedFeedForward(nn.Module):
    """(x W_up) · GELU(x W_gate), then W_down (GEGLU, Shazeer 2020), 4C wide inside: (B, N, C) kept."""

    def __init__(self, width: int):
        super().__init__()
        self.up_and_gate = nn.Linear(width, 8 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        up, gate = self.up_and_gate(x).chunk(2, dim=-1)
        return self.down(up * F.gelu(gate))


class TransformerBlock(nn.Module):
    """Self-attention, attention to a condition (or to itself again), a feed-forward: (B, N, C) -> (B, N, C).

    Each works on a normalized copy of x and is added to x (pre-norm).

    Args:
        width: C.
        heads: number of heads; has to divide C.
        context_width: width of the condition's states; None for a second self-attention in place of the
            attention to a condition.
    """

    def __init__(self, width: int, heads: int, context_width: int | None):
        super().__init__()
        self.norm_1 = nn.LayerNorm(width)
        self.self_attention = SelfAttention(width, heads)
        self.norm_2 = nn.LayerNorm(width)
        if context_width is None:
            self.second_self_attention = SelfAttention(width, heads)
        else:
            self.cross_attention = CrossAttention(width, context_width, heads)
        self.norm_3 = nn.LayerNorm(width)
        self.feed_forward = GatedFeedForward(width)

    def forward(self, x: Tensor, kv: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        """`kv` is what `cross_attention.kv` made of a condition, `bias` comes from its mask, (B, 1, 1, M)."""
        x = x + self.self_attention(self.norm_1(x))
        if kv is None:
            x = x + self.second_self_attention(self.norm_2(x))
        else:
            x = x + self.cross_attention(self.norm_2(x), kv, bias)
        return x + self.feed_forward(self.norm_3(x))


class ResNetBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut: (B, C_in, H, W) -> (B, C_out, H, W).

    GroupNorm and the activation come before each convolution (He et al. 2016, full pre-activation). Where
    there is a time embedding, it is projected and added between the two (Ho et al. 2020, appendix B).

    Args:
        channels_in: C_in.
        channels_out: C_out; where it differs from C_in, the shortcut is a 1x1 convolution.
        groups: of both GroupNorms.
        eps: of both GroupNorms.
        act_fn: name of the activation.
        time_width: width of the time embedding; None for a block that is told no time.
    """

    def __init__(
        self,
        channels_in: int,
        channels_out: int,
        groups: int,
        eps: float,
        act_fn: str,
        time_width: int | None = None,
    ):
        super().__init__()
        self.act = activation(act_fn)
        self.norm_1 = nn.GroupNorm(groups, channels_in, eps)
        self.conv_1 = nn.Conv2d(channels_in, channels_out, 3, padding=1)
        self.time = None if time_width is None else nn.Linear(time_width, channels_out)
        self.norm_2 = nn.GroupNorm(groups, channels_out, eps)
        self.conv_2 = nn.Conv2d(channels_out, channels_out, 3, padding=1)
        self.shortcut = (
            nn.Identity() if channels_in == channels_out else nn.Conv2d(channels_in, channels_out, 1)
        )

    def forward(self, x: Tensor, time: Tensor | None = None) -> Tensor:
        """`time` is the time embedding after its activation: (B, time_width), or (1, time_width) for all."""
        h = self.conv_1(self.act(self.norm_1(x)))
        if self.time is not None:
            h = h + rearrange(self.time(time), "b c -> b c 1 1")
        h = self.conv_2(self.act(self.norm_2(h)))
        return self.shortcut(x) + h


class Upsample(nn.Module):
    """Repeat the nearest pixel, then a 3x3 convolution: (B, C, H, W) -> (B, C, *size)."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """`size` is the height and width to reach: twice those of x, or one less."""
        return self.conv(F.interpolate(x, size=size, mode="nearest"))
