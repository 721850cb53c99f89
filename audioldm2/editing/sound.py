"""A caller's sounds as waveforms at the checkpoint's rate, and as the latents that the UNet works on."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from audioldm2.arguments import MAX_LENGTH_IN_S, check_count, check_length
from audioldm2.audio.log_mel import LogMel
from audioldm2.audio.resample import MAX_RATE, resample
from audioldm2.audio.sound_file import read_sound
from audioldm2.audio.waveforms import SILENCE, check_waveform
from audioldm2.decoding import FRAMES_AT_ONCE
from audioldm2.quoting import quoted
from audioldm2.runtime.precision import stage_device, stage_dtype
from audioldm2.tensors import check_finite
from audioldm2.windows import CONTEXT_ROWS, unwrap, wrap

Sound = Tensor | np.ndarray | str | os.PathLike[str]
Audio = Sound | Sequence[Sound]
MAX_CHANNELS = 64  # of an array in soundfile's layout, (samples, channels)
PIECE_CONTEXT = 256  # frames before and after a piece of a long spectrogram, encoded and discarded
QUIET = 0.02  # a peak 28 dB below that of the clips in training
AUDIO = "a waveform (tensor or array), the path of a sound file, or a list of these"


class Recording(NamedTuple):
    """One sound that a caller passed.

    Attributes:
        name: for error messages.
        waveform: (samples,), its channels mixed.
        rate: in Hz.
    """

    name: str
    waveform: Tensor
    rate: int


def as_waveforms(audio: Tensor | np.ndarray[Any, Any], name: str = "audio") -> Tensor:
    """A caller's sounds as one batch.

    Args:
        audio: (samples,) or (B, samples), floating-point, a tensor or an array.
        name: of the argument.

    Returns:
        (B, samples).

    Raises:
        TypeError, ValueError: anything else; the message names the argument.
    """
    return _as_rows(name, audio, "B", f"{name}.mean(1)")


def recordings(audio: Any, sampling_rate: Any) -> list[Recording]:
    """A caller's sounds, read and mixed.

    Args:
        audio: a waveform, (samples,) or (channels, samples); the path of a sound file; or a list of these.
        sampling_rate: of the waveforms, in Hz; None if there are only files.

    Raises:
        ImportError: a file needs soundfile, which cannot be imported.
        OSError: a file cannot be read.
        TypeError, ValueError: anything else, silence, or a sampling rate that is missing or not needed.
    """
    return [recording(name, one, sampling_rate) for name, one in named_sounds(audio, sampling_rate)]


def named_sounds(audio: Any, sampling_rate: Any, name: str = "audio") -> list[tuple[str, Sound]]:
    """A caller's sounds, not read yet, each with its name for error messages.

    Args:
        audio: see `recordings`.
        sampling_rate: see `recordings`.
        name: of the argument.

    Raises:
        TypeError, ValueError: anything else, or a sampling rate that is missing or not needed.
    """
    given = list(audio) if isinstance(audio, list | tuple) else [audio]
    if not given:
        raise ValueError(f"{name} is an empty list; pass {AUDIO}")
    names = [name] if len(given) == 1 else [f"{name}[{i}]" for i in range(len(given))]
    for each, one in zip(names, given, strict=True):
        if not isinstance(one, Tensor | np.ndarray | str | os.PathLike):
            raise TypeError(f"{each} must be {AUDIO}, got {quoted(one)}")
    if sampling_rate is not None:
        check_count("sampling_rate", sampling_rate, 1, MAX_RATE)
        if all(isinstance(one, str | os.PathLike) for one in given):
            raise ValueError("sampling_rate goes with waveforms; a file says its own rate")
    elif not all(isinstance(one, str | os.PathLike) for one in given):
        raise ValueError(f"{name} needs its sampling_rate, in Hz")
    return list(zip(names, given, strict=True))


def recording(name: str, audio: Sound, sampling_rate: Any, warn_quiet: bool = True) -> Recording:
    """One sound, read and mixed.

    Args:
        name: from `named_sounds`; that of a file is its path.
        audio: see `recordings`.
        sampling_rate: see `recordings`.
        warn_quiet: warn of a sound that is too quiet for the VAE.

    Raises:
        As `recordings` does.
    """
    if isinstance(audio, str | os.PathLike):
        name = str(audio)
        channels, rate = read_sound(name)
    else:
        channels, rate = _as_rows(name, audio, "channels", "its transpose"), int(sampling_rate)
    # float32 at least, for a spectrogram is not accurate in half precision.
    mono = channels.detach().to("cpu", torch.promote_types(channels.dtype, torch.float32)).mean(0)
    peak = float(mono.abs().max())
    if peak < SILENCE:
        how = " when its channels are mixed" if len(channels) > 1 else ""
        raise ValueError(f"{name} is silent{how}: its peak is {peak:.1g}")
    if peak < QUIET and warn_quiet:
        warnings.warn(
            f"{name} is quiet: its peak is {peak:.2g}; amplify it for better results, as the model was "
            "trained on sounds with a peak of 0.5",
            stacklevel=2,
        )
    return Recording(name, mono, rate)


def at_rate(
    sounds: Sequence[Recording],
    rate: int,
    seconds: float | None,
    shortest: float,
    hint: str = "pass audio_length_in_s to cut them or to pad them with silence",
) -> Tensor:
    """Sounds at one sampling rate and of one length.

    Args:
        sounds: B of them.
        rate: in Hz.
        seconds: the length to which they are cut, or padded with silence; None is their own.
        shortest: the length in seconds that a sound must have.
        hint: what to do if their lengths differ, for the error message.

    Returns:
        (B, samples), float32.

    Raises:
        ValueError: a sound is too short, or too long; or without `seconds`, their lengths differ.
    """
    if seconds is not None:
        check_length(seconds, shortest)
    waveforms = []
    for name, waveform, own in sounds:
        length = len(waveform) / own
        if not shortest <= length <= MAX_LENGTH_IN_S:
            raise ValueError(
                f"{name} is {length:.3g} s long; it must be from {shortest:g} to {MAX_LENGTH_IN_S:g} s"
            )
        waveforms.append(resample(waveform, own, rate).float())
    lengths = {len(waveform) for waveform in waveforms}
    if seconds is None and len(lengths) > 1:
        listed = ", ".join(f"{len(waveform) / rate:.3g}" for waveform in waveforms)
        raise ValueError(f"the sounds in audio have different lengths ({listed} s); {hint}")
    samples = lengths.pop() if seconds is None else int(seconds * rate)
    return torch.stack([F.pad(waveform, (0, samples - len(waveform))) for waveform in waveforms])


def _as_rows(name: str, audio: Any, rows: str, transposed: str) -> Tensor:
    """A waveform as (rows, samples); `rows` and `transposed` are for error messages."""
    if isinstance(audio, np.ndarray):
        if audio.dtype not in (np.float16, np.float32, np.float64):
            raise TypeError(
                f"{name} must be float32 in [-1, 1], got {audio.dtype}; of 16-bit samples pass {name} / 32768"
            )
        audio = torch.from_numpy(np.ascontiguousarray(audio))
    if isinstance(audio, str | os.PathLike):
        raise TypeError(f"{name} must be a tensor or an array, got a path; read the file with read_sound")
    check_waveform(name, audio)
    assert isinstance(audio, Tensor)
    if audio.dim() > 2:
        raise ValueError(f"{name} has shape {tuple(audio.shape)}; it must be (samples,) or ({rows}, samples)")
    if audio.dim() == 2 and audio.shape[1] < audio.shape[0] and audio.shape[1] <= MAX_CHANNELS:
        meaning = f"{len(audio)} sounds" if rows == "B" else f"{len(audio)} channels"
        raise ValueError(
            f"{name} has shape {tuple(audio.shape)}, which would be {meaning} of {audio.shape[1]} "
            f"samples; it must be ({rows}, samples): of (samples, channels), pass {transposed}"
        )
    return audio if audio.dim() == 2 else audio[None]


def encode(vae: Any, log_mel: LogMel, waveforms: Tensor, sampling_rate: int, loop: bool = False) -> Tensor:
    """Encode sounds into latents.

    A sound is resampled, and its end is padded with silence to a whole number of latents. The spectrogram of
    one of more than FRAMES_AT_ONCE frames (41 s in AudioLDM 2) is encoded in pieces with some context, to
    bound the memory: each has statistics of its own in the VAE's norms, which changes the latents a little.

    Args:
        vae: its encoder is used.
        log_mel: the front end that fits the checkpoint.
        waveforms: (B, samples).
        sampling_rate: of `waveforms`, in Hz.
        loop: whether the first sample follows the last one. A loop is not padded: its length, resampled,
            must be a whole number of latents.

    Returns:
        The most likely latents, scaled by the VAE's scaling_factor as the UNet generates them, (B, 8, T/4,
        F/4).

    Raises:
        NonFiniteError: the VAE returned numbers that are not finite.
    """
    rate = log_mel.config.sampling_rate
    # float32 at least, for a spectrogram is not accurate in half precision.
    waveforms = waveforms.to(stage_device(vae), torch.promote_types(waveforms.dtype, torch.float32))
    waveforms = resample(waveforms, sampling_rate, rate)
    whole = log_mel.config.hop_length * vae.downsampling  # samples per row of latents
    if loop:
        waveforms = wrap(waveforms, CONTEXT_ROWS * whole, axis=1)
    # The spectrogram is reflected at its ends, for which one row alone can be too short.
    samples = max(waveforms.shape[1], log_mel.config.n_fft)
    waveforms = F.pad(waveforms, (0, -(-samples // whole) * whole - waveforms.shape[1]))
    mel = log_mel(waveforms, rate).to(stage_dtype(vae))
    latents: Tensor = _encoded(vae, mel) * vae.config.scaling_factor
    check_finite("vae", latents)
    return unwrap(latents, CONTEXT_ROWS, axis=2) if loop else latents


def _encoded(vae: Any, mel: Tensor) -> Tensor:
    """The VAE's most likely latents, (B, 8, T/4, F/4), of long spectrograms (B, 1, T, F) piece by piece."""
    frames = mel.shape[2]
    if frames <= FRAMES_AT_ONCE:
        whole: Tensor = vae.encode(mel).mode()
        return whole
    pieces = []
    for start in range(0, frames, FRAMES_AT_ONCE):
        first = max(start - PIECE_CONTEXT, 0)
        part = vae.encode(mel[:, :, first : start + FRAMES_AT_ONCE + PIECE_CONTEXT]).mode()
        skipped = (start - first) // vae.downsampling
        pieces.append(part[:, :, skipped : skipped + FRAMES_AT_ONCE // vae.downsampling])
    return torch.cat(pieces, dim=2)
