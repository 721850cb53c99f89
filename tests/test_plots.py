"""Pictures: what is drawn, and their files."""

from __future__ import annotations

import math
import os
import pickle
import re
import sys
from typing import Any

import numpy as np
import pytest
import torch

from audioldm2 import (
    DISTRIBUTION,
    AudioLDM2Pipeline,
    AudioPipelineOutput,
    LatentRecorder,
    record_attention,
)
from audioldm2.attention import AttentionRecord
from audioldm2.audio.decibels import decibels
from audioldm2.audio.mel import hertz_to_mel, mel_to_hertz
from audioldm2.figures import png
from audioldm2.plots import (
    check_can_draw,
    plot_attention,
    plot_candidates,
    plot_denoising,
    plot_sound,
    plot_spectrogram,
    plot_waveform,
    save_spectrogram,
)
from tests.helpers import load_pipeline, noise, seeded
from tests.reference import assert_close

PROMPT = "A bell over rain"


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


# --- the numbers that are drawn


@pytest.fixture(scope="module")
def tiny() -> AudioLDM2Pipeline:
    return load_pipeline("tiny")


@pytest.fixture(scope="module")
def made(tiny: AudioLDM2Pipeline) -> tuple[AudioPipelineOutput, LatentRecorder, AttentionRecord]:
    """Three candidates of a prompt, the latents after each of four steps, and the attention."""
    recorder = LatentRecorder()
    with record_attention(tiny) as attention:
        output = tiny(
            PROMPT,
            num_inference_steps=4,
            audio_length_in_s=0.96,
            guidance_scale=2.0,
            num_waveforms_per_prompt=3,
            generator=seeded(),
            callback=recorder,
        )
    return output, recorder, attention


def labels(axes: Any) -> list[str]:
    return [label.get_text() for label in axes.get_yticklabels()]


def test_a_waveform_is_drawn_sample_by_sample_or_by_its_extremes() -> None:
    pytest.importorskip("matplotlib")
    samples = np.random.default_rng(0).uniform(-0.4, 0.4, 3000)
    figure = plot_waveform(torch.from_numpy(samples), 16000, title="a $1 bell")
    (axes,) = figure.axes
    times, drawn = axes.lines[0].get_data()
    assert np.array_equal(drawn, samples)
    assert np.allclose(times, np.arange(3000) / 16000)
    assert axes.get_xlim() == (0, 3000 / 16000)
    assert axes.get_ylim()[1] == -axes.get_ylim()[0] == pytest.approx(1.05 * np.abs(samples).max())
    assert (axes.get_title(), axes.get_xlabel(), axes.get_ylabel()) == ("a $1 bell", "time (s)", "amplitude")

    long = np.zeros((2, 160_000), np.float32)  # stereo: channels are averaged
    long[0, 40_000], long[:, 120_000] = 1, -0.75
    axes = plot_waveform(long, 16000).axes[0]
    drawn = axes.collections[0].get_paths()[0].vertices
    assert len(axes.lines) == 0
    assert drawn[:, 1].max() == 0.5
    assert drawn[drawn[:, 1].argmax(), 0] == pytest.approx(2.5, abs=0.005)
    assert drawn[:, 1].min() == -0.75
    assert drawn[drawn[:, 1].argmin(), 0] == pytest.approx(7.5, abs=0.005)
    assert plot_waveform(np.zeros(5), 16000).axes[0].get_ylim() == (-1, 1)


def test_a_spectrogram_is_drawn_in_seconds_and_hertz() -> None:
    module = pytest.importorskip("matplotlib.figure")
    samples = noise(1, 12000) / 10
    axes, bar = plot_spectrogram(samples, 8000).axes
    assert bar.get_ylabel() == "level (dB, loudest = 0)"
    (image,) = axes.images
    assert np.array_equal(image.get_array(), decibels(samples, 8000).T)
    assert image.get_clim() == (-80, 0)
    assert axes.get_xlim() == (0, 1.5)
    assert labels(axes) == ["0", "250", "500", "1000", "2000", "4000"]
    top = hertz_to_mel(torch.tensor(4000.0)).item()
    assert axes.get_ylim() == (0, pytest.approx(top))
    assert axes.get_yticks()[3] == pytest.approx(hertz_to_mel(torch.tensor(1000.0)).item())
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("time (s)", "frequency (Hz, mel scale)")

    own = module.Figure()
    left, right = own.subplots(1, 2)
    assert plot_spectrogram(samples, 8000, title="right", axes=right) is own
    assert plot_waveform(samples, 8000, title="left", axes=left) is own
    assert (left.get_title(), right.get_title(), len(own.axes)) == ("left", "right", 2)
    assert np.array_equal(right.images[0].get_array(), image.get_array())


def test_a_sound_has_its_waveform_above_its_spectrogram_over_the_same_time() -> None:
    pytest.importorskip("matplotlib")
    samples = noise(4000) / 10
    figure = plot_sound(samples, 16000, title="word " * 40)
    upper, lower, _ = figure.axes
    png(figure)  # lays it out
    assert upper.get_xlim() == lower.get_xlim() == (0, 0.25)
    assert upper.bbox.x0 == pytest.approx(lower.bbox.x0)
    assert upper.bbox.x1 == pytest.approx(lower.bbox.x1)
    assert upper.bbox.y0 > lower.bbox.y1
    assert np.array_equal(upper.lines[0].get_ydata(), samples)
    assert np.array_equal(lower.images[0].get_array(), decibels(samples[None], 16000).T)
    assert upper.get_title().count("\n") == 2
    assert upper.title.get_window_extent().x0 > 0


def test_candidates_are_side_by_side_with_their_scores(made: Any) -> None:
    pytest.importorskip("matplotlib")
    output = made[0]
    figure = plot_candidates(output, prompt=PROMPT)
    *panels, bar = figure.axes
    assert [axes.get_title() for axes in panels] == [
        f"{i + 1}: score {score:.3f}" for i, score in enumerate(output.scores)
    ]
    for axes, audio in zip(panels, output.audios, strict=True):
        assert np.array_equal(axes.images[0].get_array(), decibels(torch.tensor(audio)[None], 16000).T)
        assert axes.get_xlim() == (0, 0.96)
    assert figure.get_suptitle() == PROMPT
    assert bar.get_ylabel() == "level (dB, loudest = 0)"
    five = plot_candidates(AudioPipelineOutput(np.ones((5, 800)), 16000))
    assert [axes.get_title() for axes in five.axes[:-1]] == ["1", "2", "3", "4", "5"]
    rows = {axes.get_subplotspec().rowspan.start for axes in five.axes[:-1]}
    assert rows == {0, 1}
    with pytest.raises(ValueError, match=r"latents of shape \(1, 8, 8, 16\); decode them with pipe.decode"):
        plot_candidates(AudioPipelineOutput(np.ones((1, 8, 8, 16))))
    with pytest.raises(TypeError, match="output must be what a pipeline returns, got ndarray"):
        plot_candidates(output.audios)  # type: ignore[arg-type]


def test_denoising_is_a_strip_of_decoded_latents(tiny: AudioLDM2Pipeline, made: Any) -> None:
    pytest.importorskip("matplotlib")
    recorder = made[1]
    assert recorder.steps == [0, 1, 2, 3]
    assert recorder.timesteps[0] == 999
    figure = plot_denoising(recorder, tiny, sound=1, panels=3)
    *panels, _ = figure.axes
    titles = [f"step {i + 1}, t = {recorder.timesteps[i]:g}" for i in (0, 2, 3)]
    assert [axes.get_title() for axes in panels] == titles
    mels = tiny.decode(torch.stack([recorder.latents[i][1] for i in (0, 2, 3)]))[:, 0]
    for axes, mel in zip(panels, mels, strict=True):
        expected = (20 * (mel - mels[-1].max()) / math.log(10)).clamp(-80, 0)
        assert_close(torch.from_numpy(np.array(axes.images[0].get_array())), expected.T, 1e-4)
        assert axes.get_xlim() == (0, 32 * 512 / 16000)
    assert labels(panels[0]) == ["0", "500", "1000", "2000", "4000", "8000"]
    assert (panels[-1].images[0].get_array().max(), panels[0].get_ylim()[0]) == (0, 0)
    assert [axes.get_title() for axes in plot_denoising(recorder, tiny, panels=1).axes[:-1]] == [titles[-1]]
    for arguments, message in (
        ({"panels": 0}, "panels must be an integer of at least 1, got 0"),
        ({"sound": 3}, "sound must be an integer from 0 to 2, got 3"),
    ):
        with pytest.raises(ValueError, match=message):
            plot_denoising(recorder, tiny, **arguments)
    with pytest.raises(ValueError, match="recorder has no latents; run the pipeline with callback=recorder"):
        plot_denoising(LatentRecorder(), tiny)


def test_latents_are_recorded_by_either_callback_and_copied() -> None:
    recorder = LatentRecorder()
    latents = noise(1, 8, 4, 4)
    recorder(3, torch.tensor(77), latents)
    recorder.on_step_end(None, 4, 55, {"latents": latents + 1})
    kept = latents.clone()
    latents.zero_()
    assert (recorder.steps, recorder.timesteps) == ([3, 4], [77, 55])
    assert torch.equal(torch.stack(recorder.latents), torch.stack([kept, kept + 1]))


def test_attention_has_a_panel_for_each_layer_with_words_or_vectors(made: Any) -> None:
    pytest.importorskip("matplotlib")
    attention = made[2]
    figure = plot_attention(attention, PROMPT, sound=1, step=-1, title="t")
    *panels, bar = figure.axes
    assert len(panels) == len(attention.layers) == 8
    layers = {layer.name.removesuffix(".cross_attention"): layer for layer in attention.layers}
    words = attention.words(PROMPT)
    for axes in panels:
        layer = layers[axes.get_title()]
        weights = attention.weights(layer)[-1, 1]  # (time, tokens)
        if layer.condition == "t5":
            assert labels(axes) == ["A", "bell", "over", "rain", "</s>"]
            weights = torch.stack([weights[:, list(word.tokens)].sum(-1) for word in words], -1)
        else:
            assert labels(axes) == [*"12345678"]
        assert_close(torch.from_numpy(np.array(axes.images[0].get_array())), weights.T, 1e-6)
        assert axes.get_xlim() == (0, attention.seconds)
        assert axes.get_ylim() == (len(labels(axes)), 0)
        assert axes.get_yticks()[0] == 0.5
    assert bar.get_ylabel() == "weight of the attention"
    highest = max(float(axes.images[0].get_array().max()) for axes in panels)
    assert {axes.images[0].get_clim() for axes in panels} == {(0, highest)}

    levels = plot_attention(attention, by="level").axes[:-1]
    assert [axes.get_title() for axes in levels[::2]] == ["down 2", "middle", "up 0"]
    assert labels(levels[0]) == [*"123456"]
    (whole, _, _) = plot_attention(attention, by="all").axes
    assert_close(torch.from_numpy(np.array(whole.images[0].get_array())), attention.mean("t5")[0].T, 1e-6)
    for arguments, message in (
        ({"by": "head"}, "by must be one of layer, level, all; got 'head'"),
        ({"sound": 3}, "sound must be an integer from 0 to 2, got 3"),
        ({"prompt": "A"}, "prompt has 2 tokens, but sound 0 was generated from a text of 6"),
    ):
        with pytest.raises(ValueError, match=message):
            plot_attention(attention, **arguments)


def test_a_figure_shows_itself_in_a_notebook_also_as_a_copy() -> None:
    pytest.importorskip("matplotlib")
    figure = plot_waveform(np.zeros(5), 16000, title="\N{CJK UNIFIED IDEOGRAPH-97F3}")
    again = pickle.loads(pickle.dumps(figure))
    assert again._repr_png_.args == (again,)
    assert again._repr_png_()[:8] == b"\x89PNG\r\n\x1a\n"
