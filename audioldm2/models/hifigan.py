"""The vocoder, HiFi-GAN's generator (Kong et al. 2020, section 2.2 and figure 1): log-mel in, sound out.

In: a log-mel spectrogram (B, T, F), T frames of F mel bands.
Out: a waveform (B, samples) in [-1, 1] at the config's sampling rate, `hop_length` samples a frame.

A stack of transposed convolutions raises the rate step by step, halving the channels; after each, several
residual blocks of different kernel sizes look at the result side by side and their mean goes on (the paper's
multi-receptive field fusion, which sums).

Differences from the textbook: weight norm is folded into the weights when a checkpoint is loaded; the last
leaky ReLU has PyTorch's default slope of 0.01 whatever the config's slope is, as in the paper's own code; and
a spectrogram may be normalized first with a mean and a scale for each band that the checkpoint brings.
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

from audioldm2.models.config import known_fields
from audioldm2.models.stage import Stage

LAST_SLOPE = 0.01  # of the leaky ReLU before the last convolution


@dataclass(frozen=True)
class HifiGanConfig:
    """The sizes, under the names of SpeechT5HifiGan's config.json."""

    model_in_dim: int = 80
    sampling_rate: int = 16000
    upsample_initial_channel: int = 512
    upsample_rates: tuple[int, ...] = (4, 4, 4, 4)
    upsample_kernel_sizes: tuple[int, ...] = (8, 8, 8, 8)
    resblock_kernel_sizes: tuple[int, ...] = (3, 7, 11)
    resblock_dilation_sizes: tuple[tuple[int, ...], ...] = ((1, 3, 5), (1, 3, 5), (1, 3, 5))
    leaky_relu_slope: float = 0.1
    normalize_before: bool = True

    def __post_init__(self) -> None:
        steps = len(self.upsample_rates)
        if not steps or len(self.upsample_kernel_sizes) != steps:
            raise ValueError(
                f"upsample_kernel_sizes = {self.upsample_kernel_sizes} needs one kernel for each of "
                f"upsample_rates = {self.upsample_rates}, and at least one"
            )
        if any(k < r for k, r in zip(self.upsample_kernel_sizes, self.upsample_rates, strict=True)):
            raise ValueError(
                f"upsample_kernel_sizes = {self.upsample_kernel_sizes} must not be smaller than "
                f"upsample_rates = {self.upsample_rates}"
            )
        if self.upsample_initial_channel < 2**steps:
            raise ValueError(
                f"upsample_initial_channel = {self.upsample_initial_channel} cannot be halved {steps} times"
            )
        kernels = self.resblock_kernel_sizes
        if not kernels or len(self.resblock_dilation_sizes) != len(kernels):
            raise ValueError(
                f"resblock_dilation_sizes = {self.resblock_dilation_sizes} needs one entry for each of "
                f"resblock_kernel_sizes = {kernels}, and at least one"
            )
        if any(kernel % 2 == 0 for kernel in kernels):
            raise ValueError(f"resblock_kernel_sizes = {kernels} must be odd, to keep the length")

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> HifiGanConfig:
        """From a config.json's content; keys that change nothing are passed over.

        Raises:
            ValueError: sizes that do not go together.
        """
        return cls(**known_fields(cls, content))


class ResidualBlock(nn.Module):
    """Pairs of convolutions, dilated and plain, each pair added to its input: (B, C, L) -> (B, C, L)."""

    def __init__(self, channels: int, kernel: int, dilations: tuple[int, ...], slope: float):
        super().__init__()
        self.slope = slope
        self.dilated = nn.ModuleList(
            [nn.Conv1d(channels, channels, kernel, dilation=d, padding=d * (kernel // 2)) for d in dilations]
        )
        self.plain = nn.ModuleList(
            [nn.Conv1d(channels, channels, kernel, padding=kernel // 2) for _ in dilations]
        )

    def forward(self, x: Tensor) -> Tensor:
        for dilated, plain in zip(self.dilated, self.plain, strict=True):
            x = x + plain(F.leaky_relu(dilated(F.leaky_relu(x, self.slope)), self.slope))
        return x


class HifiGan(Stage[HifiGanConfig]):
    """The vocoder."""

    mean: Tensor
    scale: Tensor

    def __init__(self, config: HifiGanConfig):
        super().__init__()
        self.config = config
        channels = [config.upsample_initial_channel // 2**i for i in range(len(config.upsample_rates) + 1)]
        self.conv_in = nn.Conv1d(config.model_in_dim, channels[0], 7, padding=3)
        self.upsample = nn.ModuleList(
            [
                nn.ConvTranspose1d(inner, outer, kernel, stride=rate, padding=(kernel - rate) // 2)
                for inner, outer, rate, kernel in zip(
                    channels, channels[1:], config.upsample_rates, config.upsample_kernel_sizes, strict=False
                )
            ]
        )
        # All blocks after the first up-sampling, then all after the second, and so on.
        self.blocks = nn.ModuleList(
            [
                ResidualBlock(width, kernel, dilations, config.leaky_relu_slope)
                for width in channels[1:]
                for kernel, dilations in zip(
                    config.resblock_kernel_sizes, config.resblock_dilation_sizes, strict=True
                )
            ]
        )
        self.conv_out = nn.Conv1d(channels[-1], 1, 7, padding=3)
        # Checkpoints hold both, also where they are not used.
        self.register_buffer("mean", torch.zeros(config.model_in_dim))
        self.register_buffer("scale", torch.ones(config.model_in_dim))

    @property
    def hop_length(self) -> int:
        """Samples for each frame of the spectrogram: the product of the up-sampling rates."""
        return math.prod(self.config.upsample_rates)

    @property
    def reach(self) -> int:
        """How many frames to either side may decide over a frame's sound, the receptive field.

        Counted from the sound back to the spectrogram: a convolution of k taps, d apart, sees d (k - 1) / 2
        samples to either side; of the blocks side by side the widest counts; where the rate rises by u in a
        step of kernel k, an output is made of inputs less than k / u away.
        """
        config = self.config
        blocks = zip(config.resblock_kernel_sizes, config.resblock_dilation_sizes, strict=True)
        block = max(sum((kernel // 2) * (d + 1) for d in dilations) for kernel, dilations in blocks)
        reach = 3  # conv_out
        for rate, kernel in zip(config.upsample_rates[::-1], config.upsample_kernel_sizes[::-1], strict=True):
            reach = math.ceil((reach + block + kernel) / rate)
        return reach + 3  # conv_in

    def in_chunks(self, mel: Tensor, frames: int = 1024) -> Tensor:
        """The sound of a long spectrogram, in memory that grows with its length by no more than the result.

        Each chunk is made with `reach` frames more at either side, whose sound is thrown away, so the result
        is that of `forward` up to rounding. All chunks are of one shape.

        Args:
            mel: log-mel, (B, T, F).
            frames: of a chunk, without what is thrown away.

        Returns:
            (B, samples), as `forward`.

        Raises:
            ValueError: `mel` has another shape.
        """
        length, reach, hop = mel.shape[1], self.reach, self.hop_length
        window = frames + 2 * reach
        if length <= window:
            return self(mel)
        pieces = []
        for start in range(0, length, frames):
            first = min(max(start - reach, 0), length - window)  # the last window ends where the mel does
            sound = self(mel[:, first : first + window])
            end = (start + frames - first) * hop if start + frames < length else None
            # A copy: a compiled vocoder may write its next result where this one lies.
            pieces.append(sound[:, (start - first) * hop : end].clone())
        return torch.cat(pieces, dim=1)

    def forward(self, mel: Tensor) -> Tensor:
        """The sound of a spectrogram.

        Args:
            mel: log-mel, (B, T, F) with F = model_in_dim.

        Returns:
            (B, samples) in [-1, 1]. There are T · hop_length samples; a step whose kernel is larger than its
            rate by an odd number adds one of its own.

        Raises:
            ValueError: `mel` has another shape.
        """
        config = self.config
        if mel.dim() != 3 or mel.shape[1] < 1 or mel.shape[2] != config.model_in_dim:
            raise ValueError(
                f"mel has shape {tuple(mel.shape)}; (batch, frames, {config.model_in_dim}) is needed"
            )
        if config.normalize_before:
            mel = (mel - self.mean) / self.scale
        x = self.conv_in(rearrange(mel, "b t f -> b f t"))
        parallel = len(config.resblock_kernel_sizes)
        for step, upsample in enumerate(self.upsample):
            x = upsample(F.leaky_relu(x, config.leaky_relu_slope))  # (B, C / 2, L · rate)
            total = self.blocks[step * parallel](x)
            for block in self.blocks[step * parallel + 1 : (step + 1) * parallel]:
                total = total + block(x)
            x = total / parallel
        x = self.conv_out(F.leaky_relu(x, LAST_SLOPE))
        return rearrange(torch.tanh(x), "b 1 l -> b l")
