"""Train the vocoder: HiFi-GAN's generator turns log-mel spectrograms back into waveforms.

It starts as a bank of oscillators (oscillators.py), which already makes sound, and learns to get levels
right, to sharpen what the VAE blurs, and to make up for the coarseness of the oscillators. It is trained on
excerpts of the library's sounds. Of two random excerpts the louder one is used, so that little time goes
into silence. Half of the spectrograms are computed from the sounds, half went through the trained VAE, as in
use. There is no discriminator: on a CPU its time is better spent on more steps. The loss is the distance of
spectra and textures in audioldm2/training/spectra.py. The lines that steady sounds consist of are 31 Hz apart
here.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from audioldm2.audio.log_mel import LogMel, LogMelConfig
from audioldm2.models.hifigan import HifiGan, HifiGanConfig
from audioldm2.models.vae import VAE
from audioldm2.training.loop import train
from audioldm2.training.spectra import waveform_loss
from scripts.tiny.data.library import Library, make_library
from scripts.tiny.data.sounds import loudest_level
from scripts.tiny.run import Run
from scripts.tiny.sizes import HOP_LENGTH, TINY
from scripts.tiny.stages.oscillators import set_oscillator_weights

TRAINING_STEPS, BATCH_SIZE, LEARNING_RATE = 1800, 4, 1e-5
EXCERPT_FRAMES = 48
EDGE_FRAMES = 3  # at either end, left out of the loss: the vocoder pads there, inside real sounds
DECODED_SOUNDS = 500  # sounds that are sent through the VAE
LEVELLING_SOUNDS = 100  # sounds that the output level is adjusted on
UNSEEN_SOUNDS = 34  # that the result is measured on


@torch.no_grad()
def decoded_mels(library: Library, run: Run) -> Tensor:
    """The first sounds' log-mel spectrograms after the run's trained VAE, (n, 1, 160, 64)."""
    vae = VAE.from_pretrained(run.checkpoint, "vae", device=run.device)
    generator = run.generator(0)
    mels = []
    for indices in torch.arange(min(DECODED_SOUNDS, len(library))).split(8):
        latents = vae.encode(library.mels(indices).to(run.device)).sample(generator)
        mels.append(vae.decode(latents).cpu())
    return torch.cat(mels)


def excerpt_starts(mels: Tensor, generator: torch.Generator) -> list[int]:
    """The start of an excerpt of each spectrogram (B, T, F): of two random ones, the louder."""
    starts = torch.randint(mels.shape[1] - EXCERPT_FRAMES + 1, (len(mels), 2), generator=generator)
    return [
        max(pair, key=lambda start: mel[start : start + EXCERPT_FRAMES].mean().item())
        for mel, pair in zip(mels, starts.tolist(), strict=True)
    ]


@torch.no_grad()
def reconstruction_errors(vocoder: HifiGan, library: Library) -> tuple[float, float]:
    """Mean error of the log-mel spectrograms of vocoded sounds (natural log), and of their levels in dB."""
    device, log_mel = vocoder.mean.device, LogMel(LogMelConfig(hop_length=HOP_LENGTH))
    mel_errors, level_errors = [], []
    for i in range(len(library)):
        mel = library.mels([i])
        sound = vocoder(mel[:, 0].to(device)).cpu()
        mel_errors.append(F.l1_loss(log_mel(sound, log_mel.config.sampling_rate), mel).item())
        expected = loudest_level(library.waveforms([i])[0].numpy())
        level_errors.append(abs(loudest_level(sound[0].numpy()) - expected))
    return sum(mel_errors) / len(library), sum(level_errors) / len(library)


@torch.no_grad()
def match_level(vocoder: HifiGan, library: Library, mels: Tensor) -> None:
    """Scale the output, in place, to be as loud as the library's first sounds in the median.

    Losses on absolute differences make everything uncertain a little too soft.

    Args:
        vocoder: its last layer is scaled.
        library: of the sounds.
        mels: log-mel spectrograms of the first n sounds, (n, 1, T, F).
    """
    device = vocoder.mean.device
    missing = [
        loudest_level(library.waveforms([i])[0].numpy())
        - loudest_level(vocoder(mel.to(device))[0].cpu().numpy())
        for i, mel in enumerate(mels[:LEVELLING_SOUNDS])
    ]
    gain = 10 ** (float(np.median(missing)) / 20)
    vocoder.conv_out.weight.mul_(gain)
    vocoder.conv_out.get_parameter("bias").mul_(gain)


def train_vocoder(library: Library, run: Run) -> None:
    """Train with the run's VAE and write `vocoder`."""
    torch.manual_seed(run.seed)
    vocoder = HifiGan(HifiGanConfig.from_dict(TINY["vocoder"]))
    set_oscillator_weights(vocoder, run.seed)
    hop = vocoder.hop_length

    from_vae = decoded_mels(library, run)

    def loss(generator: torch.Generator) -> dict[str, Tensor]:
        indices = library.draw(run.batch_or(BATCH_SIZE), generator)
        half = len(indices) // 2
        indices[:half] %= len(from_vae)
        mels = torch.cat([from_vae[indices[:half]], library.mels(indices[half:])])
        mels = rearrange(mels, "b 1 t f -> b t f")
        starts = excerpt_starts(mels, generator)
        excerpts = torch.stack(
            [mel[start : start + EXCERPT_FRAMES] for mel, start in zip(mels, starts, strict=True)]
        )
        real = torch.stack(
            [
                waveform[(start + EDGE_FRAMES) * hop : (start + EXCERPT_FRAMES - EDGE_FRAMES) * hop]
                for waveform, start in zip(library.waveforms(indices), starts, strict=True)
            ]
        )
        made = vocoder(excerpts.to(run.device))[:, EDGE_FRAMES * hop : -EDGE_FRAMES * hop]
        return waveform_loss(made, real.to(run.device))

    train(
        "vocoder",
        vocoder,
        loss,
        run,
        steps=TRAINING_STEPS,
        rate=LEARNING_RATE,
        average=0.995,
        betas=(0.8, 0.99),
        clip=5.0,
    )
    match_level(vocoder, library, from_vae)
    mel_error, level_error = reconstruction_errors(vocoder, make_library(UNSEEN_SOUNDS, run.seed + 1))
    print(f"vocoder: errors on unseen sounds: log-mel {mel_error:.3f}, level {level_error:.2f} dB")
    vocoder.save_pretrained(run.checkpoint / "vocoder")
