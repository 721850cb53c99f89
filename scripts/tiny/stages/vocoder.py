"""Training of the vocoder: HiFi-GAN's generator learns to turn log-mel pictures back into sound.

It begins as a bank of oscillators (see oscillators.py), which sounds already, and learns from there to get
levels right, to sharpen what the VAE blurs, and to make up for the oscillators' coarseness. It learns on
excerpts of the library's sounds, of two places the louder one, so that little time goes into silence; half of
the pictures come straight from the sounds, half went through the trained VAE, as in use. There is no
discriminator: on a CPU its time is better spent on more steps. The loss has three parts, all of magnitudes,
because a mel does not say at which phase a sound is.

1. Spectra through short windows, point by point: the distance of the magnitudes, relative to the excerpt, and
of
   their logarithms (Yamamoto et al. 2020, "Parallel WaveGAN", equations 4 to 6, but with absolute values
   instead of squares, of which a few sounds would make up all). Long windows are left out: steady sounds have
   lines at multiples of the frame rate, 31 Hz apart. The line next to a tone is as wrong as silence to a long
   window, and better than silence to the ear and to a short one.
2. Spectra through windows of all lengths as textures: mean and spread of the logarithms around a point (after
   McDermott and Simoncelli 2011, who describe rain so). Nobody can hit noise point by point, and a generator
   that only tries ends with the median of what may come; the spread gives it away.
3. The distance of the log-mel pictures (Kong et al. 2020, "HiFi-GAN", equation 3).

Each excerpt is first brought to one level, so loud and soft sounds weigh alike, and what lies more than about
50 dB below it is silence.
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
from scripts.tiny.data.library import Library, make_library
from scripts.tiny.data.sounds import level
from scripts.tiny.loop import Run, train
from scripts.tiny.sizes import HOP, SIZES
from scripts.tiny.stages.oscillators import begin_as_oscillators

STEPS = 1800
BATCH = 4
FRAMES = 48  # of an excerpt
EDGE = 3  # frames at either end whose sound is not judged: the padding there lies inside real sounds
DECODED = 500  # sounds that are sent through the VAE
WINDOWS = ((2048, 480), (512, 120), (128, 48))  # (window, hop) in samples
SHORT = 512  # at most so long are windows whose spectra are compared point by point
PATCH = (200, 0.2)  # Hz by s that count as one texture
LEVEL = 0.1  # RMS to which excerpts are brought, of their loudest 64 ms
SOFTEST = 2e-3  # RMS; what is softer counts as silence
FLOOR = 0.1  # then, of a magnitude in a window of 1024, below which nothing is heard
MEL_FLOOR = 3e-3  # and of a magnitude in a mel band
HEARD = 100  # sounds by which the level is set
UNSEEN = 34  # sounds on which the result is measured


def power(waveforms: Tensor, window: int, hop: int) -> Tensor:
    """Waveforms (B, samples) -> energy of their spectra (B, bins, frames)."""
    shape = torch.hann_window(window, device=waveforms.device)
    spectrum = torch.stft(waveforms, window, hop, window=shape, center=False, return_complex=True)
    return torch.view_as_real(spectrum).square().sum(-1)


def logarithms(ours: Tensor, theirs: Tensor, floor: float) -> tuple[Tensor, Tensor, Tensor]:
    """Logarithms of two pictures of magnitudes (B, ...), and where the second has something to hear.

    Where the second is below the floor, all that is below the floor is alike. Where it is not, nothing is: a
    sound that is missing still feels a slope.
    """
    heard = theirs > floor
    ours = torch.where(heard, ours, ours.clamp(min=floor))
    return ours.log(), theirs.clamp(min=floor).log(), heard


def gap(ours: Tensor, theirs: Tensor, heard: Tensor) -> Tensor:
    """The mean absolute difference of pictures (B, H, W) where there is something to hear, plus the rest's.

    Taken apart, so that a tone, which is heard in few places, weighs as much as noise.
    """
    difference = (ours - theirs).abs()
    rest = 0.01 * heard[0].numel()
    parts = [(difference * part).sum((1, 2)) / (part.sum((1, 2)) + rest) for part in (heard, ~heard)]
    return (parts[0] + parts[1]).mean()


def texture(x: Tensor, shape: tuple[int, int]) -> Tensor:
    """Mean and spread of a picture (B, bins, time) in patches: (2, B, 1, ...)."""
    height, width = shape
    pool = nn.AvgPool2d(shape, (max(1, height // 2), max(1, width // 2)))
    x = rearrange(x, "b f t -> b 1 f t")
    mean = pool(x)
    return torch.stack([mean, (pool(x.square()) - mean.square()).clamp(min=1e-3).sqrt()])


def distance(made: Tensor, real: Tensor) -> dict[str, Tensor]:
    """How far waveforms (B, samples) are from the real ones; "loss" is the weighted sum of the others."""
    log_mel = LogMel(LogMelConfig(floor=1e-4))
    rate = log_mel.config.sampling_rate
    loudest = real.unfold(1, 1024, 512).square().mean(-1).amax(1, keepdim=True).sqrt()  # (B, 1)
    gain = LEVEL / loudest.clamp(min=SOFTEST)
    made, real = gain * made, gain * real
    parts = {key: torch.zeros((), device=made.device) for key in ("magnitude", "logarithm", "texture")}
    for window, hop in WINDOWS:
        floor = FLOOR * math.sqrt(window / 1024)
        ours, theirs = ((power(w, window, hop) + 1e-4).sqrt() for w in (made, real))
        if window <= SHORT:
            difference = (ours - theirs).abs().mean((1, 2))
            parts["magnitude"] += (difference / (theirs.mean((1, 2)) + floor)).mean()
        ours, theirs, heard = logarithms(ours, theirs, floor)
        if window <= SHORT:
            parts["logarithm"] += gap(ours, theirs, heard)
        patch = max(1, round(PATCH[0] * window / rate)), round(PATCH[1] * rate / hop)
        parts["texture"] += F.l1_loss(texture(ours, patch), texture(theirs, patch))
    ours, theirs = (log_mel(w, rate).exp().squeeze(1) for w in (made, real))
    parts["mel"] = gap(*logarithms(ours, theirs, MEL_FLOOR))
    loss = 0.5 * parts["magnitude"] + 0.1 * parts["logarithm"] + 0.4 * parts["texture"] + parts["mel"]
    return {"loss": loss, **parts}


@torch.no_grad()
def decoded(library: Library, run: Run) -> Tensor:
    """The log-mels that the run's trained VAE makes of those of the first sounds: (n, 1, 160, 64)."""
    vae = VAE.from_pretrained(run.checkpoint, "vae", device=run.device)
    generator = run.generator(0)
    mels = []
    for indices in torch.arange(min(DECODED, len(library))).split(8):
        latents = vae.encode(library.mels(indices).to(run.device)).sample(generator)
        mels.append(vae.decode(latents).cpu())
    return torch.cat(mels)


def louder(mels: Tensor, generator: torch.Generator) -> list[int]:
    """Where excerpts of mels (B, T, F) begin: of two places drawn for each, the one with more to hear."""
    starts = torch.randint(mels.shape[1] - FRAMES + 1, (len(mels), 2), generator=generator)
    return [
        max(places, key=lambda start: mel[start : start + FRAMES].mean().item())
        for mel, places in zip(mels, starts.tolist(), strict=True)
    ]


@torch.no_grad()
def errors(vocoder: HifiGan, library: Library) -> tuple[float, float]:
    """Mean error of the log-mels of sounds that went through the vocoder, and of their levels in dB."""
    device, log_mel = vocoder.mean.device, LogMel(LogMelConfig(hop_length=HOP))
    mel_errors, level_errors = [], []
    for i in range(len(library)):
        mel = library.mels([i])
        sound = vocoder(mel[:, 0].to(device)).cpu()
        mel_errors.append(F.l1_loss(log_mel(sound, log_mel.config.sampling_rate), mel).item())
        level_errors.append(abs(level(sound[0].numpy()) - level(library.waveforms([i])[0].numpy())))
    return sum(mel_errors) / len(library), sum(level_errors) / len(library)


@torch.no_grad()
def set_level(vocoder: HifiGan, library: Library, mels: Tensor) -> None:
    """Make the output as loud as the library's first sounds, in the median, from mels (n, 1, T, F) of them.

    What is uncertain is made a little too soft by losses that are absolute differences.
    """
    device = vocoder.mean.device
    missing = [
        level(library.waveforms([i])[0].numpy()) - level(vocoder(mel.to(device))[0].cpu().numpy())
        for i, mel in enumerate(mels[:HEARD])
    ]
    gain = 10 ** (float(np.median(missing)) / 20)
    vocoder.conv_out.weight.mul_(gain)
    vocoder.conv_out.bias.mul_(gain)


def train_vocoder(library: Library, run: Run) -> None:
    """Train the vocoder into the run's checkpoint, where the trained VAE must lie.

    Args:
        library: to train on.
        run: where and how.
    """
    torch.manual_seed(run.seed)
    vocoder = HifiGan(HifiGanConfig.from_dict(SIZES["vocoder"]))
    begin_as_oscillators(vocoder, run.seed)
    hop = vocoder.hop_length

    from_vae = decoded(library, run)

    def loss(generator: torch.Generator) -> dict[str, Tensor]:
        indices = library.draw(run.size(BATCH), generator)
        half = len(indices) // 2
        indices[:half] %= len(from_vae)
        mels = rearrange(
            torch.cat([from_vae[indices[:half]], library.mels(indices[half:])]), "b 1 t f -> b t f"
        )
        starts = louder(mels, generator)
        heard = torch.stack([mel[start : start + FRAMES] for mel, start in zip(mels, starts, strict=True)])
        real = torch.stack(
            [
                waveform[(start + EDGE) * hop : (start + FRAMES - EDGE) * hop]
                for waveform, start in zip(library.waveforms(indices), starts, strict=True)
            ]
        )
        made = vocoder(heard.to(run.device))[:, EDGE * hop : -EDGE * hop]
        return distance(made, real.to(run.device))

    train("vocoder", vocoder, loss, run, steps=STEPS, rate=1e-5, average=0.995, betas=(0.8, 0.99), clip=5.0)
    set_level(vocoder, library, from_vae)
    mel_error, level_error = errors(vocoder, make_library(UNSEEN, run.seed + 1))
    print(f"vocoder, unseen sounds there and back: log-mel {mel_error:.3f}, level {level_error:.2f} dB off")
    vocoder.save_pretrained(run.checkpoint / "vocoder")
