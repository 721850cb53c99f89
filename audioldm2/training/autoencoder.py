"""The VAE's losses: reconstruction, KL divergence and a discriminator (Rombach et al. 2022, appendix G).

    loss = error(mel, decoded) + kl_weight KL + w adversarial_weight adversarial + discriminator

    error          mean absolute difference of the log-mel spectrograms
    KL             divergence of the latents from a standard normal, in nats per latent
    adversarial    -mean D(decoded), which the VAE minimizes
    w              |d error / d W| / |d adversarial / d W|, where W is the decoder's last layer
    discriminator  hinge loss, which the discriminator minimizes: (mean max(0, 1 - D(mel)) +
                   mean max(0, 1 + D(decoded))) / 2

Every term is a mean over cells, so the weights do not depend on the length of the excerpts. AudioLDM's code
sums the error over the cells of an excerpt; divide its KL weight by the number of cells for the weight here.
Its perceptual term (LPIPS) is left out: it needs a network that was trained on photographs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from audioldm2.models.vae import VAE, DiagonalGaussian
from audioldm2.training.adversarial import frozen

SMALLEST_GRADIENT, LARGEST_WEIGHT = 1e-4, 1e4  # of the adversarial weight's ratio, as in the paper's code


class PatchDiscriminator(nn.Module):
    """Tells real spectrograms from decoded ones, patch by patch (Isola et al. 2017, "PatchGAN").

    Each logit sees a patch of 70 x 70 cells (with three layers), so it judges texture and not content.
    Maps spectrograms (B, C, T, F) to logits (B, 1, t, f), high for real ones.

    Args:
        channels: C, 1 for a mel spectrogram.
        width: channels of the first layer; doubled by each further one, up to eightfold.
        layers: the convolutions of stride 2.

    Example:
        >>> PatchDiscriminator(width=8)(torch.randn(2, 1, 160, 64)).shape
        torch.Size([2, 1, 18, 6])
    """

    def __init__(self, channels: int = 1, width: int = 64, layers: int = 3):
        super().__init__()
        widths = [width * min(2**i, 8) for i in range(layers + 1)]
        modules: list[nn.Module] = [nn.Conv2d(channels, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for i in range(1, layers + 1):
            stride = 2 if i < layers else 1
            modules += [
                nn.Conv2d(widths[i - 1], widths[i], 4, stride=stride, padding=1, bias=False),
                nn.BatchNorm2d(widths[i]),
                nn.LeakyReLU(0.2),
            ]
        self.layers = nn.Sequential(*modules, nn.Conv2d(widths[-1], 1, 4, padding=1))
        for module in self.layers:
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.02)
            elif isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.weight, mean=1.0, std=0.02)

    def forward(self, mel: Tensor) -> Tensor:
        logits: Tensor = self.layers(mel)
        return logits


def spectrogram_errors(
    decoded: Tensor, mel: Tensor, audible_level: float = float("-inf"), inaudible_weight: float = 1.0
) -> dict[str, Tensor]:
    """Mean absolute errors of a decoded log-mel spectrogram.

    Args:
        decoded: (B, 1, T, F).
        mel: the same shape.
        audible_level: cells below it, as natural logarithms, are inaudible.
        inaudible_weight: how much inaudible cells count, from 0 to 1.

    Returns:
        "error" of all cells, "audible" of the part above `audible_level`, and "loss", their mean weighted by
        `inaudible_weight` and its complement.
    """
    error = (decoded - mel).abs().mean()
    above = (decoded.clamp(min=audible_level) - mel.clamp(min=audible_level)).abs().mean()
    loss = inaudible_weight * error + (1 - inaudible_weight) * above
    return {"loss": loss, "error": error, "audible": above}


def kl_per_latent(latents: DiagonalGaussian) -> Tensor:
    """The KL divergence of the latents from a standard normal, in nats per latent: a mean, a scalar."""
    return latents.kl().mean() / latents.mode()[0].numel()


def discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """The hinge loss of a discriminator (Lim and Ye 2017), from its logits for real and made examples."""
    return (F.relu(1 - real).mean() + F.relu(1 + fake).mean()) / 2


def adaptive_weight(error: Tensor, adversarial: Tensor, last_layer: Tensor) -> Tensor:
    """What makes the adversarial gradient as long as that of the error (Esser et al. 2021, equation 7).

    Args:
        error: the reconstruction loss, a scalar.
        adversarial: the generator's adversarial loss, a scalar.
        last_layer: the weight that the gradients are compared at, the decoder's last.

    Returns:
        |d error / d last_layer| / (|d adversarial / d last_layer| + 1e-4), at most 1e4, without a gradient.
    """
    of_error, of_adversarial = (
        torch.autograd.grad(loss, last_layer, retain_graph=True)[0] for loss in (error, adversarial)
    )
    ratio: Tensor = of_error.norm() / (of_adversarial.norm() + SMALLEST_GRADIENT)
    return ratio.clamp(max=LARGEST_WEIGHT)


def autoencoder_loss(
    vae: VAE,
    mel: Tensor,
    generator: torch.Generator | None = None,
    discriminator: nn.Module | None = None,
    *,
    kl_weight: float,
    adversarial_weight: float = 0.5,
    audible_level: float = float("-inf"),
    inaudible_weight: float = 1.0,
) -> dict[str, Tensor]:
    """The losses of the VAE, and of a discriminator, on a batch of spectrograms.

    Args:
        vae: to be trained.
        mel: log-mel spectrograms, (B, 1, T, F), with T and F multiples of `vae.downsampling`.
        generator: draws the latents.
        discriminator: such as a `PatchDiscriminator`; None for the steps before it takes part. It is trained
            by the same loss.
        kl_weight: of the KL divergence per latent.
        adversarial_weight: of the adversarial loss, relative to the reconstruction's by gradient.
        audible_level: see `spectrogram_errors`.
        inaudible_weight: see `spectrogram_errors`.

    Returns:
        "loss", to be minimized, and its parts: "error", "audible", "KL"; with a discriminator also
        "adversarial", "weight" (w in the module's equation) and "discriminator".

    Example:
        >>> vae = VAE.from_pretrained("tiny", subfolder="vae")
        >>> discriminator = PatchDiscriminator(width=8)
        >>> mel = torch.randn(2, 1, 64, 64)  # log-mel spectrograms, from a LogMel
        >>> losses = autoencoder_loss(vae, mel, discriminator=discriminator, kl_weight=0.01)
        >>> losses["loss"].backward()  # gradients for both
    """
    latents = vae.encode(mel)
    decoded = vae.decode(latents.sample(generator))
    errors = spectrogram_errors(decoded, mel, audible_level, inaudible_weight)
    divergence = kl_per_latent(latents)
    losses = {**errors, "loss": errors["loss"] + kl_weight * divergence, "KL": divergence}
    if discriminator is None:
        return losses
    judged = discriminator_loss(discriminator(mel), discriminator(decoded.detach()))
    with frozen(discriminator):
        adversarial = -discriminator(decoded).mean()
    weight = adaptive_weight(errors["loss"], adversarial, vae.get_parameter("decoder.conv_out.weight"))
    losses["loss"] = losses["loss"] + adversarial_weight * weight * adversarial + judged
    return {**losses, "adversarial": adversarial, "weight": weight, "discriminator": judged}
