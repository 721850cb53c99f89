"""Which part of a sound is replaced: spans in seconds and bands in hertz, as samples and as latents.

A latent stands for 4 mel frames by 4 mel bands in AudioLDM 2, 40 ms by a few hundred hertz. A latent is
replaced if a part of it is to be replaced; what was not to be replaced is put back into the waveform.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from audioldm2.audio.log_mel import LogMelConfig
from audioldm2.audio.mel import hertz_to_mel
from audioldm2.editing.checks import Span, Spans as Spans, pairs


@dataclass(frozen=True)
class Regions:
    """The part of a sound that is replaced: `bands` during `spans`.

    Attributes:
        spans: in seconds, from start to end, in order and not touching each other; the end may be infinite.
        bands: in Hz, from low to high, likewise; None is all frequencies.
    """

    spans: tuple[Span, ...]
    bands: tuple[Span, ...] | None = None

    def times(self, samples: int, sampling_rate: int) -> list[tuple[int, int]]:
        """The spans in samples of a sound, from the first sample to the one after the last."""
        result = []
        for start, end in self.spans:
            first = round(start * sampling_rate)
            last = samples if end == math.inf else max(round(end * sampling_rate), first + 1)
            if first < samples:
                result.append((first, min(last, samples)))
        return result

    def latents(self, rows: int, samples_per_row: int, log_mel: LogMelConfig, columns: int) -> Tensor:
        """Which latents are replaced.

        Args:
            rows: T/4.
            samples_per_row: hop length times the VAE's factor.
            log_mel: the sampling rate and the mel bands.
            columns: F/4.

        Returns:
            (rows, columns), bool.
        """
        in_time = torch.zeros(rows, dtype=torch.bool)
        for start, end in self.times(rows * samples_per_row, log_mel.sampling_rate):
            in_time[start // samples_per_row : -(-end // samples_per_row)] = True
        in_frequency = torch.zeros(columns, dtype=torch.bool)
        if self.bands is None:
            in_frequency[:] = True
        else:
            # In units of mel bands, a column spans `width` of them. Filter m peaks at m + 1.
            lowest, highest = _mels((log_mel.frequency_min, log_mel.frequency_max))
            width = log_mel.n_mels / columns
            for band in self.bands:
                low, high = (
                    (mel - lowest) / (highest - lowest) * (log_mel.n_mels + 1) - 0.5 for mel in _mels(band)
                )
                first = min(max(math.floor(low / width), 0), columns - 1)
                in_frequency[first : max(math.ceil(high / width), first + 1)] = True
        return in_time[:, None] & in_frequency


def regions(keep: Any, replace: Any, replace_band: Any) -> Regions | None:
    """What a caller asks to replace; None if nothing is said.

    Args:
        keep: None, or spans in seconds, as in [(0.0, 2.5)]; all others are replaced. An end of None is the
            end of the sound.
        replace: None, or the spans that are replaced.
        replace_band: None, or a band in Hz, as in (4000, 8000), or several; only these frequencies are
            replaced.

    Raises:
        ValueError: anything else, or both `keep` and `replace`.
    """
    if keep is not None and replace is not None:
        raise ValueError("keep and replace say the same in two ways; pass one of them")
    bands = None if replace_band is None else _merged(pairs("replace_band", replace_band))
    if keep is not None:
        kept = _merged(pairs("keep", keep))
        return Regions(tuple(_between(kept)), bands)
    if replace is not None:
        return Regions(_merged(pairs("replace", replace)), bands)
    return None if bands is None else Regions(((0.0, math.inf),), bands)


def check_inside(name: str, spans: Any, seconds: float) -> None:
    """Raise ValueError unless the spans given as `name` begin and end within a sound of this length."""
    for start, end in pairs(name, spans):
        # A hundredth of a second more than the sound is a rounded length.
        if start >= seconds or (end != math.inf and end > seconds + 0.01):
            until = "s on" if end == math.inf else f"to {end:g} s"
            raise ValueError(
                f"{name} has the span from {start:g} {until}, but the sound is {seconds:g} s long"
            )


def check_bands(bands: Sequence[Span] | None, log_mel: LogMelConfig) -> None:
    """Raise ValueError unless bands lie within a checkpoint's spectrograms, and are as wide as a mel band."""
    low, high = log_mel.frequency_min, log_mel.frequency_max
    lowest, highest = _mels((low, high))
    mel_band = (highest - lowest) / (log_mel.n_mels + 1)
    for band in bands or ():
        if band[0] >= high or band[1] <= low or band[1] > high:
            raise ValueError(
                f"replace_band has {band[0]:g} to {band[1]:g} Hz, but this checkpoint's spectrograms reach "
                f"from {low:g} to {high:g} Hz"
            )
        bottom, top = _mels(band)
        if top - bottom < mel_band:
            raise ValueError(
                f"replace_band has {band[0]:g} to {band[1]:g} Hz, which is narrower than a mel band; pass "
                "hertz, as in (4000, 8000)"
            )


def _mels(band: Span) -> list[float]:
    """A band in mels."""
    mels: list[float] = hertz_to_mel(torch.tensor(band, dtype=torch.float64)).tolist()
    return mels


def _merged(spans: Sequence[Span]) -> tuple[Span, ...]:
    """Spans in order; those that overlap or touch are joined."""
    merged: list[Span] = []
    for start, end in sorted(spans):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return tuple(merged)


def _between(spans: Sequence[Span]) -> list[Span]:
    """What lies outside of spans, from 0 on."""
    ends = [0.0, *(end for _, end in spans)]
    starts = [*(start for start, _ in spans), math.inf]
    return [(end, start) for end, start in zip(ends, starts, strict=True) if end < start]
