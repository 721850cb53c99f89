"""Train the VAE's decoder further, alone, to be robust to latents that are slightly wrong.

A UNet's latents always are, and a decoder that has only seen the encoder's own latents amplifies the error:
with latents moved by a tenth of their spread, a loud engine swells by 2.2 dB instead of 0.6. Here noise is
added to the latents, in each cell and in blocks of 4 x 4 cells, by up to `LATENT_NOISE`, and the decoder
learns to decode the original (noise-augmented decoding: Zheng et al. 2025, arXiv 2510.11690). With more
noise it would also flatten the swelling of wind. An error in level has a loss of its own: an engine is
audible in 14 of 64 bands, so its swelling is a small part of the mean over all bands. The encoder stays as
it is, so everything trained on its latents stays valid.
"""

from __future__ import annotations

from math import exp

import torch
import torch.nn.functional as F
from torch import Tensor

from audioldm2 import VAE
from audioldm2.training.autoencoder import spectrogram_errors
from audioldm2.training.loop import train
from scripts.tiny.data.library import Library
from scripts.tiny.run import Run
from scripts.tiny.stages.vae import AUDIBLE_LOG_MEL, INAUDIBLE_WEIGHT, draw_segments

TRAINING_STEPS, LEARNING_RATE = 16000, 2e-3
# The highest standard deviations of the noise: in each cell, and in blocks of 4 x 4. The latents' own is 1.
LATENT_NOISE = (0.1, 0.05)


def train_decoder(library: Library, run: Run) -> None:
    """Train the decoder of the run's VAE and write `vae` again."""
    torch.manual_seed(run.seed)
    vae = VAE.from_pretrained(run.checkpoint / "vae", device=run.device)

    def loss(generator: torch.Generator) -> dict[str, Tensor]:
        mel = draw_segments(library, run, generator).to(run.device)
        with torch.no_grad():
            latents = vae.encode(mel).sample(generator)
        count, channels, frames, bands = latents.shape
        cells = torch.randn(latents.shape, generator=generator)
        blocks = torch.randn(count, channels, -(-frames // 4), -(-bands // 4), generator=generator)
        blocks = blocks.repeat_interleave(4, 2)[:, :, :frames].repeat_interleave(4, 3)[..., :bands]
        scale = torch.rand(2, count, 1, 1, 1, generator=generator)
        scale = torch.tensor(LATENT_NOISE).view(2, 1, 1, 1, 1) * scale
        latents = latents + (scale[0] * cells + scale[1] * blocks).to(run.device)
        decoded = vae.decode(latents)
        errors = spectrogram_errors(decoded, mel, AUDIBLE_LOG_MEL, INAUDIBLE_WEIGHT)
        level_error = (segment_levels(decoded) - segment_levels(mel)).abs().mean()
        return {**errors, "loss": errors["loss"] + level_error, "level": level_error}

    decoder = torch.nn.ModuleDict({"decoder": vae.decoder, "from_latents": vae.from_latents})
    train("decoder", decoder, loss, run, steps=TRAINING_STEPS, rate=LEARNING_RATE, average=0.995)
    vae.eval().save_pretrained(run.checkpoint / "vae")


def segment_levels(mel: Tensor) -> Tensor:
    """The level of each quarter of a second: half the log of the power of all bands, (B, 1, T / 8, 1)."""
    power = (2 * mel).exp().sum(3, keepdim=True)
    return F.avg_pool2d(power, (8, 1)).clamp(min=exp(2 * AUDIBLE_LOG_MEL)).log() / 2
