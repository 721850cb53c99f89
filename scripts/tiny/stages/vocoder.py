"""Train the vocoder: HiFi-GAN's generator turns log-mel spectrograms back into waveforms.

It starts as a bank of oscillators (oscillators.py), which already makes sound, and learns to get levels
right, to sharpen what the VAE blurs, and to make up for the coarseness of the oscillators. It is trained on
excerpts of the library's sounds. Of two random excerpts the louder one is used, so that little time goes
into silence. Half of the spectrograms are computed from the sounds, half went through the trained VAE, as in
use. There is no discriminator: on a CPU its time is better spent on more steps. The loss has three parts,
all on magnitudes, because a mel spectrogram does not determine phases.

1. Short-window spectra, point by point: the distance of the magnitudes, relative to the excerpt's, and of
   their logarithms (Yamamoto et al. 2020, "Parallel WaveGAN", equations 4 to 6, but with absolute values
   instead of squares, which a few sounds would dominate). Long windows are left out. Steady sounds consist
   of lines at multiples of the frame rate, 31 Hz apart; through a long window the line next to the right one
   is as wrong as silence, yet to the ear and through a short window it is better than silence.
2. Spectra through windows of all lengths, as textures: mean and spread of the logarithms in a neighborhood
   (after McDermott and Simoncelli 2011, who describe rain this way). Noise cannot be matched point by point,
   and a generator that only tries ends up with the median of all possibilities; the spread reveals that.
3. The distance of the log-mel spectrograms (Kong et al. 2020, "HiFi-GAN", equation 3).

Each excerpt is first scaled to the same level, so loud and soft sounds weigh alike. Anything more than about
50 dB below that level counts as silence.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from audioldm2.audio.log_mel import LogMel, LogMelConfig
from audioldm2.models.hifigan import HifiGan, HifiGanConfig
from audioldm2.models.vae import VAE
from audioldm2.training.loop import train
from scripts.tiny.data.library import Library, make_library
from scripts.tiny.data.sounds import loudest_level
from scripts.tiny.run import Run
from scripts.tiny.sizes import HOP_LENGTH, TINY
from scripts.tiny.stages.oscillators import set_oscillator_weights

TRAINING_STEPS, BATCH_SIZE, LEARNING_RATE = 1800, 4, 1e-5
EXCERPT_FRAMES = 48
EDGE_FRAMES = 3  # at either end, left out of the loss: the vocoder pads there, inside real sounds
DECODED_SOUNDS = 500  # sounds that are sent through the VAE
LOSS_WINDOWS = ((2048, 480), (512, 120), (128, 48))  # (window, hop) in samples
LONGEST_POINTWISE_WINDOW = 512  # samples; spectra through longer windows are compared as textures only
TEXTURE_PATCH = (200, 0.2)  # Hz by s, the neighborhood of a texture
EXCERPT_RMS = 0.1  # of an excerpt's loudest 64 ms after scaling
SILENCE_RMS = 2e-3  # excerpts softer than that are not scaled up further
MAGNITUDE_FLOOR = 0.1  # magnitudes below it, in a window of 1024 after scaling, are inaudible
MEL_FLOOR = 3e-3  # and in a mel band
LEVELLING_SOUNDS = 100  # sounds that the output level is adjusted on
UNSEEN_SOUNDS = 34  # that the result is measured on


def power_spectrum(waveforms: Tensor, window: int, hop: int) -> Tensor:
    """Squared magnitudes of the spectra of waveforms (B, samples): (B, bins, frames)."""
    hann = torch.hann_window(window, device=waveforms.device)
    spectrum = torch.stft(waveforms, window, hop, window=hann, center=False, return_complex=True)
    return torch.view_as_real(spectrum).square().sum(-1)


def floored_logarithms(made: Tensor, real: Tensor, floor: float) -> tuple[Tensor, Tensor, Tensor]:
    """Logarithms of two spectrograms of magnitudes (B, ...), and where the real one is audible.

    Where the real one is below the floor, everything below the floor is equal. Elsewhere `made` is not
    floored, so a missing sound still has a gradient.
    """
    audible = real > floor
    made = torch.where(audible, made, made.clamp(min=floor))
    return made.log(), real.clamp(min=floor).log(), audible


def balanced_difference(made: Tensor, real: Tensor, audible: Tensor) -> Tensor:
    """The mean absolute difference of (B, H, W) in the audible cells plus that in all others.

    Averaged separately, so a tone, which is audible in few cells, weighs as much as noise.
    """
    difference = (made - real).abs()
    regularizer = 0.01 * audible[0].numel()
    parts = [(difference * m).sum((1, 2)) / (m.sum((1, 2)) + regularizer) for m in (audible, ~audible)]
    return (parts[0] + parts[1]).mean()


def texture(x: Tensor, patch: tuple[int, int]) -> Tensor:
    """Mean and spread of a spectrogram (B, bins, time) in overlapping patches: (2, B, 1, ...)."""
    height, width = patch
    pool = nn.AvgPool2d(patch, (max(1, height // 2), max(1, width // 2)))
    x = rearrange(x, "b f t -> b 1 f t")
    mean = pool(x)
    return torch.stack([mean, (pool(x.square()) - mean.square()).clamp(min=1e-3).sqrt()])


def waveform_loss(made: Tensor, real: Tensor) -> dict[str, Tensor]:
    """The distance of waveforms (B, samples) from the real ones; "loss" is the weighted sum of the others."""
    log_mel = LogMel(LogMelConfig(floor=1e-4))
    rate = log_mel.config.sampling_rate
    loudest = real.unfold(1, 1024, 512).square().mean(-1).amax(1, keepdim=True).sqrt()  # (B, 1)
    gain = EXCERPT_RMS / loudest.clamp(min=SILENCE_RMS)
    made, real = gain * made, gain * real
    parts = {key: torch.zeros((), device=made.device) for key in ("magnitude", "logarithm", "texture")}
    for window, hop in LOSS_WINDOWS:
        floor = MAGNITUDE_FLOOR * math.sqrt(window / 1024)
        ours, theirs = ((power_spectrum(w, window, hop) + 1e-4).sqrt() for w in (made, real))
        if window <= LONGEST_POINTWISE_WINDOW:
            difference = (ours - theirs).abs().mean((1, 2))
            parts["magnitude"] += (difference / (theirs.mean((1, 2)) + floor)).mean()
        ours, theirs, audible = floored_logarithms(ours, theirs, floor)
        if window <= LONGEST_POINTWISE_WINDOW:
            parts["logarithm"] += balanced_difference(ours, theirs, audible)
        patch = max(1, round(TEXTURE_PATCH[0] * window / rate)), round(TEXTURE_PATCH[1] * rate / hop)
        parts["texture"] += F.l1_loss(texture(ours, patch), texture(theirs, patch))
    ours, theirs = (log_mel(w, rate).exp().squeeze(1) for w in (made, real))
    parts["mel"] = balanced_difference(*floored_logarithms(ours, theirs, MEL_FLOOR))
    loss = 0.5 * parts["magnitude"] + 0.1 * parts["logarithm"] + 0.4 * parts["texture"] + parts["mel"]
    return {"loss": loss, **parts}


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
