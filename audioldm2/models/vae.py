"""VAE: between log-mel spectrograms and the latents in which the diffusion happens.

In: a log-mel spectrogram (B, 1, T, F), T frames by F mel bands. Out, from the encoder: a diagonal Gaussian
over latents (B, 8, T/4, F/4). Out, from the decoder: a log-mel spectrogram again. Sizes are those of
AudioLDM 2: three levels of channels, so two halvings.

A variational autoencoder (Kingma and Welling 2014): q(z|x) = N(mean(x), variance(x)), a Gaussian whose axes
are independent. The networks are those of latent diffusion (Rombach et al. 2022, section 3.1): ResNet blocks
level by level, and one attention over the whole feature map at the lowest level.

Where it differs from the textbook: a halving pads only at the far ends of time and frequency; the KL term was
weighted so lightly in training that the latents are not of unit variance. `VAEConfig.scaling_factor` makes
them so: whoever calls multiplies by it (into the diffusion) or divides (out of it). Nothing is scaled here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from torch import Tensor, nn

from audioldm2.models.config import known_fields, refuse_unsupported
from audioldm2.models.layers import ResNetBlock, SelfAttention, Upsample, activation
from audioldm2.models.stage import Stage

EPS = 1e-6  # of every GroupNorm; no config says otherwise


@dataclass(frozen=True)
class VAEConfig:
    """The keys of the Hub's vae/config.json that matter; defaults are those of diffusers' AutoencoderKL.

    Raises:
        ValueError: counts of levels that differ, a block type or an activation that is not supported.
    """

    in_channels: int = 3
    out_channels: int = 3
    down_block_types: tuple[str, ...] = ("DownEncoderBlock2D",)
    up_block_types: tuple[str, ...] = ("UpDecoderBlock2D",)
    block_out_channels: tuple[int, ...] = (64,)
    layers_per_block: int = 1
    act_fn: str = "silu"
    latent_channels: int = 4
    norm_num_groups: int = 32
    sample_size: int | tuple[int, ...] = 32
    scaling_factor: float = 0.18215
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    mid_block_add_attention: bool = True

    def __post_init__(self) -> None:
        levels = len(self.block_out_channels)
        kinds = {"down_block_types": "DownEncoderBlock2D", "up_block_types": "UpDecoderBlock2D"}
        for key, kind in kinds.items():
            types = getattr(self, key)
            if len(types) != levels:
                raise ValueError(f"{key} names {len(types)} levels, block_out_channels {levels}")
            refuse_unsupported(dict.fromkeys([key], set(types) or {kind}), {key: ({kind},)})
        activation(self.act_fn)

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> VAEConfig:
        """From a Hub config; keys that change nothing here are ignored.

        Raises:
            ValueError: a value that is not supported, by name.
        """
        unscaled = ("latents_mean", "latents_std", "shift_factor")
        refuse_unsupported(content, dict.fromkeys(unscaled, (None,)))
        return cls(**known_fields(cls, content))


class DiagonalGaussian:
    """A Gaussian with independent axes, one an example: what the encoder says of the latents.

    Args:
        parameters: (B, 2C, H, W): the means, then the logarithms of the variances.

    Attributes:
        mean: (B, C, H, W).
        log_variance: (B, C, H, W), held between -30 and 20: the variance neither vanishes nor overflows.
    """

    def __init__(self, parameters: Tensor):
        self.mean, log_variance = parameters.chunk(2, dim=1)
        self.log_variance = log_variance.clamp(-30.0, 20.0)

    def mode(self) -> Tensor:
        """The most likely latents, (B, C, H, W)."""
        return self.mean

    def sample(self, generator: torch.Generator | Sequence[torch.Generator] | None = None) -> Tensor:
        """Latents drawn at random, mean + std · noise (Kingma and Welling 2014, eq. 10), (B, C, H, W).

        Args:
            generator: one for the whole batch, or a list with one an example. Noise is drawn where the
                generator lives, so a CPU generator gives the same latents on every device.

        Raises:
            ValueError: a list of another length than the batch.
        """
        return self.mean + torch.exp(0.5 * self.log_variance) * self._noise(generator)

    def _noise(self, generator: torch.Generator | Sequence[torch.Generator] | None) -> Tensor:
        shape, dtype, device = self.mean.shape, self.mean.dtype, self.mean.device
        if isinstance(generator, Sequence):
            if len(generator) == 1:
                return self._noise(generator[0])
            if len(generator) != shape[0]:
                raise ValueError(f"{len(generator)} generators for a batch of {shape[0]}; pass one for each")
            one = (1, *shape[1:])
            return torch.cat(
                [torch.randn(one, generator=g, dtype=dtype, device=g.device).to(device) for g in generator]
            )
        place = device if generator is None else generator.device
        return torch.randn(shape, generator=generator, dtype=dtype, device=place).to(device)

    def kl(self) -> Tensor:
        """Divergence from the unit Gaussian, in nats, (B,) (Kingma and Welling 2014, appendix B)."""
        terms = self.mean.square() + self.log_variance.exp() - 1.0 - self.log_variance
        return 0.5 * reduce(terms, "b c h w -> b", "sum")


class Downsample(nn.Module):
    """A 3x3 convolution of stride 2: (B, C, H, W) -> (B, C, H//2, W//2); the far ends alone are padded."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Level(nn.Module):
    """The ResNet blocks of one resolution: (B, C_in, H, W) -> (B, C_out, H, W)."""

    resnets: Sequence[ResNetBlock]

    def __init__(self, config: VAEConfig, channels_in: int, channels_out: int, layers: int):
        super().__init__()
        widths = [channels_in] + [channels_out] * layers
        resnets = (
            ResNetBlock(before, after, config.norm_num_groups, EPS, config.act_fn)
            for before, after in pairwise(widths)
        )
        self.resnets = nn.ModuleList(resnets)  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        for resnet in self.resnets:
            x = resnet(x)
        return x


class MapAttention(nn.Module):
    """One-headed attention over all places of a feature map, added to it: (B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, EPS)
        self.attention = SelfAttention(channels, heads=1, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        tokens = rearrange(self.norm(x), "b c h w -> b (h w) c")
        return x + rearrange(self.attention(tokens), "b (h w) c -> b c h w", h=x.shape[2])


class Middle(nn.Module):
    """A ResNet block, attention, a second ResNet block, at the lowest level: (B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        channels, groups = config.block_out_channels[-1], config.norm_num_groups
        self.resnets = nn.ModuleList(
            ResNetBlock(channels, channels, groups, EPS, config.act_fn) for _ in range(2)
        )
        self.attention = MapAttention(channels, groups) if config.mid_block_add_attention else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.resnets[1](self.attention(self.resnets[0](x)))


class Encoder(nn.Module):
    """From a spectrogram to the parameters of the Gaussian: (B, 1, T, F) -> (B, 2C, T/4, F/4)."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        channels = config.block_out_channels
        before = (channels[0], *channels[:-1])
        self.conv_in = nn.Conv2d(config.in_channels, channels[0], 3, padding=1)
        self.levels = nn.ModuleList(
            Level(config, c_in, c_out, config.layers_per_block)
            for c_in, c_out in zip(before, channels, strict=True)
        )
        # Between two levels: the last one is followed by none.
        self.downsamples = nn.ModuleList(Downsample(c) for c in channels[:-1])
        self.middle = Middle(config)
        self.norm_out = nn.GroupNorm(config.norm_num_groups, channels[-1], EPS)
        self.conv_out = nn.Conv2d(channels[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, mel: Tensor) -> Tensor:
        x = self.levels[0](self.conv_in(mel))
        for downsample, level in zip(self.downsamples, self.levels[1:], strict=True):
            x = level(downsample(x))
        x = self.middle(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class Decoder(nn.Module):
    """From latents to a spectrogram: (B, C, T/4, F/4) -> (B, 1, T, F); one more ResNet block a level."""

    levels: Sequence[Level]

    def __init__(self, config: VAEConfig):
        super().__init__()
        channels = config.block_out_channels[::-1]
        before = (channels[0], *channels[:-1])
        self.conv_in = nn.Conv2d(config.latent_channels, channels[0], 3, padding=1)
        self.middle = Middle(config)
        levels = (
            Level(config, c_in, c_out, config.layers_per_block + 1)
            for c_in, c_out in zip(before, channels, strict=True)
        )
        self.levels = nn.ModuleList(levels)  # type: ignore[assignment]
        # Between two levels, each at the width of the level before it.
        self.upsamples = nn.ModuleList(Upsample(c) for c in channels[:-1])
        self.norm_out = nn.GroupNorm(config.norm_num_groups, channels[-1], EPS)
        self.conv_out = nn.Conv2d(channels[-1], config.out_channels, 3, padding=1)

    def forward(self, latents: Tensor) -> Tensor:
        x = self.middle(self.conv_in(latents))
        x = self.levels[0](x)
        for upsample, level in zip(self.upsamples, self.levels[1:], strict=True):
            x = level(_double(upsample, x))
        return self.conv_out(F.silu(self.norm_out(x)))


def _double(upsample: nn.Module, x: Tensor) -> Tensor:
    height, width = x.shape[2:]
    doubled: Tensor = upsample(x, (2 * height, 2 * width))
    return doubled


def _in_chunks(f: Callable[[Tensor], Tensor], x: Tensor, rows: int) -> Tensor:
    """f(x) for an f that looks one row to either side at most, on `rows` rows of x at a time: (B, C, H, W).

    A chunk has one row more at either side, whose result is thrown away. f may give several rows for each.
    """
    height = x.shape[2]
    y = torch.empty(0)
    for start in range(0, height, rows):
        end, first, last = min(start + rows, height), max(start - 1, 0), min(start + rows + 1, height)
        part = f(x[:, :, first:last])
        scale = part.shape[2] // (last - first)
        if start == 0:
            shape = (*part.shape[:2], height * scale, part.shape[3])
            y = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
        y[:, :, start * scale : end * scale] = part[:, :, (start - first) * scale : (end - first) * scale]
    return y


def _normalized(norm: nn.GroupNorm, x: Tensor, rows: int) -> Callable[[Tensor], Tensor]:
    """GroupNorm with the statistics of the whole feature map x, to be applied to chunks of it."""
    total = square = torch.zeros(())
    for part in x.split(rows, dim=2):
        groups = part.unflatten(1, (norm.num_groups, -1)).float()  # (B, g, C/g, rows, W)
        total = total + groups.sum((2, 3, 4)).double()
        square = square + groups.square().sum((2, 3, 4)).double()
    channels = x.shape[1] // norm.num_groups
    mean = total / (channels * x.shape[2] * x.shape[3])
    variance = square / (channels * x.shape[2] * x.shape[3]) - mean.square()
    gain = (variance + norm.eps).rsqrt().repeat_interleave(channels, dim=1) * norm.weight  # (B, C)
    offset = norm.bias - mean.repeat_interleave(channels, dim=1) * gain
    gain, offset = (rearrange(v, "b c -> b c 1 1").to(x.dtype) for v in (gain, offset))
    return lambda part: part * gain + offset


def _resnet_in_chunks(resnet: ResNetBlock, x: Tensor, rows: int) -> Tensor:
    """A ResNet block without a time, as `_in_chunks`: (B, C_in, H, W) -> (B, C_out, H, W)."""
    norm_1 = _normalized(resnet.norm_1, x, rows)
    h = _in_chunks(lambda part: resnet.conv_1(resnet.act(norm_1(part))), x, rows)
    norm_2 = _normalized(resnet.norm_2, h, rows)
    y = _in_chunks(lambda part: resnet.conv_2(resnet.act(norm_2(part))), h, rows)
    for part, out in zip(x.split(rows, dim=2), y.split(rows, dim=2), strict=True):
        out += resnet.shortcut(part)
    return y


class VAE(Stage[VAEConfig]):
    """The autoencoder: `encode` to latents, `decode` to a log-mel spectrogram. See the module's docstring.

    Args:
        config: sizes; kept as `vae.config`.
    """

    def __init__(self, config: VAEConfig):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        # 1x1 convolutions between the networks and the latents.
        moments, latent = 2 * config.latent_channels, config.latent_channels
        self.to_moments = nn.Conv2d(moments, moments, 1) if config.use_quant_conv else nn.Identity()
        self.from_latents = nn.Conv2d(latent, latent, 1) if config.use_post_quant_conv else nn.Identity()

    @property
    def downsampling(self) -> int:
        """How many frames, and how many mel bands, one latent stands for: 4 for AudioLDM 2."""
        downsampling: int = 2 ** (len(self.config.block_out_channels) - 1)
        return downsampling

    def encode(self, mel: Tensor) -> DiagonalGaussian:
        """The distribution of log-mel spectrograms' latents, (B, 1, T, F) -> (B, 8, T/4, F/4), unscaled.

        T and F that the down-sampling does not divide are rounded down.

        Raises:
            ValueError: `mel` is not (B, in_channels, T, F), or is smaller than one latent.
        """
        _check("mel", mel, self.config.in_channels, smallest=self.downsampling)
        return DiagonalGaussian(self.to_moments(self.encoder(mel)))

    def decode(self, latents: Tensor) -> Tensor:
        """Log-mel spectrograms from unscaled latents, (B, 8, T/4, F/4) -> (B, 1, T, F).

        Raises:
            ValueError: `latents` is not (B, latent_channels, height, width).
        """
        _check("latents", latents, self.config.latent_channels, smallest=1)
        return self.decoder(self.from_latents(latents))

    def decode_in_chunks(self, latents: Tensor, rows: int = 256) -> Tensor:
        """`decode` for long latents, in less memory: (B, 8, T/4, F/4) -> (B, 1, T, F), equal up to rounding.

        Every norm takes its statistics over the whole length, and so does the attention at the lowest level:
        no chunk can be decoded alone. So the decoder goes layer by layer, each in chunks with one row more at
        either side, which is how far a 3x3 convolution looks. Only three feature maps of the whole length are
        there at once: a layer's input, what lies between its convolutions, and its output.

        Args:
            latents: (B, latent_channels, T/4, F/4), unscaled.
            rows: latents in time that are worked on at once.

        Raises:
            ValueError: as `decode`.
        """
        _check("latents", latents, self.config.latent_channels, smallest=1)
        decoder = self.decoder
        x = decoder.middle(decoder.conv_in(self.from_latents(latents)))
        for i, level in enumerate(decoder.levels):
            if i > 0:
                double = partial(_double, decoder.upsamples[i - 1])
                x = _in_chunks(double, x, rows)
                rows *= 2
            for resnet in level.resnets:
                x = _resnet_in_chunks(resnet, x, rows)
        norm = _normalized(decoder.norm_out, x, rows)
        return _in_chunks(lambda part: decoder.conv_out(F.silu(norm(part))), x, rows)

    def forward(self, mel: Tensor) -> Tensor:
        """There and back by the most likely latents: (B, 1, T, F) -> (B, 1, T, F)."""
        return self.decode(self.encode(mel).mode())


def _check(name: str, x: Tensor, channels: int, smallest: int) -> None:
    if x.dim() != 4 or x.shape[1] != channels or min(x.shape[2:]) < smallest:
        raise ValueError(
            f"{name} has shape {tuple(x.shape)}; it should be (batch, {channels}, time, frequency), "
            f"time and frequency at least {smallest}"
        )
