"""Decoding and vocoding in a pipeline: chunks of long sounds, groups of a batch."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import audioldm2.decoding
from audioldm2 import AudioLDM2Pipeline
from audioldm2.decoding import equal_groups


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


HAMMER = "A hammer hitting a wooden surface."


def load(folder: Path, **options: Any) -> AudioLDM2Pipeline:
    pipe = AudioLDM2Pipeline.from_pretrained(folder, **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def pipe(random_checkpoint: Path) -> AudioLDM2Pipeline:
    return load(random_checkpoint)


def sound(pipe: AudioLDM2Pipeline, prompt: str | list[str] = HAMMER, **arguments: Any) -> np.ndarray:
    arguments = {"num_inference_steps": 2, "audio_length_in_s": 0.64, **arguments}
    audio: np.ndarray = pipe(prompt, generator=torch.Generator().manual_seed(0), **arguments).audios
    return audio


@pytest.fixture
def calls(pipe: AudioLDM2Pipeline, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, int]]:
    """How the VAE and the vocoder were called: the method, the rows and the length of what it was given."""
    found: list[tuple[str, int, int]] = []

    def watching(name: str, f: Callable[..., Tensor], axis: int) -> Callable[..., Tensor]:
        def watched(x: Tensor, *arguments: Any) -> Tensor:
            found.append((name, x.shape[0], x.shape[axis]))
            return f(x, *arguments)

        return watched

    monkeypatch.setattr(pipe.vae, "decode", watching("decode", pipe.vae.decode, 2))
    monkeypatch.setattr(pipe.vae, "decode_in_chunks", watching("in rows", pipe.vae.decode_in_chunks, 2))
    monkeypatch.setattr(pipe.vocoder, "forward", watching("vocode", pipe.vocoder.forward, 1))
    # Its own chunks are longer than these sounds.
    in_chunks = partial(pipe.vocoder.in_chunks, frames=24)
    monkeypatch.setattr(pipe.vocoder, "in_chunks", watching("in frames", in_chunks, 1))
    return found


def test_long_sounds_are_made_in_chunks(
    pipe: AudioLDM2Pipeline, calls: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = sound(pipe, audio_length_in_s=1.28, num_waveforms_per_prompt=2)
    assert calls == [("decode", 2, 32), ("vocode", 2, 128)]
    calls.clear()
    monkeypatch.setattr(audioldm2.decoding, "FRAMES_AT_ONCE", 40)
    chunks = sound(pipe, audio_length_in_s=1.28, num_waveforms_per_prompt=2)
    assert calls[:2] == [("in rows", 1, 32)] * 2
    frames = [(name, length) for name, _, length in calls[2:]]
    window = 24 + 2 * pipe.vocoder.reach
    assert window < 128
    assert frames == [("in frames", 128), *[("vocode", window)] * 6] * 2
    assert whole.std() > 0.02
    np.testing.assert_allclose(chunks, whole, atol=1e-3)


def test_a_batch_is_worked_on_in_equal_groups(
    pipe: AudioLDM2Pipeline, calls: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that a compiled stage sees one shape."""
    prompts = [HAMMER, "Rain falls", "A dog", "Wind", "Birds", "Techno"]
    whole = sound(pipe, prompts)
    assert calls == [("decode", 6, 16), ("vocode", 6, 64)]
    calls.clear()
    monkeypatch.setattr(audioldm2.decoding, "FRAMES_AT_ONCE", 5 * 64)
    groups = sound(pipe, prompts)
    assert calls == [*[("decode", 3, 16)] * 2, *[("vocode", 3, 64)] * 2]
    np.testing.assert_allclose(groups, whole, atol=1e-5)


@pytest.mark.parametrize(
    ("rows", "length", "longest", "groups"),
    [(6, 10, 60, [6]), (6, 10, 59, [3, 3]), (5, 10, 49, [1] * 5), (3, 100, 50, [1] * 3), (4, 10, 29, [2, 2])],
)
def test_equal_groups(rows: int, length: int, longest: int, groups: list[int]) -> None:
    x = noise(rows, 2, length)
    found = equal_groups(x, longest, axis=2)
    assert [len(group) for group in found] == groups
    assert torch.equal(torch.cat(found), x)
