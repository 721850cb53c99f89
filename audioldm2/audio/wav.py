"""Reading and writing WAV files (RIFF/WAVE, IBM & Microsoft 1991).

In memory, a waveform is floating point in [-1, 1], of shape (samples,) or (channels, samples). Reading
divides a b-bit integer by 2^(b-1). Writing rounds to the nearest integer, so a waveform that is written and
read back changes by at most half a quantization step.

Python's `wave` module supports integers only, and soundfile is not a dependency of this package.
"""

from __future__ import annotations

import os
import stat
import struct
import uuid
import warnings
from operator import index
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from audioldm2.atomic import check_writable, replacing
from audioldm2.audio.file_types import SOUND_TYPES, WAV
from audioldm2.audio.waveforms import check_finite_samples

PCM, IEEE_FLOAT, EXTENSIBLE = 1, 3, 0xFFFE  # format tags
# Other formats, which are compressed and not supported.
COMPRESSED = {
    0x02: "Microsoft ADPCM",
    0x06: "A-law",
    0x07: "µ-law",
    0x11: "IMA ADPCM",
    0x14: "G.723 ADPCM",
    0x31: "GSM 6.10",
    0x38: "NMS ADPCM",
    0x40: "G.721 ADPCM",
    0x50: "MPEG",
    0x55: "MP3",
    0x61: "Windows Media Audio",
    0xFF: "AAC",
}
# A subformat of WAVE_FORMAT_EXTENSIBLE is a GUID: a format tag, followed by these bytes.
SUBFORMAT_END = bytes.fromhex("0000 0000 1000 8000 00aa 0038 9b71")
WAV_IDS = (b"RIFF", b"RF64", b"BW64")  # with which WAV files begin
MAX_CHANNELS = 256  # in files that are written
MAX_CHUNKS = 10_000  # before the audio; only a broken file has more
# Sizes of the data in the header of a file that was written to a pipe: by FFmpeg and others, and by SoX.
UNKNOWN_SIZES = (0xFFFFFFFF, 0x7FFFF000)
UNKNOWN_SIZE_64 = 0xFFFFFFFFFFFFFFFF  # in an RF64 file


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
        if audio.layout != torch.strided or audio.is_meta:
            raise TypeError(f"audio must be a dense tensor, got layout {audio.layout} on {audio.device}")
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


def as_int16(channels: np.ndarray) -> np.ndarray:
    """Round a waveform in [-1, 1] to 16-bit integers; what is outside is clipped, with a warning."""
    clipped = np.count_nonzero(np.abs(channels) > 1)
    if clipped:
        warnings.warn(
            f"{clipped} of {channels.size} samples are outside [-1, 1] and were clipped", stacklevel=3
        )
    steps = np.rint(channels.astype(np.float64) * 2**15)
    return np.clip(steps, -(2**15), 2**15 - 1).astype("<i2")


def write_wav(
    path: str | os.PathLike[str] | BinaryIO,
    audio: np.ndarray | Tensor,
    sampling_rate: int,
    *,
    format: Literal["pcm16", "float32"] = "pcm16",
) -> None:
    """Write a WAV file. On failure, no partial file is left, and an existing file is unchanged.

    Args:
        path: path of the file, or a binary file such as `sys.stdout.buffer`. An existing file is replaced;
            the new one has its permissions.
        audio: floating-point waveform of shape (samples,) or (channels, samples), numpy or torch. Samples
            outside [-1, 1] are clipped with a warning in "pcm16" and kept in "float32".
        sampling_rate: in Hz.
        format: sample format, "pcm16" (16-bit integers) or "float32".

    Raises:
        OSError: the file cannot be written (see `audioldm2.atomic.check_writable`), or the disk is full.
        TypeError: the audio is not floating point, or the sampling rate is not an integer.
        ValueError: the audio has another shape, no samples, NaN or infinity, or is too long for a WAV file
            (4 GiB); or the sampling rate or the format is not supported.

    Example:
        >>> audio = 0.5 * torch.sin(2 * torch.pi * 440 * torch.arange(16000) / 16000)
        >>> write_wav("a440.wav", audio, 16000)
    """
    if isinstance(path, str | os.PathLike):
        suffix = os.path.splitext(path)[1].lower()
        if SOUND_TYPES.get(suffix, WAV) is not WAV:
            raise ValueError(f"write_wav writes WAV files only, not {suffix}; soundfile.write writes others")
    if format not in ("pcm16", "float32"):
        raise ValueError(f"format must be 'pcm16' or 'float32', got {format!r}")
    channels = as_channels(audio)
    if format == "float32":
        tag, samples = IEEE_FLOAT, channels.astype("<f4")
    else:
        tag, samples = PCM, as_int16(channels)

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
    header = struct.pack("<4sI4s", b"RIFF", size, b"WAVE") + chunks
    header += struct.pack("<4sI", b"data", samples.nbytes)
    frames = np.ascontiguousarray(rearrange(samples, "c n -> n c")).data
    if not isinstance(path, str | os.PathLike):
        path.write(header)
        path.write(frames)
        return
    check_writable(Path(path))
    with replacing(Path(path)) as temporary, open(temporary, "wb") as file:
        file.write(header)
        file.write(frames)


def _chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack("<4sI", name, len(content)) + content


def read_wav(path: str | Path) -> tuple[Tensor, int]:
    """Read a WAV file (RIFF or RF64) of 8 to 32-bit integers or of 32 or 64-bit floats.

    Args:
        path: path of the file.

    Returns:
        The waveform, float32 of shape (channels, samples), with integers scaled to [-1, 1); and the sampling
        rate in Hz.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not a WAV file, is truncated, contradicts itself, has NaN or infinity, or has
            another sample format.

    Example:
        >>> waveform, sampling_rate = read_wav("a440.wav")
        >>> waveform.shape, sampling_rate
        (torch.Size([1, 16000]), 16000)
    """
    path = Path(path)
    if not stat.S_ISREG(mode := path.stat().st_mode) and not stat.S_ISDIR(mode):
        raise ValueError(f"{path} is not a regular file")  # reading a pipe could block forever
    with open(path, "rb") as file:
        try:
            layout, data = _read_chunks(file)
            samples = _samples(layout, data)
            channels = rearrange(samples, "(n c) -> c n", c=layout.channels)
        except ValueError as error:
            raise ValueError(f"{path} {error}") from error
    waveform = torch.from_numpy(np.ascontiguousarray(channels))
    if waveform.numel():
        check_finite_samples(str(path), waveform)
    return waveform, layout.rate


class _Layout(NamedTuple):
    """What the `fmt ` chunk says."""

    tag: int  # PCM or IEEE_FLOAT
    channels: int
    rate: int  # in Hz
    width: int  # bytes of one sample
    bits: int  # of them that are used


def _read_chunks(file: BinaryIO) -> tuple[_Layout, bytes]:
    """The content of a WAV file's `fmt ` and `data` chunks. Messages of errors continue the file's name."""
    length = file.seek(0, 2)
    file.seek(0)
    start = file.read(12)
    if start[:4] == b"RIFX" and start[8:] == b"WAVE":
        raise ValueError("is a big-endian WAV file (RIFX), which is not supported")
    if start[:4] not in WAV_IDS or start[8:] != b"WAVE":
        raise ValueError("is not a WAV file")
    layout: _Layout | None = None
    long_size: int | None = None  # of the audio, in an RF64 file
    for _ in range(MAX_CHUNKS):
        header = file.read(8)
        if len(header) < 8:
            break
        name, size = struct.unpack("<4sI", header)
        begin = file.tell()
        if name == b"data" and layout is not None:
            if size == 0xFFFFFFFF and long_size is not None and long_size != UNKNOWN_SIZE_64:
                size = long_size
            elif size in UNKNOWN_SIZES and size > length - begin:
                size = length - begin
            if size > length - begin:
                raise ValueError(f"is truncated: it has {length - begin} of {size} bytes of audio")
            if size % (layout.channels * layout.width):
                raise ValueError(
                    f"is truncated: its {size} bytes of audio end inside a frame of "
                    f"{layout.channels * layout.width} bytes"
                )
            return layout, file.read(size)
        if name == b"fmt ":
            form = file.read(min(size, 40))
            if len(form) < min(size, 40):
                break
            layout = _layout(form)
        elif name == b"ds64" and size >= 16 and start[:4] != b"RIFF":
            (long_size,) = struct.unpack("<8xQ", file.read(16).ljust(16, b"\0"))
        file.seek(begin + size + size % 2)  # chunks begin at even offsets
    raise ValueError("is truncated: its format or its audio is missing")


def _layout(form: bytes) -> _Layout:
    """The content of a `fmt ` chunk, checked."""
    if len(form) < 16:
        raise ValueError(f"has a format of {len(form)} bytes, which is too short")
    tag, channels, rate, byte_rate, frame, bits = struct.unpack_from("<HHIIHH", form)
    if tag == EXTENSIBLE:
        if len(form) < 40:
            raise ValueError(f"has an extensible format of {len(form)} bytes, which is too short")
        container, (valid,) = bits, struct.unpack_from("<H", form, 18)
        if form[26:40] != SUBFORMAT_END:
            raise ValueError(f"has the subformat {uuid.UUID(bytes_le=form[24:40])}, which is not supported")
        (tag,) = struct.unpack_from("<H", form, 24)
        if valid > container:
            raise ValueError(f"contradicts itself: {valid} valid bits in samples of {container} bits")
        bits = valid or container
    if tag not in (PCM, IEEE_FLOAT):
        name = f"{COMPRESSED[tag]}, format {tag:#06x}" if tag in COMPRESSED else f"format {tag:#06x}"
        raise ValueError(f"is compressed ({name}), which is not supported; convert it to PCM")
    if channels == 0 or rate == 0:
        raise ValueError(f"is not a valid WAV file: {channels} channels at {rate} Hz")
    width, rest = divmod(frame, channels)
    if rest or byte_rate != rate * frame:
        raise ValueError(
            f"contradicts itself: {channels} channels at {rate} Hz in frames of {frame} bytes and "
            f"{byte_rate} bytes per second"
        )
    if bits == 0 or bits > 8 * width:
        raise ValueError(f"contradicts itself: samples of {bits} bits in {width} bytes")
    if not (width in (1, 2, 3, 4) if tag == PCM else bits in (32, 64) and bits == 8 * width):
        kind = "integers" if tag == PCM else "floats"
        raise ValueError(f"has {kind} of {bits} bits in {width} bytes, which are not supported")
    return _Layout(tag, channels, rate, width, bits)


def _samples(layout: _Layout, data: bytes) -> np.ndarray[Any, Any]:
    """Decode samples to float32; integers use the highest bits of their bytes and are scaled to [-1, 1)."""
    width = layout.width
    if layout.tag == IEEE_FLOAT:
        with np.errstate(over="ignore"):  # infinity is refused later
            return np.frombuffer(data, f"<f{width}").astype(np.float32)
    if width == 1:
        return (np.frombuffer(data, np.uint8).astype(np.float32) - 128) / 128  # 8-bit samples are unsigned
    if width == 3:
        padded = np.zeros((len(data) // 3, 4), np.uint8)
        padded[:, 1:] = rearrange(np.frombuffer(data, np.uint8), "(n b) -> n b", b=3)
        integers, width = padded.view("<i4")[:, 0], 4
    else:
        integers = np.frombuffer(data, f"<i{width}")
    scale = 2.0 ** (1 - 8 * width)
    unused = 8 * layout.width - layout.bits
    if unused >= 8 and (integers & (2**unused - 1)).any():
        # Some programs (ALSA's S24_LE) use the lowest bits instead. Then no sample needs more than these.
        limit = 2 ** (layout.bits - 1)
        if len(integers) and not (-limit <= integers.min() and integers.max() < limit):
            raise ValueError(f"contradicts itself: its samples need more than {layout.bits} bits")
        scale = 1 / limit
    samples: np.ndarray[Any, Any] = integers.astype(np.float32)
    samples *= np.float32(scale)
    return samples
