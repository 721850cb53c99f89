"""What the log-mel front ends share: the mel filter bank, mel spectrograms, and checks.

waveform (B, samples) -> short-time Fourier transform (B, frames, bins) -> |.|^power
                      -> mel filter bank (B, frames, mels)
"""

from __future__ import annotations

import math
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from audioldm2.audio.resample import MAX_RATE
from audioldm2.audio.waveforms import check_waveform

MAX_FILTER_WEIGHTS = 2**22  # of a mel filter bank, bins times bands: far more than those of any model

# Slaney's mel scale (Auditory Toolbox, 1998): linear below 1 kHz, logarithmic above.
LINEAR_STEP = 200 / 3  # Hz per mel below the bend
BEND_HERTZ = 1000.0
BEND_MEL = BEND_HERTZ / LINEAR_STEP
LOG_STEP = math.log(6.4) / 27  # step of the frequency's natural logarithm per mel, above the bend


def hertz_to_mel(hertz: Tensor) -> Tensor:
    """From Hz to mels on Slaney's scale; any shape."""
    above = BEND_MEL + torch.log(hertz.clamp(min=BEND_HERTZ) / BEND_HERTZ) / LOG_STEP
    return torch.where(hertz < BEND_HERTZ, hertz / LINEAR_STEP, above)


def mel_to_hertz(mel: Tensor) -> Tensor:
    """From mels to Hz, the inverse of `hertz_to_mel`; any shape."""
    above = BEND_HERTZ * torch.exp((mel.clamp(min=BEND_MEL) - BEND_MEL) * LOG_STEP)
    return torch.where(mel < BEND_MEL, mel * LINEAR_STEP, above)


def mel_filter_bank(
    n_fft: int, n_mels: int, sampling_rate: int, frequency_min: float, frequency_max: float
) -> Tensor:
    """Slaney's mel filter bank: triangular filters of unit area, evenly spaced on the mel scale.

    Args:
        n_fft: length of the Fourier transform in samples.
        n_mels: number of filters.
        sampling_rate: sampling rate in Hz.
        frequency_min: lower edge of the first filter in Hz.
        frequency_max: upper edge of the last filter in Hz.

    Returns:
        Filters of shape (n_fft // 2 + 1, n_mels), float64, on the CPU.

    Raises:
        ValueError: the edges are too close for so many filters.
    """
    bins = torch.arange(n_fft // 2 + 1, dtype=torch.float64, device="cpu") * (sampling_rate / n_fft)  # Hz
    limits = hertz_to_mel(torch.tensor([frequency_min, frequency_max], dtype=torch.float64, device="cpu"))
    corners = torch.linspace(limits[0], limits[1], n_mels + 2, dtype=torch.float64, device="cpu")
    edges = mel_to_hertz(corners)  # (n_mels + 2,) Hz
    lower, center, upper = edges[:-2], edges[1:-1], edges[2:]
    bins = rearrange(bins, "f -> f 1")
    rising = (bins - lower) / (center - lower)  # (bins, n_mels)
    falling = (upper - bins) / (upper - center)
    filters = torch.minimum(rising, falling).clamp(min=0) * (2 / (upper - lower))
    if not filters.isfinite().all():
        raise ValueError(
            f"frequency_min={frequency_min} and frequency_max={frequency_max} are too close together"
        )
    return filters


def mel_spectrogram(
    waveforms: Tensor, filters: Tensor, n_fft: int, hop_length: int, power: float, center: bool, pad_mode: str
) -> Tensor:
    """A mel spectrogram without logarithm, computed in the waveforms' dtype (float32 or float64).

    Args:
        waveforms: waveforms of shape (B, samples).
        filters: mel filter bank of shape (n_fft // 2 + 1, n_mels); any device and dtype.
        n_fft: length of the Hann window and of the Fourier transform in samples.
        hop_length: samples from one frame to the next.
        power: 1 for magnitudes, 2 for energies.
        center: if True, frame t is centered on sample t · hop_length, and n_fft // 2 samples of padding are
            added at each end. If False, frame t starts there and nothing is padded.
        pad_mode: how to pad if `center`: "reflect" or "constant" (zeros).

    Returns:
        The spectrogram, shape (B, frames, n_mels).
    """
    window = torch.hann_window(n_fft, dtype=waveforms.dtype, device=waveforms.device)
    spectrum = torch.stft(
        waveforms, n_fft, hop_length, window=window, center=center, pad_mode=pad_mode, return_complex=True
    )
    spectrum = spectrum.abs() ** power  # (B, bins, frames)
    return rearrange(spectrum, "b f t -> b t f") @ filters.to(waveforms)


def check_waveforms(waveforms: Tensor, sampling_rate: int, expected_rate: int) -> None:
    """Check what a front end is called with.

    Raises:
        TypeError: the waveforms are not a dense tensor.
        ValueError: they have the wrong sampling rate, shape or dtype, no samples, or NaN or infinity.
    """
    if isinstance(waveforms, Tensor) and (waveforms.dim() != 2 or not waveforms.is_floating_point()):
        raise ValueError(
            "waveforms must be floating-point tensors of shape (batch, samples), got "
            f"{waveforms.dtype} of shape {tuple(waveforms.shape)}; pass a single waveform as waveform[None]"
        )
    check_waveform("waveforms", waveforms)
    if sampling_rate != expected_rate:
        raise ValueError(
            f"the sampling rate must be {expected_rate} Hz, got {sampling_rate} Hz; convert the waveforms "
            "with audioldm2.resample"
        )


def check_sizes(config: Any, names: tuple[str, ...]) -> None:
    """Raise ValueError unless the settings `names`, the sampling rate and the band can be used."""
    for name in names:
        value = getattr(config, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be a positive integer, got {value!r}")
    if config.sampling_rate > MAX_RATE:
        raise ValueError(f"sampling_rate must be at most {MAX_RATE} Hz, got {config.sampling_rate}")
    low, high = config.frequency_min, config.frequency_max
    if not 0 <= low < high or not math.isfinite(high):
        raise ValueError(f"0 <= frequency_min < frequency_max must hold, got {low} and {high} (in Hz)")


def check_filters(config: Any, n_fft: str, n_mels: str) -> None:
    """Raise ValueError if the settings of these names stand for too large a mel filter bank."""
    weights = (getattr(config, n_fft) // 2 + 1) * getattr(config, n_mels)
    if weights > MAX_FILTER_WEIGHTS:
        raise ValueError(
            f"{n_fft}={getattr(config, n_fft)} with {n_mels}={getattr(config, n_mels)} is too large: a mel "
            f"filter bank has at most {MAX_FILTER_WEIGHTS} weights"
        )
