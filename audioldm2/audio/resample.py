"""Changing the sampling rate by a rational factor: band-limited interpolation.

In: a waveform (..., samples) at one rate. Out: the same sound, (..., ceil(samples · target / original)).

Between its samples a band-limited signal is a sum of sincs (Shannon). Cut short by a Kaiser window and
lowered to the smaller of the two Nyquist frequencies, the sinc is a low-pass filter h, and an output sample
is

    y[n] = sum_k x[k] h(n M / L - k),        L / M = target / original in lowest terms

(Smith, *Digital Audio Resampling*; Crochiere & Rabiner 1983, chapter 4). The fraction of n M / L takes only L
values, so there are L short filters ("phases"): output n uses phase n mod L. That is one strided convolution
with L output channels, the polyphase form.

The filter passes up to 0.9 of the lower Nyquist frequency, stops all from 1.0 on, and is 100 dB deep.
"""

from __future__ import annotations

import math
from functools import lru_cache
from operator import index

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

HALF_WIDTH = 64  # reach of the filter to either side, in samples of the lower rate
CUTOFF = 0.95  # of the lower Nyquist frequency: the middle of the transition from 0.9 to 1.0
ATTENUATION = 100.0  # dB, to which HALF_WIDTH and the transition's width belong (Kaiser 1974)
KAISER_BETA = 0.1102 * (ATTENUATION - 8.7)
# Above this many weights the convolution's kernel, mostly zeros when L and M are large, is not built.
LARGEST_KERNEL = 2**22


@lru_cache(maxsize=8)
def _phases(up: int, down: int) -> tuple[Tensor, Tensor]:
    """The L = `up` filters, (L, taps), and where in a block of M = `down` inputs each begins, (L,)."""
    stretch = max(1.0, down / up)  # the lower rate's sample, in input samples
    reach = math.ceil(HALF_WIDTH * stretch)
    time = torch.arange(up) * down  # in 1/L of an input sample
    starts = time // up
    fraction = rearrange((time % up).double() / up, "l -> l 1")
    distance = (
        fraction + reach - torch.arange(2 * reach + 1)
    ) / stretch  # (L, taps), in samples of the lower rate
    inside = (1 - (distance / HALF_WIDTH) ** 2).clamp(min=0)
    window = torch.special.i0(KAISER_BETA * inside.sqrt()) / torch.special.i0(torch.tensor(KAISER_BETA))
    window = torch.where(distance.abs() <= HALF_WIDTH, window, 0.0)
    return CUTOFF / stretch * torch.sinc(CUTOFF * distance) * window, starts


def resample(waveform: Tensor, orig_sr: int, target_sr: int) -> Tensor:
    """The waveform at another sampling rate; beyond its ends it is taken to be silent.

    Args:
        waveform: (..., samples), floating point, any device.
        orig_sr: its sampling rate, in Hz.
        target_sr: the wanted one, in Hz.

    Returns:
        (..., ceil(samples · target_sr / orig_sr)) in the same dtype; `waveform` itself when the rates are
        equal.

    Raises:
        TypeError: a rate that is not a whole number; a waveform that is not floating point.
        ValueError: a rate that is not positive; a waveform without a sample axis.
    """
    orig_sr, target_sr = index(orig_sr), index(target_sr)
    if orig_sr < 1 or target_sr < 1:
        raise ValueError(f"sampling rates must be positive, not {orig_sr} and {target_sr}")
    if not waveform.is_floating_point():
        raise TypeError(f"the waveform must be floating point, not {waveform.dtype}")
    if waveform.dim() == 0:
        raise ValueError("the waveform must have shape (..., samples); this one is a single number")
    if orig_sr == target_sr or waveform.shape[-1] == 0:
        return waveform
    divisor = math.gcd(orig_sr, target_sr)
    up, down = target_sr // divisor, orig_sr // divisor
    filters, starts = _phases(up, down)
    taps = filters.shape[1]

    *lead, samples = waveform.shape
    # Half precision would add audible noise; so would TF32, which a GPU may use for a float32 convolution.
    dtype = (
        torch.float64
        if waveform.device.type == "cuda"
        else torch.promote_types(waveform.dtype, torch.float32)
    )
    x = waveform.reshape(-1, samples).to(dtype)
    length = -(-samples * up // down)
    blocks = -(-length // up)
    left = taps // 2
    width = int(starts[-1]) + taps  # inputs that a block of outputs looks at
    x = F.pad(x, (left, max(0, (blocks - 1) * down + width - left - samples)))
    if up * width <= LARGEST_KERNEL:
        kernel = torch.zeros(up, 1, width, dtype=torch.float64)
        kernel[:, 0].scatter_(1, rearrange(starts, "l -> l 1") + torch.arange(taps), filters)
        y = F.conv1d(rearrange(x, "b n -> b 1 n"), kernel.to(x), stride=down)  # (B, L, blocks)
        y = rearrange(y, "b l t -> b (t l)")
    else:
        y = torch.cat(
            [_block(x[:, t * down : t * down + width], filters, starts) for t in range(blocks)], dim=1
        )
    return y[:, :length].reshape(*lead, length).to(waveform.dtype)


def _block(x: Tensor, filters: Tensor, starts: Tensor) -> Tensor:
    """One block of outputs, the L phases one after the other: (B, width) -> (B, L)."""
    taps = filters.shape[1]
    pieces = []
    for filters_part, starts_part in zip(filters.split(4096), starts.split(4096), strict=True):
        windows = x.unfold(1, taps, 1)[:, starts_part.to(x.device)]  # (B, phases, taps)
        pieces.append(torch.einsum("b l k, l k -> b l", windows, filters_part.to(x)))
    return torch.cat(pieces, dim=1)
