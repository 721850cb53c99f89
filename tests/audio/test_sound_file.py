"""Sound files of other types than WAV, which soundfile writes and reads here."""

from __future__ import annotations

import os
import sys
import warnings

import numpy as np
import pytest
import torch

from audioldm2.audio.file_types import IMAGE_TYPES, SOUND_TYPES, sound_type
from audioldm2.audio.sound_file import check_can_write, write_sound
from tests.helpers import noise

soundfile = pytest.importorskip("soundfile")
STEREO = (0.1 * noise(2, 5000)).clamp(-1, 1)


@pytest.mark.parametrize("suffix", SOUND_TYPES)
def test_the_suffix_decides_the_type(tmp_path, suffix):
    path = tmp_path / f"a{suffix.upper()}"
    write_sound(path, STEREO, 16000)
    info = soundfile.info(path)
    kind = SOUND_TYPES[suffix]
    assert (info.format, info.subtype) == (kind.name, next(iter(kind.subtypes.values())))
    assert (info.samplerate, info.channels) == (16000, 2)
    read, _ = soundfile.read(path, always_2d=True)
    lossless = "pcm16" in kind.subtypes
    error = np.abs(read.T[:, :5000] - STEREO.numpy()).max()
    assert error <= 0.51 / 2**15 if lossless else len(read) >= 5000
    assert os.listdir(tmp_path) == [path.name]


def test_lossless_types_have_the_samples_of_a_wav_file(tmp_path):
    for sample_format, suffixes in (("pcm16", (".flac", ".aiff", ".rf64")), ("float32", (".aiff", ".w64"))):
        write_sound(tmp_path / "a.wav", STEREO, 22050, sample_format=sample_format)
        expected, _ = soundfile.read(tmp_path / "a.wav")
        for suffix in suffixes:
            write_sound(tmp_path / f"a{suffix}", STEREO, 22050, sample_format=sample_format)
            np.testing.assert_array_equal(soundfile.read(tmp_path / f"a{suffix}")[0], expected)
    with pytest.warns(UserWarning, match="1 of 2 samples are outside"):
        write_sound(tmp_path / "b.flac", torch.tensor([2.0, 0.5]), 16000)
    assert soundfile.read(tmp_path / "b.flac")[0].tolist() == [1 - 2**-15, 0.5]


def test_what_cannot_be_written_is_refused_and_leaves_no_file(tmp_path):
    sound = torch.zeros(100)
    for name, rate, sample_format, message in [
        ("a.xyz", 16000, None, r"unknown type of sound file '.xyz'; use .wav, .wave, .flac"),
        ("a.flac", 16000, "float32", "a .flac file cannot store float32: it always has pcm16"),
        ("a.mp3", 16000, "pcm16", "a .mp3 file cannot store pcm16: it is lossy"),
        ("a.wav", 16000, "int24", "must be one of pcm16, float32, got 'int24'"),
        ("a.opus", 22050, None, r"a OGG file \(OPUS\) with 1 channels at 22050 Hz cannot be written"),
    ]:
        with pytest.raises(ValueError, match=message):
            check_can_write(tmp_path / name, rate, sample_format)
        with pytest.raises(ValueError, match=message):
            write_sound(tmp_path / name, sound, rate, sample_format=sample_format)
    with pytest.raises(ValueError, match="NaN"):
        write_sound(tmp_path / "a.flac", sound * float("nan"), 16000)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        write_sound(tmp_path / "no" / "a.flac", sound, 16000)
    assert os.listdir(tmp_path) == []


def test_only_other_types_need_soundfile(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "soundfile", None)
    check_can_write("a.wav", 16000)
    write_sound(tmp_path / "a", torch.zeros(5), 16000)
    with pytest.raises(
        ImportError, match=r'writing FLAC files requires soundfile: pip install ".*\[sound\]"'
    ):
        check_can_write("a.flac", 16000)

    def broken(name):
        raise OSError("cannot load library 'libsndfile.so'")

    monkeypatch.setattr("audioldm2.extras.import_module", broken)
    with pytest.raises(ImportError, match=r"soundfile, which is broken \(OSError: cannot load"):
        check_can_write("a.flac", 16000)


def test_matplotlib_can_write_all_images_that_are_listed():
    figure = pytest.importorskip("matplotlib.figure")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert set(IMAGE_TYPES.values()) <= set(figure.Figure().canvas.get_supported_filetypes())
    assert sound_type("a")[0] == sound_type("a.WAV")[0]
