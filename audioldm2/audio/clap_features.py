"""CLAP's front end: from a waveform to the log-mel spectrogram that its audio tower takes.

`ClapFeatureExtractor` computes energies in decibels, over a window of fixed length (Wu et al. 2023, section
2). It gives the same numbers as transformers' class of that name for models without feature fusion.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_type_hints

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from audioldm2.audio.mel import check_filters, check_sizes, check_waveforms, mel_filter_bank, mel_spectrogram

MAX_SPECTRUM = 2**25  # frames times bins of the window: far more than those of any model
FUSION = "truncation='fusion' is for CLAP with feature fusion; this package runs CLAP with 'rand_trunc'"


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
        check_sizes(self, sizes)
        if self.truncation not in ("rand_trunc", "fusion"):
            raise ValueError(f"truncation must be 'rand_trunc' or 'fusion', got {self.truncation!r}")
        if self.padding not in ("repeatpad", "repeat", "pad"):
            raise ValueError(f"padding must be 'repeatpad', 'repeat' or 'pad', got {self.padding!r}")
        if self.max_samples <= self.fft_window_size // 2:
            raise ValueError(
                f"fft_window_size={self.fft_window_size} is too large for max_length_s={self.max_length_s}"
            )
        check_filters(self, "fft_window_size", "feature_size")
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
        from audioldm2.checkpoints.hub import Source, check_subfolder, checkpoint_folder
        from audioldm2.checkpoints.tensors import read_json

        source = Source(repo_or_folder, None, revision, cache_dir, token, local_files_only)
        name, subfolder = "preprocessor_config.json", check_subfolder(subfolder)
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
        check_waveforms(waveforms, sampling_rate, config.sampling_rate)
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
