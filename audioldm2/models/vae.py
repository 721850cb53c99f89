"""vae: the autoencoder between log-mel spectrograms and the latents that the diffusion model generates.

    encode:  log-mel spectrogram (B, 1, T, F)  ->  a Gaussian over latents (B, 8, T/4, F/4)
    decode:  latents (B, 8, T/4, F/4)          ->  log-mel spectrogram (B, 1, T, F)

T is frames and F is mel bands. The sizes are AudioLDM 2's, whose three levels halve time and frequency twice.

A variational autoencoder (Kingma and Welling 2014) with q(z|x) = N(mean(x), variance(x)), a Gaussian with
diagonal covariance. The networks are those of latent diffusion (Rombach et al. 2022, section 3.1): ResNet
blocks on several levels of resolution, and self-attention over the whole feature map on the lowest.

Differences from the papers: downsampling pads on one side only, at the end of time and of frequency. The KL
term had so little weight in training that the latents do not have unit variance; the caller multiplies
latents by `VAEConfig.scaling_factor` before diffusion and divides by it after. Nothing is scaled here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from torch import Tensor, nn

from audioldm2.models.config import check_sizes, known_fields, refuse_unsupported
from audioldm2.models.layers import ResNetBlock, SelfAttention, Upsample, activation
from audioldm2.models.stage import Stage, plain
from audioldm2.noise import Generators, randn

SCALING_FACTORS = (1e-4, 1e4)  # the lowest and the highest one; the real ones are near 1
GROUP_NORM_EPS = 1e-6  # the configs have no key for it


@dataclass(frozen=True)
class VAEConfig:
    """Sizes: keys of AutoencoderKL's config.json, with diffusers' defaults.

    Raises:
        ValueError: the number of levels differs between keys, or a block type or activation is not supported.
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
        check_sizes(self, layers=("layers_per_block",))
        if not SCALING_FACTORS[0] <= self.scaling_factor <= SCALING_FACTORS[1]:
            raise ValueError(
                f"scaling_factor = {self.scaling_factor} is not supported; it must be a number from "
                f"{SCALING_FACTORS[0]} to {SCALING_FACTORS[1]}"
            )
        levels = len(self.block_out_channels)
        kinds = {"down_block_types": "DownEncoderBlock2D", "up_block_types": "UpDecoderBlock2D"}
        for key, kind in kinds.items():
            types = getattr(self, key)
            if len(types) != levels:
                raise ValueError(f"{key} has {len(types)} entries for {levels} levels of block_out_channels")
            if any(name != kind for name in types):
                raise ValueError(f"{key} = {types!r} is not supported; every entry must be {kind!r}")
        activation(self.act_fn)

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> VAEConfig:
        """The config from a config.json.

        Args:
            content: the JSON object; keys that do not change the result are ignored.

        Raises:
            ValueError: a value that is not supported; the message names the key.
        """
        unscaled = ("latents_mean", "latents_std", "shift_factor")
        refuse_unsupported(content, dict.fromkeys(unscaled, (None,)))
        return cls(**known_fields(cls, content))


class DiagonalGaussian:
    """A Gaussian with diagonal covariance for each example: the distribution of the latents.

    Args:
        parameters: (B, 2C, H, W): the means, then the logarithms of the variances.

    Attributes:
        mean: (B, C, H, W).
        log_variance: (B, C, H, W), clamped to [-30, 20] so that the variance neither vanishes nor overflows.
    """

    def __init__(self, parameters: Tensor):
        self.mean, log_variance = parameters.chunk(2, dim=1)
        self.log_variance = log_variance.clamp(-30.0, 20.0)

    def mode(self) -> Tensor:
        """The most likely latents, the mean, (B, C, H, W)."""
        return self.mean

    def sample(self, generator: Generators = None) -> Tensor:
        """Draw latents, mean + std · noise (Kingma and Welling 2014, eq. 10).

        Args:
            generator: draws the noise; a list has one generator for each example. A CPU generator gives the
                same noise on every device.

        Returns:
            (B, C, H, W).

        Raises:
            ValueError: the list's length is neither 1 nor the batch size, or a generator belongs to another
                accelerator.
        """
        noise = randn(self.mean.shape, generator, self.mean.device, self.mean.dtype)
        return self.mean + torch.exp(0.5 * self.log_variance) * noise

    @property
    def latent_dist(self) -> NoReturn:
        """What diffusers' output has, and this package's does not need; asking for it is an error.

        Raises:
            AttributeError: always.
        """
        raise AttributeError(
            "VAE.encode returns the distribution itself: write vae.encode(mel).mode() in place of "
            "vae.encode(mel).latent_dist.mode()"
        )

    def kl(self) -> Tensor:
        """The KL divergence from the unit Gaussian, in nats, (B,) (Kingma and Welling 2014, appendix B)."""
        terms = self.mean.square() + self.log_variance.exp() - 1.0 - self.log_variance
        return 0.5 * reduce(terms, "b c h w -> b", "sum")


class Downsample(nn.Module):
    """A 3x3 convolution of stride 2, padded at the end only: (B, C, H, W) -> (B, C, H//2, W//2)."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(F.pad(x, (0, 1, 0, 1)))
        return out


class ResNetLevel(nn.Module):
    """The ResNet blocks of one level of resolution: (B, C_in, H, W) -> (B, C_out, H, W)."""

    resnets: Sequence[ResNetBlock]

    def __init__(self, config: VAEConfig, channels_in: int, channels_out: int, layers: int):
        super().__init__()
        widths = [channels_in] + [channels_out] * layers
        resnets = (
            ResNetBlock(before, after, config.norm_num_groups, GROUP_NORM_EPS, config.act_fn)
            for before, after in pairwise(widths)
        )
        self.resnets = nn.ModuleList(resnets)  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        for resnet in self.resnets:
            x = resnet(x)
        return x


class MapAttention(nn.Module):
    """Single-head self-attention over all positions of a feature map, pre-norm with a residual connection.

    (B, C, H, W) -> (B, C, H, W).
    """

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, GROUP_NORM_EPS)
        self.attention = SelfAttention(channels, heads=1, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        tokens = rearrange(self.norm(x), "b c h w -> b (h w) c")
        out: Tensor = x + rearrange(self.attention(tokens), "b (h w) c -> b c h w", h=x.shape[2])
        return out


class Middle(nn.Module):
    """ResNet block, attention, ResNet block, on the lowest level: (B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        channels, groups = config.block_out_channels[-1], config.norm_num_groups
        self.resnets = nn.ModuleList(
            ResNetBlock(channels, channels, groups, GROUP_NORM_EPS, config.act_fn) for _ in range(2)
        )
        self.attention = MapAttention(channels, groups) if config.mid_block_add_attention else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.resnets[1](self.attention(self.resnets[0](x)))
        return out


class Encoder(nn.Module):
    """Spectrograms to the parameters of the Gaussian: (B, 1, T, F) -> (B, 2C, T/4, F/4)."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        channels = config.block_out_channels
        before = (channels[0], *channels[:-1])
        self.conv_in = nn.Conv2d(config.in_channels, channels[0], 3, padding=1)
        self.levels = nn.ModuleList(
            ResNetLevel(config, c_in, c_out, config.layers_per_block)
            for c_in, c_out in zip(before, channels, strict=True)
        )
        # One between each pair of levels.
        self.downsamples = nn.ModuleList(Downsample(c) for c in channels[:-1])
        self.middle = Middle(config)
        self.norm_out = nn.GroupNorm(config.norm_num_groups, channels[-1], GROUP_NORM_EPS)
        self.conv_out = nn.Conv2d(channels[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, mel: Tensor) -> Tensor:
        x = self.levels[0](self.conv_in(mel))
        for downsample, level in zip(self.downsamples, self.levels[1:], strict=True):
            x = level(downsample(x))
        x = self.middle(x)
        out: Tensor = self.conv_out(F.silu(self.norm_out(x)))
        return out


class Decoder(nn.Module):
    """Latents to spectrograms: (B, C, T/4, F/4) -> (B, 1, T, F), with one more ResNet block per level."""

    levels: Sequence[ResNetLevel]

    def __init__(self, config: VAEConfig):
        super().__init__()
        channels = config.block_out_channels[::-1]
        before = (channels[0], *channels[:-1])
        self.conv_in = nn.Conv2d(config.latent_channels, channels[0], 3, padding=1)
        self.middle = Middle(config)
        levels = (
            ResNetLevel(config, c_in, c_out, config.layers_per_block + 1)
            for c_in, c_out in zip(before, channels, strict=True)
        )
        self.levels = nn.ModuleList(levels)  # type: ignore[assignment]
        # One between each pair of levels, with the channels of the first of them.
        self.upsamples = nn.ModuleList(Upsample(c) for c in channels[:-1])
        self.norm_out = nn.GroupNorm(config.norm_num_groups, channels[-1], GROUP_NORM_EPS)
        self.conv_out = nn.Conv2d(channels[-1], config.out_channels, 3, padding=1)

    def forward(self, latents: Tensor) -> Tensor:
        x = self.middle(self.conv_in(latents))
        x = self.levels[0](x)
        for upsample, level in zip(self.upsamples, self.levels[1:], strict=True):
            x = level(_double(upsample, x))
        out: Tensor = self.conv_out(F.silu(self.norm_out(x)))
        return out


def _double(upsample: nn.Module, x: Tensor) -> Tensor:
    height, width = x.shape[2:]
    doubled: Tensor = upsample(x, (2 * height, 2 * width))
    return doubled


def _in_chunks(f: Callable[[Tensor], Tensor], x: Tensor, rows: int) -> Tensor:
    """Compute f(x) in chunks of rows, for a function whose outputs depend on at most one row to either side.

    Each chunk includes one extra row on either side, whose result is discarded.

    Args:
        f: maps (B, C, h, W) to (B, C', k h, W') for any h.
        x: (B, C, H, W).
        rows: rows of x per chunk.

    Returns:
        f(x), (B, C', k H, W').
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
    """GroupNorm as a function of chunks of x, with the statistics of the whole of x."""
    # float64, because the variance is a difference of nearly equal numbers. Not every accelerator has it.
    accumulated = torch.float64 if x.device.type in ("cpu", "cuda") else torch.float32
    total = square = torch.zeros((), device=x.device)
    for part in torch.split(x, rows, dim=2):
        groups = rearrange(part, "b (g c) h w -> b g c h w", g=norm.num_groups).float()
        total = total + groups.sum((2, 3, 4)).to(accumulated)
        square = square + groups.square().sum((2, 3, 4)).to(accumulated)
    channels = x.shape[1] // norm.num_groups
    mean = total / (channels * x.shape[2] * x.shape[3])
    variance = square / (channels * x.shape[2] * x.shape[3]) - mean.square()
    gain = (variance + norm.eps).rsqrt().repeat_interleave(channels, dim=1) * norm.weight  # (B, C)
    offset = norm.bias - mean.repeat_interleave(channels, dim=1) * gain
    gain, offset = (rearrange(v, "b c -> b c 1 1").to(x.dtype) for v in (gain, offset))
    return lambda part: part * gain + offset


def _resnet_in_chunks(resnet: ResNetBlock, x: Tensor, rows: int) -> Tensor:
    """A ResNet block without a time embedding, computed in chunks: (B, C_in, H, W) -> (B, C_out, H, W)."""
    norm_1 = _normalized(resnet.norm_1, x, rows)
    h = _in_chunks(lambda part: resnet.conv_1(resnet.act(norm_1(part))), x, rows)
    norm_2 = _normalized(resnet.norm_2, h, rows)
    y = _in_chunks(lambda part: resnet.conv_2(resnet.act(norm_2(part))), h, rows)
    for start in range(0, x.shape[2], rows):
        y[:, :, start : start + rows] += resnet.shortcut(x[:, :, start : start + rows])
    return y


class VAE(Stage[VAEConfig]):
    """The autoencoder: `encode` spectrograms into latents, `decode` latents into spectrograms.

    Args:
        config: sizes, kept as `vae.config`.

    Example:
        >>> vae = VAE.from_pretrained("tiny", subfolder="vae")  # or "cvssp/audioldm2"
        >>> mel = torch.randn(2, 1, 64, 64)  # log-mel spectrograms, from a LogMel
        >>> latents = vae.encode(mel).sample() * vae.config.scaling_factor  # as the UNet expects them
        >>> latents.shape
        torch.Size([2, 8, 16, 16])
        >>> vae.decode(latents / vae.config.scaling_factor).shape
        torch.Size([2, 1, 64, 64])
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
        """Frames per latent, and mel bands per latent: 4 for AudioLDM 2."""
        downsampling: int = 2 ** (len(self.config.block_out_channels) - 1)
        return downsampling

    @plain
    def encode(self, mel: Tensor) -> DiagonalGaussian:
        """Encode log-mel spectrograms.

        Args:
            mel: (B, 1, T, F); T and F are rounded down to multiples of `downsampling`.

        Returns:
            The distribution of the latents, (B, latent_channels, T/4, F/4); they are not scaled.

        Raises:
            ValueError: `mel` has another shape, or is smaller than one latent.
        """
        _check("mel", mel, self.config.in_channels, smallest=self.downsampling)
        return DiagonalGaussian(self.to_moments(self.encoder(mel)))

    @plain
    def decode(self, latents: Tensor) -> Tensor:
        """Decode latents.

        Args:
            latents: (B, latent_channels, T/4, F/4), divided by scaling_factor.

        Returns:
            Log-mel spectrograms, (B, 1, T, F).

        Raises:
            ValueError: `latents` has another shape.
        """
        _check("latents", latents, self.config.latent_channels, smallest=1)
        mel: Tensor = self.decoder(self.from_latents(latents))
        return mel

    def decode_in_chunks(self, latents: Tensor, rows: int = 256) -> Tensor:
        """Compute `decode` for long latents with less memory; the result is equal up to rounding.

        A chunk cannot be decoded on its own, because the norms' statistics and the attention on the lowest
        level extend over the whole length. Instead, each layer is computed in chunks, with one extra row on
        either side for the 3x3 convolutions. At most three feature maps of the whole length are in memory at
        once: a layer's input, the result of its first convolution, and its output.

        Args:
            latents: (B, latent_channels, T/4, F/4), divided by scaling_factor.
            rows: latents in time per chunk.

        Returns:
            Log-mel spectrograms, (B, 1, T, F).

        Raises:
            ValueError: `latents` has another shape.
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
        """Encode and decode, through the most likely latents: (B, 1, T, F) -> (B, 1, T, F)."""
        return self.decode(self.encode(mel).mode())


def _check(name: str, x: Tensor, channels: int, smallest: int) -> None:
    if x.dim() != 4 or x.shape[1] != channels or min(x.shape[2:]) < smallest:
        raise ValueError(
            f"{name} has shape {tuple(x.shape)}; it must be (batch, {channels}, time, frequency) "
            f"with time and frequency at least {smallest}"
        )
