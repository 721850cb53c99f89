"""UNet: the denoiser, with two cross-attentions.

In: noisy latents x_t (B, 8, T/4, F/4) with T frames and F mel bands, the timestep t, and two conditions:
GPT-2's vectors (B, N, 768) and T5's states (B, M, 1024) with their mask. Out: the prediction that the
scheduler expects, for AudioLDM 2 the noise epsilon(x_t, t, conditions), with the shape of x_t.

This is the "transformer UNet" of AudioLDM 2 (Liu et al. 2023, arXiv:2308.05734): a U-Net (Ronneberger et al.
2015) of ResNet blocks conditioned on the timestep (Ho et al. 2020, appendix B), most of them followed by
transformers that attend to the conditions (Rombach et al. 2022, section 3.3).

It differs from the textbook in one way: a ResNet block is followed not by one transformer but by several, one
for each entry of `cross_attention_dim`. Together they are called a layer here, as in `layers_per_block`. The
transformer of a null entry attends only to the feature map itself, twice. Any other attends to GPT-2's
vectors if it is the first or second of its layer, and to T5's states otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from audioldm2.models.config import check_sizes, known_fields, refuse_unsupported
from audioldm2.models.layers import (
    Condition,
    Context,
    ResNetBlock,
    Transformer,
    Upsample,
    activation,
    mask_bias,
)
from audioldm2.models.stage import Stage

# Added to the attention scores of padding; finite, so that a row of padding alone gives no NaN.
PADDING_BIAS = -10_000.0
DOWN_BLOCKS = ("DownBlock2D", "CrossAttnDownBlock2D")
UP_BLOCKS = ("UpBlock2D", "CrossAttnUpBlock2D")
# Keys of diffusers' config that would change the result, and the values supported here.
SUPPORTED: dict[str, tuple[Any, ...]] = {
    "mid_block_type": ("UNetMidBlock2DCrossAttn",),
    "downsample_padding": (1,),
    "mid_block_scale_factor": (1,),
    "num_attention_heads": (None,),
    "use_linear_projection": (False,),
    "dual_cross_attention": (False, None),
    "class_embed_type": (None,),
    "num_class_embeds": (None,),
    "class_embeddings_concat": (False,),
    "resnet_time_scale_shift": ("default",),
    "time_embedding_type": ("positional",),
    "time_embedding_act_fn": (None,),
    "timestep_post_act": (None,),
    "time_cond_proj_dim": (None,),
}


@dataclass(frozen=True)
class UNetConfig:
    """The keys of the Hub's unet/config.json that change the result, with diffusers' defaults.

    `attention_head_dim` is the *number* of heads: the key was misnamed when it was introduced. Keys that hold
    one value or one per level are kept as they are, and read through `per_level` and `attends_to`.

    Raises:
        ValueError: counts of levels that differ, or a block type, activation or entry that is not supported.
    """

    sample_size: int | tuple[int, ...] | None = None
    in_channels: int = 4
    out_channels: int = 4
    flip_sin_to_cos: bool = True
    freq_shift: int = 0
    down_block_types: tuple[str, ...] = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
    up_block_types: tuple[str, ...] = ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers_per_block: int | tuple[int, ...] = 2
    act_fn: str = "silu"
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    cross_attention_dim: int | tuple[int | tuple[int | None, ...] | None, ...] = 1280
    transformer_layers_per_block: int | tuple[int, ...] = 1
    attention_head_dim: int | tuple[int, ...] = 8
    time_embedding_dim: int | None = None
    conv_in_kernel: int = 3
    conv_out_kernel: int = 3

    def __post_init__(self) -> None:
        layers = ("layers_per_block", "transformer_layers_per_block")
        check_sizes(self, layers=layers, zero=("freq_shift",), positive=("norm_eps",))
        levels = len(self.block_out_channels)
        by_level = ("layers_per_block", "transformer_layers_per_block", "attention_head_dim")
        for key in ("down_block_types", "up_block_types", "cross_attention_dim", *by_level):
            value = getattr(self, key)
            if isinstance(value, tuple) and len(value) != levels:
                raise ValueError(f"{key} has {len(value)} entries, block_out_channels {levels} levels")
            if key in by_level and not all(isinstance(n, int) and n > 0 for n in self.per_level(key)):
                raise ValueError(f"{key} = {value!r} is not supported; it must be a count, or one per level")
        kinds = zip(self.down_block_types, self.up_block_types[::-1], strict=True)
        for level, (down, up) in enumerate(kinds):
            blocks = {"down_block_types": down, "up_block_types": up}
            refuse_unsupported(blocks, {"down_block_types": DOWN_BLOCKS, "up_block_types": UP_BLOCKS})
            attends = "CrossAttn" in down + up or level == levels - 1  # the middle belongs to the last level
            if attends and self.attends_to(level) is None:
                raise ValueError(f"cross_attention_dim is null at level {level}, which has attention")
        if self.freq_shift >= max(1, self.block_out_channels[0] // 2):
            raise ValueError(f"freq_shift = {self.freq_shift} is as large as the time embedding")
        for key in ("conv_in_kernel", "conv_out_kernel"):
            if getattr(self, key) % 2 == 0:
                raise ValueError(f"{key} = {getattr(self, key)} must be odd, to preserve the size")
        activation(self.act_fn)

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> UNetConfig:
        """The config from a config.json.

        Args:
            content: the JSON object; keys that do not change the result are ignored.

        Raises:
            ValueError: a value that is not supported; the message names the key.
        """
        by_level = [False] * len(content.get("down_block_types", ()))
        refuse_unsupported(content, {**SUPPORTED, "only_cross_attention": (False, by_level)})
        return cls(**known_fields(cls, content))

    def per_level(self, key: str) -> tuple[int, ...]:
        """The values of a key for each level; the config has one for all levels or one for each."""
        value = getattr(self, key)
        return value if isinstance(value, tuple) else (value,) * len(self.block_out_channels)

    def attends_to(self, level: int) -> tuple[int | None, ...] | None:
        """The width of what each transformer of a layer attends to, at a level; None without attention."""
        widths = self.cross_attention_dim
        entry = widths[level] if isinstance(widths, tuple) else widths
        return (entry,) if isinstance(entry, int) else entry

    @property
    def time_width(self) -> int:
        """Width of the time embedding."""
        return self.time_embedding_dim or 4 * self.block_out_channels[0]


# For each transformer of a level, for each of its blocks; None if a block attends to no condition.
LevelContexts = list[list[Context | None]]


class Contexts(NamedTuple):
    """What all cross-attentions attend to: the same at every step of a generation (see `UNet.contexts`)."""

    levels: list[LevelContexts]  # down, middle, up
    rows: int  # B


class Level(nn.Module):
    """The layers of one resolution. A layer is a ResNet block and the transformers after it, if any.

    Args:
        config: the UNet's.
        level: which entry of the config's per-level values to read.
        channels_in: the input channels of each ResNet block, skip connection included.
        attention_layers: how many of the layers, counted from the first, have transformers.
        resample: the module that leads to the next resolution, or None.
    """

    resnets: Sequence[ResNetBlock]
    transformers: Sequence[Transformer]

    def __init__(
        self,
        config: UNetConfig,
        level: int,
        channels_in: Sequence[int],
        attention_layers: int,
        resample: nn.Module | None = None,
    ):
        super().__init__()
        channels, groups = config.block_out_channels[level], config.norm_num_groups
        heads = config.per_level("attention_head_dim")[level]
        depth = config.per_level("transformer_layers_per_block")[level]
        widths = (config.attends_to(level) or ()) if attention_layers else ()
        self.transformers_per_layer = len(widths)
        resnets = (
            ResNetBlock(c_in, channels, groups, config.norm_eps, config.act_fn, config.time_width)
            for c_in in channels_in
        )
        self.resnets = nn.ModuleList(resnets)  # type: ignore[assignment]
        transformers = (
            Transformer(channels, heads, depth, groups, width)
            for _ in range(attention_layers)
            for width in widths
        )
        self.transformers = nn.ModuleList(transformers)  # type: ignore[assignment]
        self.resample = resample
        self.checkpointing = False  # see UNet.enable_gradient_checkpointing

    def contexts(self, gpt2: Condition, t5: Condition) -> LevelContexts:
        """What each transformer attends to: the first two of a layer to GPT-2's vectors, the others to T5."""
        return [
            transformer.contexts(gpt2 if self.attends_to_gpt2(index) else t5)
            for index, transformer in enumerate(self.transformers)
        ]

    def attends_to_gpt2(self, index: int) -> bool:
        """Whether a transformer that attends to a condition attends to GPT-2's vectors, and not to T5's."""
        return index % self.transformers_per_layer <= 1

    def layer(self, index: int, x: Tensor, time: Tensor, contexts: LevelContexts) -> Tensor:
        """Run one layer, a ResNet block and its transformers: (B, C_in, H, W) -> (B, C, H, W)."""
        if self.checkpointing and torch.is_grad_enabled():
            out: Tensor = checkpoint(self._layer, index, x, time, contexts, use_reentrant=False)
            return out
        return self._layer(index, x, time, contexts)

    def _layer(self, index: int, x: Tensor, time: Tensor, contexts: LevelContexts) -> Tensor:
        x = self.resnets[index](x, time)
        count = self.transformers_per_layer
        own = slice(index * count, (index + 1) * count)
        for transformer, context in zip(self.transformers[own], contexts[own], strict=True):
            x = transformer(_one_row_per_context(x, context), context)
        return x


class DownLevel(Level):
    """A level of the downsampling path. All but the last end by halving the resolution."""

    def forward(
        self, x: Tensor, time: Tensor, contexts: LevelContexts, resample: bool = True
    ) -> tuple[Tensor, list[Tensor]]:
        """(B, C_in, H, W) -> (B, C, H/2, W/2), and each layer's output for the skip connections."""
        skips = []
        for index in range(len(self.resnets)):
            x = self.layer(index, x, time, contexts)
            skips.append(x)
        if resample and self.resample is not None:
            x = self.resample(x)
            skips.append(x)
        return x, skips


class MiddleLevel(Level):
    """The level between the two paths, of the lowest resolution: (B, C, H, W) -> (B, C, H, W)."""

    def forward(self, x: Tensor, time: Tensor, contexts: LevelContexts) -> Tensor:
        for index in range(len(self.resnets)):
            x = self.layer(index, x, time, contexts)
        return x


class UpLevel(Level):
    """A level of the upsampling path. All but the last end by doubling the resolution."""

    def forward(
        self,
        x: Tensor,
        skips: Sequence[Tensor],
        time: Tensor,
        contexts: LevelContexts,
        size: tuple[int, int] | None,
    ) -> Tensor:
        """(B, C_in, H, W) and one skip connection per layer -> (B, C, *size); size is None at the last."""
        for index, skip in enumerate(skips):
            x = self.layer(index, torch.cat([x, _repeated(skip, len(x))], dim=1), time, contexts)
        return x if self.resample is None else self.resample(x, size)


def down_levels(config: UNetConfig) -> list[DownLevel]:
    """The levels of the downsampling path, from the highest resolution to the lowest."""
    channels = config.block_out_channels
    layers = config.per_level("layers_per_block")
    levels = []
    for i, kind in enumerate(config.down_block_types):
        # The first layer takes the output of the level above, every other one that of the layer before it.
        channels_in = [channels[max(i - 1, 0)]] + [channels[i]] * (layers[i] - 1)
        halve = nn.Conv2d(channels[i], channels[i], 3, stride=2, padding=1) if i + 1 < len(channels) else None
        attention_layers = len(channels_in) if "CrossAttn" in kind else 0
        levels.append(DownLevel(config, i, channels_in, attention_layers, halve))
    return levels


def up_levels(config: UNetConfig) -> list[UpLevel]:
    """The levels of the upsampling path, from the lowest resolution to the highest."""
    channels = config.block_out_channels
    layers = config.per_level("layers_per_block")
    levels = []
    for i, kind in zip(reversed(range(len(channels))), config.up_block_types, strict=True):
        # The downsampling path left one feature map per layer of this level and, before those, its input.
        skips = [channels[i]] * layers[i] + [channels[max(i - 1, 0)]]
        before = [channels[min(i + 1, len(channels) - 1)]] + [channels[i]] * layers[i]
        channels_in = [x + skip for x, skip in zip(before, skips, strict=True)]
        double = None if i == 0 else Upsample(channels[i])
        attention_layers = len(channels_in) if "CrossAttn" in kind else 0
        levels.append(UpLevel(config, i, channels_in, attention_layers, double))
    return levels


class UNet(Stage[UNetConfig]):
    """The denoiser of AudioLDM 2: noisy latents, a timestep and two conditions -> the noise in the latents.

    In a loop over timesteps, the keys and values of the cross-attentions need to be computed only once, with
    `contexts`.

    Args:
        config: sizes, kept as `unet.config`.

    Example:
        >>> unet = UNet.from_pretrained("tiny", subfolder="unet")  # or "cvssp/audioldm2"
        >>> latents = torch.randn(1, unet.config.in_channels, 40, 16)  # (B, channels, T/4, F/4)
        >>> gpt2_vectors = torch.randn(1, 8, 128)  # from GPT2.generate; 768 wide in cvssp/audioldm2
        >>> t5_states = torch.randn(1, 20, 96)  # from a T5Encoder; 1024 wide in cvssp/audioldm2
        >>> noise = unet(latents, 999, gpt2_vectors, t5_states)
        >>> noise.shape
        torch.Size([1, 8, 40, 16])
        >>> contexts = unet.contexts(gpt2_vectors, t5_states)  # once
        >>> torch.equal(unet(latents, 999, contexts=contexts), noise)  # at each timestep
        True
    """

    down: Sequence[DownLevel]
    up: Sequence[UpLevel]

    def __init__(self, config: UNetConfig):
        super().__init__()
        self.config = config
        first, last, width = config.block_out_channels[0], config.block_out_channels[-1], config.time_width
        self.act = activation(config.act_fn)
        self.time_1 = nn.Linear(first, width)
        self.time_2 = nn.Linear(width, width)
        self.conv_in = _conv(config.in_channels, first, config.conv_in_kernel)
        self.down = nn.ModuleList(down_levels(config))  # type: ignore[assignment]
        self.middle = MiddleLevel(config, -1, [last, last], attention_layers=1)
        self.up = nn.ModuleList(up_levels(config))  # type: ignore[assignment]
        self.norm_out = nn.GroupNorm(config.norm_num_groups, first, config.norm_eps)
        self.conv_out = _conv(first, config.out_channels, config.conv_out_kernel)

    def time_embedding(self, timestep: Tensor) -> Tensor:
        """Embed timesteps, (S,) -> (S, time width): sinusoids (Vaswani et al. 2017, section 3.5), two layers.

        Every ResNet block begins with the same activation of the embedding; it is applied here, once.
        """
        width = self.config.block_out_channels[0]
        half = width // 2
        exponent = -math.log(10_000) * torch.arange(half, dtype=torch.float32, device=timestep.device)
        angle = timestep.float()[:, None] * torch.exp(exponent / (half - self.config.freq_shift))  # (S, half)
        waves = [angle.cos(), angle.sin()] if self.config.flip_sin_to_cos else [angle.sin(), angle.cos()]
        wave = F.pad(torch.cat(waves, dim=-1), (0, width % 2)).to(self.conv_in.weight.dtype)
        return self.act(self.time_2(self.act(self.time_1(wave))))

    def contexts(
        self,
        encoder_hidden_states: Tensor,
        encoder_hidden_states_1: Tensor | None = None,
        encoder_attention_mask_1: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
    ) -> Contexts:
        """Keys and values of every cross-attention, which are the same at every step of a generation.

        Compute them again after the weights have changed.

        Args:
            encoder_hidden_states: GPT-2's vectors, (B, N, 768).
            encoder_hidden_states_1: T5's states, (B, M, 1024); GPT-2's vectors by default.
            encoder_attention_mask_1: (B, M), 1 for T5's tokens and 0 for padding; None attends to all.
            encoder_attention_mask: (B, N), the same for GPT-2's vectors.

        Returns:
            The argument `contexts` of `forward`.

        Raises:
            ValueError: a shape that does not fit.
        """
        rows = len(encoder_hidden_states)
        if encoder_hidden_states_1 is None:
            encoder_hidden_states_1 = encoder_hidden_states
        for states in (encoder_hidden_states, encoder_hidden_states_1):
            if states.dim() != 3 or len(states) != rows:
                raise ValueError(
                    f"encoder states have shape {tuple(states.shape)}; they should be ({rows}, tokens, width)"
                )
        gpt2 = _condition(encoder_hidden_states, encoder_attention_mask)
        t5 = _condition(encoder_hidden_states_1, encoder_attention_mask_1)
        return Contexts([level.contexts(gpt2, t5) for level in (*self.down, self.middle, *self.up)], rows)

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        encoder_hidden_states: Tensor | None = None,
        encoder_hidden_states_1: Tensor | None = None,
        encoder_attention_mask_1: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        *,
        contexts: Contexts | None = None,
        level: int | None = None,
        features: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Predict the noise in `sample`.

        Args:
            sample: noisy latents, (B, in_channels, T/4, F/4); any height and width. With guidance both halves
                of the batch have the same latents: pass them once, (B/2, ...), and they are repeated where
                the first transformer attends to a condition.
            timestep: 0 to 999 for AudioLDM 2: a number, a scalar tensor, or one for each row of `sample`.
            encoder_hidden_states: GPT-2's vectors, (B, N, 768).
            encoder_hidden_states_1: T5's states, (B, M, 1024); GPT-2's vectors by default (still masked by
                `encoder_attention_mask_1`, as in diffusers).
            encoder_attention_mask_1: (B, M), 1 for T5's tokens and 0 for padding; None attends to all.
            encoder_attention_mask: (B, N), the same for GPT-2's vectors.
            contexts: what the method `contexts` returned, in place of the encoder arguments.
            level: also return the features that enter this level of the upsampling path from below, to be
                used again at another timestep (see `audioldm2.feature_cache`); 0 is the highest resolution.
            features: what a call with this `level` returned. Only the levels from 0 to `level` are run.

        Returns:
            (B, out_channels, T/4, F/4); with `level` and without `features`, this and the features,
            (B, C, T/4, F/4) for level 0.

        Raises:
            ValueError: a shape that does not fit, not exactly one of `encoder_hidden_states` and `contexts`,
                `features` without `level`, or a level that has none below it.
        """
        given = (
            encoder_hidden_states,
            encoder_hidden_states_1,
            encoder_attention_mask_1,
            encoder_attention_mask,
        )
        if contexts is None and encoder_hidden_states is not None:
            contexts = self.contexts(encoder_hidden_states, *given[1:])
        elif contexts is None or any(x is not None for x in given):
            raise ValueError("pass either encoder_hidden_states (with its masks) or contexts")
        if not isinstance(timestep, Tensor):
            timestep = torch.tensor(timestep, device=sample.device)
        timestep = timestep.to(sample.device).reshape(-1)
        self._check(sample, timestep, contexts.rows)
        self._check_level(level, features, contexts.rows)
        if len(timestep) > 1:
            sample, timestep = (_repeated(x, contexts.rows) for x in (sample, timestep))
        time = self.time_embedding(timestep)

        levels = len(self.down)
        down, middle, up = contexts.levels[:levels], contexts.levels[levels], contexts.levels[levels + 1 :]
        entered = levels - 1 - (level or 0)  # where in `up` the features enter
        depth, first = (levels, 0) if features is None else (levels - entered, entered)
        x = self.conv_in(sample)
        skips = [x]
        for index in range(depth):
            resample = features is None or index + 1 < depth
            x, outputs = self.down[index](x, time, down[index], resample)
            skips += outputs
        x = self.middle(x, time, middle) if features is None else features
        entering = x
        for index in range(first, levels):
            if index == entered:
                entering = x
            last_first = [skips.pop() for _ in self.up[index].resnets]
            # Halving rounds odd sizes up, so doubling may be one too many.
            size = tuple(skips[-1].shape[2:]) if skips else None
            x = self.up[index](x, last_first, time, up[index], size)
        x = self.conv_out(self.act(self.norm_out(x)))
        x = _repeated(x, contexts.rows).contiguous()
        return x if level is None or features is not None else (x, entering)

    def enable_gradient_checkpointing(self) -> None:
        """Store only the inputs of each layer for the backward pass, and compute the rest again there.

        Training then needs less memory and about a third more time (Chen et al. 2016, "Training Deep Nets
        with Sublinear Memory Cost"). Results and gradients are the same; without gradients nothing changes.
        """
        self._set_checkpointing(True)

    def disable_gradient_checkpointing(self) -> None:
        """Store everything for the backward pass again."""
        self._set_checkpointing(False)

    @property
    def is_gradient_checkpointing(self) -> bool:
        """Whether `enable_gradient_checkpointing` is in effect."""
        checkpointing: bool = self.middle.checkpointing
        return checkpointing

    def _set_checkpointing(self, checkpointing: bool) -> None:
        for level in (*self.down, self.middle, *self.up):
            level.checkpointing = checkpointing

    def _check(self, sample: Tensor, timestep: Tensor, rows: int) -> None:
        if sample.dim() != 4 or sample.shape[1] != self.config.in_channels:
            wanted = f"(batch, {self.config.in_channels}, time, frequency)"
            raise ValueError(f"sample has shape {tuple(sample.shape)}; it should be {wanted}")
        batch = len(sample)
        if batch == 0 or rows % batch:
            raise ValueError(f"sample has a batch of {batch}, the encoder states have one of {rows}")
        if len(timestep) not in (1, batch):
            raise ValueError(f"{len(timestep)} timesteps for a batch of {batch}; pass one, or one per row")

    def _check_level(self, level: int | None, features: Tensor | None, rows: int) -> None:
        below = len(self.down) - 1
        if level is None:
            if features is not None:
                raise ValueError("features go with level; pass the one that they were returned for")
        elif not 0 <= level < below:
            raise ValueError(
                f"level = {level} has none below it; this UNet has features for 0 to {below - 1}"
            )
        elif features is not None:
            channels = self.config.block_out_channels[level + 1]
            if features.dim() != 4 or features.shape[1] != channels or rows % len(features):
                raise ValueError(
                    f"features have shape {tuple(features.shape)}; for level {level} and {rows} rows they "
                    f"should be ({rows}, {channels}, time, frequency)"
                )


def _conv(channels_in: int, channels_out: int, kernel: int) -> nn.Conv2d:
    return nn.Conv2d(channels_in, channels_out, kernel, padding=(kernel - 1) // 2)


def _repeated(x: Tensor, rows: int) -> Tensor:
    """Repeat a batch until it has `rows` rows, of which len(x) is a divisor."""
    return x if len(x) == rows else x.repeat(rows // len(x), *[1] * (x.dim() - 1))


def _one_row_per_context(x: Tensor, contexts: Sequence[Context | None]) -> Tensor:
    """Repeat a feature map to have one row for each row of the contexts, if there are any."""
    return _repeated(x, next((len(context.kv) for context in contexts if context is not None), len(x)))


def _condition(states: Tensor, mask: Tensor | None) -> Condition:
    if mask is None:
        return Condition(states, None)
    if mask.shape != states.shape[:2]:
        raise ValueError(
            f"the attention mask has shape {tuple(mask.shape)} and its states {tuple(states.shape)}; "
            f"the mask should be {tuple(states.shape[:2])}"
        )
    return Condition(states, mask_bias(mask, states.dtype, PADDING_BIAS))
