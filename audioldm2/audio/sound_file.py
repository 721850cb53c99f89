"""Sound files of any type: WAV by this package, others (FLAC, Ogg, MP3, ...) by soundfile.

soundfile is an optional dependency, which the extra "sound" installs; it contains libsndfile. In writing, the
suffix of the file's name decides the type (see `file_types`); in reading, the file's content.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from audioldm2.arguments import MAX_LENGTH_IN_S, check_count
from audioldm2.atomic import check_writable, replacing
from audioldm2.audio.file_types import WAV, SoundType, sound_type
from audioldm2.audio.wav import WAV_IDS, as_channels, as_int16, read_wav, write_wav
from audioldm2.audio.waveforms import check_finite_samples
from audioldm2.extras import import_extra

FRAMES_AT_ONCE = 2**16  # libsndfile's Vorbis encoder overflows its stack with minutes at once


def check_can_write(path: str | Path, sampling_rate: int, sample_format: str | None = None) -> None:
    """Check that a sound file of this type can be written, before the long computation of the sound.

    Args:
        path: path of the file, which is not touched.
        sampling_rate: in Hz.
        sample_format: "pcm16", "float32", or None for the type's default.

    Raises:
        ImportError: soundfile is needed and cannot be imported.
        ValueError: the suffix is unknown; or the type does not have the sample format or the sampling rate.
    """
    kind, sample_format = sound_type(path, sample_format)
    if kind == WAV:
        check_count("sampling_rate", sampling_rate, 1, 2**32 - 1)
    else:
        _encode(io.BytesIO(), np.zeros((1, 64), np.float32), sampling_rate, kind, sample_format)


def write_sound(
    path: str | Path, audio: np.ndarray | Tensor, sampling_rate: int, *, sample_format: str | None = None
) -> None:
    """Write a sound file. On failure, no partial file is left, and an existing file is unchanged.

    Args:
        path: path of the file; its suffix decides the type, WAV by default.
        audio: floating-point waveform of shape (samples,) or (channels, samples), numpy or torch; see
            `write_wav`.
        sampling_rate: in Hz.
        sample_format: "pcm16" (16-bit integers) or "float32", where the type has it; "pcm16" by default.

    Raises:
        ImportError: soundfile is needed and cannot be imported.
        OSError: the file cannot be written.
        TypeError: the audio is not floating point, or the sampling rate is not an integer.
        ValueError: the audio has another shape, no samples, NaN or infinity; the suffix is unknown; or the
            type does not have the sample format or the sampling rate.
    """
    kind, sample_format = sound_type(path, sample_format)
    if kind == WAV:
        write_wav(path, audio, sampling_rate, format="float32" if sample_format == "float32" else "pcm16")
        return
    channels = as_channels(audio)
    # Rounded as in WAV files, so that a FLAC file has the same samples.
    channels = as_int16(channels) if sample_format == "pcm16" else channels.astype(np.float32)
    check_writable(path)
    # Encoded in memory: libsndfile's Ogg encoder does not say that a disk is full.
    content = io.BytesIO()
    _encode(content, channels, sampling_rate, kind, sample_format)
    with replacing(path) as temporary:
        temporary.write_bytes(content.getvalue())


def read_sound(path: str | Path, longest: float = MAX_LENGTH_IN_S) -> tuple[Tensor, int]:
    """Read a sound file.

    Args:
        path: path of the file. What does not begin as a WAV file does is read by soundfile.
        longest: the length in seconds that a sound may have; a longer one is not decoded.

    Returns:
        The waveform, float32 of shape (channels, samples) in [-1, 1]; and the sampling rate in Hz.

    Raises:
        ImportError: soundfile is needed and cannot be imported.
        OSError: the file cannot be read.
        ValueError: it is not a sound file, is damaged or too long, has no samples, or has NaN or
            infinity.

    Example:
        >>> waveform, rate = read_sound("dog.flac")
        >>> audio = pipe("A cat meows", audio=waveform, sampling_rate=rate).audios[0]
    """
    path = Path(path)
    if not path.is_file() and path.exists() and not path.is_dir():
        raise ValueError(f"{path} is not a regular file")  # reading a pipe could block forever
    with open(path, "rb") as file:
        begin = file.read(12)
    if begin[:4] in WAV_IDS and begin[8:] == b"WAVE":
        waveform, rate = read_wav(path)
        if waveform.shape[1] > longest * rate:
            raise ValueError(f"{path} is longer than {longest:g} s")
    elif not begin:
        raise ValueError(f"{path} is empty")
    else:
        waveform, rate = _decode(path, longest)
    if waveform.shape[1] == 0:
        raise ValueError(f"{path} has no samples")
    return waveform, rate


def _decode(path: Path, longest: float) -> tuple[Tensor, int]:
    """Read a file with soundfile."""
    soundfile: Any = import_extra("soundfile", "sound", f"reading {path}, which is not a WAV file,")
    try:
        with soundfile.SoundFile(path) as file:
            if file.frames > longest * file.samplerate:
                raise ValueError(f"{path} is longer than {longest:g} s")
            frames, rate = file.read(dtype="float32", always_2d=True), file.samplerate
    except soundfile.LibsndfileError as error:
        raise ValueError(f"{path} is not a sound file that can be read: {error.error_string}") from error
    waveform = torch.from_numpy(np.ascontiguousarray(rearrange(frames, "n c -> c n")))
    if waveform.numel():
        check_finite_samples(str(path), waveform)
    return waveform, rate


def _encode(
    target: io.BytesIO,
    channels: np.ndarray,
    sampling_rate: int,
    kind: SoundType,
    sample_format: str | None,
) -> None:
    """Write integers or floats, (channels, samples), with soundfile."""
    soundfile: Any = import_extra("soundfile", "sound", f"writing {kind.name} files")
    frames = np.ascontiguousarray(rearrange(channels, "c n -> n c"))
    options = {"format": kind.name, "subtype": kind.subtypes[sample_format]}
    try:
        with soundfile.SoundFile(target, "w", sampling_rate, len(channels), **options) as file:
            for start in range(0, len(frames), FRAMES_AT_ONCE):
                file.write(frames[start : start + FRAMES_AT_ONCE])
    except soundfile.LibsndfileError as error:
        raise ValueError(
            f"a {kind.name} file ({options['subtype']}) with {len(channels)} channels at {sampling_rate} Hz "
            f"cannot be written: {error.error_string}"
        ) from error
