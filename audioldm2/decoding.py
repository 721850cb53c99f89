"""Latents to sound: the VAE's decoder and the vocoder, long sounds in chunks to bound the memory.

The result is that of decoding at once, up to rounding (see `VAE.decode_in_chunks` and `HifiGan.in_chunks`).
Of the VAE's feature maps, at most three have the full length at a time. Batches are decoded in groups of
equal size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from audioldm2.arguments import check_length
from audioldm2.runtime.precision import stage_dtype

# Mel frames (10 ms each in AudioLDM 2) that are decoded at once, in all sounds of a group together.
FRAMES_AT_ONCE = 4096

ProgressBar = Callable[[str, int], Any]  # from a description and a total to tqdm's bar


def decode(vae: Any, latents: Tensor, progress: ProgressBar) -> Tensor:
    """Decode latents into log-mel spectrograms.

    Args:
        vae: its decoder is used.
        latents: as the UNet generates them, scaled by the VAE's scaling_factor, (B, 8, T/4, F/4).
        progress: makes the progress bar.

    Returns:
        (B, 1, T, F).
    """
    latents = (latents / vae.config.scaling_factor).to(stage_dtype(vae))
    rows = FRAMES_AT_ONCE // vae.downsampling
    groups = equal_groups(latents, rows, axis=2)
    mels = []
    with progress("Decoding", len(groups)) as bar:
        for group in groups:
            long = group.shape[2] > rows
            mels.append(vae.decode_in_chunks(group, rows) if long else vae.decode(group))
            bar.update()
    return torch.cat(mels)


def vocode(vocoder: Any, mel: Tensor, progress: ProgressBar) -> Tensor:
    """Turn log-mel spectrograms into waveforms.

    Args:
        vocoder: from spectrograms to waveforms.
        mel: (B, 1, T, F).
        progress: makes the progress bar.

    Returns:
        (B, samples), float32, on the CPU.
    """
    mel = rearrange(mel, "b 1 t f -> b t f").to(stage_dtype(vocoder))
    groups = equal_groups(mel, FRAMES_AT_ONCE, axis=1)
    waveforms = []
    with progress("Vocoding", len(groups)) as bar:
        for group in groups:
            long = group.shape[1] > FRAMES_AT_ONCE
            waveforms.append((vocoder.in_chunks(group) if long else vocoder(group)).float().cpu())
            bar.update()
    return torch.cat(waveforms)


def equal_groups(x: Tensor, longest: int, axis: int) -> tuple[Tensor, ...]:
    """A batch in groups of equal size: one row each, or at most `longest` in total along `axis`."""
    most = max(1, longest // x.shape[axis])
    size = max(n for n in range(1, min(most, len(x)) + 1) if len(x) % n == 0)
    groups: tuple[Tensor, ...] = x.split(size)
    return groups


def frames_and_samples(unet: Any, vae: Any, vocoder: Any, audio_length_in_s: float | None) -> tuple[int, int]:
    """Convert a duration to mel frames, a multiple of the VAE's factor, and to samples.

    Args:
        unet: its config's `sample_size` is the length of the sounds it was trained on, in latents.
        vae: its factor between frames and latents.
        vocoder: its hop length and sampling rate.
        audio_length_in_s: seconds; None is the length that the UNet was trained on.

    Returns:
        frames: of the mel spectrogram.
        samples: what is kept of the waveform.

    Raises:
        ValueError: not a number of seconds, or out of range.
    """
    config, scale = vocoder.config, vae.downsampling
    frame = vocoder.hop_length / config.sampling_rate  # seconds
    if audio_length_in_s is None:
        size = getattr(getattr(unet, "config", None), "sample_size", None)
        size = size[0] if isinstance(size, Sequence) else size
        if size is None:
            raise ValueError("pass audio_length_in_s: this checkpoint does not say how long its sounds are")
        audio_length_in_s = size * scale * frame
    check_length(audio_length_in_s, shortest=scale * frame)
    frames = math.ceil(int(audio_length_in_s / frame) / scale) * scale
    return frames, int(audio_length_in_s * config.sampling_rate)
