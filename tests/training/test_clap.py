"""CLAP's loss against transformers' and against its formula."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from audioldm2.models.clap import ClapModel
from audioldm2.training.clap import contrastive_loss, limit_scales
from tests.helpers import noise
from tests.models.test_clap import CONFIGS, prompts, reference, sounds, stage, tensors_of
from tests.reference import assert_close
from tests.training.helpers import descend

CONFIG = CONFIGS["hub-like"]


@pytest.fixture
def clap() -> ClapModel:
    return stage(tensors_of(reference(CONFIG)), CONFIG)


def test_the_loss_equals_that_of_transformers_logits(clap: ClapModel) -> None:
    ids, mask = prompts(3, 9, pad=1)
    features = sounds(CONFIG, 3)
    model = reference(CONFIG)
    outputs = model(input_ids=ids, attention_mask=mask, input_features=features)
    of_texts, of_sounds = (
        F.cross_entropy(logits, torch.arange(3))
        for logits in (outputs.logits_per_text, outputs.logits_per_audio)
    )
    text, sound = clap.text_features(ids, mask), clap.audio_features(features)
    assert_close(contrastive_loss(clap, text, sound), (of_texts + of_sounds) / 2)
    assert clap.logit_scale_a != clap.logit_scale_t, "random scales, so each has to be at its place"


def test_all_positives_of_a_row_count_alike(clap: ClapModel) -> None:
    text = F.normalize(noise(4, 6), dim=1)
    sound = F.normalize(noise(3, 6, seed=1), dim=1)
    positives = torch.tensor([[1, 0, 1], [0, 1, 0], [1, 0, 1], [0, 0, 0]]).bool()  # the last fits nothing
    per_text = (clap.logit_scale_t.exp() * text @ sound.T).log_softmax(1)
    per_sound = (clap.logit_scale_a.exp() * sound @ text.T).log_softmax(1)
    of_texts = -(per_text[0, 0] + per_text[0, 2]) / 2 - per_text[1, 1] - (per_text[2, 0] + per_text[2, 2]) / 2
    of_sounds = -(per_sound[0, 0] + per_sound[0, 2]) / 2 - per_sound[1, 1]
    of_sounds = of_sounds - (per_sound[2, 0] + per_sound[2, 2]) / 2
    expected = (of_texts / 3 + of_sounds / 3) / 2
    torch.testing.assert_close(contrastive_loss(clap, text, sound, positives), expected)


def test_what_fits_must_be_said_and_must_have_the_right_shape(clap: ClapModel) -> None:
    with pytest.raises(ValueError, match="4 texts and 3 sounds need positives"):
        contrastive_loss(clap, noise(4, 6), noise(3, 6))
    with pytest.raises(ValueError, match=r"positives has shape \(3, 4\); it must be .* \(4, 3\)"):
        contrastive_loss(clap, noise(4, 6), noise(3, 6), torch.ones(3, 4).bool())


def test_the_scales_are_kept_from_1_to_100(clap: ClapModel) -> None:
    with torch.no_grad():
        clap.logit_scale_a.fill_(9.0)
        clap.logit_scale_t.fill_(-0.5)
    limit_scales(clap)
    assert clap.logit_scale_a.exp().item() == pytest.approx(100)
    assert clap.logit_scale_t.item() == 0
    with torch.no_grad():
        clap.logit_scale_a.fill_(math.log(14))
    limit_scales(clap)
    assert clap.logit_scale_a.exp().item() == pytest.approx(14)


def test_a_short_run_makes_texts_find_their_sounds(clap: ClapModel) -> None:
    ids, mask = prompts(4, 9, pad=1)
    features = sounds(CONFIG, 4)

    def loss(generator: torch.Generator) -> dict[str, Tensor]:
        limit_scales(clap)
        text, sound = clap.text_features(ids, mask), clap.audio_features(features)
        return {"loss": contrastive_loss(clap, text, sound)}

    clap.train()  # the audio tower's norm has no statistics yet
    losses = descend(clap, loss, steps=25, rate=3e-3)["loss"]
    assert losses[-1] < 0.5 * losses[0]
    with torch.no_grad():
        similarity = clap.text_features(ids, mask) @ clap.audio_features(features).T
    assert similarity.argmax(1).tolist() == list(range(4))
