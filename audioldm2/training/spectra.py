"""The distance of waveforms by their spectra: a loss for vocoders that needs no discriminator.

It has three parts, all on magnitudes, because a mel spectrogram does not determine phases.

1. Short-window spectra, point by point: the distance of the magnitudes, relative to the excerpt's, and of
   their logarithms (Yamamoto et al. 2020, "Parallel WaveGAN", equations 4 to 6, but with absolute values
   instead of squares, which a few sounds would dominate). Long windows are left out. A vocoder's steady
   sounds consist of lines at multiples of its frame rate; through a long window the line next to the right
   one is as wrong as silence, yet to the ear and through a short window it is better than silence.
2. Spectra through windows of all lengths, as textures: mean and spread of the logarithms in a neighborhood
   (after McDermott and Simoncelli 2011, who describe rain this way). Noise cannot be matched point by point,
   and a generator that only tries ends up with the median of all possibilities; the spread reveals that.
3. The distance of the log-mel spectrograms (Kong et al. 2020, "HiFi-GAN", equation 3).

Each excerpt is first scaled to the same level, so loud and soft sounds weigh alike. Anything more than about
50 dB below that level counts as silence.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from audioldm2.audio.log_mel import LogMel, LogMelConfig

LOSS_WINDOWS = ((2048, 480), (512, 120), (128, 48))  # (window, hop) in samples
LONGEST_POINTWISE_WINDOW = 512  # samples; spectra through longer windows are compared as textures only
TEXTURE_PATCH = (200, 0.2)  # Hz by s, the neighborhood of a texture
EXCERPT_RMS = 0.1  # of an excerpt's loudest 64 ms after scaling
SILENCE_RMS = 2e-3  # excerpts softer than that are not scaled up further
MAGNITUDE_FLOOR = 0.1  # magnitudes below it, in a window of 1024 after scaling, are inaudible
MEL_FLOOR = 3e-3  # and in a mel band


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
    """The distance of waveforms at 16 kHz from the real ones.

    Args:
        made: (B, samples), at least 2048 samples.
        real: the same shape.

    Returns:
        "magnitude", "logarithm", "texture" and "mel", the parts described above, and "loss", their weighted
        sum.
    """
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
