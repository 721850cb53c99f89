"""One generation at a time on a pipeline: threads, web servers and callbacks get the right sounds."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from audioldm2 import AudioLDM2Pipeline, DPMSolverMultistepScheduler

SEEDS = range(16)


@pytest.fixture
def pipe(random_checkpoint: Path) -> AudioLDM2Pipeline:
    pipe = AudioLDM2Pipeline.from_pretrained(random_checkpoint)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    return pipe


def sound(pipe: AudioLDM2Pipeline, seed: int, callback: Callable | None = None) -> np.ndarray:
    audio: np.ndarray = pipe(
        f"Rain number {seed}",
        negative_prompt="Low",
        num_inference_steps=3 + seed % 3,
        audio_length_in_s=0.32,
        num_waveforms_per_prompt=1 + seed % 2,
        generator=torch.Generator().manual_seed(seed),
        callback=callback,
    ).audios
    return audio


@pytest.fixture
def alone(pipe: AudioLDM2Pipeline) -> list[np.ndarray]:
    return [sound(pipe, seed) for seed in SEEDS]


def same(actual: list[np.ndarray], expected: list[np.ndarray]) -> None:
    for one, other in zip(actual, expected, strict=True):
        np.testing.assert_array_equal(one, other)


def test_threads(pipe: AudioLDM2Pipeline, alone: list[np.ndarray]) -> None:
    with ThreadPoolExecutor(4) as pool:
        same(list(pool.map(lambda seed: sound(pipe, seed), SEEDS)), alone)


def test_asyncio(pipe: AudioLDM2Pipeline, alone: list[np.ndarray]) -> None:
    async def all_at_once() -> list[np.ndarray]:
        return await asyncio.gather(*(asyncio.to_thread(sound, pipe, seed) for seed in SEEDS))

    same(asyncio.run(all_at_once()), alone)


def test_two_pipelines_with_the_same_parts(pipe: AudioLDM2Pipeline, alone: list[np.ndarray]) -> None:
    """They share stages, which keep nothing, and the scheduler, which does."""
    parts = {name: part for name, part in vars(pipe).items() if not name.startswith("_")}
    other = AudioLDM2Pipeline(**parts)
    other.set_progress_bar_config(disable=True)
    with ThreadPoolExecutor(2) as pool:
        pipes = [(pipe, other)[seed % 2] for seed in SEEDS]
        same(list(pool.map(sound, pipes, SEEDS)), alone)


def test_a_generation_within_a_callback(pipe: AudioLDM2Pipeline, alone: list[np.ndarray]) -> None:
    inner: list[np.ndarray] = []

    def callback(step: int, t: torch.Tensor, latents: torch.Tensor) -> None:
        if step == 1:
            inner.append(sound(pipe, 5))

    np.testing.assert_array_equal(sound(pipe, 2, callback), alone[2])
    same(inner, [alone[5]])


def test_after_an_error_the_next_generation_is_right(
    pipe: AudioLDM2Pipeline, alone: list[np.ndarray]
) -> None:
    def broken(step: int, t: torch.Tensor, latents: torch.Tensor) -> None:
        raise KeyError("the callback's own")

    with pytest.raises(KeyError, match="the callback's own"):
        sound(pipe, 2, broken)
    with ThreadPoolExecutor(1) as pool:  # another thread: the lock is free
        np.testing.assert_array_equal(pool.submit(sound, pipe, 2).result(timeout=60), alone[2])
