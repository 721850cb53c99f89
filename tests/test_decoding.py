"""Decoding and vocoding in the pipeline: a long sound in chunks, a batch of short ones in equal groups."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import audioldm2.decoding
from audioldm2 import AudioLDM2Pipeline
from audioldm2.decoding import equal_groups, frames_and_samples
from tests.helpers import HAMMER, noise, sound


@pytest.fixture
def calls(pipe: AudioLDM2Pipeline, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, int]]:
    """Calls of the VAE and the vocoder: the method, and the number of rows and the length of its input."""
    found: list[tuple[str, int, int]] = []

    def watching(name: str, f: Callable[..., Tensor], axis: int) -> Callable[..., Tensor]:
        def watched(x: Tensor, *arguments: Any) -> Tensor:
            found.append((name, x.shape[0], x.shape[axis]))
            return f(x, *arguments)

        return watched

    monkeypatch.setattr(pipe.vae, "decode", watching("decode", pipe.vae.decode, 2))
    decode_in_chunks = watching("decode in chunks", pipe.vae.decode_in_chunks, 2)
    monkeypatch.setattr(pipe.vae, "decode_in_chunks", decode_in_chunks)
    monkeypatch.setattr(pipe.vocoder, "forward", watching("vocode", pipe.vocoder.forward, 1))
    # By default its chunks are longer than these sounds.
    in_chunks = partial(pipe.vocoder.in_chunks, frames=24)
    monkeypatch.setattr(pipe.vocoder, "in_chunks", watching("vocode in chunks", in_chunks, 1))
    return found


def test_a_long_sound_is_decoded_and_vocoded_in_chunks(
    pipe: AudioLDM2Pipeline, calls: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = sound(pipe, audio_length_in_s=1.28, num_waveforms_per_prompt=2)
    assert calls == [("decode", 2, 32), ("vocode", 2, 128)]
    calls.clear()
    monkeypatch.setattr(audioldm2.decoding, "FRAMES_AT_ONCE", 40)
    chunks = sound(pipe, audio_length_in_s=1.28, num_waveforms_per_prompt=2)
    assert calls[:2] == [("decode in chunks", 1, 32)] * 2
    frames = [(name, length) for name, _, length in calls[2:]]
    window = 24 + 2 * pipe.vocoder.reach
    assert window < 128
    assert frames == [("vocode in chunks", 128), *[("vocode", window)] * 6] * 2
    assert whole.std() > 0.02
    np.testing.assert_allclose(chunks, whole, atol=1e-3)


def test_a_batch_is_decoded_in_groups_of_equal_size(
    pipe: AudioLDM2Pipeline, calls: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A compiled stage then sees a single shape."""
    prompts = [HAMMER, "Rain falls", "A dog", "Wind", "Birds", "Techno"]
    whole = sound(pipe, prompts, audio_length_in_s=0.64)
    assert calls == [("decode", 6, 16), ("vocode", 6, 64)]
    calls.clear()
    monkeypatch.setattr(audioldm2.decoding, "FRAMES_AT_ONCE", 5 * 64)
    groups = sound(pipe, prompts, audio_length_in_s=0.64)
    assert calls == [*[("decode", 3, 16)] * 2, *[("vocode", 3, 64)] * 2]
    np.testing.assert_allclose(groups, whole, atol=1e-5)


@pytest.mark.parametrize(
    ("rows", "length", "longest", "groups"),
    [(6, 10, 60, [6]), (6, 10, 59, [3, 3]), (5, 10, 49, [1] * 5), (3, 100, 50, [1] * 3), (4, 10, 29, [2, 2])],
)
def test_groups_have_equal_sizes_and_keep_the_order(
    rows: int, length: int, longest: int, groups: list[int]
) -> None:
    x = noise(rows, 2, length)
    found = equal_groups(x, longest, axis=2)
    assert [len(group) for group in found] == groups
    assert torch.equal(torch.cat(found), x)


# --- lengths


def lengths(seconds: float | None, **config: Any) -> tuple[int, int]:
    """Frames and samples with a hop of 160 samples at 16 kHz, and four frames for each latent."""
    vocoder = SimpleNamespace(hop_length=160, config=SimpleNamespace(sampling_rate=16000))
    unet = SimpleNamespace(config=SimpleNamespace(**config)) if config else object()
    return frames_and_samples(unet, SimpleNamespace(downsampling=4), vocoder, seconds)


@pytest.mark.parametrize(
    ("seconds", "frames", "samples"),
    [(10.24, 1024, 163840), (1.0, 100, 16000), (0.995, 100, 15920), (0.777, 80, 12432), (0.04, 4, 640)],
)
def test_frames_are_a_multiple_of_the_vaes_factor_and_samples_are_cut_to_the_length(
    seconds: float, frames: int, samples: int
) -> None:
    assert lengths(seconds) == (frames, samples)


@pytest.mark.parametrize("size", [256, (256, 16), [256, 16]], ids=repr)
def test_by_default_a_sound_is_as_long_as_those_of_the_training(size: Any) -> None:
    assert lengths(None, sample_size=size) == (1024, 163840)


@pytest.mark.parametrize("config", [{}, {"sample_size": None}, {"in_channels": 8}], ids=repr)
def test_a_length_is_needed_if_the_checkpoint_does_not_state_one(config: dict) -> None:
    with pytest.raises(ValueError, match="pass audio_length_in_s"):
        lengths(None, **config)
