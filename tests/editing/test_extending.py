"""Continuing sounds: where the windows lie, what is kept, loops, batches, and what is refused."""

from __future__ import annotations

import io
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from torch import Tensor

from audioldm2 import AudioLDM2Pipeline, DPMSolverMultistepScheduler
from audioldm2.editing.extending import Extension
from audioldm2.editing.inpainting import FADE_S
from tests.helpers import load_pipeline, noise, seeded

RATE = 16000
FADE = round(FADE_S * RATE)
ROW = 4 * 512  # samples of a row of tiny's latents, 0.128 s
SOUND = (0.1 * noise(RATE // 2 + 100, seed=5)).clamp(-1, 1)  # 3 rows, and a part of one


@pytest.fixture(scope="module")
def tiny() -> AudioLDM2Pipeline:
    return load_pipeline("tiny")


def extended(pipe: AudioLDM2Pipeline, prompt: Any = "Rain", audio: Any = SOUND, **arguments: Any) -> Any:
    defaults = {"sampling_rate": RATE, "num_inference_steps": 2, "extend": 1.5, "window": 1.024}
    return pipe(prompt, audio=audio, **{**defaults, "generator": seeded(1), **arguments}).audios


# --- where the windows lie


@pytest.mark.parametrize("loop", [False, True])
def test_windows_reach_the_end_and_keep_what_they_should(loop: bool) -> None:
    for window in (4, 8, 10):
        for known in range(1, 20):
            for rows in range(known + 1, 50):
                windows = Extension(known, rows, window, loop).windows
                if window >= rows:
                    assert windows == [(0, rows)]
                    continue
                end, quarter = known, window // 4
                for start, next_end in windows[:-1]:
                    assert end - start == min(end, window // 2), "rows that are kept"
                    assert end < next_end == start + window - quarter, "rows that are new"
                    end = next_end
                start, last = windows[-1]
                assert last == rows
                assert start + window == rows + (quarter if loop else 0)
                assert end - start >= min(end, window // 2 - (quarter if loop else 0))


def test_each_window_is_generated_from_what_there_is() -> None:
    calls: list[tuple[list[float], list[bool]]] = []

    def generate(clean: Tensor, replaced: Tensor) -> Tensor:
        calls.append((clean[0, 0, :, 0].tolist(), replaced[:, 0].tolist()))
        return torch.full_like(clean, 10.0 * len(calls))

    known = torch.arange(1.0, 5).view(1, 1, 4, 1)
    result = Extension(4, 7, window=4, loop=True).run(known, generate, lambda: False)
    assert [call[1] for call in calls] == [[False, False, True, True], [False, True, True, False]]
    assert [row for row, new in zip(*calls[0], strict=True) if not new] == [3, 4]
    assert [row for row, new in zip(*calls[1], strict=True) if not new] == [10, 1]
    assert result[0, 0, :, 0].tolist() == [1, 2, 3, 4, 10, 20, 20]


# --- what the pipeline makes of it


@pytest.mark.parametrize(
    "sampler",
    [DPMSolverMultistepScheduler, diffusers.HeunDiscreteScheduler,
     diffusers.EulerAncestralDiscreteScheduler],
)  # fmt: skip
def test_the_input_is_kept_and_the_rest_is_new(tiny: AudioLDM2Pipeline, sampler: Any) -> None:
    pipe = AudioLDM2Pipeline(**{**tiny.components, "scheduler": sampler.from_config(tiny.scheduler.config)})
    pipe.set_progress_bar_config(disable=True)
    shapes: set[int] = set()
    handle = pipe.unet.register_forward_pre_hook(lambda module, inputs: shapes.add(inputs[0].shape[2]))
    try:
        (sound,) = extended(pipe)
    finally:
        handle.remove()
    assert shapes == {8}, "windows of one length"
    assert sound.shape == (len(SOUND) + int(1.5 * RATE),)
    end = len(SOUND)
    assert np.array_equal(sound[: end - FADE], SOUND[: end - FADE].numpy())
    assert all(np.ptp(sound[start : start + ROW]) > 0 for start in range(end, len(sound) - ROW, ROW))


def test_a_window_fits_the_tail_of_the_one_before(tiny: AudioLDM2Pipeline) -> None:
    """What the UNet sees in the rows that are kept is the tail at the noise level of the step."""
    seen: list[Tensor] = []
    handle = tiny.unet.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    try:
        latents = extended(tiny, output_type="latent", guidance_scale=1)
    finally:
        handle.remove()
    clean = tiny.encode_audio(SOUND, RATE)
    assert torch.equal(latents[:, :, :3], clean[:, :, :3])
    windows = Extension(3, latents.shape[2], 8, loop=False).windows
    assert len(windows) >= 3
    assert len(seen) == 2 * len(windows)
    scheduler = DPMSolverMultistepScheduler.from_config(tiny.scheduler.config)
    scheduler.set_timesteps(2)
    generator, end = seeded(1), 3
    for (start, next_end), second in zip(windows, seen[1::2], strict=True):
        eps = torch.randn(second.shape, generator=generator)
        tail = scheduler.add_noise(latents[:, :, start : start + 8], eps, scheduler.timesteps[1:2])
        assert torch.allclose(second[:, :, : end - start], tail[:, :, : end - start], atol=1e-6)
        end = next_end


def test_batches_and_candidates(tiny: AudioLDM2Pipeline) -> None:
    other = SOUND.flip(0)
    bar = io.StringIO()
    tiny.set_progress_bar_config(file=bar)
    try:
        result = tiny(
            ["Rain", "A high tone"],
            audio=[SOUND, other],
            sampling_rate=RATE,
            extend=1.0,
            window=1.024,
            num_waveforms_per_prompt=2,
            num_inference_steps=2,
            generator=[seeded(i) for i in range(4)],
        )
    finally:
        tiny.set_progress_bar_config(disable=True)
    assert "Denoising: 100%" in bar.getvalue()
    assert "4/4" in bar.getvalue(), "two windows of two steps"
    assert result.audios.shape == (4, len(SOUND) + RATE)
    assert result.scores.shape == (4,)
    end = len(SOUND) - FADE
    for row, original in zip(result.audios, (SOUND, SOUND, other, other), strict=True):
        assert np.array_equal(row[:end], original[:end].numpy())
    assert np.abs(result.audios[0, len(SOUND) :] - result.audios[1, len(SOUND) :]).max() > 0.01


def test_callbacks_see_every_window_and_may_stop(tiny: AudioLDM2Pipeline) -> None:
    steps: list[int] = []

    def look(pipe: AudioLDM2Pipeline, step: int, t: Tensor, tensors: dict[str, Tensor]) -> None:
        steps.append(step)
        pipe._interrupt = len(steps) == 3

    latents = extended(tiny, callback_on_step_end=look, output_type="latent")
    assert steps == [0, 1, 0]
    _, end = Extension(3, 16, 8, loop=False).windows[1]
    assert latents.shape[2] == end
    steps.clear()
    (sound,) = extended(tiny, callback_on_step_end=look)
    assert len(sound) == end * ROW


def test_every_window_begins_with_the_guidance_of_the_call(tiny: AudioLDM2Pipeline) -> None:
    """A callback that switches guidance off after the first step does so in each window alike."""
    seen: list[tuple[int, float]] = []

    def callback(pipe: Any, step: int, t: Any, tensors: Any) -> None:
        seen.append((step, pipe.guidance_scale))
        pipe._guidance_scale = 1.0

    extended(tiny, guidance_scale=2.0, callback_on_step_end=callback)
    assert len(seen) > 2
    assert seen == [(0, 2.0), (1, 1.0)] * (len(seen) // 2)


@pytest.mark.parametrize("window", [1.024, 5.12])
def test_an_extended_loop_leads_back_to_its_beginning(tiny: AudioLDM2Pipeline, window: float) -> None:
    (sound,) = extended(tiny, loop=True, window=window)
    assert len(sound) % ROW == 0
    assert 0 <= len(sound) - len(SOUND) - int(1.5 * RATE) < ROW
    assert np.array_equal(sound[FADE : len(SOUND) - FADE], SOUND[FADE : len(SOUND) - FADE].numpy())
    # The fade at the beginning starts from what the new part leads to.
    assert not np.array_equal(sound[: FADE // 2], SOUND[: FADE // 2].numpy())


# --- what is refused


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"extend": -1}, "extend must be a number of seconds, more than 0"),
        ({"extend": float("nan")}, "extend must be a number of seconds, more than 0"),
        ({"extend": "10"}, "extend must be a number of seconds, more than 0"),
        ({"extend": 3600}, "extend = 3600 makes a sound of 3600.5 s; the limit is 3600 s"),
        ({"audio": None, "sampling_rate": None}, "extend goes with audio"),
        ({"strength": 0.5}, "extend keeps all of audio, so leave out strength"),
        ({"keep": (0, 0.2)}, "extend keeps all of audio, so leave out keep"),
        ({"replace_band": (4000, 8000)}, "extend keeps all of audio, so leave out replace_band"),
        (
            {"audio_length_in_s": 3.0},
            "extend says how long the sound becomes, so leave out audio_length_in_s",
        ),
        ({"latents": noise(1, 8, 16, 16)}, "extend says how long the sound becomes, so leave out latents"),
        (
            {"extend": None, "loop": True, "keep": (0, 0.2)},
            "loop goes with audio and strength, or with extend",
        ),
        ({"window": 0.3}, "window must be from 1.024 to 3600 seconds, got 0.3"),
        ({"window": float("inf")}, "window must be from 1.024 to 3600 seconds, got inf"),
        ({"window": 5000}, "window must be from 1.024 to 3600 seconds, got 5000"),
        ({"loop": 1}, "loop must be True or False, got 1"),
        ({"exact_decoding": "no"}, "exact_decoding must be True or False, got 'no'"),
    ],
    ids=str,
)
def test_arguments_that_cannot_be_used(tiny: AudioLDM2Pipeline, arguments: dict, message: str) -> None:
    with pytest.raises((TypeError, ValueError)) as found:
        extended(tiny, **arguments)
    assert message in str(found.value)
    assert "\n" not in str(found.value)


def test_sounds_of_different_lengths_are_refused(tiny: AudioLDM2Pipeline) -> None:
    with pytest.raises(ValueError, match=r"different lengths.*extend them one by one"):
        extended(tiny, ["Rain", "Rain"], [SOUND, SOUND[:5000]])
