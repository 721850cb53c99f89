"""Resampling by a rational factor, with band-limited interpolation.

In: a waveform (..., samples). Out: the same sound at another rate, (..., ceil(samples · target / original)).

A band-limited signal is a sum of sincs, one for each sample (Shannon). The sinc, truncated by a Kaiser window
and scaled to the lower of the two Nyquist frequencies, is a low-pass filter h, and an output sample is

    y[n] = sum_k x[k] h(n M / L - k),        L / M = target / original in lowest terms

(Smith, *Digital Audio Resampling*; Crochiere & Rabiner 1983, chapter 4). The fractional part of n M / L takes
only L values, so there are L short filters, the phases: output n uses phase n mod L. This polyphase form is a
strided convolution with L output channels.

The passband ends at 0.9 times the lower Nyquist frequency. The stopband begins at that frequency and is
attenuated by 100 dB.
"""

from __future__ import annotations

import math
from operator import index

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

HALF_WIDTH = 64  # of the filter, in samples of the lower rate
CUTOFF = 0.95  # relative to the lower Nyquist frequency: the middle of the transition band, 0.9 to 1.0
ATTENUATION = 100.0  # of the stopband in dB; follows from HALF_WIDTH and the transition band (Kaiser 1974)
KAISER_BETA = 0.1102 * (ATTENUATION - 8.7)
# The convolution's kernel is mostly zeros when L and M are large. It is not built beyond this many weights.
MAX_KERNEL_WEIGHTS = 2**22
PHASES_AT_ONCE = 4096  # in the algorithm without that kernel


def _phases(up: int, down: int) -> tuple[Tensor, Tensor]:
    """The L = `up` filters, (L, taps), and the offset of each in a block of M = `down` inputs, on the CPU."""
    stretch = max(1.0, down / up)  # samples of the input per sample of the lower rate
    half_width = math.ceil(HALF_WIDTH * stretch)
    time = torch.arange(up, device="cpu") * down  # in units of 1/L input samples
    starts = time // up
    fraction = rearrange((time % up).double() / up, "l -> l 1")
    # Distance of each tap from the output sample, in samples of the lower rate: (L, taps).
    distance = (fraction + half_width - torch.arange(2 * half_width + 1, device="cpu")) / stretch
    inside = (1 - (distance / HALF_WIDTH) ** 2).clamp(min=0)
    middle = torch.special.i0(torch.tensor(KAISER_BETA, device="cpu"))
    window = torch.special.i0(KAISER_BETA * inside.sqrt()) / middle
    window = torch.where(distance.abs() <= HALF_WIDTH, window, 0.0)
    return CUTOFF / stretch * torch.sinc(CUTOFF * distance) * window, starts


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
        TypeError: a rate is not an integer, or the waveform is not floating point.
        ValueError: a rate is not positive, or the waveform has no sample axis.

    Example:
        >>> resample(torch.randn(2, 16000), 16000, 48000).shape
        torch.Size([2, 48000])
    """
    orig_sr, target_sr = index(orig_sr), index(target_sr)
    if orig_sr < 1 or target_sr < 1:
        raise ValueError(f"sampling rates must be positive, got {orig_sr} and {target_sr}")
    if not waveform.is_floating_point():
        raise TypeError(f"the waveform must be floating point, got {waveform.dtype}")
    if waveform.dim() == 0:
        raise ValueError("the waveform must have shape (..., samples), got a single number")
    if orig_sr == target_sr or waveform.shape[-1] == 0:
        return waveform
    divisor = math.gcd(orig_sr, target_sr)
    up, down = target_sr // divisor, orig_sr // divisor
    filters, starts = _phases(up, down)
    taps = filters.shape[1]

    *lead, samples = waveform.shape
    # Half precision would add audible noise, and so would TF32, which GPUs may use in float32 convolutions.
    lowest = torch.float64 if waveform.device.type == "cuda" else torch.float32
    dtype = torch.promote_types(waveform.dtype, lowest)
    x = waveform.reshape(-1, samples).to(dtype)
    length = -(-samples * up // down)
    blocks = -(-length // up)
    left = taps // 2
    width = int(starts[-1]) + taps  # number of inputs for one block of outputs
    x = F.pad(x, (left, max(0, (blocks - 1) * down + width - left - samples)))
    if up * width <= MAX_KERNEL_WEIGHTS:
        kernel = torch.zeros(up, 1, width, dtype=torch.float64, device="cpu")
        positions = rearrange(starts, "l -> l 1") + torch.arange(taps, device="cpu")
        kernel[:, 0].scatter_(1, positions, filters)
        y = F.conv1d(rearrange(x, "b n -> b 1 n"), kernel.to(x), stride=down)  # (B, L, blocks)
        y = rearrange(y, "b l t -> b (t l)")
    else:
        y = torch.cat(
            [_block(x[:, t * down : t * down + width], filters, starts) for t in range(blocks)], dim=1
        )
    return y[:, :length].reshape(*lead, length).to(waveform.dtype)


def _block(x: Tensor, filters: Tensor, starts: Tensor) -> Tensor:
    """One block of L outputs, computed in groups of phases: (B, width) -> (B, L)."""
    taps = filters.shape[1]
    windows = x.unfold(1, taps, 1)  # (B, width - taps + 1, taps), a view
    outputs = []
    for first in range(0, len(filters), PHASES_AT_ONCE):
        phases = slice(first, first + PHASES_AT_ONCE)
        inputs = windows[:, starts[phases].to(x.device)]  # (B, phases, taps)
        outputs.append(torch.einsum("b l k, l k -> b l", inputs, filters[phases].to(x)))
    return torch.cat(outputs, dim=1)
