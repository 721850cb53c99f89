"""Sound files: reading and writing WAV (RIFF/WAVE, IBM & Microsoft 1991).

A waveform in memory is floating point in [-1, 1], (samples,) or (channels, samples). An integer sample of b
bits stands for itself divided by 2^(b-1), so that what is written reads back the same to half a step.

The standard library's `wave` knows integers only and soundfile is no dependency of this package, hence the
small reader and writer here.
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
MOST_CHANNELS = 256
UNKNOWN_SIZE = 0xFFFFFFFF  # in the header of a file that was written to a pipe


class _Rehearsal(Exception):
    """Ends the rehearsal in `check_writable`."""


def check_writable(path: str | Path) -> None:
    """Find out whether a file can be written at `path`, before the work whose result it is to hold.

    Nothing is left behind, and a file that is there already is not touched.

    Raises:
        OSError: it cannot; a subclass as fits (FileNotFoundError, IsADirectoryError, PermissionError, ...),
            and the message says why.
    """
    path = Path(path)
    folder = path.parent
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, "the output path is a folder; name a file in it", str(path))
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "the output path is not a regular file", str(path))
    if not folder.exists():
        raise FileNotFoundError(errno.ENOENT, "the folder of the output path does not exist", str(folder))
    if not folder.is_dir():
        raise NotADirectoryError(
            errno.ENOTDIR, "the output path lies in something that is no folder", str(folder)
        )
    if path.exists() and not os.access(path, os.W_OK):
        raise PermissionError(errno.EACCES, "the output file exists and may not be written", str(path))
    try:
        with suppress(_Rehearsal), replacing(path.resolve()):
            raise _Rehearsal
    except OSError as error:
        reason = f"the output file cannot be written ({error.strerror})"
        raise OSError(error.errno, reason, str(path)) from error  # becomes the subclass that errno means


def as_channels(audio: np.ndarray | Tensor) -> np.ndarray:
    """A waveform (samples,) or (channels, samples), numpy or torch, as floats (channels, samples) in numpy.

    Raises:
        TypeError: not floating point.
        ValueError: another shape, no samples, or NaN or infinity among them.
    """
    if isinstance(audio, Tensor):
        audio = audio.detach().cpu()
        # numpy knows no bfloat16.
        audio = audio.float().numpy() if audio.dtype == torch.bfloat16 else audio.numpy()
    audio = np.asarray(audio)
    if not np.issubdtype(audio.dtype, np.floating):
        raise TypeError(f"audio must be floating point in [-1, 1], not {audio.dtype}")
    if audio.ndim not in (1, 2) or 0 in audio.shape:
        raise ValueError(f"audio must have shape (samples,) or (channels, samples), not {audio.shape}")
    channels = np.atleast_2d(audio)
    if len(channels) > MOST_CHANNELS:
        raise ValueError(
            f"audio of shape {audio.shape} would have {len(channels)} channels; (channels, samples) is "
            "meant, so transpose it"
        )
    broken = channels.size - np.count_nonzero(np.isfinite(channels))
    if broken:
        raise ValueError(f"audio has {broken} samples of {channels.size} that are NaN or infinite")
    return channels


def write_wav(
    path: str | Path,
    audio: np.ndarray | Tensor,
    sampling_rate: int,
    *,
    format: Literal["pcm16", "float32"] = "pcm16",
) -> None:
    """Write a WAV file: whole or, when anything goes wrong, not at all.

    Args:
        path: where; an existing file is replaced.
        audio: (samples,) or (channels, samples), numpy or torch, floating point. "pcm16" clips what is
            outside [-1, 1], with a warning; "float32" keeps it.
        sampling_rate: in Hz.
        format: "pcm16" or "float32".

    Raises:
        OSError: as `check_writable` says, or the disk is full.
        TypeError: audio that is not floating point, or a rate that is not a whole number.
        ValueError: audio of another shape, empty, too long for a WAV file (4 GiB), with NaN or infinity;
            another format; a rate that does not fit.
    """
    if format not in ("pcm16", "float32"):
        raise ValueError(f"format must be 'pcm16' or 'float32', not {format!r}")
    channels = as_channels(audio)
    if format == "float32":
        tag, samples = IEEE_FLOAT, channels.astype("<f4")
    else:
        beyond = np.count_nonzero(np.abs(channels) > 1)
        if beyond:
            warnings.warn(
                f"{beyond} samples of {channels.size} are outside [-1, 1] and were clipped", stacklevel=2
            )
        steps = np.rint(channels.astype(np.float64) * 2**15)
        tag, samples = PCM, np.clip(steps, -(2**15), 2**15 - 1).astype("<i2")

    count, length = samples.shape
    frame = count * samples.itemsize
    rate = index(sampling_rate)
    if not 0 < rate * frame < 2**32:
        raise ValueError(f"a WAV file cannot have a sampling rate of {rate} Hz")
    form = struct.pack("<HHIIHH", tag, count, rate, rate * frame, frame, 8 * samples.itemsize)
    chunks = _chunk(b"fmt ", form)
    if tag == IEEE_FLOAT:  # what is not PCM says how long its extension and the sound are
        chunks = _chunk(b"fmt ", form + struct.pack("<H", 0)) + _chunk(b"fact", struct.pack("<I", length))
    # Frames are of even length, so the data need no padding byte.
    size = len(b"WAVE") + len(chunks) + 8 + samples.nbytes
    if size >= 2**32:
        raise ValueError(f"{samples.nbytes} bytes of sound do not fit into a WAV file, which ends at 4 GiB")
    check_writable(path)
    with replacing(Path(path).resolve()) as temporary, open(temporary, "wb") as file:
        file.write(struct.pack("<4sI4s", b"RIFF", size, b"WAVE") + chunks)
        file.write(struct.pack("<4sI", b"data", samples.nbytes))
        file.write(np.ascontiguousarray(rearrange(samples, "c n -> n c")).data)


def _chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack("<4sI", name, len(content)) + content


def read_wav(path: str | Path) -> tuple[Tensor, int]:
    """Read a WAV file of 16, 24 or 32 bit integers or 32 or 64 bit floats.

    Returns:
        The sound, (channels, samples) in float32, integers scaled to [-1, 1); and its sampling rate in Hz.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not a WAV file, is cut short, or holds samples of another kind.
    """
    path = Path(path)
    form, data = _chunks(path, path.read_bytes())
    tag, count, rate, _, _, bits = struct.unpack_from("<HHIIHH", form)
    if tag == EXTENSIBLE and len(form) >= 26:
        (tag,) = struct.unpack_from("<H", form, 24)  # the subformat begins with the tag proper
    if count == 0 or rate == 0:
        raise ValueError(f"{path}: not a sound, with {count} channels at {rate} Hz")
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
            "16, 24 or 32 bit PCM and 32 or 64 bit float are"
        )
    channels = rearrange(samples.astype(np.float32), "(n c) -> c n", c=count)
    return torch.from_numpy(np.ascontiguousarray(channels)), rate


def _chunks(path: Path, content: bytes) -> tuple[bytes, bytes]:
    """A WAV file's `fmt ` and `data` chunks."""
    if len(content) < 12 or content[:4] != b"RIFF" or content[8:12] != b"WAVE":
        raise ValueError(f"{path}: not a WAV file")
    form: bytes | None = None
    place = 12
    while place + 8 <= len(content):
        name, size = struct.unpack_from("<4sI", content, place)
        body = content[place + 8 : place + 8 + size]
        if name == b"data" and form is not None:
            if len(body) < size != UNKNOWN_SIZE:
                raise ValueError(f"{path}: cut short, {len(body)} bytes of sound of {size} are there")
            return form, body
        if name == b"fmt " and len(body) >= 16:
            form = body
        place += 8 + size + size % 2  # chunks begin at even places
    raise ValueError(f"{path}: cut short, the sound or its format is missing")
