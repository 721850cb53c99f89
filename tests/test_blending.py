"""Blends of prompts, and words with weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from audioldm2 import AudioLDM2Pipeline
from audioldm2.words import occurrences
from tests.helpers import assert_same_sound, load_pipeline, seeded
from tests.reference import Both

SHORT = {"num_inference_steps": 2, "audio_length_in_s": 0.64}


@pytest.fixture(scope="module")
def tiny() -> AudioLDM2Pipeline:
    return load_pipeline("tiny")


def encoded(pipe: AudioLDM2Pipeline, prompt: Any, **arguments: Any) -> tuple[torch.Tensor, ...]:
    return pipe.encode_prompt(prompt, do_classifier_free_guidance=False, **arguments)


def assert_equal(actual: Any, expected: Any) -> None:
    for one, other in zip(actual, expected, strict=True):
        assert torch.equal(one, other)


def blended(arguments: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
    return tuple(arguments[n] for n in ("prompt_embeds", "attention_mask", "generated_prompt_embeds"))


def test_a_blend_of_one_prompt_is_the_prompt(tiny: AudioLDM2Pipeline) -> None:
    assert_equal(blended(tiny.blend([("A bell over rain", 3)])), encoded(tiny, "A bell over rain"))
    output = tiny(**tiny.blend([("A bell", 1)]), num_waveforms_per_prompt=2, generator=seeded(), **SHORT)
    text = tiny("A bell", num_waveforms_per_prompt=2, generator=seeded(), **SHORT)
    assert_same_sound(output.audios, text.audios)
    assert output.scores == pytest.approx(text.scores, abs=1e-4)


def test_a_blend_joins_the_words_and_averages_the_vectors(tiny: AudioLDM2Pipeline) -> None:
    states, mask, vectors = blended(tiny.blend([("Rain", 3), ("A bell rings far away", 1)]))
    rain, bell = encoded(tiny, "Rain"), encoded(tiny, "A bell rings far away")
    assert torch.equal(states, torch.cat([rain[0], bell[0]], 1))
    assert bool(mask.all())
    torch.testing.assert_close(vectors, 0.75 * rain[2] + 0.25 * bell[2])


def test_blends_work_in_batches_with_negative_prompts_and_ranking(tiny: AudioLDM2Pipeline) -> None:
    blends = tiny.blend([[("Rain", 1), ("A bell", 1)], [("A siren over the waves", 1)]])
    output = tiny(**blends, negative_prompt="Wind", num_waveforms_per_prompt=2, generator=seeded(), **SHORT)
    assert len(output.audios) == 4
    assert output.scores[0] >= output.scores[1]
    assert torch.allclose(blends["clap_embeds"].norm(dim=1), torch.ones(2))
    without = {name: value for name, value in blends.items() if name != "clap_embeds"}
    assert tiny(**without, num_waveforms_per_prompt=2, **SHORT).scores is None


BAD_BLENDS: dict[str, tuple[Any, str]] = {
    "text": ("rain", "prompts must be a list of .prompt, weight."),
    "empty": ([], "prompts must be a list of .prompt, weight."),
    "empty blend": ([[("rain", 1)], []], "a blend must be a list of .prompt, weight."),
    "no weight": (["rain", "bell"], "a blend must have entries .prompt, weight."),
    "zero": ([("rain", 0)], "the weight of 'rain' must be a positive number, got 0"),
    "negative": ([("rain", -1)], "must be a positive number"),
    "nan": ([("rain", float("nan"))], "must be a positive number"),
    "text as weight": ([("rain", "1")], "must be a positive number"),
    "too long": ([("rain " * 30, 1), ("wind " * 90, 1)], "tokens together; 48 are read"),
}


@pytest.mark.filterwarnings("ignore:.*cut off")
@pytest.mark.parametrize("name", BAD_BLENDS)
def test_bad_blends_are_named(tiny: AudioLDM2Pipeline, name: str) -> None:
    value, message = BAD_BLENDS[name]
    with pytest.raises((TypeError, ValueError), match=message):
        tiny.blend(value)


def test_clap_embeds_go_with_prompt_embeds(tiny: AudioLDM2Pipeline) -> None:
    blend = tiny.blend([("rain", 1)])
    for arguments, message in (
        ({"prompt": "rain", "clap_embeds": blend["clap_embeds"]}, "clap_embeds goes with prompt_embeds"),
        ({**blend, "clap_embeds": blend["clap_embeds"].repeat(2, 1)}, "2 clap_embeds for 1 prompt_embeds"),
        ({**blend, "clap_embeds": blend["clap_embeds"][:, 1:]}, "clap_embeds has shape"),
        ({**blend, "word_weights": {"rain": 2}}, "word_weights goes with prompt"),
    ):
        with pytest.raises(ValueError, match=message):
            tiny(**arguments, **SHORT)


# --- words with weights


def test_weighted_words_scale_their_states_alone(tiny: AudioLDM2Pipeline) -> None:
    prompt = "A siren OVER rain, rainy and over  Rain"
    states, mask, vectors = encoded(tiny, prompt)
    assert_equal(encoded(tiny, prompt, word_weights={"rain": 1, "a Siren": 1.0}), (states, mask, vectors))
    weighted = encoded(tiny, prompt, word_weights={"rain": 1.5, "over": 0.25, "over rain": 2})
    assert_equal(weighted[1:], (mask, vectors))
    ratio = (weighted[0] / states)[0].nan_to_num(1).median(dim=-1).values.tolist()
    # A, siren, O-V-E-R, rain, comma, rain-y, a-nd, o-ver, Rain, end
    over, rain = 0.25 * 2, 1.5 * 2  # of the phrase, too
    expected = [1, 1, over, over, over, over, rain, 1, 1, 1, 1, 1, over, over, rain, 1]
    assert ratio == pytest.approx(expected, rel=1e-5)


def test_words_match_as_wholes_in_any_case() -> None:
    assert occurrences("Rain, rainy RAIN train", "rain") == [(0, 4), (12, 16)]
    assert occurrences("heavy   rain", "Heavy rain") == [(0, 12)]
    assert occurrences("a.b axb", "a.b") == [(0, 3)]


def test_weights_apply_to_each_prompt_and_not_to_negative_ones(tiny: AudioLDM2Pipeline) -> None:
    prompts = ["A siren over rain", "Rain"]
    plain = tiny.encode_prompt(prompts, negative_prompt="rain")[0]
    ratio = tiny.encode_prompt(prompts, negative_prompt="rain", word_weights={"rain": 2})[0] / plain
    factors = ratio.nan_to_num(1).median(dim=-1).values
    assert factors[:2].unique().tolist() == [1.0]
    assert [(row == 2).sum().item() for row in factors[2:]] == [1, 1]
    listed = tiny.encode_prompt(prompts, negative_prompt="rain", word_weights=[{"siren": 2}, None])[0] / plain
    assert [(row == 2).sum().item() for row in listed.nan_to_num(1).median(dim=-1).values] == [0, 0, 1, 0]


def test_weights_reach_the_sound(tiny: AudioLDM2Pipeline) -> None:
    def sound(**arguments: Any) -> Any:
        return tiny("A siren over rain", generator=seeded(), **SHORT, **arguments).audios

    plain = sound()
    assert (sound(word_weights={"siren": 1}) == plain).all()
    assert (sound(word_weights={"siren": 0}) != plain).any()


BAD_WEIGHTS: dict[str, tuple[Any, str]] = {
    "absent": ({"train": 2}, "word_weights has 'train', which is not a word of the prompt"),
    "part": ({"rai": 2}, "'rai', which is not a word"),
    "absent in its own": (
        [{"bell": 2}, {"bell": 1}],
        "'bell', which is not a word of 'A bell over rain'|'Rain'",
    ),
    "list": ([{"rain": 2}], "got 1 word_weights for 2 prompts"),
    "entry": ([2, 3], "word_weights must hold dicts"),
    "text": ("rain", "word_weights must be a dict"),
    "negative": ({"rain": -1}, "word_weights must be numbers of at least 0, but that of 'rain' is -1"),
    "nan": ({"rain": float("nan")}, "that of .rain. is nan"),
    "empty": ({" ": 2}, "word_weights must have words as keys"),
}


@pytest.mark.parametrize("name", BAD_WEIGHTS)
def test_bad_word_weights_are_named(tiny: AudioLDM2Pipeline, name: str) -> None:
    value, message = BAD_WEIGHTS[name]
    with pytest.raises((TypeError, ValueError), match=message):
        encoded(tiny, ["A bell over rain", "Rain"], word_weights=value)


@pytest.mark.filterwarnings("ignore:.*cut off")
def test_a_word_that_is_cut_off_is_named(tiny: AudioLDM2Pipeline) -> None:
    with pytest.raises(ValueError, match="'bell', which is beyond the 48 tokens that are read"):
        encoded(tiny, "rain " * 140 + "bell", word_weights={"bell": 2})


def test_speech_checkpoints_refuse_both(speech: Both) -> None:
    with pytest.raises(ValueError, match="word_weights is not for speech checkpoints"):
        encoded(speech.ours, "A woman", transcription="Hello", word_weights={"woman": 2})
    with pytest.raises(ValueError, match="blend is not for speech checkpoints"):
        speech.ours.blend([("A woman", 1)])
