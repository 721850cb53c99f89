"""Log-mel front ends: a waveform in, a picture of its energy over time and mel bands out.

    waveform (B, samples) -> short-time Fourier transform (B, frames, bins) -> |.|^power
                          -> mel filter bank (B, frames, mels) -> logarithm (B, 1, frames, mels)

`ClapFeatureExtractor` feeds CLAP's audio tower: power spectrum, decibels, a window of fixed length (Wu et al.
2023, section 2; the filter bank is Slaney's, as librosa has it). It equals transformers' class of that name
for the unfused models.

`LogMel` makes the pictures that AudioLDM's VAE was trained on and that its vocoder turns back into sound:
magnitude spectrum, natural logarithm, HiFi-GAN's framing (Kong et al. 2020), exactly `samples // hop_length`
frames.

Both share one filter bank, `mel_filter_bank`, and differ from the textbook in nothing but the floor under the
logarithm, which each has of its own.
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
LINEAR_STEP = 200 / 3  # Hz a mel, below the bend
BEND_HERTZ = 1000.0
BEND_MEL = BEND_HERTZ / LINEAR_STEP
LOG_STEP = math.log(6.4) / 27  # of the natural logarithm of the frequency a mel, above the bend


def hertz_to_mel(hertz: Tensor) -> Tensor:
    """Slaney's mel scale, any shape."""
    above = BEND_MEL + torch.log(hertz.clamp(min=BEND_HERTZ) / BEND_HERTZ) / LOG_STEP
    return torch.where(hertz < BEND_HERTZ, hertz / LINEAR_STEP, above)


def mel_to_hertz(mel: Tensor) -> Tensor:
    """The inverse of `hertz_to_mel`."""
    above = BEND_HERTZ * torch.exp((mel.clamp(min=BEND_MEL) - BEND_MEL) * LOG_STEP)
    return torch.where(mel < BEND_MEL, mel * LINEAR_STEP, above)


def mel_filter_bank(
    n_fft: int, n_mels: int, sampling_rate: int, frequency_min: float, frequency_max: float
) -> Tensor:
    """Triangular filters, evenly spaced on the mel scale, each of unit area (Slaney's; librosa's default).

    Args:
        n_fft: length of the Fourier transform, in samples.
        n_mels: number of filters.
        sampling_rate: in Hz.
        frequency_min: lower edge of the first filter, in Hz.
        frequency_max: upper edge of the last filter, in Hz.

    Returns:
        (n_fft // 2 + 1, n_mels), float64, on the CPU.
    """
    bins = torch.arange(n_fft // 2 + 1, dtype=torch.float64) * (sampling_rate / n_fft)  # (bins,) Hz
    limits = hertz_to_mel(torch.tensor([frequency_min, frequency_max], dtype=torch.float64))
    corners = torch.linspace(limits[0], limits[1], n_mels + 2, dtype=torch.float64)
    edges = mel_to_hertz(corners)  # (n_mels + 2,) Hz
    lower, center, upper = edges[:-2], edges[1:-1], edges[2:]
    bins = rearrange(bins, "f -> f 1")
    rising = (bins - lower) / (center - lower)  # (bins, n_mels)
    falling = (upper - bins) / (upper - center)
    return torch.minimum(rising, falling).clamp(min=0) * (2 / (upper - lower))


def mel_spectrogram(
    waveforms: Tensor, filters: Tensor, n_fft: int, hop_length: int, power: float, center: bool, pad_mode: str
) -> Tensor:
    """Hann-windowed spectrum through a filter bank, computed in the waveforms' dtype (float32 or float64).

    Args:
        waveforms: (B, samples).
        filters: (n_fft // 2 + 1, n_mels), any device and dtype.
        n_fft: length of window and transform, in samples.
        hop_length: samples from one frame to the next.
        power: 1 for magnitudes, 2 for energy.
        center: put frame t's middle, not its start, at sample t · hop_length, padding both ends by n_fft //
        2. pad_mode: what to pad with: "reflect" or "constant" (zeros).

    Returns:
        (B, frames, n_mels).
    """
    window = torch.hann_window(n_fft, dtype=waveforms.dtype, device=waveforms.device)
    spectrum = torch.stft(
        waveforms, n_fft, hop_length, window=window, center=center, pad_mode=pad_mode, return_complex=True
    )
    strength = spectrum.abs() ** power  # (B, bins, frames)
    return rearrange(strength, "b f t -> b t f") @ filters.to(waveforms)


def _check_waveforms(waveforms: Tensor, sampling_rate: int, wanted_rate: int) -> None:
    if waveforms.dim() != 2 or not waveforms.is_floating_point():
        raise ValueError(
            f"waveforms must be floating point of shape (batch, samples), not {waveforms.dtype} of shape "
            f"{tuple(waveforms.shape)}; one waveform is waveform[None]"
        )
    if waveforms.shape[1] == 0:
        raise ValueError("waveforms are empty: they have no samples")
    if sampling_rate != wanted_rate:
        raise ValueError(
            f"the sampling rate is {sampling_rate} Hz and {wanted_rate} Hz is needed; "
            "change it with audioldm2.audio.resample.resample"
        )


def _check_sizes(config: Any, names: tuple[str, ...], band: tuple[float, float]) -> None:
    for name in names:
        value = getattr(config, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}={value!r} is not supported: a positive whole number is needed")
    if not 0 <= band[0] < band[1]:
        raise ValueError(
            f"a band from {band[0]} to {band[1]} Hz is not supported: 0 <= lower < upper is needed"
        )


@dataclass(frozen=True)
class ClapFeatureExtractorConfig:
    """CLAP's front end, under the names of preprocessor_config.json.

    `top_db` and `padding_value` stand in those files too and change nothing: transformers reads neither.
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
                f"truncation={self.truncation!r} is not supported: 'rand_trunc' is, which CLAP models with "
                "enable_fusion false need"
            )
        if self.padding not in ("repeatpad", "repeat", "pad"):
            raise ValueError(
                f"padding={self.padding!r} is not supported: 'repeatpad', 'repeat' and 'pad' are"
            )
        if self.max_samples <= self.fft_window_size // 2:
            raise ValueError(
                f"fft_window_size={self.fft_window_size} is too long for max_length_s={self.max_length_s}"
            )

    @property
    def max_samples(self) -> int:
        """Length of the window in samples."""
        return self.max_length_s * self.sampling_rate

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> ClapFeatureExtractorConfig:
        """From a preprocessor_config.json's content; keys that change nothing are passed over.

        Raises:
            ValueError: a value that is not supported, named.
        """
        names = {field.name for field in dataclasses.fields(cls)}
        # transformers takes a file that does not say for a fused model's.
        given = {"truncation": "fusion", **content}
        return cls(**{key: value for key, value in given.items() if key in names})

    def to_dict(self) -> dict[str, Any]:
        """The content of a preprocessor_config.json that transformers' ClapFeatureExtractor loads."""
        return {"feature_extractor_type": "ClapFeatureExtractor", **dataclasses.asdict(self)}


class ClapFeatureExtractor:
    """CLAP's front end: a window of `max_length_s` seconds as log-mel, 10 log10(max(energy, 1e-10)).

    Shorter sounds fill the window as `padding` says: "repeatpad" repeats the sound as often as it fits whole
    and adds zeros, "repeat" repeats it to the end, "pad" only adds zeros. Of longer ones a part is taken at
    random.
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
        """Waveforms (B, samples) -> dB (B, 1, frames, mels), float32, on the waveforms' device.

        Args:
            waveforms: floating point, in [-1, 1].
            sampling_rate: theirs, in Hz; it must be the config's.
            generator: decides where each waveform longer than the window is cut; None is torch's default one.

        Raises:
            ValueError: another sampling rate; waveforms of another shape or dtype, or empty.
        """
        config = self.config
        _check_waveforms(waveforms, sampling_rate, config.sampling_rate)
        # float64 as in transformers, where there is one: quiet bands beside loud ones lie below float32's
        # noise.
        waveforms = waveforms.to(torch.float32 if waveforms.device.type == "mps" else torch.float64)
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
            places = starts.to(waveforms.device) + torch.arange(length, device=waveforms.device)
            return waveforms.gather(1, places)
        if self.config.padding == "repeat":
            return waveforms.repeat(1, length // samples + 1)[:, :length]
        if self.config.padding == "repeatpad":
            waveforms = waveforms.repeat(1, length // samples)
        return F.pad(waveforms, (0, length - waveforms.shape[1]))


@dataclass(frozen=True)
class LogMelConfig:
    """AudioLDM's own front end; the defaults are what its VAE and vocoder were trained with."""

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
                f"hop_length={self.hop_length} must be at most n_fft={self.n_fft} and less by an even number"
            )
        if not self.floor > 0:
            raise ValueError(f"floor={self.floor} is not supported: it must be positive")


class LogMel:
    """AudioLDM's front end: log(max(magnitude, floor)) of 64 mel bands, what its VAE encodes.

    Frames lie as in HiFi-GAN: (n_fft - hop_length) / 2 samples are mirrored at either end and no more, so
    that `samples` give `samples // hop_length` frames. In training each clip first lost its mean and was
    scaled to a peak of 0.5 (`w -= w.mean(); w *= 0.5 / w.abs().max()`); do so before to be where the VAE is
    at its best.
    """

    def __init__(self, config: LogMelConfig | None = None):
        self.config = config = config or LogMelConfig()
        self.filters = mel_filter_bank(
            config.n_fft, config.n_mels, config.sampling_rate, config.frequency_min, config.frequency_max
        )

    def __call__(self, waveforms: Tensor, sampling_rate: int) -> Tensor:
        """Waveforms (B, samples) -> natural log of magnitudes (B, 1, samples // hop_length, n_mels).

        Computed in float32, or in float64 for float64 waveforms, on their device.

        Raises:
            ValueError: another sampling rate than the config's; waveforms of another shape or dtype, or too
                short to be mirrored or to fill a frame.
        """
        config = self.config
        _check_waveforms(waveforms, sampling_rate, config.sampling_rate)
        pad = (config.n_fft - config.hop_length) // 2
        shortest = max(pad + 1, config.n_fft - 2 * pad)
        if waveforms.shape[1] < shortest:
            raise ValueError(
                f"waveforms of {waveforms.shape[1]} samples are too short: at least {shortest} are needed"
            )
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
