"""The log-mel distance between sounds that should be the same, such as those of one noise and two samplers.

The root mean square, over frames t and mel bands f, of the difference between log-mel spectrograms in dB:

    sqrt(mean over t, f of (L(t, f) - L'(t, f))^2),   L = max(20 log10(magnitude), maximum - 80 dB)

The maximum is that of the reference's spectrogram. Without that floor, differences in silence, which nobody
hears, would count most.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from audioldm2.arguments import check_count
from audioldm2.audio.decibels import DECIBELS_PER_NEPER, RANGE_DB
from audioldm2.audio.log_mel import LogMel
from audioldm2.audio.resample import MAX_RATE, resample
from audioldm2.editing.sound import as_waveforms
from audioldm2.tensors import check_tensor


def log_mel_distance(
    sounds: Tensor | np.ndarray[Any, Any],
    references: Tensor | np.ndarray[Any, Any],
    sampling_rate: int,
    log_mel: LogMel | None = None,
) -> Tensor:
    """The log-mel distance of each sound from its reference.

    It compares samplers, step counts and precisions on the same prompts and the same initial noise, where a
    sound should come out the same. It says nothing about sounds that may differ: two recordings of rain are
    as far apart as two sounds can be that have the same levels.

    Args:
        sounds: (B, samples) or (samples,), in [-1, 1].
        references: of the same shape.
        sampling_rate: of both, in Hz.
        log_mel: the front end; by default AudioLDM 2's (16 kHz, 64 bands, 10 ms), so that the distances of
            all checkpoints can be compared. Sounds are resampled to its rate.

    Returns:
        (B,), in dB, float32, on the CPU.

    Raises:
        TypeError, ValueError: sounds that cannot be used, of different shapes, or too short for a frame.

    Example:
        >>> sounds = torch.randn(2, 16000, generator=torch.Generator().manual_seed(0)) / 4
        >>> log_mel_distance(sounds / 2, sounds, 16000)  # 20 log10 2
        tensor([6.0206, 6.0206])
    """
    log_mel = log_mel or LogMel()
    check_count("sampling_rate", sampling_rate, 1, MAX_RATE)
    each = [as_waveforms(sounds, "sounds"), as_waveforms(references, "references")]
    shapes = [tuple(x.shape) for x in each]
    if shapes[0] != shapes[1]:
        raise ValueError(f"sounds has shape {shapes[0]} and references {shapes[1]}; they must be equal")
    rate = log_mel.config.sampling_rate
    mel, reference = (log_mel(resample(x.to("cpu", torch.float32), sampling_rate, rate), rate) for x in each)
    return spectrogram_distance(mel, reference)


def spectrogram_distance(mel: Tensor, reference: Tensor) -> Tensor:
    """The log-mel distance between spectrograms, such as those that `pipe.decode(latents)` returns.

    Args:
        mel: natural logarithms of magnitudes, (B, 1, T, F).
        reference: of the same shape.

    Returns:
        (B,), in dB, float32, on the CPU.

    Raises:
        TypeError, ValueError: another shape, or numbers that are not finite.
    """
    check_tensor("mel", mel, "(B, 1, T, F)")
    check_tensor("reference", reference, "(B, 1, T, F)")
    if mel.shape != reference.shape:
        raise ValueError(f"mel has shape {tuple(mel.shape)} and reference {tuple(reference.shape)}")
    first, second = (x.detach().float().cpu() for x in (mel, reference))
    floor = second.amax((1, 2, 3), keepdim=True) - RANGE_DB / DECIBELS_PER_NEPER
    difference = first.maximum(floor) - second.maximum(floor)
    return DECIBELS_PER_NEPER * difference.square().mean((1, 2, 3)).sqrt()
