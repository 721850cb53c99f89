"""First weights with which HiFi-GAN's generator already sounds: a bank of oscillators.

Drawn at random, its weights need days of a GPU to find out what any vocoder must do: turn logarithms into
amplitudes, and make oscillations of many frequencies from signals that have none. Both can be written down.

The sound is what overlapping windows of sinusoids add up to,

    y(t) = sum over frames n and mel bands m of  exp(mel_m[n]) T_m(t - n H),
    T_m(t) = w(t) sum over lines f of  r_m(f) cos(2 pi f t + phi_f)

with a Hann window w of two frames. Lines lie at multiples of 1/H, at which consecutive frames agree; r_m is
the band's triangle. (A generator sees nothing but the mel. Where that stands still, its output must repeat
with the frames, whatever its weights are: lines at multiples of the frame rate are all that there can be.
That is why the tiny checkpoint's frames are as far apart as 32 ms: 31 Hz from line to line.)

A generator with slope 0 computes that with four layers:

1. conv_in makes of each band three ramps relu(mel_m - b), whose sum approximates the exponential.
2. The first up-sampling multiplies them with the T_m, in complex subbands at a low rate: a subband l around
   f_l is an analytic signal (Crochiere and Rabiner 1983, chapter 7). Its samples may be as few as its
   bandwidth, a little more in order that short filters can tell it from its images.
3. The second and third up-sampling interpolate, z(t) = sum_i z[i] p(t - i T) exp(2 pi j f_l (t - i T)) with a
   windowed sinc p, and join two subbands to one of twice the width, then all to the sound.
4. conv_out takes the channel that holds it.

Signals pass through the ReLUs in pairs: x = relu(x) - relu(-x). The residual blocks add nothing at first.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from audioldm2.audio.log_mel import LogMelConfig, mel_filter_bank
from audioldm2.models.hifigan import HifiGan

# Ramps (b, slope) whose sum is exp(x) within 4 dB for x = -5.2 ... 2.5, where sounds lie; below is silence.
RAMPS = ((-5.417, 0.01642), (-2.625, 0.1984), (-0.062, 2.584))
LEVEL = 10 ** (-45.5 / 20)  # of the sum of all lines against the sound that the mels were taken of


@torch.no_grad()
def begin_as_oscillators(vocoder: HifiGan, seed: int = 0) -> None:
    """Set a vocoder's weights, in place.

    Args:
        vocoder: with three up-samplings, a slope of 0, and twice as many taps as steps in the first.
        seed: of the lines' phases, and of the small weights of what is not used yet.

    Raises:
        ValueError: its sizes are others.
    """
    config = vocoder.config
    rates, rate = config.upsample_rates, config.sampling_rate
    wanted = len(RAMPS) * config.model_in_dim
    if len(rates) != 3 or config.leaky_relu_slope != 0 or config.upsample_initial_channel != wanted:
        raise ValueError(f"needed are 3 up-samplings, leaky_relu_slope 0, upsample_initial_channel {wanted}")
    generator = torch.Generator().manual_seed(seed)
    for layer in vocoder.modules():
        if isinstance(layer, nn.Conv1d | nn.ConvTranspose1d):
            layer.weight.normal_(0, 0.003 / math.sqrt(layer.weight[0].numel()), generator=generator)
            nn.init.zeros_(layer.bias)
    for block in vocoder.blocks:
        for dilated in block.dilated:
            dilated.weight.normal_(0, 1 / math.sqrt(dilated.weight[0].numel()), generator=generator)

    bands, middle = config.model_in_dim, vocoder.conv_in.kernel_size[0] // 2
    for k, (begin, _) in enumerate(RAMPS):
        ramps = slice(k * bands, (k + 1) * bands)
        vocoder.conv_in.weight[ramps, :, middle] = torch.eye(bands)
        vocoder.conv_in.bias[ramps] = -begin

    # Delays of what follows, in samples: kernels of even length have their middle between two samples.
    steps = rates[1] * rates[2], rates[2]  # samples between two values of the first and second stage
    first, second, third = vocoder.upsample
    delays = [
        step * (k - 1 - 2 * p) / 2
        for step, k, p in (
            (steps[1], second.kernel_size[0], second.padding[0]),
            (1, third.kernel_size[0], third.padding[0]),
        )
    ]
    count = first.weight.shape[1] // 4
    width = rate / 2 / count  # Hz
    at = (torch.arange(first.kernel_size[0], dtype=torch.float64) - first.padding[0]) * steps[0] + sum(delays)
    templates = _templates(vocoder, count, width, at, generator)
    _set(first.weight, torch.cat([slope * templates for _, slope in RAMPS]))

    for layer, step, narrow, units in ((second, steps[1], width, count), (third, 1, 2 * width, count // 2)):
        taps = layer.kernel_size[0]
        times = (torch.arange(taps, dtype=torch.float64) - (taps - 1) / 2) * step / rate  # s
        spacing = layer.stride[0] * step / rate  # s from one value that comes in to the next
        centers = (torch.arange(units, dtype=torch.float64) + 0.5) * narrow
        sinc = torch.sinc(times / spacing) * torch.kaiser_window(taps, False, 4.0, dtype=torch.float64)
        kernels = sinc * torch.exp(2j * math.pi * centers[:, None] * times)  # (units, taps)
        if layer is second:
            wide = torch.zeros(units, units // 2, taps, dtype=torch.complex128)
            wide[torch.arange(units), torch.arange(units) // 2] = kernels
            _set_complex(layer.weight, wide)
        else:
            _set_real(layer.weight, kernels)
    middle = vocoder.conv_out.kernel_size[0] // 2
    vocoder.conv_out.weight[0, :2, middle] = torch.tensor([0.99, -0.99])


def _templates(vocoder: HifiGan, count: int, width: float, at: Tensor, generator: torch.Generator) -> Tensor:
    """T_m in each of `count` subbands, analytic, at samples `at` from a frame's begin: (m, l, taps)."""
    rate, hop = vocoder.config.sampling_rate, vocoder.hop_length
    mel = LogMelConfig(hop_length=hop)
    filters = mel_filter_bank(mel.n_fft, mel.n_mels, rate, mel.frequency_min, mel.frequency_max)
    lines = torch.arange(1, hop // 2, dtype=torch.float64) * rate / hop
    bins = lines * mel.n_fft / rate
    low = bins.floor().long()
    shape = filters[low] + (filters[low + 1] - filters[low]) * (bins - low)[:, None]  # (lines, m)
    shape = LEVEL * shape / shape.amax(0).clamp(min=1e-9) / filters.sum(0)
    phases = 2 * math.pi * torch.rand(len(lines), generator=generator, dtype=torch.float64)
    window = torch.sin(math.pi * ((at + hop / 2) / (2 * hop))) ** 2  # from half a frame before to one after
    waves = window * torch.exp(1j * (2 * math.pi * lines[:, None] * at / rate + phases[:, None]))
    inside = (lines / width).long()[:, None] == torch.arange(count)  # (lines, l)
    return torch.einsum("fm,fl,ft->mlt", shape.to(waves.dtype), inside.to(waves.dtype), waves)


def _set(weight: Tensor, kernels: Tensor) -> None:
    """From ramps to complex signals, each as two pairs: re, -re, im, -im."""
    for part, values in enumerate((kernels.real, -kernels.real, kernels.imag, -kernels.imag)):
        weight[:, part::4] = values.to(weight.dtype)


def _set_complex(weight: Tensor, kernels: Tensor) -> None:
    """From complex signals to complex ones: multiplication with the kernels (in, out, taps)."""
    for i, a in enumerate((1, -1, 1j, -1j)):
        _set(weight[i::4], a * kernels)


def _set_real(weight: Tensor, kernels: Tensor) -> None:
    """From complex signals to the real part, as one pair, in the first two channels; kernels (in, taps)."""
    for i, a in enumerate((1, -1, 1j, -1j)):
        weight[i::4, 0] = (a * kernels).real.to(weight.dtype)
        weight[i::4, 1] = -(a * kernels).real.to(weight.dtype)
