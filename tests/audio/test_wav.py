"""WAV files against soundfile and scipy, and what happens to files when writing fails."""

from __future__ import annotations

import os
import struct
import warnings
from contextlib import suppress

import numpy as np
import pytest
import torch

from audioldm2.audio.wav import check_writable, read_wav, write_wav
from tests.reference import assert_close


@pytest.mark.parametrize("shape", [(777,), (1, 777), (3, 778)])
@pytest.mark.parametrize("kind", [np.float64, np.float32, np.float16, torch.float32, torch.bfloat16])
def test_other_readers_read_what_we_write(tmp_path, shape, kind):
    soundfile = pytest.importorskip("soundfile")
    wavfile = pytest.importorskip("scipy.io.wavfile")
    values = np.random.default_rng(0).uniform(-1, 0.99, shape)  # stays below 1 in half precision
    if isinstance(kind, torch.dtype):
        audio = torch.from_numpy(values).to(kind).requires_grad_()
        values = audio.detach().double().numpy()
    else:
        audio = values.astype(kind)
        values = audio.astype(np.float64)
    frames = np.atleast_2d(values).T
    for format, subtype, step in (("pcm16", "PCM_16", 2.0**-16), ("float32", "FLOAT", 1e-7)):
        path = tmp_path / f"{format}.wav"
        write_wav(path, audio, 22050, format=format)
        read, rate = soundfile.read(path, always_2d=True)
        assert (rate, soundfile.info(path).subtype) == (22050, subtype)
        assert read.shape == frames.shape
        assert np.abs(read - frames).max() <= step
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            rate, read = wavfile.read(path)
        assert rate == 22050
        scale = 2**15 if format == "pcm16" else 1
        assert np.abs(read.reshape(frames.shape) / scale - frames).max() <= step
        ours, rate = read_wav(path)
        assert rate == 22050
        assert ours.dtype == torch.float32
        assert np.abs(ours.numpy().T - frames).max() <= step
        assert os.listdir(tmp_path) == [path.name]
        path.unlink()


def test_pcm16_is_rounded_and_clipped_with_a_warning(tmp_path):
    path = tmp_path / "a.wav"
    exact = torch.tensor([-1.0, -0.5, 0.0, 0.25, 0.7 / 2**15, -0.7 / 2**15, 0.3 / 2**15])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        write_wav(path, exact, 16000)
        assert (read_wav(path)[0] * 2**15).tolist() == [[-32768, -16384, 0, 8192, 1, -1, 0]]
        write_wav(path, torch.tensor([1.0]), 16000)  # full scale is not clipping
    with pytest.warns(UserWarning, match=r"2 of 3 samples are outside \[-1, 1\]"):
        write_wav(path, torch.tensor([1.5, -7.0, 0.5]), 16000)
    assert (read_wav(path)[0] * 2**15).tolist() == [[32767, -32768, 16384]]
    write_wav(path, torch.tensor([1.5, -7.0]), 16000, format="float32")
    assert read_wav(path)[0].tolist() == [[1.5, -7.0]]


def test_headers_follow_the_standard_to_the_byte(tmp_path):
    path = tmp_path / "a.wav"
    stereo = torch.tensor([[0.5, 0.0, 0.0], [-0.5, 0.0, 0.25]])
    write_wav(path, stereo, 16000)
    header = struct.pack(
        "<4sI4s4sIHHIIHH4sI", b"RIFF", 48, b"WAVE", b"fmt ", 16, 1, 2, 16000, 64000, 4, 16, b"data", 12
    )
    assert path.read_bytes() == header + struct.pack("<6h", 16384, -16384, 0, 0, 0, 8192)
    write_wav(path, stereo, 16000, format="float32")
    header = struct.pack("<4sI4s4sIHHIIHHH", b"RIFF", 74, b"WAVE", b"fmt ", 18, 3, 2, 16000, 128000, 8, 32, 0)
    header += struct.pack("<4sII4sI", b"fact", 4, 3, b"data", 24)
    assert path.read_bytes() == header + struct.pack("<6f", 0.5, -0.5, 0, 0, 0, 0.25)
    assert len(path.read_bytes()) == 74 + 8


@pytest.mark.parametrize("container", ["WAV", "WAVEX", "RF64"])
@pytest.mark.parametrize("subtype", ["PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE"])
@pytest.mark.parametrize("channels", [1, 2])
def test_we_read_what_soundfile_writes(tmp_path, container, subtype, channels):
    soundfile = pytest.importorskip("soundfile")
    path = tmp_path / "a.wav"
    values = np.random.default_rng(1).uniform(-1, 0.999, (501, channels))
    soundfile.write(path, values, 44100, subtype=subtype, format=container)
    expected, _ = soundfile.read(path, dtype="float64", always_2d=True)
    actual, rate = read_wav(path)
    assert rate == 44100
    assert_close(actual.double(), torch.from_numpy(expected.T.copy()), 1e-7)


def test_what_soundfile_compresses_is_refused_by_name(tmp_path):
    soundfile = pytest.importorskip("soundfile")
    supported = {"PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE"}
    compressed = {
        *((container, subtype) for container in ("WAV", "WAVEX") for subtype in ("ALAW", "ULAW")),
        *(("WAV", subtype) for subtype in set(soundfile.available_subtypes("WAV")) - supported),
    }
    assert len(compressed) > 6
    path = tmp_path / "a.wav"
    for container, subtype in compressed:
        try:
            soundfile.write(path, np.zeros(2000), 8000, subtype=subtype, format=container)
        except soundfile.LibsndfileError:  # this build cannot write it
            continue
        with pytest.raises(ValueError, match=r"is compressed \((?!format)"):
            read_wav(path)


def test_other_chunks_are_skipped_and_files_from_pipes_are_read_to_the_end(tmp_path):
    path = tmp_path / "a.wav"
    write_wav(path, torch.tensor([0.5, -0.25]), 16000)
    content = path.read_bytes()
    path.write_bytes(content[:36] + b"LIST" + struct.pack("<I", 3) + b"abc\0" + content[36:] + b"junk")
    assert read_wav(path)[0].tolist() == [[0.5, -0.25]]
    path.write_bytes(content[:40] + b"\xff\xff\xff\xff" + content[44:])
    assert read_wav(path)[0].tolist() == [[0.5, -0.25]]


def test_errors_about_broken_files_name_the_file(tmp_path):
    path = tmp_path / "a.wav"
    write_wav(path, torch.tensor([0.5, -0.25]), 16000)
    content = path.read_bytes()
    for broken, message in [
        (b"", "is not a WAV file"),
        (b"ID3" + content, "is not a WAV file"),
        (content[:30], "is truncated: its format or its audio is missing"),
        (content[:-1], "is truncated: it has 3 of 4 bytes of audio"),
        (content[:22] + b"\x00" + content[23:], "0 channels"),
        (b"RIFX" + content[4:], "is a big-endian WAV file"),
        (content[:16] + b"\x0e" + content[17:], "has a format of 14 bytes"),
        (content[:12] + b"LIST\0\0\0\0" * 10_001 + content[12:], "its format or its audio is missing"),
        (content[:12] + b"LIST\xff\xff\xff\x7f" + content[12:], "its format or its audio is missing"),
    ]:
        path.write_bytes(broken)
        with pytest.raises(ValueError, match=f"a.wav.*{message}"):
            read_wav(path)
    with pytest.raises(FileNotFoundError):
        read_wav(tmp_path / "none.wav")
    with pytest.raises(IsADirectoryError):
        read_wav(tmp_path)
    os.mkfifo(tmp_path / "pipe.wav")
    for name in (tmp_path / "pipe.wav", "/dev/zero"):
        with pytest.raises(ValueError, match="is not a regular file"):
            read_wav(name)


# --- formats, made by hand

GUID_END = bytes.fromhex("0000 0000 1000 8000 00aa 0038 9b71")


def wav(
    data: bytes,
    bits: int,
    *,
    width: int | None = None,
    tag: int = 1,
    channels: int = 1,
    rate: int = 16000,
    byte_rate: int | None = None,
    valid: int | None = None,
    guid_end: bytes = GUID_END,
    size: int | None = None,
    riff: bytes = b"RIFF",
    before: bytes = b"",
) -> bytes:
    """A WAV file; an extensible one if `valid` bits are given."""
    frame = (width or bits // 8) * channels
    byte_rate = rate * frame if byte_rate is None else byte_rate
    form = struct.pack("<HHIIHH", tag, channels, rate, byte_rate, frame, bits)
    if valid is not None:
        form = struct.pack("<H", 0xFFFE) + form[2:] + struct.pack("<HHIH", 22, valid, 0, tag) + guid_end
    size = len(data) if size is None else size
    chunks = before + b"fmt " + struct.pack("<I", len(form)) + form + b"data" + struct.pack("<I", size) + data
    return riff + struct.pack("<I", min(len(chunks) + 4, 2**32 - 1)) + b"WAVE" + chunks


def ds64(size: int) -> bytes:
    return b"ds64" + struct.pack("<IQQQI", 28, 0, size, 0, 0)


HALF_24 = [2**22, -(2**22), 2**23 - 1, 3]  # 24-bit integers: 0.5, -0.5, nearly 1, nearly 0
LEFT = struct.pack("<4i", *(value << 8 for value in HALF_24))
RIGHT = struct.pack("<4i", *HALF_24)
EXPECTED_24 = [value / 2**23 for value in HALF_24]
READABLE = {
    "24 bits in 4 bytes": (wav(LEFT, 24, width=4), EXPECTED_24),
    "24 bits in 4 bytes, extensible": (wav(LEFT, 32, valid=24), EXPECTED_24),
    "24 bits in 4 bytes, both stated": (wav(LEFT, 24, width=4, valid=24), EXPECTED_24),
    "24 bits in 4 bytes, in the lowest": (wav(RIGHT, 24, width=4), EXPECTED_24),
    "20 bits in 3 bytes": (wav(b"\0\0\x40\0\0\xc0", 24, valid=20), [0.5, -0.5]),
    "12 bits in 2 bytes": (wav(struct.pack("<2h", 2**14, -(2**14)), 12, width=2), [0.5, -0.5]),
    "8 bits": (wav(b"\x80\xff\x00", 8), [0.0, 127 / 128, -1.0]),
    "valid bits of 0": (wav(struct.pack("<h", 2**14), 16, valid=0), [0.5]),
    "extensible floats": (wav(struct.pack("<2f", 0.25, 2.5), 32, tag=3, valid=32), [0.25, 2.5]),
    "nothing": (wav(b"", 16), []),
    "from a pipe": (wav(struct.pack("<h", 2**14), 16, size=0xFFFFFFFF), [0.5]),
    "from SoX's pipe": (wav(struct.pack("<h", 2**14), 16, size=0x7FFFF000), [0.5]),
    "RF64": (
        wav(struct.pack("<h", 2**14) + b"LIST", 16, size=2**32 - 1, riff=b"RF64", before=ds64(2)),
        [0.5],
    ),
    "RF64 from a pipe": (
        wav(struct.pack("<h", 2**14), 16, size=2**32 - 1, riff=b"RF64", before=ds64(2**64 - 1)),
        [0.5],
    ),
    "odd chunk before": (wav(struct.pack("<h", 2**14), 16, before=b"note\x01\0\0\0a\0"), [0.5]),
}


@pytest.mark.parametrize(("content", "expected"), READABLE.values(), ids=READABLE)
def test_samples_are_read_as_the_format_says(tmp_path, content, expected):
    (tmp_path / "a.wav").write_bytes(content)
    waveform, rate = read_wav(tmp_path / "a.wav")
    assert (waveform.shape, rate) == ((1, len(expected)), 16000)
    assert waveform[0].tolist() == [float(np.float32(value)) for value in expected]


AMBISONIC = bytes.fromhex("0000 2107 d311 8644 c8c1 ca00 0000")
REFUSED = {
    "another GUID": (wav(LEFT, 32, valid=24, guid_end=AMBISONIC), "subformat 00000001-0721-11d3-8644-c8c1ca"),
    "A-law": (wav(b"abcd", 8, tag=6), r"is compressed \(A-law, format 0x0006\)"),
    "mu-law, extensible": (wav(b"abcd", 8, tag=7, valid=8), "µ-law"),
    "unknown": (wav(b"abcd", 8, tag=0x1234), "format 0x1234"),
    "byte rate": (
        wav(b"abcd", 16, byte_rate=64000),
        "contradicts itself: 1 channels at 16000 Hz in frames of 2",
    ),
    "block align": (wav(b"abcdef", 16, width=3, channels=1, byte_rate=32000), "contradicts itself"),
    "too few bytes": (wav(b"abcd", 24, width=2), "samples of 24 bits in 2 bytes"),
    "too many valid bits": (wav(b"abcd", 16, valid=24), "24 valid bits in samples of 16 bits"),
    "no bits": (wav(b"abcd", 0, width=2), "samples of 0 bits"),
    "wide integers": (wav(b"abcdefgh", 64), "integers of 64 bits in 8 bytes"),
    "half floats": (wav(b"abcd", 16, tag=3), "floats of 16 bits"),
    "no rate": (wav(b"abcd", 16, rate=0), "1 channels at 0 Hz"),
    "no frame": (
        wav(b"abcd", 16, channels=2)[:32] + b"\0\0" + wav(b"abcd", 16, channels=2)[34:],
        "contradicts",
    ),
    "half a frame": (wav(b"abcdef", 16, channels=2), "end inside a frame of 4 bytes"),
    "half a frame from a pipe": (wav(b"abc", 16, size=0xFFFFFFFF), "end inside a frame of 2 bytes"),
    "bits not used": (wav(struct.pack("<2i", 1, 2**30), 24, width=4), "its samples need more than 24 bits"),
    "huge": (wav(b"abcd", 16, size=2**31), "is truncated: it has 4 of 2147483648 bytes"),
    "huge RF64": (
        wav(b"abcd", 16, size=2**32 - 1, riff=b"RF64", before=ds64(2**62)),
        "is truncated: it has 4 of 4611686018427387904 bytes",
    ),
    "NaN": (wav(struct.pack("<2f", float("nan"), 0), 32, tag=3), "1 of 2 samples in .* are NaN or infinite"),
    "too large for float32": (wav(struct.pack("<d", 1e300), 64, tag=3), "1 of 1 samples in"),
}


@pytest.mark.parametrize(("content", "message"), REFUSED.values(), ids=REFUSED)
def test_formats_that_are_not_supported_are_refused_by_name(tmp_path, content, message):
    (tmp_path / "a.wav").write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        read_wav(tmp_path / "a.wav")
    assert "a.wav" in str(caught.value)


def test_every_corrupted_byte_of_a_header_is_a_sound_or_a_value_error(tmp_path):
    path = tmp_path / "a.wav"
    for content in (READABLE["24 bits in 4 bytes, extensible"][0], READABLE["RF64"][0]):
        for position in range(len(content)):
            for value in (0, 0xFF):
                path.write_bytes(content[:position] + bytes([value]) + content[position + 1 :])
                with suppress(ValueError):
                    waveform, rate = read_wav(path)
                    assert torch.isfinite(waveform).all()
                    assert rate > 0
            path.write_bytes(content[:position])
            if position < content.index(b"data") + 8:
                with pytest.raises(ValueError, match=r"a\.wav"):
                    read_wav(path)


def test_invalid_audio_is_not_written(tmp_path):
    path = tmp_path / "a.wav"
    for audio, error, message in [
        (torch.tensor([0.0, float("nan")]), ValueError, "1 of 2 samples in audio are NaN or infinite"),
        (np.array([[np.inf, -np.inf]]), ValueError, "2 of 2 samples"),
        (np.zeros(5, np.int16), TypeError, "floating point"),
        (torch.zeros(5, dtype=torch.int64), TypeError, "floating point"),
        (np.zeros(5, complex), TypeError, "floating point"),
        (torch.zeros(5, device="meta"), TypeError, "audio must be a dense tensor"),
        (torch.zeros(5).to_sparse(), TypeError, "audio must be a dense tensor"),
        ("a bell", TypeError, "floating point"),
        (torch.zeros(1, 1, 5), ValueError, r"shape \(samples,\) or \(channels, samples\)"),
        (torch.zeros(0), ValueError, r"got \(0,\)"),
        (torch.zeros(16000, 2), ValueError, "16000 channels"),
    ]:
        with pytest.raises(error, match=message):
            write_wav(path, audio, 16000)
    with pytest.raises(ValueError, match="'pcm16' or 'float32', got 'mp3'"):
        write_wav(path, torch.zeros(5), 16000, format="mp3")
    for rate, error in ((0, ValueError), (2**31, ValueError), (16000.5, TypeError)):
        with pytest.raises(error):
            write_wav(path, torch.zeros(5), rate)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_an_interrupted_write_keeps_the_old_file(tmp_path, monkeypatch, interruption):
    path = tmp_path / "a.wav"
    path.write_text("before")

    def stop(*_):
        assert len(os.listdir(tmp_path)) == 2  # the old file and the temporary one
        raise interruption

    # Interrupt the rename itself, when the temporary file is complete.
    monkeypatch.setattr("audioldm2.audio.wav.check_writable", lambda path: None)
    monkeypatch.setattr("os.replace", stop)
    with pytest.raises(type(interruption) if isinstance(interruption, OSError) else interruption):
        write_wav(path, torch.zeros(5), 16000)
    assert os.listdir(tmp_path) == ["a.wav"]
    assert path.read_text() == "before"


def test_check_writable(tmp_path, monkeypatch):
    there = tmp_path / "there.wav"
    there.write_text("before")
    check_writable(there)
    check_writable(str(tmp_path / "new.wav"))
    with pytest.raises(FileNotFoundError, match="folder of the output path does not exist"):
        check_writable(tmp_path / "no" / "a.wav")
    with pytest.raises(IsADirectoryError, match="is a folder"):
        check_writable(tmp_path)
    with pytest.raises(NotADirectoryError, match="parent of the output path is not a folder"):
        check_writable(there / "a.wav")
    for path in ("", tmp_path / "..", f"{tmp_path}/new/"):
        with pytest.raises(IsADirectoryError, match="is a folder"):
            check_writable(path)
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(OSError, match=r"(?i)symbolic links"):
        check_writable(tmp_path / "loop")
    (tmp_path / "loop").unlink()
    check_writable(os.devnull)
    with pytest.raises(OSError, match=r"(?i)too long"):
        check_writable(tmp_path / ("a" * 300))
    with pytest.raises(FileNotFoundError, match="does not exist"):
        write_wav(tmp_path / "no" / "a.wav", torch.zeros(5), 16000)

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("os.open", refuse)  # simulated, because root may write everywhere
    with pytest.raises(PermissionError, match=r"cannot be written \(Permission denied\).*there.wav"):
        check_writable(there)
    assert os.listdir(tmp_path) == ["there.wav"]
    assert there.read_text() == "before"


def test_writing_follows_a_symbolic_link(tmp_path):
    (tmp_path / "real.wav").write_text("before")
    (tmp_path / "link.wav").symlink_to("real.wav")
    write_wav(tmp_path / "link.wav", torch.tensor([0.5]), 16000)
    assert (tmp_path / "link.wav").is_symlink()
    assert read_wav(tmp_path / "real.wav")[0].tolist() == [[0.5]]
