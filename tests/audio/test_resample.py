"""Resampling against ideal tones, soxr, librosa and scipy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from audioldm2.audio.resample import resample
from tests.reference import assert_close


def tones(rate: int, count: int, highest: float) -> np.ndarray:
    """The mean of forty tones up to `highest` Hz, sampled at `rate`."""
    generator = np.random.default_rng(3)
    frequency = generator.uniform(0.01, 1, 40)[:, None] * highest
    frequency[0] = highest
    phase = generator.uniform(0, 2 * np.pi, 40)[:, None]
    return np.sin(2 * np.pi * frequency * np.arange(count) / rate + phase).mean(0)


def noise_to_signal(actual: np.ndarray, expected: np.ndarray) -> float:
    """In dB, without an eighth at each end, where the sound begins and stops."""
    middle = slice(len(expected) // 8, -len(expected) // 8)
    difference = (actual[: len(expected)] - expected)[middle]
    return 10 * math.log10((difference**2).mean() / (expected[middle] ** 2).mean())


RATES = [(16000, 48000), (48000, 16000), (44100, 48000), (44100, 16000), (16000, 44100), (8001, 16000)]


@pytest.mark.parametrize(("orig", "target"), RATES)
def test_resampled_tones_equal_ideal_tones(orig, target):
    highest = 0.9 * min(orig, target) / 2
    x = tones(orig, orig, highest)
    y = resample(torch.from_numpy(x), orig, target).numpy()
    ideal = tones(target, len(y), highest)
    assert noise_to_signal(y, ideal) < -100
    single = resample(torch.from_numpy(x).float(), orig, target).numpy()
    assert single.dtype == np.float32
    assert noise_to_signal(single, ideal) < -100


@pytest.mark.parametrize(
    ("orig", "target", "lowest"), [(16000, 48000, -100), (48000, 16000, -100), (32000, 48000, -80)]
)
def test_resampling_equals_soxr_at_all_frequencies_and_at_the_ends(orig, target, lowest):
    """Noise contains the whole band, the transition to the stopband too; librosa's default is soxr's HQ."""
    soxr = pytest.importorskip("soxr")
    x = np.random.default_rng(0).standard_normal((3, orig // 4))
    actual = resample(torch.from_numpy(x), orig, target).numpy()
    expected = soxr.resample(x.T, orig, target, quality="HQ").T
    assert actual.shape == expected.shape
    error = ((actual - expected) ** 2).mean() / (expected**2).mean()
    assert 10 * math.log10(error) < lowest


@pytest.mark.parametrize(("orig", "target"), [(16000, 48000), (16000, 44100), (22050, 48000), (8000, 16000)])
def test_no_tone_differs_from_soxrs(orig, target):
    """One tone at a time. From 16 to 44.1 kHz soxr's own error is more than -80 dB from 6 kHz on."""
    soxr = pytest.importorskip("soxr")
    share = 0.95 if (orig, target) == (16000, 48000) else 0.7  # 0.95 is 7.6 kHz
    for frequency in share * orig / 2 * np.linspace(0.02, 1, 8):
        x = np.sin(2 * np.pi * frequency * np.arange(orig // 4) / orig)
        expected = soxr.resample(x, orig, target, quality="HQ")
        assert noise_to_signal(resample(torch.from_numpy(x), orig, target).numpy(), expected) < -80


def test_resampling_has_no_aliases_and_no_images():
    # Downsampling removes a tone above the new Nyquist frequency.
    x = np.sin(2 * np.pi * 8010 / 48000 * np.arange(48000))
    down = resample(torch.from_numpy(x), 48000, 16000).numpy()
    assert 20 * math.log10(np.abs(down[2000:-2000]).max()) < -90
    # Upsampling adds nothing above the old Nyquist frequency.
    generator = np.random.default_rng(0)
    x = lowpass_noise(generator.standard_normal(16000), 0.9)
    up = resample(torch.from_numpy(x), 16000, 48000).numpy()
    spectrum = np.abs(np.fft.rfft(up * np.blackman(len(up)))) ** 2
    edge = 8000 * len(spectrum) // 24000 + 10
    assert 10 * math.log10(spectrum[edge:].sum() / spectrum[:edge].sum()) < -90


def lowpass_noise(noise: np.ndarray, share: float) -> np.ndarray:
    """Noise without frequencies above `share` of its Nyquist frequency, faded in and out."""
    spectrum = np.fft.rfft(noise)
    spectrum[int(share * len(spectrum)) :] = 0
    return np.fft.irfft(spectrum, len(noise)) * np.hanning(len(noise))


def test_resampled_lengths_are_rounded_up_as_librosas():
    librosa = pytest.importorskip("librosa")
    for orig, target in [(16000, 48000), (48000, 16000), (44100, 16000), (16000, 44100)]:
        for samples in (1, 2, 3, 100, 1001, 4567):
            length = resample(torch.zeros(samples), orig, target).shape[-1]
            assert length == -(-samples * target // orig)
            librosas = librosa.resample(np.zeros(samples, np.float32), orig_sr=orig, target_sr=target)
            assert length == len(librosas)


def test_resampling_keeps_shape_dtype_and_equal_rates(monkeypatch):
    x = torch.randn(3, 1, 1000, generator=torch.Generator().manual_seed(0))
    y = resample(x, 44100, 48000)
    assert y.shape == (3, 1, 1089)
    for i in range(3):
        assert_close(y[i, 0], resample(x[i, 0], 44100, 48000), 1e-6)
    assert resample(x, 16000, 16000) is x
    half = resample(x.bfloat16(), 44100, 48000)
    assert half.dtype == torch.bfloat16
    assert_close(half.float(), y, 2e-2)
    # The algorithm for large factors gives the same result as the convolution.
    monkeypatch.setattr("audioldm2.audio.resample.MAX_KERNEL_WEIGHTS", 0)
    assert_close(resample(x, 44100, 48000), y, 1e-6)


@pytest.mark.parametrize("max_kernel_weights", [0, 2**22])
def test_resampling_has_gradients_even_after_inference_mode(monkeypatch, max_kernel_weights):
    monkeypatch.setattr("audioldm2.audio.resample.MAX_KERNEL_WEIGHTS", max_kernel_weights)
    x = torch.randn(100, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        resample(x, 44100, 48000)
    x.requires_grad_()
    resample(x, 44100, 48000).square().sum().backward()
    assert torch.isfinite(x.grad).all()
    assert x.grad.abs().min() > 0


def test_resampling_refuses_bad_arguments():
    good = torch.zeros(5)
    for waveform, rates, error, message in [
        (good, (16000, 0), ValueError, "target_sr must be positive .* got 0"),
        (good, (-8000, 16000), ValueError, "orig_sr must be positive"),
        (good, (2**32 - 1, 16000), ValueError, "orig_sr must be positive and at most 1048576 Hz"),
        (good, (1, 48000), ValueError, "a factor of more than 4096, got 1 and 48000"),
        (good, (16000, 44100.5), TypeError, "target_sr must be an integer"),
        (good, ("16000", 8000), TypeError, "orig_sr must be an integer"),
        (good, (True, 8000), TypeError, "orig_sr must be an integer"),
        (good.to(torch.int16), (16000, 8000), TypeError, "waveform must be a floating-point tensor"),
        (good.to(torch.complex64), (16000, 8000), TypeError, "got torch.complex64"),
        (good.numpy(), (16000, 8000), TypeError, "waveform must be a tensor, got ndarray; .*from_numpy"),
        (good.to_sparse(), (16000, 8000), TypeError, "waveform must be a dense tensor"),
        (good.to("meta"), (16000, 8000), TypeError, "a meta tensor"),
        (torch.tensor(1.0), (16000, 8000), ValueError, "single number"),
        (torch.zeros(2, 0), (16000, 8000), ValueError, r"waveform has no samples: its shape is \(2, 0\)"),
        (torch.tensor([0.0, math.nan]), (16000, 8000), ValueError, "1 of 2 samples in waveform are NaN"),
        (torch.tensor([math.inf]).half(), (16000, 16000), ValueError, "1 of 1 samples in waveform"),
    ]:
        with pytest.raises(error, match=message):
            resample(waveform, *rates)
