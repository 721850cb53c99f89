"""Log-mel front ends: from a waveform to its log-mel spectrogram.

    waveform (B, samples) -> short-time Fourier transform (B, frames, bins) -> |.|^power
                          -> mel filter bank (B, frames, mels) -> logarithm (B, 1, frames, mels)

`ClapFeatureExtractor` computes the input of CLAP's audio tower (Wu et al. 2023, section 2): energies in
decibels, over a window of fixed length. It gives the same numbers as transformers' class of that name for
models without feature fusion.

`LogMel` computes the spectrograms that AudioLDM's VAE was trained on and that its vocoder turns into sound:
the natural logarithm of magnitudes, with HiFi-GAN's framing (Kong et al. 2020), exactly
`samples // hop_length` frames.

Both use Slaney's mel filter bank, librosa's default. Each clamps small values before the logarithm with a
floor of its own.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

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
    """
    bins = torch.arange(n_fft // 2 + 1, dtype=torch.float64, device="cpu") * (sampling_rate / n_fft)  # Hz
    limits = hertz_to_mel(torch.tensor([frequency_min, frequency_max], dtype=torch.float64, device="cpu"))
    corners = torch.linspace(limits[0], limits[1], n_mels + 2, dtype=torch.float64, device="cpu")
    edges = mel_to_hertz(corners)  # (n_mels + 2,) Hz
    lower, center, upper = edges[:-2], edges[1:-1], edges[2:]
    bins = rearrange(bins, "f -> f 1")
    rising = (bins - lower) / (center - lower)  # (bins, n_mels)
    falling = (upper - bins) / (upper - center)
    return torch.minimum(rising, falling).clamp(min=0) * (2 / (upper - lower))


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


def _check_waveforms(waveforms: Tensor, sampling_rate: int, expected_rate: int) -> None:
    if waveforms.dim() != 2 or not waveforms.is_floating_point():
        raise ValueError(
            "waveforms must be floating-point tensors of shape (batch, samples), got "
            f"{waveforms.dtype} of shape {tuple(waveforms.shape)}; pass a single waveform as waveform[None]"
        )
    if waveforms.shape[1] == 0:
        raise ValueError("waveforms have no samples")
    if sampling_rate != expected_rate:
        raise ValueError(
            f"the sampling rate must be {expected_rate} Hz, got {sampling_rate} Hz; convert the waveforms "
            "with audioldm2.audio.resample.resample"
        )


def _check_sizes(config: Any, names: tuple[str, ...], band: tuple[float, float]) -> None:
    for name in names:
        value = getattr(config, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be a positive integer, got {value!r}")
    if not 0 <= band[0] < band[1]:
        raise ValueError(f"0 <= frequency_min < frequency_max must hold, got {band[0]} and {band[1]} (in Hz)")


@dataclass(frozen=True)
class ClapFeatureExtractorConfig:
    """Settings of `ClapFeatureExtractor`, named as in preprocessor_config.json.

    Args:
        feature_size: number of mel bands.
        sampling_rate: sampling rate of the waveforms in Hz.
        hop_length: samples from one frame to the next.
        max_length_s: length of the window in seconds.
        fft_window_size: length of the Fourier transform in samples.
        frequency_min: lower edge of the lowest mel band in Hz.
        frequency_max: upper edge of the highest mel band in Hz.
        truncation: what to do with longer waveforms; only "rand_trunc" is supported, a random excerpt.
        padding: what to do with shorter waveforms: "repeatpad", "repeat" or "pad".

    Raises:
        ValueError: a value is not supported.
    """

    feature_size: int = 64
    sampling_rate: int = 48000
    hop_length: int = 480
    max_length_s: int = 10
    fft_window_size: int = 1024
    frequency_min: float = 0
    frequency_max: float = 14000
    truncation: str = "rand_trunc"
    padding: str = "repeatpad"

    def __post_init__(self) -> None:
        sizes = ("feature_size", "sampling_rate", "hop_length", "max_length_s", "fft_window_size")
        _check_sizes(self, sizes, (self.frequency_min, self.frequency_max))
        if self.truncation != "rand_trunc":
            raise ValueError(
                f"truncation={self.truncation!r} is not supported; CLAP models without feature fusion use "
                "'rand_trunc'"
            )
        if self.padding not in ("repeatpad", "repeat", "pad"):
            raise ValueError(f"padding must be 'repeatpad', 'repeat' or 'pad', got {self.padding!r}")
        if self.max_samples <= self.fft_window_size // 2:
            raise ValueError(
                f"fft_window_size={self.fft_window_size} is too large for max_length_s={self.max_length_s}"
            )

    @property
    def max_samples(self) -> int:
        """The length of the window in samples."""
        return self.max_length_s * self.sampling_rate

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> ClapFeatureExtractorConfig:
        """Create a config from the content of a preprocessor_config.json.

        Keys that transformers' ClapFeatureExtractor does not use either (`top_db`, `padding_value`, ...) are
        ignored.

        Raises:
            ValueError: a value is not supported.
        """
        names = {field.name for field in dataclasses.fields(cls)}
        # transformers' default is a model with feature fusion.
        given = {"truncation": "fusion", **content}
        return cls(**{key: value for key, value in given.items() if key in names})

    def to_dict(self) -> dict[str, Any]:
        """The content of a preprocessor_config.json that transformers' ClapFeatureExtractor can load."""
        return {"feature_extractor_type": "ClapFeatureExtractor", **dataclasses.asdict(self)}


class ClapFeatureExtractor:
    """CLAP's front end: waveforms (B, samples) -> log-mel features (B, 1, frames, mels) in dB.

    The features are 10 log10(max(energy, 1e-10)) over a window of `config.max_length_s` seconds. Shorter
    waveforms fill the window according to `config.padding`: "repeatpad" repeats the waveform as many times as
    it fits in full and pads with zeros, "repeat" repeats it up to the end, and "pad" only pads with zeros.
    Longer waveforms are cropped at a random position.

    Args:
        config: settings; available as `extractor.config`.

    Example:
        >>> extractor = ClapFeatureExtractor(ClapFeatureExtractorConfig())
        >>> extractor(torch.randn(2, 48000), 48000).shape
        torch.Size([2, 1, 1001, 64])
    """

    def __init__(self, config: ClapFeatureExtractorConfig):
        self.config = config
        self.filters = mel_filter_bank(
            config.fft_window_size,
            config.feature_size,
            config.sampling_rate,
            config.frequency_min,
            config.frequency_max,
        )

    def __call__(
        self, waveforms: Tensor, sampling_rate: int, generator: torch.Generator | None = None
    ) -> Tensor:
        """Compute log-mel features in dB.

        Args:
            waveforms: floating-point waveforms in [-1, 1] of shape (B, samples).
            sampling_rate: their sampling rate in Hz, which must equal `config.sampling_rate`.
            generator: draws the excerpt of each waveform that is longer than the window; by default,
                PyTorch's global generator.

        Returns:
            Features of shape (B, 1, frames, mels), float32, on the waveforms' device.

        Raises:
            ValueError: the waveforms have the wrong sampling rate, shape or dtype, or no samples.
        """
        config = self.config
        _check_waveforms(waveforms, sampling_rate, config.sampling_rate)
        # In float32, rounding errors of loud bands would drown quiet ones. Not every accelerator has float64.
        has_float64 = waveforms.device.type in ("cpu", "cuda")
        waveforms = waveforms.to(torch.float64 if has_float64 else torch.float32)
        energy = mel_spectrogram(
            self._window(waveforms, generator),
            self.filters,
            config.fft_window_size,
            config.hop_length,
            power=2,
            center=True,
            pad_mode="reflect",
        )
        decibels = 10 * torch.log10(energy.clamp(min=1e-10))
        return rearrange(decibels, "b t m -> b 1 t m").float()

    def _window(self, waveforms: Tensor, generator: torch.Generator | None) -> Tensor:
        """(B, samples) -> (B, max_samples)."""
        batch, samples = waveforms.shape
        length = self.config.max_samples
        if samples > length:
            device = generator.device if generator is not None else torch.device("cpu")
            starts = torch.randint(samples - length + 1, (batch, 1), generator=generator, device=device)
            index = starts.to(waveforms.device) + torch.arange(length, device=waveforms.device)
            return waveforms.gather(1, index)
        if self.config.padding == "repeat":
            return waveforms.repeat(1, length // samples + 1)[:, :length]
        if self.config.padding == "repeatpad":
            waveforms = waveforms.repeat(1, length // samples)
        return F.pad(waveforms, (0, length - waveforms.shape[1]))


@dataclass(frozen=True)
class LogMelConfig:
    """Settings of `LogMel`; the defaults are those that AudioLDM 2's VAE and vocoder were trained with.

    Args:
        sampling_rate: sampling rate of the waveforms in Hz.
        n_fft: length of the window and of the Fourier transform in samples.
        hop_length: samples from one frame to the next.
        n_mels: number of mel bands.
        frequency_min: lower edge of the lowest mel band in Hz.
        frequency_max: upper edge of the highest mel band in Hz.
        floor: smallest magnitude; smaller ones are raised to it before the logarithm.

    Raises:
        ValueError: a value is not supported.
    """

    sampling_rate: int = 16000
    n_fft: int = 1024
    hop_length: int = 160
    n_mels: int = 64
    frequency_min: float = 0
    frequency_max: float = 8000
    floor: float = 1e-5

    def __post_init__(self) -> None:
        sizes = ("sampling_rate", "n_fft", "hop_length", "n_mels")
        _check_sizes(self, sizes, (self.frequency_min, self.frequency_max))
        if self.hop_length > self.n_fft or (self.n_fft - self.hop_length) % 2:
            raise ValueError(
                f"n_fft={self.n_fft} minus hop_length={self.hop_length} must be an even number, 0 or more"
            )
        if not self.floor > 0:
            raise ValueError(f"floor must be positive, got {self.floor}")


class LogMel:
    """AudioLDM's front end: waveforms (B, samples) -> log-mel spectrograms (B, 1, frames, mels).

    The values are log(max(magnitude, floor)), the input of AudioLDM 2's VAE. Framing is HiFi-GAN's:
    (n_fft - hop_length) / 2 samples are reflected at each end, which gives `samples // hop_length` frames.

    During training, each clip was centered and scaled to a peak of 0.5: `w -= w.mean();
    w *= 0.5 / w.abs().max()`. The VAE works best on waveforms prepared in the same way.

    Args:
        config: settings; available as `log_mel.config`. By default, those of AudioLDM 2.

    Example:
        >>> LogMel()(torch.randn(2, 16000), 16000).shape
        torch.Size([2, 1, 100, 64])
    """

    def __init__(self, config: LogMelConfig | None = None):
        self.config = config = config or LogMelConfig()
        self.filters = mel_filter_bank(
            config.n_fft, config.n_mels, config.sampling_rate, config.frequency_min, config.frequency_max
        )

    def __call__(self, waveforms: Tensor, sampling_rate: int) -> Tensor:
        """Compute log-mel spectrograms.

        Args:
            waveforms: floating-point waveforms in [-1, 1] of shape (B, samples).
            sampling_rate: their sampling rate in Hz, which must equal `config.sampling_rate`.

        Returns:
            Spectrograms of shape (B, 1, samples // hop_length, n_mels) on the waveforms' device: float64 for
            float64 waveforms, float32 for others.

        Raises:
            ValueError: the waveforms have the wrong sampling rate, shape or dtype, or are too short.
        """
        config = self.config
        _check_waveforms(waveforms, sampling_rate, config.sampling_rate)
        pad = (config.n_fft - config.hop_length) // 2
        shortest = max(pad + 1, config.n_fft - 2 * pad)
        if waveforms.shape[1] < shortest:
            raise ValueError(f"waveforms must have at least {shortest} samples, got {waveforms.shape[1]}")
        if waveforms.dtype != torch.float64:
            waveforms = waveforms.float()
        magnitude = mel_spectrogram(
            F.pad(waveforms, (pad, pad), mode="reflect"),
            self.filters,
            config.n_fft,
            config.hop_length,
            power=1,
            center=False,
            pad_mode="reflect",
        )
        return rearrange(torch.log(magnitude.clamp(min=config.floor)), "b t m -> b 1 t m")
