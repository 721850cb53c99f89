"""Sound in: waveforms to the latents that the UNet works on."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from audioldm2.audio.log_mel import LogMel
from audioldm2.audio.resample import resample
from audioldm2.audio.waveforms import check_waveform
from audioldm2.runtime.precision import stage_device, stage_dtype
from audioldm2.tensors import check_finite

MAX_CHANNELS = 64  # of an array in soundfile's layout, (samples, channels)


def as_waveforms(audio: Tensor | np.ndarray[Any, Any]) -> Tensor:
    """A caller's sounds as one batch.

    Args:
        audio: (samples,) or (B, samples), floating-point, a tensor or an array.

    Returns:
        (B, samples).

    Raises:
        TypeError, ValueError: anything else; the message names the argument.
    """
    if isinstance(audio, np.ndarray):
        if audio.dtype not in (np.float16, np.float32, np.float64):
            raise TypeError(
                f"audio must be float32 in [-1, 1], got {audio.dtype}; of 16-bit samples pass audio / 32768"
            )
        audio = torch.from_numpy(np.ascontiguousarray(audio))
    if isinstance(audio, str | os.PathLike):
        raise TypeError("audio must be a tensor or an array, got a path; read the file with read_wav")
    check_waveform("audio", audio)
    assert isinstance(audio, Tensor)
    if audio.dim() > 2:
        raise ValueError(f"audio has shape {tuple(audio.shape)}; it must be (samples,) or (B, samples)")
    if audio.dim() == 2 and audio.shape[1] < audio.shape[0] and audio.shape[1] <= MAX_CHANNELS:
        raise ValueError(
            f"audio has shape {tuple(audio.shape)}, which would be {len(audio)} sounds of {audio.shape[1]} "
            "samples; it must be (B, samples): of (samples, channels), pass audio.mean(1)"
        )
    return audio if audio.dim() == 2 else audio[None]


def encode(vae: Any, log_mel: LogMel, waveforms: Tensor, sampling_rate: int) -> Tensor:
    """Encode sounds into latents.

    A sound is resampled, and its end is padded with silence to a whole number of latents.

    Args:
        vae: its encoder is used.
        log_mel: the front end that fits the checkpoint.
        waveforms: (B, samples).
        sampling_rate: of `waveforms`, in Hz.

    Returns:
        The most likely latents, scaled by the VAE's scaling_factor as the UNet generates them, (B, 8, T/4,
        F/4).

    Raises:
        NonFiniteError: the VAE returned numbers that are not finite.
    """
    rate = log_mel.config.sampling_rate
    # float32 at least, for a spectrogram is not accurate in half precision.
    waveforms = waveforms.to(stage_device(vae), torch.promote_types(waveforms.dtype, torch.float32))
    waveforms = resample(waveforms, sampling_rate, rate)
    whole = log_mel.config.hop_length * vae.downsampling  # samples per row of latents
    # The spectrogram is reflected at its ends, for which one row alone can be too short.
    samples = max(waveforms.shape[1], log_mel.config.n_fft)
    waveforms = F.pad(waveforms, (0, -(-samples // whole) * whole - waveforms.shape[1]))
    mel = log_mel(waveforms, rate).to(stage_dtype(vae))
    latents: Tensor = vae.encode(mel).mode() * vae.config.scaling_factor
    check_finite("vae", latents)
    return latents
