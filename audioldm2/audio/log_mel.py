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
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_type_hints

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from audioldm2.audio.resample import MAX_RATE
from audioldm2.audio.waveforms import check_waveform

# Limits for settings that come from a file: far above those of any model, and below what fills the memory.
MAX_FILTER_WEIGHTS = 2**22  # of a mel filter bank, bins times bands
MAX_SPECTRUM = 2**25  # frames times bins of CLAP's window
MAX_HOP_LENGTH = 2**14  # of a vocoder

FUSION = "truncation='fusion' is for CLAP with feature fusion; this package runs CLAP with 'rand_trunc'"

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


def _check_waveforms(waveforms: Tensor, sampling_rate: int, expected_rate: int) -> None:
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


def _check_sizes(config: Any, names: tuple[str, ...]) -> None:
    for name in names:
        value = getattr(config, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be a positive integer, got {value!r}")
    if config.sampling_rate > MAX_RATE:
        raise ValueError(f"sampling_rate must be at most {MAX_RATE} Hz, got {config.sampling_rate}")
    low, high = config.frequency_min, config.frequency_max
    if not 0 <= low < high or not math.isfinite(high):
        raise ValueError(f"0 <= frequency_min < frequency_max must hold, got {low} and {high} (in Hz)")


def _check_filters(config: Any, n_fft: str, n_mels: str) -> None:
    weights = (getattr(config, n_fft) // 2 + 1) * getattr(config, n_mels)
    if weights > MAX_FILTER_WEIGHTS:
        raise ValueError(
            f"{n_fft}={getattr(config, n_fft)} with {n_mels}={getattr(config, n_mels)} is too large: a mel "
            f"filter bank has at most {MAX_FILTER_WEIGHTS} weights"
        )


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
        truncation: what to do with longer waveforms: "rand_trunc", a random excerpt. "fusion", of models with
            feature fusion, can be stored, but not computed.
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
        _check_sizes(self, sizes)
        if self.truncation not in ("rand_trunc", "fusion"):
            raise ValueError(f"truncation must be 'rand_trunc' or 'fusion', got {self.truncation!r}")
        if self.padding not in ("repeatpad", "repeat", "pad"):
            raise ValueError(f"padding must be 'repeatpad', 'repeat' or 'pad', got {self.padding!r}")
        if self.max_samples <= self.fft_window_size // 2:
            raise ValueError(
                f"fft_window_size={self.fft_window_size} is too large for max_length_s={self.max_length_s}"
            )
        _check_filters(self, "fft_window_size", "feature_size")
        frames = self.max_samples // self.hop_length + 1
        if max(self.max_samples, frames * (self.fft_window_size // 2 + 1)) > MAX_SPECTRUM:
            raise ValueError(
                f"max_length_s={self.max_length_s} with sampling_rate={self.sampling_rate} and hop_length="
                f"{self.hop_length} is too long: a spectrogram has at most {MAX_SPECTRUM} values"
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
        config = cls(**{key: value for key, value in given.items() if key in names})
        if config.truncation == "fusion":
            warnings.warn(f"sounds cannot be ranked with this feature extractor: {FUSION}", stacklevel=2)
        return config

    def to_dict(self) -> dict[str, Any]:
        """The content of a preprocessor_config.json that transformers' ClapFeatureExtractor can load."""
        return {"feature_extractor_type": "ClapFeatureExtractor", **dataclasses.asdict(self)}


def _setting(name: str) -> Any:
    """A read-only property that returns an entry of `self.config`."""
    return property(lambda extractor: getattr(extractor.config, name), doc=f"`config.{name}`.")


class ClapFeatureExtractor:
    """CLAP's front end: waveforms (B, samples) -> log-mel features (B, 1, frames, mels) in dB.

    The features are 10 log10(max(energy, 1e-10)) over a window of `config.max_length_s` seconds. Shorter
    waveforms fill the window according to `config.padding`: "repeatpad" repeats the waveform as many times as
    it fits in full and pads with zeros, "repeat" repeats it up to the end, and "pad" only pads with zeros.
    Longer waveforms are cropped at a random position.

    The settings are also attributes under their names in preprocessor_config.json, as in transformers:
    `extractor.sampling_rate`. They cannot be changed; make another extractor with
    `dataclasses.replace(extractor.config, ...)`.

    Args:
        config: settings; available as `extractor.config`.

    Example:
        >>> extractor = ClapFeatureExtractor(ClapFeatureExtractorConfig())
        >>> extractor(torch.randn(2, 48000), extractor.sampling_rate).shape
        torch.Size([2, 1, 1001, 64])
    """

    feature_size = _setting("feature_size")
    sampling_rate = _setting("sampling_rate")
    hop_length = _setting("hop_length")
    max_length_s = _setting("max_length_s")
    fft_window_size = _setting("fft_window_size")
    frequency_min = _setting("frequency_min")
    frequency_max = _setting("frequency_max")
    truncation = _setting("truncation")
    padding = _setting("padding")
    nb_max_samples = _setting("max_samples")

    def __init__(self, config: ClapFeatureExtractorConfig):
        self.config = config
        self.filters = mel_filter_bank(
            config.fft_window_size,
            config.feature_size,
            config.sampling_rate,
            config.frequency_min,
            config.frequency_max,
        )

    @classmethod
    def from_pretrained(
        cls,
        repo_or_folder: str | Path,
        subfolder: str = "",
        *,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
    ) -> ClapFeatureExtractor:
        """Load the settings from a checkpoint's preprocessor_config.json.

        Args:
            repo_or_folder: a local folder, "owner/name" on the Hub, or "tiny".
            subfolder: the folder in the checkpoint, "feature_extractor" in a pipeline's.
            revision: branch, tag or commit on the Hub.
            cache_dir: where downloads are stored; None is the Hub client's default.
            token: access token for private repositories; None uses the stored login.
            local_files_only: use earlier downloads only, without asking the Hub.

        Raises:
            CheckpointError: the checkpoint cannot be found or read, or a setting is not supported.
        """
        from audioldm2.checkpoints.errors import CheckpointError
        from audioldm2.checkpoints.hub import Source, checkpoint_folder
        from audioldm2.checkpoints.tensors import read_json

        source = Source(repo_or_folder, None, revision, cache_dir, token, local_files_only)
        name = "preprocessor_config.json"
        path = checkpoint_folder(source, [subfolder], first_file=name, weights=False) / subfolder / name
        content = read_json(path)
        try:
            return cls.from_content(content)
        except (ValueError, TypeError) as error:
            raise CheckpointError(f"{path}: {error}") from error

    @classmethod
    def from_content(cls, content: Mapping[str, Any]) -> ClapFeatureExtractor:
        """The extractor of a preprocessor_config.json's content, whose types are checked.

        Raises:
            ValueError: a value is not supported.
        """
        from audioldm2.models.config import check_types

        check_types(get_type_hints(ClapFeatureExtractorConfig), content)
        return cls(ClapFeatureExtractorConfig.from_dict(content))

    def save_pretrained(self, folder: str | Path) -> None:
        """Write preprocessor_config.json into a folder, which is created if it does not exist."""
        from audioldm2.checkpoints.formats import write_json

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "preprocessor_config.json", self.config.to_dict())

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
            TypeError: the waveforms are not a dense tensor.
            ValueError: the waveforms have the wrong sampling rate, shape or dtype, no samples, or NaN or
                infinity; or `config.truncation` is "fusion".
        """
        config = self.config
        if config.truncation == "fusion":
            raise ValueError(FUSION)
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
        _check_sizes(self, sizes)
        _check_filters(self, "n_fft", "n_mels")
        if self.hop_length > self.n_fft or (self.n_fft - self.hop_length) % 2:
            raise ValueError(
                f"n_fft={self.n_fft} minus hop_length={self.hop_length} must be an even number, 0 or more"
            )
        if not 0 < self.floor < math.inf:
            raise ValueError(f"floor must be positive, got {self.floor}")

    @classmethod
    def for_vocoder(cls, vocoder_config: Any, **settings: Any) -> LogMelConfig:
        """The settings that fit a vocoder: its spectrograms are the vocoder's input.

        The sampling rate and the number of bands are the vocoder's, and the hop length is the product of its
        upsampling rates. `frequency_max` is half the sampling rate and `n_fft` is 1024, as in AudioLDM 2's
        training, or larger if the hop is longer than 512 samples.

        Args:
            vocoder_config: of HiFi-GAN, such as `pipe.vocoder.config`; transformers' has the same names.
            settings: values to use instead, by their names in this class.

        Raises:
            ValueError: a value is not supported.

        Example:
            >>> pipe = AudioLDM2Pipeline.from_pretrained("tiny")
            >>> LogMelConfig.for_vocoder(pipe.vocoder.config).hop_length
            512
        """
        hop = settings.get("hop_length") or math.prod(vocoder_config.upsample_rates)
        if not 1 <= hop <= MAX_HOP_LENGTH:
            raise ValueError(
                f"the hop length, the product of upsample_rates, must be from 1 to {MAX_HOP_LENGTH} samples"
            )
        n_fft = max(1024, 2 ** (2 * hop - 1).bit_length())
        derived = {
            "sampling_rate": vocoder_config.sampling_rate,
            "n_fft": n_fft + (n_fft - hop) % 2,
            "hop_length": hop,
            "n_mels": vocoder_config.model_in_dim,
            "frequency_max": vocoder_config.sampling_rate / 2,
        }
        return cls(**{**derived, **settings})


class LogMel:
    """AudioLDM's front end: waveforms (B, samples) -> log-mel spectrograms (B, 1, frames, mels).

    The values are log(max(magnitude, floor)), the input of AudioLDM 2's VAE. Framing is HiFi-GAN's:
    (n_fft - hop_length) / 2 samples are reflected at each end, which gives `samples // hop_length` frames.

    During training, each clip was centered and scaled to a peak of 0.5: `w -= w.mean();
    w *= 0.5 / w.abs().max()`. The VAE works best on waveforms prepared in the same way.

    Args:
        config: settings; available as `log_mel.config`. By default, those of AudioLDM 2. Other checkpoints
            need others: see `LogMel.from_pretrained` and `LogMelConfig.for_vocoder`.

    Example:
        >>> LogMel()(torch.randn(2, 16000), 16000).shape
        torch.Size([2, 1, 100, 64])
        >>> LogMel.from_pretrained("tiny")(torch.randn(2, 16000), 16000).shape
        torch.Size([2, 1, 31, 64])
    """

    def __init__(self, config: LogMelConfig | None = None):
        self.config = config = config or LogMelConfig()
        self.filters = mel_filter_bank(
            config.n_fft, config.n_mels, config.sampling_rate, config.frequency_min, config.frequency_max
        )

    @classmethod
    def from_pretrained(
        cls,
        repo_or_folder: str | Path,
        *,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
    ) -> LogMel:
        """The front end that fits a pipeline's checkpoint.

        The settings come from the vocoder's config.json (see `LogMelConfig.for_vocoder`). The rest may
        be in an `audioldm2.json` next to model_index.json, with the names of `LogMelConfig`:
        `{"log_mel": {"n_fft": 2048}}`.

        Args:
            repo_or_folder: a local folder, "owner/name" on the Hub (weights are not downloaded), or "tiny".
            revision: branch, tag or commit on the Hub.
            cache_dir: where downloads are stored; None is the Hub client's default.
            token: access token for private repositories; None uses the stored login.
            local_files_only: use earlier downloads only, without asking the Hub.

        Raises:
            CheckpointError: the checkpoint cannot be found or read, or a setting is not supported.
        """
        from audioldm2.checkpoints.errors import CheckpointError
        from audioldm2.checkpoints.hub import Source, checkpoint_folder
        from audioldm2.checkpoints.recommended import read_settings
        from audioldm2.checkpoints.tensors import read_json
        from audioldm2.models.config import check_types
        from audioldm2.models.hifigan import HifiGanConfig

        source = Source(repo_or_folder, None, revision, cache_dir, token, local_files_only)
        folder = checkpoint_folder(source, ["", "vocoder"], first_file="model_index.json", weights=False)
        path = folder / "vocoder" / "config.json"
        content = read_json(path)
        try:
            check_types(get_type_hints(HifiGanConfig), content)
            vocoder = HifiGanConfig.from_dict(content)
            settings = log_mel_settings(folder, read_settings(folder))
            return cls(LogMelConfig.for_vocoder(vocoder, **settings))
        except CheckpointError:
            raise
        except (ValueError, TypeError) as error:
            raise CheckpointError(f"{path}: {error}") from error

    def __call__(self, waveforms: Tensor, sampling_rate: int) -> Tensor:
        """Compute log-mel spectrograms.

        Args:
            waveforms: floating-point waveforms in [-1, 1] of shape (B, samples).
            sampling_rate: their sampling rate in Hz, which must equal `config.sampling_rate`.

        Returns:
            Spectrograms of shape (B, 1, samples // hop_length, n_mels) on the waveforms' device: float64 for
            float64 waveforms, float32 for others.

        Raises:
            TypeError: the waveforms are not a dense tensor.
            ValueError: the waveforms have the wrong sampling rate, shape or dtype, are too short, or have NaN
                or infinity.
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


def log_mel_settings(folder: Path, content: Mapping[str, Any]) -> dict[str, Any]:
    """What a checkpoint's audioldm2.json says about log-mel spectrograms.

    Args:
        folder: the checkpoint's, for error messages.
        content: of the file, from `read_settings`.

    Raises:
        CheckpointError: a setting is unknown, of another type, or decided by the vocoder.
    """
    from audioldm2.checkpoints.errors import CheckpointError
    from audioldm2.checkpoints.recommended import SETTINGS_FILE
    from audioldm2.models.config import check_types

    path = folder / SETTINGS_FILE
    settings = content.get("log_mel", {})
    # The others are the vocoder's.
    free = ("n_fft", "frequency_min", "frequency_max", "floor")
    hints = {name: hint for name, hint in get_type_hints(LogMelConfig).items() if name in free}
    if not isinstance(settings, dict) or not settings.keys() <= hints.keys():
        raise CheckpointError(f"{path}: log_mel must be an object with some of {', '.join(hints)}")
    try:
        check_types(hints, settings, "log_mel.")
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error
    return settings
