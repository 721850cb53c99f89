"""Replacing a part of a sound and keeping the rest.

During the run, the latents that are kept are set to those of the original, at the noise level of the next
step, after each update: the UNet fits what it generates to them (Lugmayr et al. 2022, "RePaint", eq. 8,
without its resampling). After the last step they are the original's, exactly.

The waveform that is decoded from them is not the original's, for the VAE and the vocoder only approximate it.
So the original waveform is put back where it is kept, with short crossfades.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from audioldm2.editing.regions import Regions
from audioldm2.editing.variation import noisy

FADE_S = 0.02  # of the crossfades, which lie in what is kept
FADE_OCTAVES = 1 / 6  # from a band that is replaced to the frequencies that are kept


def keeping(
    scheduler: Any, clean: Tensor, noise: Tensor, replaced: Tensor
) -> Callable[[int, Tensor], Tensor]:
    """A function for `denoise` that keeps latents.

    Args:
        scheduler: the sampler, after `set_timesteps`.
        clean: the latents of the original, (B, channels, T/4, F/4).
        noise: what they are noised with, of the same shape.
        replaced: which of them are not kept, (T/4, F/4) or (B, 1, T/4, F/4), bool.
    """

    def after_update(index: int, latents: Tensor) -> Tensor:
        return torch.where(replaced, latents, noisy(scheduler, clean, noise, index))

    return after_update


def mixed(
    original: Tensor, generated: Tensor, regions: Regions, sampling_rate: int, loop: bool = False
) -> Tensor:
    """The original waveform with the generated one in its regions.

    The crossfades lie in what is kept. A waveform that is kept at all frequencies is the original's, to the
    sample, outside of the crossfades.

    Args:
        original: (B, samples).
        generated: (B, samples).
        regions: what is replaced.
        sampling_rate: of both, in Hz.
        loop: whether the first sample follows the last one.

    Returns:
        (B, samples).
    """
    samples = original.shape[-1]
    difference = generated - original
    if regions.bands is not None:
        difference = _in_bands(difference, regions.bands, sampling_rate)
    weight = torch.zeros(samples)
    fade = round(FADE_S * sampling_rate)
    rising = 0.5 - 0.5 * torch.cos(math.pi * (torch.arange(fade) + 0.5) / fade)
    for start, end in regions.times(samples, sampling_rate):
        weight[start:end] = 1
        before, after = weight[max(start - fade, 0) : start], weight[end : end + fade]
        before.copy_(torch.maximum(before, rising[fade - len(before) :]))
        after.copy_(torch.maximum(after, rising.flip(0)[: len(after)]))
        if loop and end == samples:
            weight[:fade] = torch.maximum(weight[:fade], rising.flip(0)[:samples])
    mix = original + weight * difference
    return torch.where(weight == 1, generated, mix) if regions.bands is None else mix


def _in_bands(waveform: Tensor, bands: tuple[tuple[float, float], ...], sampling_rate: int) -> Tensor:
    """The part of a waveform in frequency bands, with zero phase: (B, samples) -> (B, samples).

    The gain is 1 within a band and falls to 0 outside of it, over FADE_OCTAVES.
    """
    samples = waveform.shape[-1]
    # Zeros at the end, so that the filter's response does not wrap around.
    length = samples + sampling_rate // 4
    hertz = torch.fft.rfftfreq(length, 1 / sampling_rate)
    gain = torch.zeros(len(hertz))
    for low, high in bands:
        below = torch.log2(low / hertz) if low > 0 else torch.full_like(hertz, -1.0)
        above = torch.log2(hertz / high)
        outside = torch.maximum(below, above).clamp(min=0) / FADE_OCTAVES
        gain = torch.maximum(gain, 0.5 + 0.5 * torch.cos(math.pi * outside.clamp(max=1)))
    spectrum = torch.fft.rfft(waveform.double(), length) * gain
    filtered: Tensor = torch.fft.irfft(spectrum, length)[..., :samples]
    return filtered.to(waveform.dtype)
