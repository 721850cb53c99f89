"""text_encoder: CLAP, which maps text and sound into one space where what belongs together is near.

    text:  input_ids (B, N), attention_mask (B, N)  ->  text_features (B, P), of length 1
    sound: log-mel picture (B, 1, frames, mels)     ->  audio_features (B, P), of length 1

CLAP (Wu et al. 2023, "Large-scale Contrastive Language-Audio Pretraining with Feature Fusion and
Keyword-to-Caption Augmentation", section 3) has two towers. AudioLDM 2 reads the prompt with the text tower
(an input of GPT-2), and ranks finished sounds by the cosine between the two towers' features.

* The text tower is RoBERTa (Liu et al. 2019): BERT's encoder, normalized after each sublayer. Its positions
  count the tokens that are not padding, from pad_token_id + 1 on.
* The audio tower is HTS-AT (Chen et al. 2022), a Swin transformer (Liu et al. 2021) on a square picture: the
  mel picture (long in time, low in frequency) is cut in time and the pieces are stacked in frequency.
  Attention is within windows of w x w patches, shifted by w/2 in every second block; between levels 2 x 2
  patches merge.

Only the unfused kind of CLAP is here (one picture a clip). Dropout and stochastic depth are left out, as they
act in training only.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from torch import Tensor, nn

from audioldm2.models.config import known_fields, refuse_unsupported
from audioldm2.models.layers import ACTIVATIONS, activation, attention, mask_bias
from audioldm2.models.stage import Stage

# Keys that would change the result, and the values that they may have here.
SUPPORTED_TEXT = {"position_embedding_type": ("absolute",), "hidden_act": tuple(ACTIVATIONS)}
SUPPORTED_AUDIO: dict[str, tuple[Any, ...]] = {
    "enable_fusion": (False,),
    "flatten_patch_embeds": (True,),
    "patch_embed_input_channels": (1,),
    "hidden_act": tuple(ACTIVATIONS),
}


def _pair(value: int | tuple[int, ...]) -> tuple[int, int]:
    height, width = (value, value) if isinstance(value, int) else value
    return height, width


@dataclass(frozen=True)
class ClapTextConfig:
    """RoBERTa's sizes; the fields are the keys of config.json's "text_config", the defaults transformers'."""

    vocab_size: int = 50265
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    max_position_embeddings: int = 514
    type_vocab_size: int = 1
    layer_norm_eps: float = 1e-12
    pad_token_id: int = 1

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"num_attention_heads = {self.num_attention_heads} must divide {self.hidden_size}"
            )
        if not isinstance(self.pad_token_id, int):
            raise ValueError(f"pad_token_id = {self.pad_token_id!r} must be a token's number")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ClapTextConfig:
        refuse_unsupported(values, SUPPORTED_TEXT)
        return cls(**known_fields(cls, values))


@dataclass(frozen=True)
class ClapAudioConfig:
    """HTS-AT's sizes; the fields are the keys of config.json's "audio_config", the defaults transformers'."""

    spec_size: int = 256
    num_mel_bins: int = 64
    window_size: int = 8
    patch_size: int | tuple[int, ...] = 4
    patch_stride: int | tuple[int, ...] = (4, 4)
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
                raise ValueError(f"patch_size = {size} does not go with a stride of {stride}")
            halved = patches // 2 ** (len(widths) - 1)
            if patches % 2 ** (len(widths) - 1) or halved < self.window_size:
                raise ValueError(
                    f"window_size = {self.window_size} is not supported with {patches} patches, halved "
                    f"{len(widths) - 1} times; they must halve evenly, to no less than a window"
                )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ClapAudioConfig:
        refuse_unsupported(values, SUPPORTED_AUDIO)
        return cls(**known_fields(cls, values))

    def width(self, level: int) -> int:
        return self.patch_embeds_hidden_size * 2**level


@dataclass(frozen=True)
class ClapConfig:
    """Both towers and what joins them; the fields are the keys of the Hub's config.json."""

    text_config: ClapTextConfig = field(default_factory=ClapTextConfig)
    audio_config: ClapAudioConfig = field(default_factory=ClapAudioConfig)
    projection_dim: int = 512
    projection_hidden_act: str = "relu"
    logit_scale_init_value: float = 1 / 0.07

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ClapConfig:
        """The config from a config.json's content.

        Keys of generation and training are ignored, and so are the towers' own copies of the projection's
        keys, which the outer ones overrule.

        Raises:
            ValueError: a key has a value that is not supported; fused CLAP (enable_fusion) is one.
        """
        refuse_unsupported(values, {"projection_hidden_act": tuple(ACTIVATIONS)})
        text = ClapTextConfig.from_dict(values.get("text_config") or {})
        audio = ClapAudioConfig.from_dict(values.get("audio_config") or {})
        return cls(**{**known_fields(cls, values), "text_config": text, "audio_config": audio})


class Projection(nn.Module):
    """A tower's pooled state (B, C) -> a feature of length 1, (B, P): two linear maps, then x / |x|."""

    def __init__(self, width: int, config: ClapConfig):
        super().__init__()
        self.activation = activation(config.projection_hidden_act)
        self.inner = nn.Linear(width, config.projection_dim)
        self.outer = nn.Linear(config.projection_dim, config.projection_dim)

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(self.outer(self.activation(self.inner(x))), dim=-1)


class TextBlock(nn.Module):
    """Self-attention and feed-forward, each added and then normalized: (B, N, C) -> (B, N, C)."""

    def __init__(self, config: ClapTextConfig):
        super().__init__()
        width = config.hidden_size
        self.heads = config.num_attention_heads
        self.activation = activation(config.hidden_act)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.attention_norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.up = nn.Linear(width, config.intermediate_size)
        self.down = nn.Linear(config.intermediate_size, width)
        self.feed_forward_norm = nn.LayerNorm(width, eps=config.layer_norm_eps)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        x = self.attention_norm(x + self.out(attention(q, k, v, self.heads, bias=bias)))
        return self.feed_forward_norm(x + self.down(self.activation(self.up(x))))


class ClapTextTower(nn.Module):
    """RoBERTa, its pooler and the projection: token ids and mask (B, N) -> features (B, P)."""

    def __init__(self, config: ClapConfig):
        super().__init__()
        text = config.text_config
        width = text.hidden_size
        self.pad_token_id = text.pad_token_id
        self.longest = text.max_position_embeddings - text.pad_token_id - 1
        self.words = nn.Embedding(text.vocab_size, width, padding_idx=text.pad_token_id)
        self.positions = nn.Embedding(text.max_position_embeddings, width, padding_idx=text.pad_token_id)
        self.token_types = nn.Embedding(text.type_vocab_size, width)
        self.embedding_norm = nn.LayerNorm(width, eps=text.layer_norm_eps)
        self.blocks = nn.ModuleList(TextBlock(text) for _ in range(text.num_hidden_layers))
        self.pooler = nn.Linear(width, width)
        self.projection = Projection(width, config)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        if input_ids.dim() != 2 or input_ids.shape != attention_mask.shape:
            raise ValueError(
                f"input_ids and attention_mask must both be (batch, tokens); their shapes are "
                f"{tuple(input_ids.shape)} and {tuple(attention_mask.shape)}"
            )
        if input_ids.shape[1] > self.longest:
            raise ValueError(f"{input_ids.shape[1]} tokens are too many for CLAP; cut them to {self.longest}")
        is_token = (input_ids != self.pad_token_id).long()
        positions = is_token.cumsum(dim=1) * is_token + self.pad_token_id
        x = self.words(input_ids) + self.token_types.weight[0] + self.positions(positions)  # (B, N, C)
        x = self.embedding_norm(x)
        bias = mask_bias(attention_mask, x.dtype, torch.finfo(x.dtype).min)
        for block in self.blocks:
            x = block(x, bias)
        return self.projection(torch.tanh(self.pooler(x[:, 0])))


def _relative_index(window: int, device: torch.device) -> Tensor:
    """For each pair of patches in a window, the row of the bias table that holds their offset: (w², w²)."""
    at = torch.arange(window, device=device)
    offset = at[:, None] - at[None, :] + window - 1  # along one axis, 0 ... 2w-2
    index = offset[:, None, :, None] * (2 * window - 1) + offset[None, :, None, :]
    return rearrange(index, "i j k l -> (i j) (k l)")


def _shift_mask(height: int, width: int, window: int, shift: int, like: Tensor) -> Tensor:
    """A bias of -100 between patches that only the shift made neighbors (Swin, figure 4): (windows, w², w²).

    Without a shift it is all zeros.
    """

    def region(length: int) -> Tensor:
        at = torch.arange(length, device=like.device)
        return (at >= length - window).long() + (at >= length - shift).long()

    regions = 3 * region(height)[:, None] + region(width)[None, :]
    regions = rearrange(regions, "(H p) (W q) -> (H W) (p q)", p=window, q=window)
    apart = regions[:, :, None] != regions[:, None, :]
    return apart.to(like.dtype) * -100.0


class SwinBlock(nn.Module):
    """Attention within windows, then feed-forward, each added to what it read: (B, H, W, C) -> the same."""

    def __init__(self, config: ClapAudioConfig, level: int, shifted: bool):
        super().__init__()
        width = config.width(level)
        self.heads = config.num_attention_heads[level]
        self.window = config.window_size
        # A picture that is one window high or wide is not shifted, in either direction.
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
        """Self-attention within each window: (B, H, W, C) -> the same; H and W are multiples of the window.

        The windows are treated as further heads, so that one bias serves the whole batch.
        """
        w = self.window
        height, width = x.shape[1:3]
        q, k, v = rearrange(self.qkv(x), "b (H p) (W q) (t c) -> t b (p q) (H W c)", t=3, p=w, q=w)
        bias = rearrange(self.relative_bias[_relative_index(w, x.device)], "q k h -> h q k")
        mask = rearrange(_shift_mask(height, width, w, self.shift, like=bias), "n q k -> n 1 q k")
        bias = rearrange(bias + mask, "n h q k -> (n h) q k")
        x = attention(q, k, v, heads=bias.shape[0], bias=bias)
        x = rearrange(x, "b (p q) (H W c) -> b (H p) (W q) c", p=w, q=w, H=height // w, W=width // w)
        return self.out(x)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[1:3]
        # Zeros fill the last windows; they are attended to, as in the reference.
        y = F.pad(self.attention_norm(x), (0, 0, 0, -width % self.window, 0, -height % self.window))
        y = torch.roll(y, (-self.shift, -self.shift), dims=(1, 2))
        y = torch.roll(self.window_attention(y), (self.shift, self.shift), dims=(1, 2))
        x = x + y[:, :height, :width]
        return x + self.down(self.activation(self.up(self.feed_forward_norm(x))))


class PatchMerging(nn.Module):
    """Each 2 x 2 patches become one: (B, H, W, C) -> (B, H/2, W/2, 2C) (Swin, section 3.1)."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(4 * width)
        self.reduce = nn.Linear(4 * width, 2 * width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.reduce(self.norm(rearrange(x, "b (H p) (W q) c -> b H W (q p c)", p=2, q=2)))


class SwinLevel(nn.Module):
    """The blocks of one resolution, every second one shifted; then, but after the last, patch merging."""

    def __init__(self, config: ClapAudioConfig, level: int):
        super().__init__()
        depth, last = config.depths[level], level == len(config.depths) - 1
        self.blocks = nn.Sequential(*(SwinBlock(config, level, i % 2 == 1) for i in range(depth)))
        self.merge = nn.Identity() if last else PatchMerging(config.width(level))

    def forward(self, x: Tensor) -> Tensor:
        return self.merge(self.blocks(x))


class ClapAudioTower(nn.Module):
    """HTS-AT and the projection: log-mel pictures (B, 1, frames, mels) -> features (B, P)."""

    def __init__(self, config: ClapConfig):
        super().__init__()
        audio = config.audio_config
        size, stride, width = _pair(audio.patch_size), _pair(audio.patch_stride), audio.width(0)
        padding = ((size[0] - stride[0]) // 2, (size[1] - stride[1]) // 2)
        self.mels = audio.num_mel_bins
        self.pieces = audio.spec_size // audio.num_mel_bins  # that the picture is cut into in time
        self.frames = audio.spec_size * self.pieces
        self.mel_norm = nn.BatchNorm2d(audio.num_mel_bins)
        self.patches = nn.Conv2d(1, width, size, stride, padding)
        self.patch_norm = nn.LayerNorm(width) if audio.enable_patch_layer_norm else nn.Identity()
        self.levels = nn.ModuleList(SwinLevel(audio, level) for level in range(len(audio.depths)))
        self.norm = nn.LayerNorm(audio.hidden_size)
        self.projection = Projection(audio.hidden_size, config)

    def forward(self, input_features: Tensor) -> Tensor:
        shape = tuple(input_features.shape)
        if len(shape) != 4 or shape[1] != 1 or shape[2] > self.frames or shape[3] != self.mels:
            raise ValueError(
                f"input_features must be (batch, 1, frames, {self.mels}) with at most {self.frames} frames; "
                f"the shape is {shape}"
            )
        x = input_features.to(self.patches.weight.dtype)
        x = self.mel_norm(rearrange(x, "b 1 t f -> b f t 1"))
        x = rearrange(x, "b f t 1 -> b 1 t f")
        if shape[2] < self.frames:
            x = F.interpolate(x, (self.frames, self.mels), mode="bicubic", align_corners=True)
        x = rearrange(x, "b c (r t) f -> b c (r f) t", r=self.pieces)  # square: (B, 1, spec_size, spec_size)
        x = self.patch_norm(rearrange(self.patches(x), "b c H W -> b H W c"))
        for level in self.levels:
            x = level(x)
        return self.projection(reduce(self.norm(x), "b H W c -> b c", "mean"))


class ClapModel(Stage[ClapConfig]):
    """CLAP: the two towers, and the two learned temperatures of its contrastive loss."""

    def __init__(self, config: ClapConfig):
        super().__init__()
        self.config = config
        self.text = ClapTextTower(config)
        self.audio = ClapAudioTower(config)
        self.logit_scale_a = nn.Parameter(torch.tensor(math.log(config.logit_scale_init_value)))
        self.logit_scale_t = nn.Parameter(torch.tensor(math.log(config.logit_scale_init_value)))

    def text_features(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Features of texts.

        Args:
            input_ids: (B, N), integers, padded on the right; N <= max_position_embeddings - pad_token_id - 1.
            attention_mask: (B, N), 1 or True for tokens, 0 for padding.

        Returns:
            (B, projection_dim), each of length 1.

        Raises:
            ValueError: shapes that do not fit together, or too many tokens.
        """
        return self.text(input_ids, attention_mask)

    def audio_features(self, input_features: Tensor) -> Tensor:
        """Features of sounds.

        Args:
            input_features: log-mel pictures, (B, 1, frames, mels); stretched to spec_size² / mels frames.

        Returns:
            (B, projection_dim), each of length 1.

        Raises:
            ValueError: another shape, or too many frames.
        """
        return self.audio(input_features)

    def logits(self, text_features: Tensor, audio_features: Tensor) -> tuple[Tensor, Tensor]:
        """Scaled cosines of (T, P) and (A, P): (T, A) for the loss over sounds, (A, T) over texts."""
        cosine = text_features @ audio_features.t()
        return cosine * self.logit_scale_t.exp(), cosine.t() * self.logit_scale_a.exp()

    def forward(self, input_ids: Tensor, attention_mask: Tensor, input_features: Tensor) -> Tensor:
        """How well each of T texts goes with each of A sounds: (T, A), scaled cosines."""
        return self.logits(
            self.text_features(input_ids, attention_mask), self.audio_features(input_features)
        )[0]
