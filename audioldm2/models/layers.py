"""Building blocks that stages share: attention, and the blocks of the UNet and the VAE.

In shapes, B is the batch size, N and M are numbers of tokens, C is the number of channels or the width, and H
and W are the height and width of a feature map. In AudioLDM 2, H is time and W is frequency.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

# By their names in the Hub's configs ("swish" is an older name of SiLU).
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "swish": F.silu,
    "mish": F.mish,
    "gelu": F.gelu,
    "gelu_new": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
}

# The widest heads whose attention in bfloat16 is computed in float32 on a CPU. On two Zen 4 cores, which
# multiply bfloat16 in hardware, PyTorch's attention with heads of 32, as in AudioLDM 2's UNet, was measured
# at 142 GFLOP/s in float32 and at 111 in bfloat16. `scripts/bench --stage attention` measures it.
MAX_WIDTH_FOR_FLOAT32 = 32


def attention(
    q: Tensor, k: Tensor, v: Tensor, heads: int, bias: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """Multi-head attention, softmax(q k^T · scale + bias) v (Vaswani et al. 2017, eq. 1).

    Args:
        q: queries, (B, N, heads · d).
        k: keys, (B, M, heads · d).
        v: values, (B, M, heads · d).
        heads: number of heads, each of width d.
        bias: added to the scores before the softmax, broadcast to (B, heads, N, M); large negative numbers
            mask.
        scale: 1/sqrt(d) by default.

    Returns:
        (B, N, heads · d).
    """
    dtype = q.dtype
    q, k, v = (rearrange(x, "b n (h d) -> b h n d", h=heads) for x in (q, k, v))
    if _is_faster_in_float32(q):
        q, k, v = q.float(), k.float(), v.float()
        bias = None if bias is None else bias.float()
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)
    return rearrange(out.to(dtype), "b h n d -> b n (h d)")


def _is_faster_in_float32(q: Tensor) -> bool:
    """Whether to compute attention in float32, for queries (B, heads, N, d) in bfloat16 on a CPU.

    Compilers choose algorithms of their own, and autocast would convert back.
    """
    return (
        q.dtype == torch.bfloat16
        and q.device.type == "cpu"
        and q.shape[-1] <= MAX_WIDTH_FOR_FLOAT32
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled("cpu")
    )


def mask_bias(mask: Tensor, dtype: torch.dtype, low: float) -> Tensor:
    """Turn a mask (B, M), 1 for tokens and 0 for padding, into an attention bias (B, 1, 1, M).

    Args:
        mask: (B, M), any dtype.
        dtype: of the bias.
        low: the bias of padding, a large negative number; finite, so that a row of padding alone gives a mean
            rather than NaN.
    """
    return rearrange((1 - mask.to(dtype)) * low, "b m -> b 1 1 m")


def activation(name: str, key: str = "act_fn") -> Callable[[Tensor], Tensor]:
    """Look up an activation function.

    Args:
        name: its name in a config.
        key: the config's key, for the error message.

    Raises:
        ValueError: no supported activation has this name.
    """
    if not isinstance(name, str) or name.lower() not in ACTIVATIONS:
        raise ValueError(f"{key} = {name!r} is not supported; use one of {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name.lower()]


class SelfAttention(nn.Module):
    """Self-attention: (B, N, C) -> (B, N, C), with one matrix for queries, keys and values.

    Args:
        width: C.
        heads: number of heads; must divide C.
        bias: whether queries, keys and values have a bias; the output always has one.
    """

    def __init__(self, width: int, heads: int, bias: bool = False):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=bias)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        out: Tensor = self.out(attention(q, k, v, self.heads))
        return out


class CrossAttention(nn.Module):
    """Cross-attention to a condition: (B, N, C) -> (B, N, C).

    Keys and values are computed by the caller with `kv`, from the condition's states, (B, M, context_width)
    -> (B, M, 2C): they are the same at every sampling step.

    Args:
        width: C.
        context_width: width of the condition's states.
        heads: number of heads; must divide C.
    """

    def __init__(self, width: int, context_width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(width, width, bias=False)
        self.kv = nn.Linear(context_width, 2 * width, bias=False)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, kv: Tensor, bias: Tensor | None) -> Tensor:
        """Attend to keys and values.

        Args:
            x: (B, N, C).
            kv: keys and values, (B, M, 2C).
            bias: from the condition's mask, (B, 1, 1, M); None attends to all.
        """
        k, v = kv.chunk(2, dim=-1)
        out: Tensor = self.out(attention(self.q(x), k, v, self.heads, bias))
        return out


class GatedFeedForward(nn.Module):
    """((x W_up) * GELU(x W_gate)) W_down (GEGLU, Shazeer 2020), 4C wide inside: (B, N, C) -> (B, N, C)."""

    def __init__(self, width: int):
        super().__init__()
        self.up_and_gate = nn.Linear(width, 8 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        up, gate = self.up_and_gate(x).chunk(2, dim=-1)
        out: Tensor = self.down(up * F.gelu(gate))
        return out


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention and feed-forward, pre-norm with residual connections.

    (B, N, C) -> (B, N, C).

    Args:
        width: C.
        heads: number of heads; must divide C.
        context_width: width of the condition's states; None replaces the cross-attention with a second
            self-attention.
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
        """Run the block.

        Args:
            x: (B, N, C).
            kv: keys and values of the condition, from `cross_attention.kv`; None without a condition.
            bias: from the condition's mask, (B, 1, 1, M); None attends to all.
        """
        x = x + self.self_attention(self.norm_1(x))
        if kv is None:
            x = x + self.second_self_attention(self.norm_2(x))
        else:
            x = x + self.cross_attention(self.norm_2(x), kv, bias)
        out: Tensor = x + self.feed_forward(self.norm_3(x))
        return out


class Condition(NamedTuple):
    """States to attend to, (B, M, C), and the bias of their mask, (B, 1, 1, M); None without a mask."""

    states: Tensor
    bias: Tensor | None


class Context(NamedTuple):
    """What one cross-attention attends to: keys and values (B, M, 2C), and the bias as in `Condition`."""

    kv: Tensor
    bias: Tensor | None


class Transformer(nn.Module):
    """Transformer blocks over the positions of a feature map: (B, C, H, W) -> (B, C, H, W), residual."""

    blocks: Sequence[TransformerBlock]

    def __init__(self, channels: int, heads: int, depth: int, groups: int, context_width: int | None):
        super().__init__()
        width = heads * (channels // heads)
        self.context_width = context_width
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.proj_in = nn.Linear(channels, width)
        blocks = (TransformerBlock(width, heads, context_width) for _ in range(depth))
        self.blocks = nn.ModuleList(blocks)  # type: ignore[assignment]
        self.proj_out = nn.Linear(width, channels)

    def contexts(self, condition: Condition) -> list[Context | None]:
        """What each block attends to; None for blocks without cross-attention.

        Raises:
            ValueError: the states have another width than `context_width`.
        """
        if self.context_width is None:
            return [None] * len(self.blocks)
        if (width := condition.states.shape[-1]) != self.context_width:
            raise ValueError(
                f"encoder states are {width} wide; cross_attention_dim asks for {self.context_width}"
            )
        return [Context(block.cross_attention.kv(condition.states), condition.bias) for block in self.blocks]

    def forward(self, x: Tensor, contexts: Sequence[Context | None]) -> Tensor:
        tokens = self.proj_in(rearrange(self.norm(x), "b c h w -> b (h w) c"))
        for block, context in zip(self.blocks, contexts, strict=True):
            tokens = block(tokens) if context is None else block(tokens, context.kv, context.bias)
        out: Tensor = x + rearrange(self.proj_out(tokens), "b (h w) c -> b c h w", h=x.shape[2])
        return out


class ResNetBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut: (B, C_in, H, W) -> (B, C_out, H, W).

    GroupNorm and the activation precede each convolution (He et al. 2016, full pre-activation). The time
    embedding, if there is one, is projected and added after the first convolution (Ho et al. 2020,
    appendix B).

    Args:
        channels_in: C_in.
        channels_out: C_out; if it differs from C_in, the shortcut is a 1x1 convolution.
        groups: number of groups of both GroupNorms.
        eps: of both GroupNorms.
        act_fn: name of the activation.
        time_width: width of the time embedding; None for a block without one.
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
        """Run the block.

        Args:
            x: (B, C_in, H, W).
            time: the time embedding after its activation, (B, time_width), or (1, time_width) for all rows.
        """
        h = self.conv_1(self.act(self.norm_1(x)))
        if self.time is not None:
            h = h + rearrange(self.time(time), "b c -> b c 1 1")
        h = self.conv_2(self.act(self.norm_2(h)))
        out: Tensor = self.shortcut(x) + h
        return out


class Upsample(nn.Module):
    """Nearest-neighbor upsampling and a 3x3 convolution: (B, C, H, W) -> (B, C, *size)."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """Upsample `x` to `size`, the height and width of the result: twice those of `x`, or one less."""
        out: Tensor = self.conv(F.interpolate(x, size=size, mode="nearest"))
        return out
