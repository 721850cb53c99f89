"""vocoder: the generator of HiFi-GAN (Kong et al. 2020, section 2.2 and figure 1).

    log-mel spectrogram (B, T, F)  ->  waveform (B, samples) in [-1, 1], `hop_length` samples per frame

Transposed convolutions upsample step by step and halve the channels. After each, several residual blocks with
different kernel sizes run in parallel, and their mean is the input of the next step (the paper's
multi-receptive field fusion, which sums instead).

Differences from the paper: weight normalization is folded into the weights when a checkpoint is loaded; the
last leaky ReLU has PyTorch's default slope of 0.01, as in the paper's code, whatever the config's slope is;
and the spectrogram may first be normalized with a mean and scale per mel band, which the checkpoint contains.
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

from audioldm2.models.config import check_sampling_rate, check_sizes, known_fields
from audioldm2.models.stage import Stage

# What no tensor bounds: 5 and 160 in cvssp/audioldm2.
MAX_DILATION = 1024
MAX_HOP_LENGTH = 8192
LAST_SLOPE = 0.01  # negative slope of the leaky ReLU before the last convolution


@dataclass(frozen=True)
class HifiGanConfig:
    """Sizes: the keys of SpeechT5HifiGan's config.json, with transformers' defaults.

    There is one upsampling step for each entry of `upsample_rates`, and in each step one residual block for
    each entry of `resblock_kernel_sizes`.
    """

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
        check_sizes(self)
        check_sampling_rate(self.sampling_rate)
        steps = len(self.upsample_rates)
        if not steps or len(self.upsample_kernel_sizes) != steps:
            raise ValueError(
                f"upsample_kernel_sizes = {self.upsample_kernel_sizes} must have one entry for each of "
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
                f"resblock_dilation_sizes = {self.resblock_dilation_sizes} must have one entry for each of "
                f"resblock_kernel_sizes = {kernels}, and at least one"
            )
        if any(kernel % 2 == 0 for kernel in kernels):
            raise ValueError(f"resblock_kernel_sizes = {kernels} must be odd, to preserve the length")
        if any(d > MAX_DILATION for dilations in self.resblock_dilation_sizes for d in dilations):
            raise ValueError(
                f"resblock_dilation_sizes = {self.resblock_dilation_sizes} must be at most {MAX_DILATION}"
            )
        if math.prod(self.upsample_rates) > MAX_HOP_LENGTH:
            raise ValueError(
                f"upsample_rates = {self.upsample_rates} must give at most {MAX_HOP_LENGTH} samples a frame"
            )
        if not 0 <= self.leaky_relu_slope <= 1:
            raise ValueError(
                f"leaky_relu_slope = {self.leaky_relu_slope} is not supported; it must be 0 to 1"
            )

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> HifiGanConfig:
        """The config from a config.json.

        Args:
            content: the JSON object; keys that do not change the result are ignored.

        Raises:
            ValueError: sizes that do not fit together; the message names the key.
        """
        return cls(**known_fields(cls, content))


class ResidualBlock(nn.Module):
    """Pairs of a dilated and a plain convolution with residual connections: (B, C, L) -> (B, C, L).

    Args:
        channels: C.
        kernel: kernel size, odd.
        dilations: one for each pair.
        slope: negative slope of the leaky ReLU before each convolution.
    """

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
    """The vocoder: log-mel spectrograms to waveforms.

    Args:
        config: sizes, kept as `vocoder.config`.

    Example:
        >>> vocoder = HifiGan.from_pretrained("tiny", subfolder="vocoder")  # or "cvssp/audioldm2"
        >>> mel = torch.randn(2, 10, vocoder.config.model_in_dim)  # from a VAE, without its channel axis
        >>> vocoder.hop_length, vocoder.config.sampling_rate
        (512, 16000)
        >>> vocoder(mel).shape  # (batch, samples)
        torch.Size([2, 5120])
    """

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
        # All blocks of the first step, then all of the second, and so on.
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
        # Checkpoints contain both even if they are not used.
        self.register_buffer("mean", torch.zeros(config.model_in_dim))
        self.register_buffer("scale", torch.ones(config.model_in_dim))

    @property
    def hop_length(self) -> int:
        """Samples per frame of the spectrogram: the product of the upsampling rates."""
        return math.prod(self.config.upsample_rates)

    @property
    def reach(self) -> int:
        """The receptive field, in frames to either side of a frame (an upper bound).

        Counted from the waveform back to the spectrogram: a convolution with kernel k and dilation d reaches
        d (k - 1) / 2 samples to either side; of parallel blocks the widest counts; and an output of an
        upsampling step with rate u and kernel k depends on inputs less than k / u away.
        """
        config = self.config
        blocks = zip(config.resblock_kernel_sizes, config.resblock_dilation_sizes, strict=True)
        block = max(sum((kernel // 2) * (d + 1) for d in dilations) for kernel, dilations in blocks)
        reach = 3  # conv_out
        for rate, kernel in zip(config.upsample_rates[::-1], config.upsample_kernel_sizes[::-1], strict=True):
            reach = math.ceil((reach + block + kernel) / rate)
        return reach + 3  # conv_in

    def in_chunks(self, mel: Tensor, frames: int = 1024) -> Tensor:
        """Compute `forward` for a long spectrogram in chunks; beyond the result, memory does not grow with T.

        Each chunk includes `reach` extra frames on either side, whose samples are discarded, so the result
        equals that of `forward` up to rounding. All chunks have the same shape.

        Args:
            mel: log-mel spectrogram, (B, T, F) with F = model_in_dim.
            frames: length of a chunk without the extra frames.

        Returns:
            Waveforms, (B, samples), as `forward` returns them.

        Raises:
            ValueError: `mel` has another shape.
        """
        length, reach, hop = mel.shape[1], self.reach, self.hop_length
        window = frames + 2 * reach
        if length <= window:
            waveforms: Tensor = self(mel)
            return waveforms
        pieces = []
        for start in range(0, length, frames):
            first = min(max(start - reach, 0), length - window)  # the last window ends with the spectrogram
            sound = self(mel[:, first : first + window])
            end = (start + frames - first) * hop if start + frames < length else None
            # Copied: a compiled vocoder may reuse the output buffer for the next chunk.
            pieces.append(sound[:, (start - first) * hop : end].clone())
        return torch.cat(pieces, dim=1)

    def forward(self, mel: Tensor) -> Tensor:
        """Turn spectrograms into waveforms.

        Args:
            mel: log-mel spectrogram, (B, T, F) with F = model_in_dim.

        Returns:
            Waveforms, (B, T · hop_length), in [-1, 1]; an upsampling step whose kernel size minus rate is odd
            adds one sample to its output.

        Raises:
            ValueError: `mel` has another shape.
        """
        config = self.config
        if mel.dim() != 3 or mel.shape[1] < 1 or mel.shape[2] != config.model_in_dim:
            raise ValueError(
                f"mel has shape {tuple(mel.shape)}; it must be (batch, frames, {config.model_in_dim})"
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
