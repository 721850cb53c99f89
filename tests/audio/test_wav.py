"""WAV files against soundfile and scipy, and what happens to files when writing fails."""

from __future__ import annotations

import os
import struct
import warnings

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


@pytest.mark.parametrize("container", ["WAV", "WAVEX"])
@pytest.mark.parametrize("subtype", ["PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE"])
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
        (content[:34] + b"\x08" + content[35:], "samples of 8 bits in format 1"),
        (content[:20] + b"\x55" + content[21:], "samples of 16 bits in format 85"),
        (content[:22] + b"\x00" + content[23:], "0 channels"),
    ]:
        path.write_bytes(broken)
        with pytest.raises(ValueError, match=f"a.wav.*{message}"):
            read_wav(path)
    with pytest.raises(FileNotFoundError):
        read_wav(tmp_path / "none.wav")


def test_invalid_audio_is_not_written(tmp_path):
    path = tmp_path / "a.wav"
    for audio, error, message in [
        (torch.tensor([0.0, float("nan")]), ValueError, "1 of 2 samples in audio are NaN or infinite"),
        (np.array([[np.inf, -np.inf]]), ValueError, "2 of 2 samples"),
        (np.zeros(5, np.int16), TypeError, "floating point"),
        (torch.zeros(5, dtype=torch.int64), TypeError, "floating point"),
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
    with pytest.raises(OSError, match="not a regular file"):
        check_writable(os.devnull)
    with pytest.raises(OSError, match=r"(?i)too long"):
        check_writable(tmp_path / ("a" * 300))
    with pytest.raises(FileNotFoundError, match="does not exist"):
        write_wav(tmp_path / "no" / "a.wav", torch.zeros(5), 16000)

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.mkstemp", refuse)  # simulated, because root may write everywhere
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
