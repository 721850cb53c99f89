"""Spectrograms and their image files."""

from __future__ import annotations

import math
import os
import re
import sys

import numpy as np
import pytest
import torch

from audioldm2 import DISTRIBUTION
from audioldm2.audio.decibels import decibels
from audioldm2.audio.mel import hertz_to_mel, mel_to_hertz
from audioldm2.plots import check_can_draw, save_spectrogram
from tests.reference import assert_close


def test_decibels_peak_at_a_tones_frequency():
    rate = 16000
    time = torch.arange(rate) / rate
    waveform = torch.where(
        time < 0.5, torch.sin(2 * math.pi * 440 * time), torch.sin(2 * math.pi * 3000 * time)
    )
    values = decibels(waveform[None], rate)
    assert values.shape == (101, 128)
    assert values.max().item() == 0
    assert values.min().item() >= -80.001
    mels = torch.linspace(0, hertz_to_mel(torch.tensor(8000.0)).item(), 130)[1:-1]
    peaks = mel_to_hertz(mels[values.argmax(1)])  # in Hz, by frame
    assert torch.allclose(peaks[10:40], torch.tensor(440.0), rtol=0.05)
    assert torch.allclose(peaks[60:90], torch.tensor(3000.0), rtol=0.05)
    assert_close(decibels(torch.zeros(1, 100), rate), torch.full((1, 128), -80.0), 1e-6)


def test_low_frequencies_are_at_the_bottom_and_time_runs_to_the_right(tmp_path):
    image = pytest.importorskip("matplotlib.image")
    time = np.arange(16000) / 16000
    save_spectrogram(tmp_path / "a.png", np.sin(2 * np.pi * 300 * time) * (time < 0.5), 16000)
    brightness = image.imread(tmp_path / "a.png")[40:400, 120:900, :3].sum(-1)
    low, high = brightness[240:], brightness[:120]
    assert low[:, :300].max() > 2
    assert max(high[:, :300].max(), low[:, 500:].max()) < 0.5


@pytest.mark.parametrize(("shape", "rate"), [((9000,), 16000), ((2, 9000), 48000), ((1,), 8000)])
def test_a_spectrogram_is_a_png(tmp_path, shape, rate):
    image = pytest.importorskip("matplotlib.image")
    before = set(sys.modules)
    path = tmp_path / "a"
    title = "a $1 bell & a_drum \N{CJK UNIFIED IDEOGRAPH-97F3}"  # the font lacks the last
    save_spectrogram(path, np.random.default_rng(0).uniform(-1, 1, shape), rate, title=title)
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert image.imread(path, format="png").shape == (480, 1080, 4)
    assert os.listdir(tmp_path) == ["a"]
    assert "matplotlib.pyplot" not in set(sys.modules) - before


def test_no_spectrogram_without_matplotlib_or_from_bad_arguments(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        save_spectrogram(tmp_path / "no" / "a.png", torch.zeros(5), 16000)
    with pytest.raises(ValueError, match="must be positive"):
        save_spectrogram(tmp_path / "a.png", torch.zeros(5), 0)
    with pytest.raises(ValueError, match="NaN"):
        save_spectrogram(tmp_path / "a.png", torch.tensor([float("nan")]), 16000)
    with pytest.raises(TypeError, match="floating point"):
        save_spectrogram(tmp_path / "a.png", torch.zeros(5, dtype=torch.complex64), 16000)
    with pytest.raises(ValueError, match=r"unknown type of image file '.txt'; use .png, "):
        save_spectrogram(tmp_path / "a.txt", torch.zeros(5), 16000)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=re.escape(f'pip install "{DISTRIBUTION}[plot]"')):
        save_spectrogram(tmp_path / "a.png", torch.zeros(5), 16000)
    assert os.listdir(tmp_path) == []


def test_the_suffix_decides_the_type_and_a_broken_matplotlib_is_told(tmp_path, monkeypatch):
    figure = pytest.importorskip("matplotlib.figure")
    save_spectrogram(tmp_path / "a.SVG", torch.ones(500), 16000)
    assert b"<svg" in (tmp_path / "a.SVG").read_bytes()

    def broken(*_, **__):
        raise OSError("libfreetype.so.6: cannot open shared object file\nmore")

    check_can_draw("a.jpg")
    monkeypatch.setattr(figure.Figure, "savefig", broken)
    with pytest.raises(ImportError, match=r"matplotlib cannot write jpg files here \(OSError: libfreetype"):
        check_can_draw("a.jpg")
    monkeypatch.setattr("audioldm2.extras.import_module", broken)
    with pytest.raises(ImportError, match=r"matplotlib, which is broken \(OSError: libfreetype.*\[plot\]"):
        check_can_draw("a.png")
