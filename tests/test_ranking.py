"""Candidates are scored by CLAP and ordered within their prompt."""

from __future__ import annotations

from itertools import permutations
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from audioldm2 import AudioLDM2Pipeline
from audioldm2.ranking import best_first, score
from tests.helpers import HAMMER, RAIN, assert_same_sound, noise, seeded, sound
from tests.reference import Both, assert_close
from tests.test_conditioning import embeddings

# --- the order


def test_each_prompts_candidates_are_ordered_by_their_own_scores() -> None:
    audio = torch.arange(6.0)[:, None].expand(6, 2)  # each candidate is named by its samples
    scores = torch.tensor([[0.1, 0.9, 0.5], [-0.2, -0.4, -0.3]])
    ordered, sorted_scores = best_first(audio, scores)
    assert ordered[:, 0].tolist() == [1, 2, 0, 3, 5, 4]
    assert torch.equal(sorted_scores, torch.tensor([0.9, 0.5, 0.1, -0.2, -0.3, -0.4]))


@pytest.mark.parametrize("values", permutations((0.1, 0.2, 0.3)))
def test_the_best_candidate_is_the_first(values: tuple[float, ...]) -> None:
    scores = torch.tensor([values])
    ordered, _ = best_first(scores.T, scores)
    assert ordered.flatten().tolist() == torch.tensor([0.3, 0.2, 0.1]).tolist()


def test_candidates_with_equal_scores_keep_their_order() -> None:
    audio = torch.arange(40.0)[:, None]
    assert torch.equal(best_first(audio, torch.ones(2, 20))[0], audio)


def test_one_candidate_needs_no_order() -> None:
    audio = noise(3, 5)
    assert torch.equal(best_first(audio, noise(3, 1))[0], audio)


# --- the scores


class Listener(nn.Module):
    """In place of CLAP: the embedding of a sound is its first features, normalized."""

    def __init__(self, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1, dtype=dtype))
        self.seen: list[Tensor] = []

    def audio_features(self, input_features: Tensor) -> Tensor:
        self.seen.append(input_features)
        return F.normalize(input_features.flatten(1)[:, :4], dim=-1)


class FrontEnd:
    """In place of CLAP's front end: the samples are the features."""

    config = SimpleNamespace(sampling_rate=8000)

    def __init__(self) -> None:
        self.generators: list[Any] = []

    def __call__(self, waveforms: Tensor, rate: int, generator: torch.Generator | None) -> Tensor:
        assert rate == 8000
        self.generators.append(generator)
        return waveforms


def test_a_score_is_the_cosine_between_a_sound_and_its_own_prompt() -> None:
    texts, sounds = F.normalize(noise(2, 4), dim=-1), noise(6, 10, seed=1)
    scores = score(Listener(), FrontEnd(), texts, sounds, 8000)
    assert scores.shape == (2, 3)
    expected = F.cosine_similarity(sounds[:, :4].view(2, 3, 4), texts[:, None], dim=-1)
    assert_close(scores, expected, 1e-6)


def test_sounds_are_resampled_to_the_front_ends_rate_and_converted_to_claps_dtype() -> None:
    listener, front_end, generator = Listener(torch.bfloat16), FrontEnd(), seeded()
    texts = F.normalize(noise(1, 4), dim=-1)
    scores = score(listener, front_end, texts, noise(2, 100), 16000, generator)
    (features,) = listener.seen
    assert features.shape == (2, 50)
    assert features.dtype == scores.dtype == torch.bfloat16
    assert front_end.generators == [generator]


# --- in the pipeline


def test_candidates_of_one_prompt_are_ranked_as_in_diffusers(base: Both) -> None:
    base.check(prompt=HAMMER, num_waveforms_per_prompt=4)


def test_candidates_stay_with_their_prompt(base: Both) -> None:
    """In the order in which diffusers ranks the candidates of that prompt alone."""
    theirs, prompts = base.theirs, [HAMMER, RAIN]
    arguments = {"num_waveforms_per_prompt": 3, "num_inference_steps": 3, "audio_length_in_s": 0.64}
    # With embeddings in place of the text, diffusers has nothing to rank by.
    drawn = theirs(**embeddings(theirs, prompts), **arguments, generator=seeded()).audios
    blocks = np.split(drawn, 2)
    ranked = [
        theirs.score_waveforms(prompt, torch.from_numpy(block), 3, "cpu", torch.float32).numpy()
        for prompt, block in zip(prompts, blocks, strict=True)
    ]
    differences = [np.abs(one - block).max() for one, block in zip(ranked, blocks, strict=True)]
    assert max(differences) > 1e-3, "they were drawn in order, which proves nothing"
    assert_same_sound(sound(base.ours, prompts, **arguments), np.concatenate(ranked))


def test_candidates_from_embeddings_are_not_ranked(base: Both) -> None:
    """CLAP's embedding of the prompt is not among the embeddings."""
    arguments = {"num_waveforms_per_prompt": 4, "guidance_scale": 1.0}
    drawn = sound(base.ours, None, **embeddings(base.ours, HAMMER), **arguments)
    ranked = sound(base.ours, **arguments)
    order = [int(np.abs(drawn - one).max(axis=1).argmin()) for one in ranked]
    assert sorted(order) == [0, 1, 2, 3]
    assert_same_sound(drawn[order], ranked, 1e-4)


def test_the_first_generator_decides_which_part_clap_hears(
    pipe: AudioLDM2Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sound longer than CLAP's window is cut at random; the same seed has to give the same order."""
    generators = []
    front_end = pipe.feature_extractor

    def recording(*arguments: Any) -> Tensor:
        generators.append(arguments[2])
        return front_end(*arguments)

    recording.config = front_end.config  # type: ignore[attr-defined]
    monkeypatch.setattr(pipe, "feature_extractor", recording)
    one, each = seeded(), [seeded(1), seeded(2)]
    for generator in (one, each):
        pipe(
            HAMMER,
            generator=generator,
            num_inference_steps=1,
            audio_length_in_s=0.32,
            num_waveforms_per_prompt=2,
        )
    assert generators[0] is one
    assert generators[1] is each[0]
