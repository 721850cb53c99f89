"""Long sounds in windows, and loops: denoising, decoding, and the seam."""

from __future__ import annotations

from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from torch import Tensor

import audioldm2.decoding
from audioldm2 import AudioLDM2Pipeline, DPMSolverMultistepScheduler
from audioldm2.windows import window_rows
from scripts.pages import run
from tests.helpers import HAMMER, RAIN, ROOT, load_pipeline, noise, run_python, seeded, sound

SAMPLERS = (DPMSolverMultistepScheduler, diffusers.HeunDiscreteScheduler,
            diffusers.EulerAncestralDiscreteScheduler)  # fmt: skip
ROW = 640  # samples of a row of latents in the random checkpoint, 0.04 s


@pytest.fixture(scope="module")
def tiny() -> AudioLDM2Pipeline:
    return load_pipeline("tiny")


def lengths_seen(pipe: AudioLDM2Pipeline) -> list[int]:
    """The lengths of the latents that the UNet gets from now on."""
    seen: list[int] = []
    pipe.unet.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].shape[2]))
    return seen


# --- windows


@pytest.mark.parametrize("loop", [False, True])
def test_a_window_of_the_whole_length_changes_nothing(pipe: AudioLDM2Pipeline, loop: bool) -> None:
    whole = sound(pipe, audio_length_in_s=0.64, loop=loop)
    assert np.array_equal(sound(pipe, audio_length_in_s=0.64, loop=loop, window=0.64), whole)
    assert np.array_equal(sound(pipe, audio_length_in_s=0.64, loop=loop, window=100.0), whole)
    assert not np.array_equal(sound(pipe, audio_length_in_s=0.64, loop=loop, window=0.48), whole)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_unet_sees_windows_of_one_length_with_any_sampler(pipe: AudioLDM2Pipeline, sampler: Any) -> None:
    pipe.scheduler = sampler.from_config(pipe.scheduler.config)
    seen, steps = lengths_seen(pipe), []
    result = pipe(
        [HAMMER, RAIN],
        negative_prompt=["Low quality", ""],
        num_waveforms_per_prompt=2,
        audio_length_in_s=1.6,
        window=0.64,
        num_inference_steps=2,
        generator=seeded(),
        callback=lambda step, t, latents: steps.append((step, tuple(latents.shape))),
    )
    assert set(seen) == {16}, "a compiled UNet is compiled once"
    assert len(seen) % 4 == 0, "four windows cover 40 rows"
    assert steps == [(0, (4, 4, 40, 4)), (1, (4, 4, 40, 4))]
    assert result.audios.shape == (4, 25600)
    assert result.scores.shape == (4,)
    assert result.audios.std() > 0.02


def test_a_denoiser_of_single_rows_is_not_changed_by_windows(pipe: AudioLDM2Pipeline) -> None:
    class OfRows(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.config = pipe.unet.config
            self.weight = torch.nn.Parameter(noise(4, 4))

        def forward(self, sample: Tensor, timestep: Tensor, **states: Tensor) -> Tensor:
            return torch.einsum("bchw,cd->bdhw", sample, self.weight)

    pipe.unet = OfRows()
    arguments = {"audio_length_in_s": 1.6, "num_inference_steps": 3, "output_type": "latent"}
    whole = sound(pipe, **arguments)
    torch.testing.assert_close(sound(pipe, window=0.64, **arguments), whole, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(sound(pipe, window=0.64, loop=True, **arguments), whole, rtol=1e-4, atol=1e-4)


def test_windows_are_rounded_to_what_the_unet_halves(pipe: AudioLDM2Pipeline) -> None:
    row = ROW / 16000
    assert [window_rows(pipe.unet, seconds, row) for seconds in (0.32, 0.34, 0.41, 10.24)] == [8, 8, 12, 256]
    assert window_rows(pipe.unet, None, row) == 32, "by default, the length of the training"
    with pytest.raises(ValueError, match="pass window, in seconds"):
        window_rows(torch.nn.Identity(), None, row)


def test_windows_fit_inpainting_and_variation(tiny: AudioLDM2Pipeline) -> None:
    audio = 0.1 * noise(16000 * 2, seed=3)
    for arguments in ({"keep": (0.0, 1.0)}, {"strength": 0.5}, {"strength": 0.5, "loop": True}):
        (found,) = tiny(
            "Rain", audio=audio, sampling_rate=16000, window=1.024, num_inference_steps=2, **arguments
        ).audios
        assert len(found) == (30720 if "loop" in arguments else 32000)
        if "keep" in arguments:
            assert np.array_equal(found[:15000], audio[:15000].numpy())


@pytest.mark.slow
def test_memory_does_not_grow_with_the_length() -> None:
    """Four times the length adds the latents, the spectrogram and the waveform, and little else."""
    script = """
import resource, sys, torch
torch.set_num_threads(1)
from audioldm2 import AudioLDM2Pipeline
pipe = AudioLDM2Pipeline.from_pretrained("tiny")
pipe.set_progress_bar_config(disable=True)
pipe("Rain", audio_length_in_s=float(sys.argv[1]), window=5.12, exact_decoding=False, num_inference_steps=1)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""
    peaks = [float(run_python("-c", script, seconds).stdout) for seconds in ("160", "640")]
    assert peaks[1] - peaks[0] < 150, peaks  # MiB; the waveform alone has 39, and copies of it


# --- decoding in windows


def test_decoding_in_windows_is_nearly_exact(
    tiny: AudioLDM2Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    latents = tiny(
        ["Rain", "A siren"], num_inference_steps=4, output_type="latent", generator=seeded()
    ).audios
    exact = tiny.decode(latents)
    assert torch.equal(tiny.decode(latents, exact=False), exact), "shorter than a window"
    monkeypatch.setattr(audioldm2.decoding, "WINDOW_ROWS", 20)
    monkeypatch.setattr(audioldm2.decoding, "OVERLAP_ROWS", 10)
    lengths: list[int] = []
    decode = tiny.vae.decode
    monkeypatch.setattr(tiny.vae, "decode", lambda x: lengths.append(x.shape[2]) or decode(x))
    windowed = tiny.decode(latents, exact=False)
    assert lengths == [20] * 3
    assert windowed.shape == exact.shape
    difference = (windowed - exact).abs().mean() * 20 / np.log(10)  # dB
    assert 0.01 < difference < 3


# --- loops


@pytest.mark.parametrize("exact", [True, False])
def test_a_loop_is_decoded_on_a_circle(
    tiny: AudioLDM2Pipeline, exact: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever it is cut, a loop is the same sound."""
    monkeypatch.setattr(audioldm2.decoding, "WINDOW_ROWS", 20)
    monkeypatch.setattr(audioldm2.decoding, "OVERLAP_ROWS", 10)
    latents = tiny("A siren", num_inference_steps=4, output_type="latent", generator=seeded()).audios
    found = tiny.decode(latents, exact, loop=True)
    rolled = tiny.decode(latents.roll(20, 2), exact, loop=True).roll(-20 * 4, 2)
    # The norms' statistics count what is near the cut twice.
    assert (rolled - found).abs().max() * 20 / np.log(10) < 1.0
    assert (tiny.decode(latents, exact) - found)[:, :, :8].abs().max() * 20 / np.log(10) > 2.0
    wave = tiny.vocode(found, loop=True)
    assert wave.shape == (1, found.shape[2] * 512)
    again = tiny.vocode(found.roll(7, 2), loop=True).roll(-7 * 512, 1)
    torch.testing.assert_close(again, wave, rtol=0, atol=1e-5)


def test_a_loop_is_encoded_on_a_circle(tiny: AudioLDM2Pipeline) -> None:
    audio = 0.1 * noise(1, 30 * 2048, seed=2)
    latents = tiny.encode_audio(audio, 16000, loop=True)
    rolled = tiny.encode_audio(audio.roll(15 * 2048, 1), 16000, loop=True).roll(-15, 2)
    assert latents.shape[2] == 30
    near = (latents - tiny.encode_audio(audio, 16000)).abs()
    assert (rolled - latents).abs().max() < 0.5 * near.max()


def seam(audio: np.ndarray, at: int, length: int = 800) -> np.ndarray:
    """The change at a sample of a circle: of the sample, of the level, and of the spectrum (50 ms, dB)."""
    left, right = (audio[np.arange(start, start + length) % len(audio)] for start in (at - length, at))
    spectra = [np.abs(np.fft.rfft(x * np.hanning(length))[:400]) ** 2 for x in (left, right)]
    bands = [10 * np.log10(s.reshape(20, 20).sum(1) + 1e-4) for s in spectra]
    levels = [10 * np.log10((x**2).mean() + 1e-8) for x in (left, right)]
    return np.array(
        [abs(right[0] - left[-1]), abs(levels[1] - levels[0]), np.abs(bands[1] - bands[0]).mean()]
    )


def gap(audio: np.ndarray) -> float:
    """How far the level of 100 ms falls below its median in dB, anywhere on a circle."""
    power = np.convolve(np.concatenate([audio, audio[:1600]]) ** 2, np.ones(1600), "valid")
    levels = 10 * np.log10(power + 1e-6)
    return float(np.median(levels) - levels.min())


@pytest.mark.parametrize("kind", ["text", "windows", "audio"])
def test_the_seam_of_a_loop_is_like_the_rest_of_it(tiny: AudioLDM2Pipeline, kind: str) -> None:
    arguments: dict[str, Any] = {
        "text": {"audio_length_in_s": 2.5},
        "windows": {"audio_length_in_s": 2.5, "window": 1.536},
        "audio": {"audio": 0.1 * noise(33000, seed=2), "sampling_rate": 16000, "strength": 0.6},
    }[kind]
    change, gaps = {}, {}
    for loop in (True, False) if kind == "text" else (True,):
        audios = tiny(
            ["Rain", "White noise"], loop=loop, num_inference_steps=6, generator=seeded(), **arguments
        ).audios
        assert len(audios[0]) % 2048 == 0 or not loop
        at_seam = np.mean([seam(audio, 0) for audio in audios], axis=0)
        elsewhere = [[seam(audio, at) for at in range(4000, len(audio) - 4000, 997)] for audio in audios]
        change[loop] = at_seam / np.mean(elsewhere, axis=(0, 1))
        gaps[loop] = max(gap(audio) for audio in audios)
    assert change[True].max() < 1.8, change
    assert gaps[True] < 3, "no fade anywhere, also not away from the seam"
    assert kind != "text" or gaps[False] > 20, "tiny's clips fade in and out"


def test_a_loop_needs_a_flag_and_no_spans(tiny: AudioLDM2Pipeline) -> None:
    with pytest.raises(TypeError, match="loop must be True or False"):
        tiny("Rain", loop="yes")
    with pytest.raises(ValueError, match=r"window must be from 1\.024 to 3600 seconds, got nan"):
        tiny("Rain", window=float("nan"))


def test_the_page_runs_and_prints_what_it_says() -> None:
    page = ROOT / "docs" / "long-sounds.md"
    printed = [(out, cell.output) for cell, out in run(page)]
    assert [out for out, _ in printed] == [expected for _, expected in printed]
    assert len(printed) == 4
