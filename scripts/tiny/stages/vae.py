"""Train the VAE, which turns log-mel spectrograms into latents and back (Kingma and Welling 2014).

The loss is the mean absolute error of the decoded spectrogram plus the KL divergence of the latents from a
standard normal, with a small weight (Rombach et al. 2022). Segments of several lengths are used, so that the
VAE also handles clips that are not 5.12 s long. Training has three rounds with warm restarts (Loshchilov and
Hutter 2017), which helps with sounds that are rare in the library. In the last round inaudible cells of the
spectrogram count little, because most of a spectrogram is inaudible. There is no perceptual or adversarial
loss: spectrograms of synthetic sounds are learned without.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from audioldm2 import VAE
from audioldm2.models.vae import VAEConfig
from audioldm2.training.autoencoder import autoencoder_loss
from audioldm2.training.loop import train
from scripts.tiny.data.library import Library
from scripts.tiny.run import Run
from scripts.tiny.sizes import TINY
from scripts.tiny.stages.latents import encode_modes

INAUDIBLE_WEIGHT = 0.1  # of inaudible cells, in the last round
# Steps, learning rate and weight of inaudible cells. Each round starts from the averaged
# weights of the previous one.
TRAINING_ROUNDS = ((1200, 2e-3, 1.0), (1300, 2e-3, 1.0), (2400, 2e-3, INAUDIBLE_WEIGHT))
TRAINING_STEPS = sum(steps for steps, _, _ in TRAINING_ROUNDS)
FRAMES_PER_STEP = 640  # in segments of one length
SEGMENT_LENGTHS = (40, 80, 160)  # frames, multiples of 8
KL_WEIGHT = 3e-3
AUDIBLE_LOG_MEL = -6.0  # natural logarithm; cells below it are inaudible (see oscillators.RAMPS)
SILENT_LOG_MEL, LOG_MEL_RANGE = -11.5, 14.0  # natural logarithm: silence, and from there to the loudest cells


def draw_segments(library: Library, run: Run, generator: torch.Generator) -> Tensor:
    """A batch of segments of log-mel spectrograms, (B, 1, T, 64)."""
    length = SEGMENT_LENGTHS[int(torch.randint(len(SEGMENT_LENGTHS), (), generator=generator))]
    mels = library.mels(library.draw(run.batch_or(FRAMES_PER_STEP // length), generator))
    starts = torch.randint(0, (mels.shape[2] - length) // 8 + 1, (len(mels),), generator=generator) * 8
    return torch.stack([mel[:, s : s + length] for mel, s in zip(mels, starts.tolist(), strict=True)])


def train_vae(library: Library, run: Run) -> None:
    """Train the VAE, standardize its latents, and write `vae`."""
    torch.manual_seed(run.seed)
    vae = VAE(VAEConfig.from_dict(TINY["vae"]))
    with torch.no_grad():  # the untrained decoder gives near silence, which most of a spectrogram is
        vae.get_parameter("decoder.conv_out.bias").fill_(SILENT_LOG_MEL + LOG_MEL_RANGE / 4)

    def loss(generator: torch.Generator, inaudible_weight: float) -> dict[str, Tensor]:
        return autoencoder_loss(
            vae,
            draw_segments(library, run, generator).to(run.device),
            generator,
            kl_weight=KL_WEIGHT,
            audible_level=AUDIBLE_LOG_MEL,
            inaudible_weight=inaudible_weight,
        )

    for i, (steps, rate, inaudible_weight) in enumerate(TRAINING_ROUNDS, 1):
        train(
            f"vae_{i}",
            vae,
            partial(loss, inaudible_weight=inaudible_weight),
            run,
            steps=steps,
            rate=rate,
            average=0.995,
        )
    standardize(vae, library, run)
    vae.save_pretrained(run.checkpoint / "vae")


@torch.no_grad()
def standardize(vae: VAE, library: Library, run: Run) -> None:
    """Give each channel of the latents mean 0 and variance 1, in place, without changing what is decoded.

    A scaling factor alone (Rombach et al. 2022, appendix G) leaves the channels' means, which carry most of
    the power because sounds are mostly silence; a noisy latent then tells the UNet little about the sound.
    The 1 x 1 convolutions around the latents absorb each channel's mean and scale.
    """
    latents = encode_modes(vae, library, min(256, len(library)), run)
    scale, mean = torch.std_mean(latents.to(run.device), dim=(0, 2, 3))
    weight, bias = vae.get_parameter("to_moments.weight"), vae.get_parameter("to_moments.bias")
    bias.sub_(torch.cat([mean, 2 * scale.log()]))  # the second half are logarithms of variances
    means = slice(None, len(mean))
    weight[means].div_(scale.view(-1, 1, 1, 1))
    bias[means].div_(scale)
    weight, bias = vae.get_parameter("from_latents.weight"), vae.get_parameter("from_latents.bias")
    bias.add_(weight[:, :, 0, 0] @ mean)
    weight.mul_(scale.view(1, -1, 1, 1))
