"""Reading and writing WAV files (RIFF/WAVE, IBM & Microsoft 1991).

In memory, a waveform is floating point in [-1, 1], of shape (samples,) or (channels, samples). Reading
divides a b-bit integer by 2^(b-1). Writing rounds to the nearest integer, so a waveform that is written and
read back changes by at most half a quantization step.

Python's `wave` module supports integers only, and soundfile is not a dependency of this package.
"""

from __future__ import annotations

import errno
import os
import struct
import warnings
from contextlib import suppress
from operator import index
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from audioldm2.atomic import replacing

PCM, IEEE_FLOAT, EXTENSIBLE = 1, 3, 0xFFFE  # format tags
MAX_CHANNELS = 256
UNKNOWN_SIZE = 0xFFFFFFFF  # the size of the data in the header of a file that was written to a pipe


class _DryRun(Exception):
    """Ends the dry run in `check_writable`."""


def check_writable(path: str | Path) -> None:
    """Check that a file can be written, before the long computation of its content.

    An existing file is not changed, and no new one is left behind.

    Args:
        path: path of the file.

    Raises:
        OSError: it cannot be written. The message says why, and the subclass fits the reason:
            FileNotFoundError, IsADirectoryError, PermissionError, ...
    """
    path = Path(path)
    folder = path.parent
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, "the output path is a folder; add a file name", str(path))
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "the output path is not a regular file", str(path))
    if not folder.exists():
        raise FileNotFoundError(errno.ENOENT, "the folder of the output path does not exist", str(folder))
    if not folder.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, "the parent of the output path is not a folder", str(folder))
    if path.exists() and not os.access(path, os.W_OK):
        raise PermissionError(errno.EACCES, "the output file exists and is not writable", str(path))
    try:
        with suppress(_DryRun), replacing(path.resolve()):
            raise _DryRun
    except OSError as error:
        reason = f"the output file cannot be written ({error.strerror})"
        raise OSError(error.errno, reason, str(path)) from error  # errno selects the subclass


def as_channels(audio: np.ndarray | Tensor) -> np.ndarray:
    """Convert a waveform to a numpy array of shape (channels, samples), and check it.

    Args:
        audio: waveform of shape (samples,) or (channels, samples), numpy or torch.

    Returns:
        A floating-point array of shape (channels, samples).

    Raises:
        TypeError: the waveform is not floating point.
        ValueError: it has another shape, no samples, NaN or infinity.
    """
    if isinstance(audio, Tensor):
        audio = audio.detach().cpu()
        # numpy has no bfloat16.
        audio = audio.float().numpy() if audio.dtype == torch.bfloat16 else audio.numpy()
    audio = np.asarray(audio)
    if not np.issubdtype(audio.dtype, np.floating):
        raise TypeError(f"audio must be floating point in [-1, 1], got {audio.dtype}")
    if audio.ndim not in (1, 2) or 0 in audio.shape:
        raise ValueError(f"audio must have shape (samples,) or (channels, samples), got {audio.shape}")
    channels = np.atleast_2d(audio)
    if len(channels) > MAX_CHANNELS:
        raise ValueError(
            f"audio of shape {audio.shape} would have {len(channels)} channels; transpose it to "
            "(channels, samples)"
        )
    invalid = channels.size - np.count_nonzero(np.isfinite(channels))
    if invalid:
        raise ValueError(f"{invalid} of {channels.size} samples in audio are NaN or infinite")
    return channels


def write_wav(
    path: str | Path,
    audio: np.ndarray | Tensor,
    sampling_rate: int,
    *,
    format: Literal["pcm16", "float32"] = "pcm16",
) -> None:
    """Write a WAV file. On failure, no partial file is left, and an existing file is unchanged.

    Args:
        path: path of the file; an existing file is replaced.
        audio: floating-point waveform of shape (samples,) or (channels, samples), numpy or torch. Samples
            outside [-1, 1] are clipped with a warning in "pcm16" and kept in "float32".
        sampling_rate: in Hz.
        format: sample format, "pcm16" (16-bit integers) or "float32".

    Raises:
        OSError: the file cannot be written (see `check_writable`), or the disk is full.
        TypeError: the audio is not floating point, or the sampling rate is not an integer.
        ValueError: the audio has another shape, no samples, NaN or infinity, or is too long for a WAV file
            (4 GiB); or the sampling rate or the format is not supported.

    Example:
        >>> audio = 0.5 * torch.sin(2 * torch.pi * 440 * torch.arange(16000) / 16000)
        >>> write_wav("a440.wav", audio, 16000)
    """
    if format not in ("pcm16", "float32"):
        raise ValueError(f"format must be 'pcm16' or 'float32', got {format!r}")
    channels = as_channels(audio)
    if format == "float32":
        tag, samples = IEEE_FLOAT, channels.astype("<f4")
    else:
        clipped = np.count_nonzero(np.abs(channels) > 1)
        if clipped:
            warnings.warn(
                f"{clipped} of {channels.size} samples are outside [-1, 1] and were clipped", stacklevel=2
            )
        steps = np.rint(channels.astype(np.float64) * 2**15)
        tag, samples = PCM, np.clip(steps, -(2**15), 2**15 - 1).astype("<i2")

    count, length = samples.shape
    frame = count * samples.itemsize
    rate = index(sampling_rate)
    if not 0 < rate * frame < 2**32:
        raise ValueError(f"a WAV file cannot store a sampling rate of {rate} Hz")
    form = struct.pack("<HHIIHH", tag, count, rate, rate * frame, frame, 8 * samples.itemsize)
    chunks = _chunk(b"fmt ", form)
    if tag == IEEE_FLOAT:  # formats other than PCM state the sizes of their extension and of the sound
        chunks = _chunk(b"fmt ", form + struct.pack("<H", 0)) + _chunk(b"fact", struct.pack("<I", length))
    # A frame has an even number of bytes, so the data chunk needs no padding.
    size = len(b"WAVE") + len(chunks) + 8 + samples.nbytes
    if size >= 2**32:
        raise ValueError(f"{samples.nbytes} bytes of audio do not fit into a WAV file, whose limit is 4 GiB")
    check_writable(path)
    with replacing(Path(path).resolve()) as temporary, open(temporary, "wb") as file:
        file.write(struct.pack("<4sI4s", b"RIFF", size, b"WAVE") + chunks)
        file.write(struct.pack("<4sI", b"data", samples.nbytes))
        file.write(np.ascontiguousarray(rearrange(samples, "c n -> n c")).data)


def _chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack("<4sI", name, len(content)) + content


def read_wav(path: str | Path) -> tuple[Tensor, int]:
    """Read a WAV file of 16, 24 or 32-bit integers or of 32 or 64-bit floats.

    Args:
        path: path of the file.

    Returns:
        The waveform, float32 of shape (channels, samples), with integers scaled to [-1, 1); and the sampling
        rate in Hz.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not a WAV file, is truncated, or has another sample format.

    Example:
        >>> waveform, sampling_rate = read_wav("a440.wav")
        >>> waveform.shape, sampling_rate
        (torch.Size([1, 16000]), 16000)
    """
    path = Path(path)
    form, data = _chunks(path, path.read_bytes())
    tag, count, rate, _, _, bits = struct.unpack_from("<HHIIHH", form)
    if tag == EXTENSIBLE and len(form) >= 26:
        (tag,) = struct.unpack_from("<H", form, 24)  # the subformat begins with the actual tag
    if count == 0 or rate == 0:
        raise ValueError(f"{path} is not a valid WAV file: {count} channels at {rate} Hz")
    data = data[: len(data) // (count * max(1, bits // 8)) * count * max(1, bits // 8)]
    samples: np.ndarray[Any, Any]
    if tag == IEEE_FLOAT and bits in (32, 64):
        samples = np.frombuffer(data, f"<f{bits // 8}")
    elif tag == PCM and bits in (16, 32):
        samples = np.frombuffer(data, f"<i{bits // 8}") / 2.0 ** (bits - 1)
    elif tag == PCM and bits == 24:
        padded = np.zeros((len(data) // 3, 4), np.uint8)
        padded[:, 1:] = rearrange(np.frombuffer(data, np.uint8), "(n b) -> n b", b=3)
        samples = padded.view("<i4")[:, 0] / 2.0**31
    else:
        raise ValueError(
            f"{path}: samples of {bits} bits in format {tag} are not supported; "
            "use 16, 24 or 32-bit PCM, or 32 or 64-bit float"
        )
    channels = rearrange(samples.astype(np.float32), "(n c) -> c n", c=count)
    return torch.from_numpy(np.ascontiguousarray(channels)), rate


def _chunks(path: Path, content: bytes) -> tuple[bytes, bytes]:
    """The content of a WAV file's `fmt ` and `data` chunks."""
    if len(content) < 12 or content[:4] != b"RIFF" or content[8:12] != b"WAVE":
        raise ValueError(f"{path} is not a WAV file")
    form: bytes | None = None
    offset = 12
    while offset + 8 <= len(content):
        name, size = struct.unpack_from("<4sI", content, offset)
        body = content[offset + 8 : offset + 8 + size]
        if name == b"data" and form is not None:
            if len(body) < size != UNKNOWN_SIZE:
                raise ValueError(f"{path} is truncated: it has {len(body)} of {size} bytes of audio")
            return form, body
        if name == b"fmt " and len(body) >= 16:
            form = body
        offset += 8 + size + size % 2  # chunks begin at even offsets
    raise ValueError(f"{path} is truncated: its format or its audio is missing")
