"""Generations that are started at the same time: each result is the one of its seed alone, bit for bit."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from audioldm2 import AudioLDM2Pipeline, DPMSolverMultistepScheduler
from tests.helpers import seeded

SEEDS = range(8)


@pytest.fixture
def dpm(pipe: AudioLDM2Pipeline) -> AudioLDM2Pipeline:
    """With DPM-Solver++, which keeps the results of earlier steps."""
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    return pipe


def sound(pipe: AudioLDM2Pipeline, seed: int, callback: Callable | None = None) -> np.ndarray:
    """A sound whose prompt, number of steps and number of candidates depend on the seed."""
    audio: np.ndarray = pipe(
        f"Rain number {seed}",
        negative_prompt="Low",
        num_inference_steps=3 + seed % 3,
        audio_length_in_s=0.32,
        num_waveforms_per_prompt=1 + seed % 2,
        generator=seeded(seed),
        callback=callback,
    ).audios
    return audio


@pytest.fixture
def alone(dpm: AudioLDM2Pipeline) -> list[np.ndarray]:
    """The sound of each seed, generated one after the other."""
    return [sound(dpm, seed) for seed in SEEDS]


def assert_equal(actual: list[np.ndarray], expected: list[np.ndarray]) -> None:
    for one, other in zip(actual, expected, strict=True):
        np.testing.assert_array_equal(one, other)


def test_threads_that_share_a_pipeline(dpm: AudioLDM2Pipeline, alone: list[np.ndarray]) -> None:
    with ThreadPoolExecutor(4) as pool:
        assert_equal(list(pool.map(lambda seed: sound(dpm, seed), SEEDS)), alone)


def test_asyncio_tasks_that_share_a_pipeline(dpm: AudioLDM2Pipeline, alone: list[np.ndarray]) -> None:
    async def all_at_once() -> list[np.ndarray]:
        return await asyncio.gather(*(asyncio.to_thread(sound, dpm, seed) for seed in SEEDS))

    assert_equal(asyncio.run(all_at_once()), alone)


def test_threads_with_pipelines_that_share_all_parts(dpm: AudioLDM2Pipeline, alone: list[np.ndarray]) -> None:
    """Their stages have no state, but their scheduler has."""
    other = AudioLDM2Pipeline(**dpm.components)
    other.set_progress_bar_config(disable=True)
    with ThreadPoolExecutor(2) as pool:
        pipes = [(dpm, other)[seed % 2] for seed in SEEDS]
        assert_equal(list(pool.map(sound, pipes, SEEDS)), alone)


def test_a_callback_may_generate(dpm: AudioLDM2Pipeline, alone: list[np.ndarray]) -> None:
    inner: list[np.ndarray] = []

    def callback(step: int, t: torch.Tensor, latents: torch.Tensor) -> None:
        if step == 1:
            inner.append(sound(dpm, 5))

    np.testing.assert_array_equal(sound(dpm, 2, callback), alone[2])
    assert_equal(inner, [alone[5]])


def test_after_an_error_other_threads_can_generate(dpm: AudioLDM2Pipeline, alone: list[np.ndarray]) -> None:
    def broken(step: int, t: torch.Tensor, latents: torch.Tensor) -> None:
        raise KeyError("the callback's own")

    with pytest.raises(KeyError, match="the callback's own"):
        sound(dpm, 2, broken)
    with ThreadPoolExecutor(1) as pool:
        np.testing.assert_array_equal(pool.submit(sound, dpm, 2).result(), alone[2])
