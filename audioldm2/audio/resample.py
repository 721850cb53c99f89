"""Resampling by a rational factor, with band-limited interpolation.

In: a waveform (..., samples). Out: the same sound at another rate, (..., ceil(samples · target / original)).

A band-limited signal is a sum of sincs, one for each sample (Shannon). The sinc, truncated by a Kaiser window
and scaled to the lower of the two Nyquist frequencies, is a low-pass filter h, and an output sample is

    y[n] = sum_k x[k] h(n M / L - k),        L / M = target / original in lowest terms

(Smith, *Digital Audio Resampling*; Crochiere & Rabiner 1983, chapter 4). The fractional part of n M / L takes
only L values, so there are L short filters, the phases: output n uses phase n mod L. This polyphase form is a
strided convolution with L output channels. For a small L, several blocks of L outputs are computed at once,
which is the same convolution with more channels and a longer stride, and faster.

The filter is that of soxr's quality "HQ", librosa's default, whose impulse response is a sinc with the Kaiser
window below: the passband ends at 0.914 times the lower Nyquist frequency (7.3 kHz for 16 kHz), and the
stopband begins at that frequency, attenuated by more than 120 dB. From 16 to 48 kHz and back, the result is
soxr's to less than -100 dB at all frequencies, the ends included. For factors such as 160/147, soxr
approximates the filter (its own error is -60 dB close to the end of the passband), and this module does not.
"""

from __future__ import annotations

import math
from operator import index

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from audioldm2.audio.waveforms import check_waveform

HALF_WIDTH = 290.5 / 3  # of the filter, in samples of the lower rate
CUTOFF = 0.956872  # relative to the lower Nyquist frequency: the middle of the transition band, 0.914 to 1.0
KAISER_BETA = 13.04
MAX_RATE = 2**20  # Hz; no sound has more, and the filters would need gigabytes
MAX_FACTOR = 4096  # of two rates
OUTPUTS_AT_ONCE = 64  # channels of the convolution if L is smaller; measured on CPUs
# The convolution's kernel is mostly zeros when L and M are large. It is not built beyond this many weights.
MAX_KERNEL_WEIGHTS = 2**22


def _filters(up: int, down: int, first: int, count: int) -> tuple[Tensor, Tensor]:
    """The filters of outputs `first` to `first + count` and the input at which each begins, on the CPU.

    Args:
        up: L, the number of different filters.
        down: M, inputs for L outputs.
        first: index of an output.
        count: number of outputs.

    Returns:
        filters: (count, taps), float64.
        starts: (count,), indices into the inputs with `taps // 2` zeros before them.
    """
    stretch = max(1.0, down / up)  # samples of the input per sample of the lower rate
    half_width = math.ceil(HALF_WIDTH * stretch)
    time = torch.arange(first, first + count, device="cpu") * down  # in units of 1/L input samples
    fraction = rearrange((time % up).double() / up, "n -> n 1")
    # Distance of each tap from the output sample, in samples of the lower rate: (count, taps).
    distance = (fraction + half_width - torch.arange(2 * half_width + 1, device="cpu")) / stretch
    inside = (1 - (distance / HALF_WIDTH) ** 2).clamp(min=0)
    middle = torch.special.i0(torch.tensor(KAISER_BETA, dtype=torch.float64, device="cpu"))
    window = torch.special.i0(KAISER_BETA * inside.sqrt()) / middle
    window = torch.where(distance.abs() <= HALF_WIDTH, window, 0.0)
    return CUTOFF / stretch * torch.sinc(CUTOFF * distance) * window, time // up


def check_rates(orig_sr: int, target_sr: int) -> None:
    """Check that `resample` can convert between two sampling rates.

    Raises:
        TypeError: a rate is not an integer.
        ValueError: a rate is out of range, or they are too far apart.
    """
    for name, value in (("orig_sr", orig_sr), ("target_sr", target_sr)):
        if isinstance(value, bool) or not hasattr(value, "__index__"):
            raise TypeError(f"{name} must be an integer, the sampling rate in Hz, got {value!r}")
        if not 1 <= index(value) <= MAX_RATE:
            raise ValueError(f"{name} must be positive and at most {MAX_RATE} Hz, got {index(value)}")
    low, high = sorted((index(orig_sr), index(target_sr)))
    if high > MAX_FACTOR * low:
        raise ValueError(
            f"orig_sr and target_sr must not differ by a factor of more than {MAX_FACTOR}, "
            f"got {index(orig_sr)} and {index(target_sr)}"
        )


def resample(waveform: Tensor, orig_sr: int, target_sr: int) -> Tensor:
    """Convert a waveform to another sampling rate. Beyond its ends it is assumed to be zero.

    Args:
        waveform: floating-point waveform of shape (..., samples), on any device.
        orig_sr: its sampling rate in Hz.
        target_sr: the new sampling rate in Hz.

    Returns:
        A waveform of shape (..., ceil(samples · target_sr / orig_sr)), same dtype; `waveform` itself if the
        rates are equal.

    Raises:
        TypeError: a rate is not an integer, or the waveform is not a floating-point tensor.
        ValueError: a rate is not positive or out of range; or the waveform has no sample axis, no samples,
            NaN or infinity.

    Example:
        >>> resample(torch.randn(2, 16000), 16000, 48000).shape
        torch.Size([2, 48000])
    """
    check_rates(orig_sr, target_sr)
    check_waveform("waveform", waveform)
    orig_sr, target_sr = index(orig_sr), index(target_sr)
    if orig_sr == target_sr:
        return waveform
    divisor = math.gcd(orig_sr, target_sr)
    up, down = target_sr // divisor, orig_sr // divisor

    *lead, samples = waveform.shape
    # Half precision would add audible noise, and so would TF32, which GPUs may use in float32 convolutions.
    lowest = torch.float64 if waveform.device.type == "cuda" else torch.float32
    dtype = torch.promote_types(waveform.dtype, lowest)
    x = waveform.reshape(-1, samples).to(dtype)
    length = -(-samples * up // down)
    # Outputs are computed in blocks, a multiple of L each, from `stride` more inputs than the one before.
    repeats = max(1, min(OUTPUTS_AT_ONCE, length) // up)
    outputs, stride = up * repeats, down * repeats
    blocks = -(-length // outputs)
    left = math.ceil(HALF_WIDTH * max(1.0, down / up))
    taps = 2 * left + 1
    width = (outputs - 1) * down // up + taps  # number of inputs for one block
    x = F.pad(x, (left, max(0, (blocks - 1) * stride + width - left - samples)))
    if outputs * width <= MAX_KERNEL_WEIGHTS:
        filters, starts = _filters(up, down, 0, outputs)
        kernel = torch.zeros(outputs, 1, width, dtype=torch.float64, device="cpu")
        kernel[:, 0].scatter_(1, rearrange(starts, "n -> n 1") + torch.arange(taps, device="cpu"), filters)
        y = F.conv1d(rearrange(x, "b n -> b 1 n"), kernel.to(x), stride=stride)  # (B, outputs, blocks)
        y = rearrange(y, "b n t -> b (t n)")
    else:
        most = max(1, MAX_KERNEL_WEIGHTS // taps)
        groups = []
        for first in range(0, outputs, most):
            filters, starts = _filters(up, down, first, min(most, outputs - first))
            group = [_apply(x[:, t * stride :], filters, starts) for t in range(blocks)]
            groups.append(torch.stack(group, dim=1))
        y = rearrange(torch.cat(groups, dim=2), "b t n -> b (t n)")
    y = y[:, :length].reshape(*lead, length).to(waveform.dtype)
    if not bool(y.isfinite().all()):
        raise ValueError(
            f"waveform is too loud to be resampled in {waveform.dtype}: the result is not finite"
        )
    return y


def _apply(x: Tensor, filters: Tensor, starts: Tensor) -> Tensor:
    """Apply each filter, (N, taps), to the inputs from its start on: (B, samples) -> (B, N)."""
    inputs = x.unfold(1, filters.shape[1], 1)[:, starts.to(x.device)]  # (B, N, taps)
    return torch.einsum("b n k, n k -> b n", inputs, filters.to(x))
