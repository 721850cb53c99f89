"""Latents to sound: the VAE's decoder and the vocoder, long sounds in chunks to bound the memory.

The result is that of decoding at once, up to rounding (see `VAE.decode_in_chunks` and `HifiGan.in_chunks`).
Of the VAE's feature maps, at most three have the full length at a time. Batches are decoded in groups of
equal size.

Decoding in windows needs memory for one window only, but is not exact: the decoder's GroupNorms and its
attention extend over the whole length, and each window has statistics of its own. docs/long-sounds.md says
what that costs.

A loop is decoded on a circle: each stage sees what is before its first row and after its last one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from audioldm2.arguments import check_length
from audioldm2.runtime.foreign import trained_rows
from audioldm2.runtime.precision import stage_dtype
from audioldm2.tensors import check_finite
from audioldm2.windows import CONTEXT_ROWS, averaged, unwrap, wrap

# Mel frames (10 ms each in AudioLDM 2) that are decoded at once, in all sounds of a group together.
FRAMES_AT_ONCE = 4096
# Rows of latents in a window, and those that neighbors share: 10.24 s and 2.56 s in AudioLDM 2.
WINDOW_ROWS, OVERLAP_ROWS = 256, 64
# What the vocoder sees beyond the ends of a loop. AudioLDM 2's reaches over 25 frames.
CONTEXT_FRAMES = 32

ProgressBar = Callable[[str, int], Any]  # from a description and a total to tqdm's bar


def decode(
    vae: Any, latents: Tensor, progress: ProgressBar, exact: bool = True, loop: bool = False
) -> Tensor:
    """Decode latents into log-mel spectrograms.

    Args:
        vae: its decoder is used.
        latents: as the UNet generates them, scaled by the VAE's scaling_factor, (B, 8, T/4, F/4).
        progress: makes the progress bar.
        exact: False decodes in windows of WINDOW_ROWS.
        loop: whether the first row follows the last one.

    Returns:
        (B, 1, T, F).

    Raises:
        ValueError: a scaling_factor that nothing can be divided by.
        NonFiniteError: the VAE returned numbers that are not finite.
    """
    factor = vae.config.scaling_factor
    if not math.isfinite(factor) or factor == 0:
        raise ValueError(f"scaling_factor in the VAE's config is {factor}; it must be finite and not 0")
    latents = (latents / factor).to(stage_dtype(vae))
    rows = FRAMES_AT_ONCE // vae.downsampling
    windowed = not exact and latents.shape[2] > WINDOW_ROWS
    wrapped = loop and not windowed
    if wrapped:
        latents = wrap(latents, CONTEXT_ROWS, axis=2)
    groups = equal_groups(latents, rows, axis=2)
    mels = []
    with progress("Decoding", len(groups)) as bar:
        for group in groups:
            if windowed:
                mels.append(averaged(vae.decode, group, WINDOW_ROWS, OVERLAP_ROWS, circular=loop))
            else:
                long = group.shape[2] > rows
                mels.append(vae.decode_in_chunks(group, rows) if long else vae.decode(group))
            bar.update()
    mel = torch.cat(mels)
    check_finite("vae", mel)
    return unwrap(mel, CONTEXT_ROWS * vae.downsampling, axis=2) if wrapped else mel


def vocode(vocoder: Any, mel: Tensor, progress: ProgressBar, loop: bool = False) -> Tensor:
    """Turn log-mel spectrograms into waveforms.

    Args:
        vocoder: from spectrograms to waveforms.
        mel: (B, 1, T, F).
        progress: makes the progress bar.
        loop: whether the first frame follows the last one.

    Returns:
        (B, samples), float32, on the CPU.

    Raises:
        NonFiniteError: the vocoder returned numbers that are not finite.
    """
    if mel.shape[1] != 1:
        raise ValueError(f"mel has shape {tuple(mel.shape)}; a spectrogram has one channel, (B, 1, T, F)")
    mel = rearrange(mel, "b 1 t f -> b t f").to(stage_dtype(vocoder))
    if loop:
        mel = wrap(mel, CONTEXT_FRAMES, axis=1)
    groups = equal_groups(mel, FRAMES_AT_ONCE, axis=1)
    waveforms = []
    with progress("Vocoding", len(groups)) as bar:
        for group in groups:
            long = group.shape[1] > FRAMES_AT_ONCE
            waveform = vocoder.in_chunks(group) if long else vocoder(group)
            _check_waveform(waveform, group, vocoder.hop_length)
            waveforms.append(waveform.float().cpu())
            bar.update()
    audio = torch.cat(waveforms)
    check_finite("vocoder", audio)
    if loop:  # some vocoders return a few samples too many or too few, at the end
        hop = vocoder.hop_length
        audio = audio[:, CONTEXT_FRAMES * hop : (mel.shape[1] - CONTEXT_FRAMES) * hop]
    return audio


def _check_waveform(waveform: Tensor, mel: Tensor, hop_length: int) -> None:
    """Raise ValueError unless a vocoder returned waveforms of the spectrograms' length, up to a frame."""
    batch, frames, _ = mel.shape
    samples = frames * hop_length
    if waveform.shape[:-1] != (batch,) or abs(waveform.shape[-1] - samples) >= hop_length:
        raise ValueError(
            f"vocoder returned {tuple(waveform.shape)} for {batch} spectrograms of {frames} frames; it must "
            f"return waveforms, ({batch}, {samples})"
        )


def equal_groups(x: Tensor, longest: int, axis: int) -> tuple[Tensor, ...]:
    """A batch in groups of equal size: one row each, or at most `longest` in total along `axis`."""
    most = max(1, longest // x.shape[axis])
    size = max(n for n in range(1, min(most, len(x)) + 1) if len(x) % n == 0)
    groups: tuple[Tensor, ...] = x.split(size)
    return groups


def frames_and_samples(
    unet: Any, vae: Any, vocoder: Any, audio_length_in_s: float | None, rows: int | None = None
) -> tuple[int, int]:
    """Convert a duration to mel frames, a multiple of the VAE's factor, and to samples.

    As in diffusers, a duration is rounded down to whole frames, and the waveform is then cut to the samples
    of the duration. It can therefore be up to a frame shorter, though no longer, than what was asked for.

    Args:
        unet: its config's `sample_size` is the length of the sounds it was trained on, in latents.
        vae: its factor between frames and latents.
        vocoder: its hop length and sampling rate.
        audio_length_in_s: seconds; None is the length of the given latents, or of the sounds that the UNet
            was trained on.
        rows: the length of latents that were given, in rows (T/4); None if there are none.

    Returns:
        frames: of the mel spectrogram.
        samples: the most that is kept of the waveform.

    Raises:
        ValueError: not a number of seconds, out of range, or not the length of the latents.
    """
    rate, scale = vocoder.config.sampling_rate, vae.downsampling
    frame = vocoder.hop_length / rate  # seconds
    given = audio_length_in_s is not None
    if not given:
        size = trained_rows(unet)
        if size is None and rows is None:
            raise ValueError("pass audio_length_in_s: this checkpoint does not say how long its sounds are")
        audio_length_in_s = max(size or 0, rows or 0) * scale * frame
    check_length(audio_length_in_s, shortest=scale * frame)
    assert audio_length_in_s is not None
    frames = math.ceil(int(audio_length_in_s / frame) / scale) * scale
    if rows is not None:
        if given and frames != rows * scale:
            raise ValueError(
                f"latents have {rows} rows, which are {rows * scale * frame:g} s, but audio_length_in_s = "
                f"{audio_length_in_s:g} needs {frames // scale}; leave out one of the two"
            )
        frames = rows * scale
    return frames, int(audio_length_in_s * rate)
