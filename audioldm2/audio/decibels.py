"""Log-mel spectrograms in decibels, for plots.

In: a waveform (1, samples) of any sampling rate. Out: levels (frames, 128) relative to the maximum.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from audioldm2.audio.mel import mel_filter_bank, mel_spectrogram

N_MELS = 128
RANGE_DB = 80.0  # dynamic range: lower levels, relative to the maximum, are raised to it
DECIBELS_PER_NEPER = 20 / math.log(10)  # of natural logarithms of amplitudes, as in LogMel's spectrograms
WINDOW_S = 0.064  # in seconds; rounded to a power of two in samples
HOP_S = 0.01  # in seconds


def decibels(waveform: Tensor, sampling_rate: int) -> Tensor:
    """The log-mel spectrogram of a waveform, relative to its maximum.

    Args:
        waveform: floating-point waveform of shape (1, samples).
        sampling_rate: in Hz.

    Returns:
        Levels in dB of shape (frames, N_MELS), from -RANGE_DB to 0; -RANGE_DB everywhere if it is silent.
    """
    n_fft = 2 ** max(4, round(math.log2(WINDOW_S * sampling_rate)))
    hop = max(1, round(HOP_S * sampling_rate))
    filters = mel_filter_bank(n_fft, N_MELS, sampling_rate, 0, sampling_rate / 2)
    energy = mel_spectrogram(waveform, filters, n_fft, hop, power=2, center=True, pad_mode="constant")[0]
    maximum = energy.max().clamp(min=1e-10)
    return 10 * torch.log10((energy / maximum).clamp(min=10 ** (-RANGE_DB / 10)))
