"""Initial weights with which HiFi-GAN's generator already makes sound: a bank of oscillators.

From random weights, days on a GPU go into learning what every vocoder has to do: turn logarithms into
amplitudes, and make oscillations of many frequencies from signals that do not oscillate. Both can be written
down.

The output is a sum of overlapping windows of sinusoids,

    y(t) = sum over frames n and mel bands m of  exp(mel_m[n]) T_m(t - n H),
    T_m(t) = w(t) sum over lines f of  r_m(f) cos(2 pi f t + phi_f)

with a Hann window w of two frames. The lines are at multiples of 1/H, where consecutive frames agree; r_m is
the band's triangle. (A generator's only input is the mel spectrogram. Where that is constant, the output
must repeat with the frames, whatever the weights: lines at multiples of the frame rate are all that is
possible. This is why frames of the tiny checkpoint are as far apart as 32 ms: lines are then 31 Hz apart.)

A generator with slope 0 computes that sum with four layers:

1. conv_in makes of each band three ramps relu(mel_m - b), whose sum approximates the exponential.
2. The first up-sampling multiplies them by the T_m, in complex subbands at a low rate: subband l around f_l
   is an analytic signal (Crochiere and Rabiner 1983, chapter 7). Its sampling rate may be as low as its
   bandwidth, and is a little higher so that short filters can separate it from its images.
3. The second and third up-sampling interpolate, z(t) = sum_i z[i] p(t - i T) exp(2 pi j f_l (t - i T)) with a
   windowed sinc p. The second joins two subbands into one of twice the width, the third all of them into the
   waveform.
4. conv_out selects the channel that holds it.

Signals pass through the ReLUs in pairs: x = relu(x) - relu(-x). The residual blocks add nothing at first.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from audioldm2.audio.log_mel import LogMelConfig
from audioldm2.audio.mel import mel_filter_bank
from audioldm2.models.hifigan import HifiGan

# Ramps (b, slope) whose sum is exp(x) within 4 dB for x = -5.2 ... 2.5, the range of sounds. Anything below
# is silence.
RAMPS = ((-5.417, 0.01642), (-2.625, 0.1984), (-0.062, 2.584))
LINE_GAIN = 10 ** (-45.5 / 20)  # makes the sum of all lines as loud as the sound the mels were computed from


@torch.no_grad()
def set_oscillator_weights(vocoder: HifiGan, seed: int = 0) -> None:
    """Set a vocoder's weights to a bank of oscillators, in place.

    Args:
        vocoder: has three up-samplings, the first with a kernel of twice its rate, and a slope of 0.
        seed: of the lines' phases, and of the small weights of the parts that are not used yet.

    Raises:
        ValueError: the vocoder has other sizes.
    """
    config = vocoder.config
    rates, rate = config.upsample_rates, config.sampling_rate
    wanted = len(RAMPS) * config.model_in_dim
    if len(rates) != 3 or config.leaky_relu_slope != 0 or config.upsample_initial_channel != wanted:
        raise ValueError(
            "oscillators need 3 upsample_rates, leaky_relu_slope 0 and upsample_initial_channel "
            f"{wanted}, not {len(rates)}, {config.leaky_relu_slope} and {config.upsample_initial_channel}"
        )
    generator = torch.Generator().manual_seed(seed)
    for layer in vocoder.modules():
        if isinstance(layer, nn.Conv1d | nn.ConvTranspose1d):
            layer.weight.normal_(0, 0.003 / math.sqrt(layer.weight[0].numel()), generator=generator)
            nn.init.zeros_(layer.get_parameter("bias"))
    for name, layer in vocoder.blocks.named_modules():
        if isinstance(layer, nn.Conv1d) and ".dilated." in name:
            layer.weight.normal_(0, 1 / math.sqrt(layer.weight[0].numel()), generator=generator)

    bands, middle = config.model_in_dim, vocoder.conv_in.kernel_size[0] // 2
    for k, (start, _) in enumerate(RAMPS):
        ramps = slice(k * bands, (k + 1) * bands)
        vocoder.conv_in.weight[ramps, :, middle] = torch.eye(bands)
        vocoder.conv_in.get_parameter("bias")[ramps] = -start

    # The delays of the later layers, in samples: the middle of an even kernel is between two samples.
    steps = rates[1] * rates[2], rates[2]  # samples between two outputs of the first and second up-sampling
    first, second, third = (layer for layer in vocoder.upsample if isinstance(layer, nn.ConvTranspose1d))
    delays = [
        step * (k - 1 - 2 * p) / 2
        for step, k, p in (
            (steps[1], second.kernel_size[0], int(second.padding[0])),
            (1, third.kernel_size[0], int(third.padding[0])),
        )
    ]
    count = first.weight.shape[1] // 4
    width = rate / 2 / count  # Hz
    taps = torch.arange(first.kernel_size[0], dtype=torch.float64)
    positions = (taps - int(first.padding[0])) * steps[0] + sum(delays)
    templates = _templates(vocoder, count, width, positions, generator)
    _set(first.weight, torch.cat([slope * templates for _, slope in RAMPS]))

    for layer, step, narrow, units in ((second, steps[1], width, count), (third, 1, 2 * width, count // 2)):
        length = layer.kernel_size[0]
        times = (torch.arange(length, dtype=torch.float64) - (length - 1) / 2) * step / rate  # s
        spacing = layer.stride[0] * step / rate  # s between two inputs
        centers = (torch.arange(units, dtype=torch.float64) + 0.5) * narrow
        sinc = torch.sinc(times / spacing) * torch.kaiser_window(length, False, 4.0, dtype=torch.float64)
        kernels = sinc * torch.exp(2j * math.pi * centers[:, None] * times)  # (units, length)
        if layer is second:
            wide = torch.zeros(units, units // 2, length, dtype=torch.complex128)
            wide[torch.arange(units), torch.arange(units) // 2] = kernels
            _set_complex(layer.weight, wide)
        else:
            _set_real(layer.weight, kernels)
    middle = vocoder.conv_out.kernel_size[0] // 2
    vocoder.conv_out.weight[0, :2, middle] = torch.tensor([0.99, -0.99])


def _templates(
    vocoder: HifiGan, count: int, width: float, positions: Tensor, generator: torch.Generator
) -> Tensor:
    """The analytic signals of T_m in each of `count` subbands, (m, l, taps).

    `positions` (taps,) are in samples from the start of a frame, `width` is the subbands' in Hz.
    """
    rate, hop = vocoder.config.sampling_rate, vocoder.hop_length
    mel = LogMelConfig(hop_length=hop)
    filters = mel_filter_bank(mel.n_fft, mel.n_mels, rate, mel.frequency_min, mel.frequency_max)
    lines = torch.arange(1, hop // 2, dtype=torch.float64) * rate / hop
    bins = lines * mel.n_fft / rate
    low = bins.floor().long()
    shape = filters[low] + (filters[low + 1] - filters[low]) * (bins - low)[:, None]  # (lines, m)
    shape = LINE_GAIN * shape / shape.amax(0).clamp(min=1e-9) / filters.sum(0)
    phases = 2 * math.pi * torch.rand(len(lines), generator=generator, dtype=torch.float64)
    window = torch.sin(math.pi * ((positions + hop / 2) / (2 * hop))) ** 2  # two frames long
    waves = window * torch.exp(1j * (2 * math.pi * lines[:, None] * positions / rate + phases[:, None]))
    inside = (lines / width).long()[:, None] == torch.arange(count)  # (lines, l)
    return torch.einsum("fm,fl,ft->mlt", shape.to(waves.dtype), inside.to(waves.dtype), waves)


def _set(weight: Tensor, kernels: Tensor) -> None:
    """Weights from ramps to complex signals, each in four channels: re, -re, im, -im."""
    for part, values in enumerate((kernels.real, -kernels.real, kernels.imag, -kernels.imag)):
        weight[:, part::4] = values.to(weight.dtype)


def _set_complex(weight: Tensor, kernels: Tensor) -> None:
    """Weights from complex signals to complex signals: multiplication by the kernels (in, out, taps)."""
    for i, a in enumerate((1, -1, 1j, -1j)):
        _set(weight[i::4], a * kernels)


def _set_real(weight: Tensor, kernels: Tensor) -> None:
    """Weights from complex signals to the real part, a pair in the first two channels; kernels (in, taps)."""
    for i, a in enumerate((1, -1, 1j, -1j)):
        weight[i::4, 0] = (a * kernels).real.to(weight.dtype)
        weight[i::4, 1] = -(a * kernels).real.to(weight.dtype)
