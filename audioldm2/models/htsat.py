"""HTS-AT, the audio tower of CLAP: a Swin transformer on spectrograms.

    log-mel spectrogram (B, 1, frames, mels)  ->  one vector (B, hidden_size)

HTS-AT (Chen et al. 2022, "HTS-AT: A Hierarchical Token-Semantic Audio Transformer") reads a spectrogram as an
image. The spectrogram, long in time and low in frequency, is cut into pieces in time, which are stacked in
frequency to a square image (the paper's section 2.1). The image goes through a Swin transformer (Liu et al.
2021): it is embedded in patches; attention is within windows of w x w patches, shifted by w/2 in every second
block; between levels, 2 x 2 patches merge into one of twice the width.

Dropout and stochastic depth, which act in training only, are left out.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from torch import Tensor, nn

from audioldm2.models.config import check_sizes, known_fields, refuse_unsupported
from audioldm2.models.layers import ACTIVATIONS, activation, attention

# Keys that would change the result, and the values that are supported.
SUPPORTED: dict[str, tuple[Any, ...]] = {
    "enable_fusion": (False,),
    "flatten_patch_embeds": (True,),
    "hidden_act": tuple(ACTIVATIONS),
}


MAX_SPEC_SIZE = 4096  # the image's side, which no tensor bounds; 256 in every real checkpoint


def _pair(value: int | tuple[int, ...]) -> tuple[int, int]:
    height, width = (value, value) if isinstance(value, int) else value
    return height, width


@dataclass(frozen=True)
class HTSATConfig:
    """Sizes of HTS-AT: the keys of "audio_config" in CLAP's config.json, with transformers' defaults.

    The square image has spec_size² pixels; `patch_embeds_hidden_size` is the width of the first level.
    """

    spec_size: int = 256
    num_mel_bins: int = 64
    window_size: int = 8
    patch_size: int | tuple[int, ...] = 4
    patch_stride: int | tuple[int, ...] = (4, 4)
    patch_embed_input_channels: int = 1
    patch_embeds_hidden_size: int = 96
    enable_patch_layer_norm: bool = True
    hidden_size: int = 768
    depths: tuple[int, ...] = (2, 2, 6, 2)
    num_attention_heads: tuple[int, ...] = (4, 8, 16, 32)
    mlp_ratio: float = 4.0
    qkv_bias: bool = True
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        check_sizes(self, layers=("depths",), positive=("layer_norm_eps", "mlp_ratio"))
        if self.spec_size > MAX_SPEC_SIZE:
            raise ValueError(
                f"spec_size = {self.spec_size} is not supported; it must be at most {MAX_SPEC_SIZE}"
            )
        for key in ("patch_size", "patch_stride"):
            value = getattr(self, key)
            if isinstance(value, tuple) and len(value) != 2:
                raise ValueError(f"{key} must be one integer or two, got {len(value)}")
        widths = [self.width(level) for level in range(len(self.depths))]
        heads = self.num_attention_heads
        if len(heads) != len(widths) or any(w % h for w, h in zip(widths, heads, strict=True)):
            raise ValueError(f"num_attention_heads = {heads} must divide the levels' widths, {widths}")
        if self.hidden_size != widths[-1]:
            raise ValueError(f"hidden_size = {self.hidden_size} must be the last level's width, {widths[-1]}")
        if self.spec_size % self.num_mel_bins:
            raise ValueError(f"num_mel_bins = {self.num_mel_bins} must divide spec_size = {self.spec_size}")
        for size, stride in zip(_pair(self.patch_size), _pair(self.patch_stride), strict=True):
            patches = (self.spec_size + 2 * ((size - stride) // 2) - size) // stride + 1
            if patches != self.spec_size // stride:
                raise ValueError(f"patch_size = {size} does not fit patch_stride = {stride}")
            if patches % 2 ** (len(widths) - 1):
                raise ValueError(
                    f"{patches} patches are not supported: they must halve evenly {len(widths) - 1} times"
                )

    @property
    def unusable(self) -> str | None:
        """Why a tower of these sizes cannot run, although a checkpoint can hold it; None if it can."""
        last = self.spec_size // max(_pair(self.patch_stride)) // 2 ** (len(self.depths) - 1)
        if last >= self.window_size:
            return None
        return f"window_size = {self.window_size} is more than the {last} patches of the last level"

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> HTSATConfig:
        """The config from "audio_config"; keys that do not change the result are ignored.

        Raises:
            ValueError: a value that is not supported; the message names the key.
        """
        refuse_unsupported(content, SUPPORTED)
        config = cls(**known_fields(cls, content))
        if config.unusable:
            warnings.warn(f"CLAP cannot rank sounds with this audio_config: {config.unusable}", stacklevel=2)
        return config

    def width(self, level: int) -> int:
        """The width of a level, counted from 0."""
        width: int = self.patch_embeds_hidden_size * 2**level
        return width


def _relative_index(window: int, device: torch.device) -> Tensor:
    """The row of the bias table for each pair of patches in a window, by their offset: (w², w²)."""
    position = torch.arange(window, device=device)
    offset = position[:, None] - position[None, :] + window - 1  # along one axis, 0 ... 2w-2
    index = offset[:, None, :, None] * (2 * window - 1) + offset[None, :, None, :]
    return rearrange(index, "i j k l -> (i j) (k l)")


def _shift_mask(height: int, width: int, window: int, shift: int, like: Tensor) -> Tensor:
    """A bias of -100 between patches that only the shift made neighbors (Swin, figure 4).

    Args:
        height: of the feature map, in patches.
        width: of the feature map, in patches.
        window: side of a window, in patches.
        shift: in patches; without one the bias is all zeros.
        like: a tensor of the wanted dtype and device.

    Returns:
        (windows, w², w²).
    """

    def region(length: int) -> Tensor:
        position = torch.arange(length, device=like.device)
        return (position >= length - window).long() + (position >= length - shift).long()

    regions = 3 * region(height)[:, None] + region(width)[None, :]
    regions = rearrange(regions, "(H p) (W q) -> (H W) (p q)", p=window, q=window)
    apart = regions[:, :, None] != regions[:, None, :]
    return apart.to(like.dtype) * -100.0


class SwinBlock(nn.Module):
    """Attention within windows and feed-forward, pre-norm with residual connections.

    (B, H, W, C) -> (B, H, W, C).

    Args:
        config: HTS-AT's.
        level: which level the block is in.
        shifted: whether the windows are shifted by half a window.
    """

    def __init__(self, config: HTSATConfig, level: int, shifted: bool):
        super().__init__()
        width = config.width(level)
        self.heads = config.num_attention_heads[level]
        self.window = config.window_size
        # A feature map that is only one window high or wide is not shifted in either direction.
        smallest = config.spec_size // max(_pair(config.patch_stride)) // 2**level
        self.shift = self.window // 2 if shifted and smallest > self.window else 0
        self.activation = activation(config.hidden_act)
        self.attention_norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.qkv = nn.Linear(width, 3 * width, bias=config.qkv_bias)
        self.out = nn.Linear(width, width)
        self.relative_bias = nn.Parameter(torch.zeros((2 * self.window - 1) ** 2, self.heads))
        self.feed_forward_norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.up = nn.Linear(width, int(config.mlp_ratio * width))
        self.down = nn.Linear(int(config.mlp_ratio * width), width)

    def window_attention(self, x: Tensor) -> Tensor:
        """Self-attention within each window: (B, H, W, C) -> (B, H, W, C), H and W multiples of the window.

        The windows are treated as additional heads, so that one bias serves the whole batch.
        """
        w = self.window
        height, width = x.shape[1:3]
        q, k, v = rearrange(self.qkv(x), "b (H p) (W q) (t c) -> t b (p q) (H W c)", t=3, p=w, q=w)
        bias = rearrange(self.relative_bias[_relative_index(w, x.device)], "q k h -> h q k")
        mask = rearrange(_shift_mask(height, width, w, self.shift, like=bias), "n q k -> n 1 q k")
        bias = rearrange(bias + mask, "n h q k -> (n h) q k")
        x = attention(q, k, v, heads=bias.shape[0], bias=bias)
        x = rearrange(x, "b (p q) (H W c) -> b (H p) (W q) c", p=w, q=w, H=height // w, W=width // w)
        out: Tensor = self.out(x)
        return out

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[1:3]
        # The last windows are padded with zeros, which are attended to, as in the reference.
        y = F.pad(self.attention_norm(x), (0, 0, 0, -width % self.window, 0, -height % self.window))
        y = torch.roll(y, (-self.shift, -self.shift), dims=(1, 2))
        y = torch.roll(self.window_attention(y), (self.shift, self.shift), dims=(1, 2))
        x = x + y[:, :height, :width]
        out: Tensor = x + self.down(self.activation(self.up(self.feed_forward_norm(x))))
        return out


class PatchMerging(nn.Module):
    """2 x 2 patches become one of twice the width: (B, H, W, C) -> (B, H/2, W/2, 2C) (Swin, section 3.1)."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(4 * width)
        self.reduce = nn.Linear(4 * width, 2 * width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.reduce(self.norm(rearrange(x, "b (H p) (W q) c -> b H W (q p c)", p=2, q=2)))
        return out


class SwinLevel(nn.Module):
    """The blocks of one level, every second one shifted, then patch merging (except on the last level).

    (B, H, W, C) -> (B, H/2, W/2, 2C), or the input's shape on the last level.
    """

    def __init__(self, config: HTSATConfig, level: int):
        super().__init__()
        depth, last = config.depths[level], level == len(config.depths) - 1
        self.blocks = nn.Sequential(*(SwinBlock(config, level, i % 2 == 1) for i in range(depth)))
        self.merge = nn.Identity() if last else PatchMerging(config.width(level))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.merge(self.blocks(x))
        return out


class HTSAT(nn.Module):
    """The transformer: log-mel spectrograms (B, channels, frames, mels) -> vectors (B, hidden_size).

    There is one channel in all published checkpoints.

    Args:
        config: sizes; `hidden_size` is the last level's width.
    """

    def __init__(self, config: HTSATConfig):
        super().__init__()
        size, stride, width = _pair(config.patch_size), _pair(config.patch_stride), config.width(0)
        padding = ((size[0] - stride[0]) // 2, (size[1] - stride[1]) // 2)
        self.unusable = config.unusable
        self.channels = config.patch_embed_input_channels
        self.mels = config.num_mel_bins
        self.pieces = config.spec_size // config.num_mel_bins  # that the spectrogram is cut into in time
        self.frames = config.spec_size * self.pieces
        self.mel_norm = nn.BatchNorm2d(config.num_mel_bins)
        self.patches = nn.Conv2d(self.channels, width, size, stride, padding)
        self.patch_norm = nn.LayerNorm(width) if config.enable_patch_layer_norm else nn.Identity()
        self.levels = nn.ModuleList(SwinLevel(config, level) for level in range(len(config.depths)))
        self.norm = nn.LayerNorm(config.hidden_size)

    def forward(self, input_features: Tensor) -> Tensor:
        """Encode spectrograms.

        Args:
            input_features: log-mel spectrograms, (B, channels, frames, mels), converted to the weights'
                dtype; fewer than spec_size² / mels frames are stretched to that many.

        Returns:
            (B, hidden_size), the mean over all patches.

        Raises:
            ValueError: another shape, too many frames, or a config that is `unusable`.
        """
        if self.unusable:
            raise ValueError(f"CLAP's audio tower cannot run: {self.unusable}")
        shape = tuple(input_features.shape)
        if len(shape) != 4 or shape[1] != self.channels or shape[2] > self.frames or shape[3] != self.mels:
            raise ValueError(
                f"input_features must be (batch, {self.channels}, frames, {self.mels}) with at most "
                f"{self.frames} frames; the shape is {shape}"
            )
        x = input_features.to(self.patches.weight.dtype)
        x = self.mel_norm(rearrange(x, "b c t f -> b f t c"))
        x = rearrange(x, "b f t c -> b c t f")
        if shape[2] < self.frames:
            x = F.interpolate(x, (self.frames, self.mels), mode="bicubic", align_corners=True)
        x = rearrange(x, "b c (r t) f -> b c (r f) t", r=self.pieces)  # (B, C, spec_size, spec_size)
        x = self.patch_norm(rearrange(self.patches(x), "b c H W -> b H W c"))
        for level in self.levels:
            x = level(x)
        pooled: Tensor = reduce(self.norm(x), "b H W c -> b c", "mean")
        return pooled
