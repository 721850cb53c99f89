"""The vocoder's losses: HiFi-GAN's discriminators, feature matching and mel distance (Kong et al. 2020).

    generator      sum_k [ mean (1 - D_k(made))² + feature_weight sum_l mean |D_k,l(real) - D_k,l(made)| ]
                   + mel_weight mean |mel(real) - mel(made)|                              (section 2.4)
    discriminator  sum_k [ mean (1 - D_k(real))² + mean D_k(made)² ]

D_k are sub-discriminators of two kinds, and D_k,l their layers. Those of the first kind see the waveform
folded at a prime period, so that each finds what repeats at its own; those of the second see the waveform
and smoothed copies of it, as a whole.

As in the paper's code, the output itself is among the layers of feature matching. Both losses are computed
for the same weights (see adversarial.py), while the paper updates the discriminators first.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

from audioldm2.audio.log_mel import LogMel
from audioldm2.training.adversarial import frozen

SLOPE = 0.1  # of the leaky ReLUs
PERIODS = (2, 3, 5, 7, 11)
Features = list[Tensor]  # what the layers of a sub-discriminator give, the last one its output


class PeriodDiscriminator(nn.Module):
    """A sub-discriminator that sees waveforms (B, L) folded at a period, as (B, 1, L / period, period).

    Its kernels are one column wide, so samples are only compared with those a multiple of the period away.

    Args:
        period: in samples.
        width: channels of the first layer; the paper's is 32.
    """

    def __init__(self, period: int, width: int = 32):
        super().__init__()
        self.period = period
        widths = [1, width, 4 * width, 16 * width, 32 * width, 32 * width]
        strides = (3, 3, 3, 3, 1)
        self.layers = nn.ModuleList(
            weight_norm(nn.Conv2d(widths[i], widths[i + 1], (5, 1), (stride, 1), padding=(2, 0)))
            for i, stride in enumerate(strides)
        )
        self.output = weight_norm(nn.Conv2d(widths[-1], 1, (3, 1), padding=(1, 0)))

    def forward(self, waveforms: Tensor) -> Features:
        x = rearrange(waveforms, "b l -> b 1 l")
        x = F.pad(x, (0, -x.shape[-1] % self.period), mode="reflect")
        return run_layers(rearrange(x, "b 1 (t p) -> b 1 t p", p=self.period), self.layers, self.output)


class ScaleDiscriminator(nn.Module):
    """A sub-discriminator of whole waveforms (B, L), with grouped convolutions (Kumar et al. 2019).

    Args:
        width: channels of the first layer; the paper's is 128.
        spectral: normalize the layers by their largest singular value instead of per channel.
    """

    def __init__(self, width: int = 128, spectral: bool = False):
        super().__init__()
        norm = spectral_norm if spectral else weight_norm
        widths = [1, width, width, 2 * width, 4 * width, 8 * width, 8 * width, 8 * width]
        kernels, strides = (15, 41, 41, 41, 41, 41, 5), (1, 2, 2, 4, 4, 1, 1)
        most_groups = (1, 4, 16, 16, 16, 16, 1)
        layers = []
        for i, (kernel, stride) in enumerate(zip(kernels, strides, strict=True)):
            groups = math.gcd(most_groups[i], widths[i], widths[i + 1])  # fewer only in small networks
            layers.append(
                norm(nn.Conv1d(widths[i], widths[i + 1], kernel, stride, padding=kernel // 2, groups=groups))
            )
        self.layers = nn.ModuleList(layers)
        self.output = norm(nn.Conv1d(widths[-1], 1, 3, padding=1))

    def forward(self, waveforms: Tensor) -> Features:
        return run_layers(rearrange(waveforms, "b l -> b 1 l"), self.layers, self.output)


def run_layers(x: Tensor, layers: nn.ModuleList, output: nn.Module) -> Features:
    """The results of all layers, each after its leaky ReLU, and of the output."""
    features = []
    for layer in layers:
        x = F.leaky_relu(layer(x), SLOPE)
        features.append(x)
    return [*features, output(x)]


class VocoderDiscriminator(nn.Module):
    """HiFi-GAN's discriminators: five periods and three scales, the waveform and two smoothed copies of it.

    Maps waveforms (B, L) to the features of each sub-discriminator.

    Args:
        periods: of the period discriminators, in samples.
        scales: the number of scale discriminators; each sees half of the rate of the one before.
        period_width: channels of the period discriminators' first layer.
        scale_width: channels of the scale discriminators' first layer.

    Example:
        >>> discriminator = VocoderDiscriminator(period_width=2, scale_width=2)
        >>> features = discriminator(torch.randn(2, 4000))
        >>> len(features), features[0][-1].shape  # 5 periods and 3 scales; the outputs of the first
        (8, torch.Size([2, 1, 25, 2]))
    """

    def __init__(
        self,
        periods: tuple[int, ...] = PERIODS,
        scales: int = 3,
        period_width: int = 32,
        scale_width: int = 128,
    ):
        super().__init__()
        self.periods = nn.ModuleList(PeriodDiscriminator(period, period_width) for period in periods)
        self.scales = nn.ModuleList(ScaleDiscriminator(scale_width, spectral=i == 0) for i in range(scales))

    def forward(self, waveforms: Tensor) -> list[Features]:
        features: list[Features] = [discriminator(waveforms) for discriminator in self.periods]
        for i, discriminator in enumerate(self.scales):
            if i:
                waveforms = F.avg_pool1d(waveforms, 4, stride=2, padding=2)
            features.append(discriminator(waveforms))
        return features


def discriminator_loss(real: list[Features], made: list[Features]) -> Tensor:
    """The discriminators' least-squares loss (Mao et al. 2017): outputs of 1 for real sounds, 0 for made."""
    terms = [(1 - r[-1]).square().mean() + m[-1].square().mean() for r, m in zip(real, made, strict=True)]
    return torch.stack(terms).sum()


def adversarial_loss(made: list[Features]) -> Tensor:
    """The generator's least-squares loss: outputs of 1 for made sounds."""
    return torch.stack([(1 - features[-1]).square().mean() for features in made]).sum()


def feature_matching_loss(real: list[Features], made: list[Features]) -> Tensor:
    """The mean absolute difference of each layer's features, summed over all layers of all discriminators."""
    pairs = [pair for r, m in zip(real, made, strict=True) for pair in zip(r, m, strict=True)]
    return torch.stack([F.l1_loss(m, r) for r, m in pairs]).sum()


def vocoder_loss(
    made: Tensor,
    real: Tensor,
    discriminator: nn.Module,
    log_mel: LogMel,
    *,
    feature_weight: float = 2.0,
    mel_weight: float = 45.0,
) -> dict[str, Tensor]:
    """The losses of the vocoder and of its discriminators on a batch of excerpts.

    Args:
        made: waveforms from the vocoder, (B, L).
        real: the waveforms that its spectrograms were computed from, (B, L).
        discriminator: such as a `VocoderDiscriminator`. It is trained by the same loss.
        log_mel: the front end of the vocoder.
        feature_weight: of feature matching; the paper's is 2.
        mel_weight: of the mel distance; the paper's is 45.

    Returns:
        "loss", to be minimized, and its parts: "mel", "features", "adversarial" and "discriminator".

    Raises:
        ValueError: the waveforms' shapes differ.
    """
    if made.shape != real.shape:
        raise ValueError(
            f"made has shape {tuple(made.shape)} and real {tuple(real.shape)}; they must be equal"
        )
    of_real = discriminator(real)
    judged = discriminator_loss(of_real, discriminator(made.detach()))
    with frozen(discriminator):
        of_made = discriminator(made)
    of_real = [[layer.detach() for layer in features] for features in of_real]
    rate = log_mel.config.sampling_rate
    mel = F.l1_loss(log_mel(made, rate), log_mel(real, rate))
    matching, adversarial = feature_matching_loss(of_real, of_made), adversarial_loss(of_made)
    loss = adversarial + feature_weight * matching + mel_weight * mel + judged
    return {
        "loss": loss,
        "mel": mel,
        "features": matching,
        "adversarial": adversarial,
        "discriminator": judged,
    }
