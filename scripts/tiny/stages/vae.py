"""The VAE: log-mel pictures of sounds, there and back (Kingma and Welling 2014; Rombach et al. 2022).

The loss is the mean absolute error of the decoded picture and, lightly weighted, the KL divergence of the
latents from a standard normal. Pieces of a clip are of several lengths, so that other durations than 5.12 s
are known, too. There are three rounds, warm restarts (Loshchilov and Hutter 2017), for what is rare in the
library; in the last one, what is too soft to be heard counts little, for most of a picture is that.
Neither a perceptual nor an adversarial loss is used: pictures of synthetic sounds are learnt without.
At last the decoder alone learns to bear latents that are not quite right.
"""

from __future__ import annotations

from functools import partial
from math import exp

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm

from audioldm2 import VAE
from audioldm2.models.vae import VAEConfig
from scripts.tiny.data.library import Library
from scripts.tiny.loop import Run, kept, train
from scripts.tiny.sizes import SIZES

# Steps, learning rate, and how much counts what is not heard; a round begins from the average of the last.
UNHEARD = 0.1  # in the last round
ROUNDS = ((1200, 2e-3, 1.0), (1300, 2e-3, 1.0), (2400, 2e-3, UNHEARD))
DECODER_STEPS, DECODER_RATE = 16000, 2e-3
# Standard deviations, at most, of what moves latents for the decoder: each alone, and 4 x 4. Theirs is 1.
ASTRAY = (0.1, 0.05)
FRAMES = 640  # a step, in pieces of one length
LENGTHS = (40, 80, 160)  # frames, multiples of 8
KL_WEIGHT = 3e-3
PREDICTED = 0.05  # the variance in which predicted latents are left, about
SILENCE = -6.0  # natural logarithm; what is below in a picture is not heard (see oscillators.RAMPS)
FLOOR, SPAN = -11.5, 14.0  # natural logarithm: silence, and from there to the loudest


def pieces(library: Library, run: Run, generator: torch.Generator) -> Tensor:
    """A batch of pieces of clips, (B, 1, T, 64)."""
    length = LENGTHS[int(torch.randint(len(LENGTHS), (), generator=generator))]
    mels = library.mels(library.draw(run.size(FRAMES // length), generator))
    starts = torch.randint(0, (mels.shape[2] - length) // 8 + 1, (len(mels),), generator=generator) * 8
    return torch.stack([mel[:, s : s + length] for mel, s in zip(mels, starts.tolist(), strict=True)])


def train_vae(library: Library, run: Run) -> None:
    """Train the VAE, standardise its latents, and save it as `vae`."""
    torch.manual_seed(run.seed)
    vae = VAE(VAEConfig.from_dict(SIZES["vae"]))
    with torch.no_grad():  # begins as silence, and learns the rest
        vae.decoder.conv_out.bias.fill_(FLOOR + SPAN / 4)

    def loss(generator: torch.Generator, unheard: float) -> dict[str, Tensor]:
        mel = pieces(library, run, generator).to(run.device)
        latents = vae.encode(mel)
        found = errors(vae.decode(latents.sample(generator)), mel, unheard)
        divergence = latents.kl().mean() / latents.mode()[0].numel()
        return {**found, "loss": found["loss"] + KL_WEIGHT * divergence, "KL": divergence}

    for i, (steps, rate, unheard) in enumerate(ROUNDS, 1):
        train(
            f"vae_{i}",
            vae,
            partial(loss, unheard=unheard),
            run,
            steps=steps,
            rate=rate,
            average=0.995,
        )
    standardise(vae, library, run)
    vae.save_pretrained(run.checkpoint / "vae")


def train_decoder(library: Library, run: Run) -> None:
    """Train the VAE's decoder on, alone, from latents that are not quite right, and save the VAE again.

    A UNet's latents never are, and a decoder that learnt from the encoder's own makes much of that: where
    they are moved by a tenth of their spread, a loud engine swells by 2.2 dB and not 0.6. Here the decoder
    learns what the sound was before latents were moved, each for itself and 4 x 4 together, by up to ASTRAY
    (noise-augmented decoding: Zheng et al. 2025, arXiv 2510.11690); further, and it takes a wind's swelling
    for a fault, too. An error of the level counts apart: an engine is heard in 14 of 64 bands, and how it
    swells is little in the mean of them all. The encoder stays as it is, and with it all that was learnt from
    its latents.
    """
    torch.manual_seed(run.seed)
    vae = VAE.from_pretrained(run.checkpoint / "vae", device=run.device)

    def loss(generator: torch.Generator) -> dict[str, Tensor]:
        mel = pieces(library, run, generator).to(run.device)
        with torch.no_grad():
            latents = vae.encode(mel).sample(generator)
        count, channels, frames, bands = latents.shape
        alone = torch.randn(latents.shape, generator=generator)
        together = torch.randn(count, channels, -(-frames // 4), -(-bands // 4), generator=generator)
        together = together.repeat_interleave(4, 2)[:, :, :frames].repeat_interleave(4, 3)[..., :bands]
        far = torch.tensor(ASTRAY).view(2, 1, 1, 1, 1) * torch.rand(2, count, 1, 1, 1, generator=generator)
        latents = latents + (far[0] * alone + far[1] * together).to(run.device)
        decoded = vae.decode(latents)
        found, apart = errors(decoded, mel, UNHEARD), (levels(decoded) - levels(mel)).abs().mean()
        return {**found, "loss": found["loss"] + apart, "level": apart}

    decoder = torch.nn.ModuleDict({"decoder": vae.decoder, "from_latents": vae.from_latents})
    train("decoder", decoder, loss, run, steps=DECODER_STEPS, rate=DECODER_RATE, average=0.995)
    vae.eval().save_pretrained(run.checkpoint / "vae")


def errors(decoded: Tensor, mel: Tensor, unheard: float) -> dict[str, Tensor]:
    """Mean absolute error of a picture, and of what is heard of it; "loss" has the former by `unheard`."""
    error = (decoded - mel).abs().mean()
    heard = (decoded.clamp(min=SILENCE) - mel.clamp(min=SILENCE)).abs().mean()
    return {"loss": unheard * error + (1 - unheard) * heard, "error": error, "heard": heard}


def levels(mel: Tensor) -> Tensor:
    """Half the logarithm of the power of all bands together, a quarter of a second each: (B, 1, T / 8, 1)."""
    power = (2 * mel).exp().sum(3, keepdim=True)
    return F.avg_pool2d(power, (8, 1)).clamp(min=exp(2 * SILENCE)).log() / 2


@torch.no_grad()
def modes(vae: VAE, library: Library, count: int, run: Run) -> Tensor:
    """The most likely latents of the first sounds, unscaled: (count, 8, 40, 16) float32 on the CPU."""
    batches = tqdm(torch.arange(count).split(8), desc="Encoding sounds", disable=None)
    return torch.cat([vae.encode(library.mels(rows).to(run.device)).mode().cpu() for rows in batches])


@torch.no_grad()
def standardise(vae: VAE, library: Library, run: Run) -> None:
    """Give each channel of the latents mean 0 and variance 1, in place; what is decoded stays the same.

    A scaling factor alone (Rombach et al. 2022, appendix G) leaves the channels' means, which carry most of
    the power where sounds are mostly silence: then a latent at high noise tells the UNet little of the sound.
    The 1 x 1 convolutions around the latents take up mean and scale of each channel.
    """
    latents = modes(vae, library, min(256, len(library)), run)
    scale, mean = torch.std_mean(latents.to(run.device), dim=(0, 2, 3))
    moments, back = vae.to_moments, vae.from_latents
    moments.bias -= torch.cat([mean, 2 * scale.log()])  # the second half are logarithms of variances
    means = slice(None, len(mean))
    moments.weight[means] /= scale.view(-1, 1, 1, 1)
    moments.bias[means] /= scale
    back.bias += back.weight[:, :, 0, 0] @ mean
    back.weight *= scale.view(1, -1, 1, 1)


@torch.no_grad()
def importance(vae: VAE, library: Library, run: Run) -> Tensor:
    """How much a squared error in each channel of the scaled latents is to count, (C, 1, 1); 1 in the mean.

    That is the reciprocal of the variance which the VAE leaves the channel in, plus that of what is
    predicted. A few channels carry the sound, held to 0.05 of their spread; most say nothing, and an error in
    them is no louder than the VAE's own noise ("posterior collapse": Lucas et al. 2019, arXiv 1911.02469).
    How much a decoded picture changes, squared, goes from channel to channel as that reciprocal.
    """
    batches = torch.arange(min(64, len(library))).split(8)
    variances = [vae.encode(library.mels(rows).to(run.device)).log_variance.exp() for rows in batches]
    left = torch.cat(variances).mean((0, 2, 3)) * vae.config.scaling_factor**2
    weights = 1 / (left + PREDICTED)
    return (weights / weights.mean()).view(-1, 1, 1)


@torch.no_grad()
def library_latents(library: Library, run: Run) -> Tensor:
    """The most likely latents of all sounds, by the trained VAE, unscaled: (n, 8, 40, 16) float32 on the CPU.

    They are kept in the run's folder, until the VAE or the library is another one.
    """
    folder = run.checkpoint / "vae"

    def encode() -> dict[str, Tensor]:
        vae = VAE.from_pretrained(folder, device=run.device)
        return {"latents": modes(vae, library, len(library), run)}

    files = [path.read_bytes() for path in sorted(folder.iterdir())]
    mels = library.mels(torch.arange(len(library))).numpy()
    return kept(run.folder / "latents.pt", [*files, mels.tobytes()], encode)["latents"]
