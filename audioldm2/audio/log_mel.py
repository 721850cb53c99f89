"""AudioLDM's front end: from a waveform to the log-mel spectrogram that its VAE was trained on.

`LogMel` computes what the VAE encodes and the vocoder turns into sound: the natural logarithm of magnitudes,
with HiFi-GAN's framing (Kong et al. 2020), exactly `samples // hop_length` frames.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_type_hints

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from audioldm2.audio.mel import check_filters, check_sizes, check_waveforms, mel_filter_bank, mel_spectrogram

MAX_HOP_LENGTH = 2**14  # of a vocoder: far more than that of any model


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
        check_sizes(self, sizes)
        check_filters(self, "n_fft", "n_mels")
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
        check_waveforms(waveforms, sampling_rate, config.sampling_rate)
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
