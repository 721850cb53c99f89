"""The captions of the tiny checkpoint's sounds, and the library of sounds and captions."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from audioldm2.audio.log_mel import LogMel, LogMelConfig
from scripts.tiny.data.captions import ADJECTIVES, NOUNS, PHRASES, caption
from scripts.tiny.data.library import CAPTIONS_PER_SOUND, load_library, make_library
from scripts.tiny.data.sounds import ALL_SOUNDS, CLIP_SAMPLES, Scene, Sound, draw_scene
from scripts.tiny.sizes import HOP_LENGTH


def says(text: str, quality: str) -> bool:
    return any(words in text for words in (*ADJECTIVES[quality], *PHRASES[quality]))


@pytest.mark.parametrize("held_out", [False, True])
@pytest.mark.parametrize("sound", ALL_SOUNDS, ids=lambda sound: f"{sound.kind} {sound.trait}".strip())
def test_a_caption_names_everything_in_the_scene(sound: Sound, held_out: bool) -> None:
    rng = np.random.default_rng(0)
    for loudness in ("", "loud", "soft"):
        for _ in range(20):
            text = caption(Scene((sound,), loudness), rng, held_out).lower()
            nouns = [re.sub("^an? ", "", noun) for noun in NOUNS[sound.kind]]
            assert any(noun in text for noun in nouns), text
            assert all(says(text, quality) for quality in (sound.trait, loudness) if quality), text
            assert not re.search(r"\ba [aeiou](?!ne)|\ban [^aeiou]", text), text


def test_both_sounds_of_a_scene_are_named() -> None:
    rng = np.random.default_rng(0)
    for held_out in (False, True):
        for _ in range(50):
            text = caption(Scene((Sound("bell"), Sound("wind"))), rng, held_out)
            assert "bell" in text.lower()
            assert "wind" in text.lower()


def test_held_out_captions_never_occur_in_training_but_use_its_words() -> None:
    rng = np.random.default_rng(0)
    trained, held_out = (
        {caption(draw_scene(rng), rng, out).lower().rstrip(".") for _ in range(20_000)}
        for out in (False, True)
    )
    assert not trained & held_out
    words = [set(re.findall(r"\w+", " ".join(texts))) for texts in (trained, held_out)]
    assert words[1] <= words[0]


def test_the_library_is_the_same_from_disk_and_differs_between_seeds(tmp_path: Path) -> None:
    made = make_library(3, seed=5)
    load_library(tmp_path, 3, seed=5)
    loaded = load_library(tmp_path, 3, seed=5)  # now from disk
    assert loaded.scenes == made.scenes
    assert loaded.captions == made.captions
    assert [len(texts) for texts in loaded.captions] == [CAPTIONS_PER_SOUND] * 3
    torch.testing.assert_close(loaded.waveforms([0, 2]), made.waveforms([0, 2]), rtol=0, atol=0)
    assert loaded.waveforms(torch.tensor([1])).shape == (1, CLIP_SAMPLES)
    mels = LogMel(LogMelConfig(hop_length=HOP_LENGTH))(loaded.waveforms([0, 1, 2]), 16000)
    torch.testing.assert_close(loaded.mels([0, 1, 2]), mels, rtol=0, atol=0.01)  # float16 on disk
    assert (make_library(1, seed=6).waveforms([0]) != made.waveforms([0])).any()


def test_a_sound_does_not_depend_on_the_size_of_the_library() -> None:
    torch.testing.assert_close(make_library(2, 0).waveforms([1]), make_library(4, 0).waveforms([1]))
