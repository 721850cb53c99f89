"""Prompts and embeddings to what the UNet attends to, against diffusers' `encode_prompt`."""

from __future__ import annotations

import json
import shutil
import warnings
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from audioldm2 import AudioLDM2Pipeline
from tests.helpers import HAMMER, RAIN, assert_same_sound, load_pipeline, seeded, sound
from tests.reference import Both, assert_close

COND = ("prompt_embeds", "attention_mask", "generated_prompt_embeds")
UNCOND = ("negative_prompt_embeds", "negative_attention_mask", "negative_generated_prompt_embeds")


def embeddings(pipe: Any, prompt: str | list[str], names: tuple[str, str, str] = COND) -> dict[str, Tensor]:
    """The arguments that replace a prompt, or with the names of `UNCOND` a negative prompt."""
    values = pipe.encode_prompt(prompt, torch.device("cpu"), 1, False)
    return dict(zip(names, values, strict=True))


# --- texts


@pytest.mark.filterwarnings("ignore:.*cut off", "ignore:negative_prompt has no effect")
@pytest.mark.parametrize("guided", [True, False])
@pytest.mark.parametrize("waveforms", [1, 3])
@pytest.mark.parametrize(
    "negative", [["Low quality", "noisy"], ["Low quality, average quality, noisy and dull.", "Techno"]]
)
def test_encode_prompt_equals_diffusers(
    base: Both, guided: bool, waveforms: int, negative: list[str]
) -> None:
    """Also if a negative prompt is longer than the prompts; it is cut to their length."""
    arguments = ([HAMMER, RAIN], torch.device("cpu"), waveforms, guided)
    ours = base.ours.encode_prompt(*arguments, negative_prompt=negative)
    theirs = base.theirs.encode_prompt(*arguments, negative_prompt=negative)
    for actual, expected in zip(ours, theirs, strict=True):
        assert actual.dtype == expected.dtype
        assert_close(actual, expected)


def test_rows_of_one_prompt_are_together_and_the_unconditional_side_comes_first(base: Both) -> None:
    single = base.ours.encode_prompt([HAMMER, RAIN], negative_prompt=["Low", "Techno"])
    triple = base.ours.encode_prompt([HAMMER, RAIN], None, 3, negative_prompt=["Low", "Techno"])
    for one, three in zip(single, triple, strict=True):
        assert torch.equal(three, one.repeat_interleave(3, dim=0))
    plain = base.ours.encode_prompt([HAMMER, RAIN], do_classifier_free_guidance=False)
    for guided, cond in zip(single, plain, strict=True):
        assert_close(guided[2:], cond, 1e-5)


def test_encode_prompt_returns_its_result_on_the_device_asked_for(base: Both) -> None:
    assert {x.device.type for x in base.ours.encode_prompt(HAMMER, "meta")} == {"meta"}
    assert {x.device.type for x in base.ours.encode_prompt(HAMMER)} == {"cpu"}


def test_one_negative_prompt_is_used_for_all_prompts(base: Both) -> None:
    one = base.ours.encode_prompt([HAMMER, RAIN], negative_prompt="Techno")
    each = base.ours.encode_prompt([HAMMER, RAIN], negative_prompt=["Techno"] * 2)
    assert all(map(torch.equal, one, each))


@pytest.mark.parametrize("guided", [True, False])
def test_prompts_are_encoded_once_and_in_one_batch(
    pipe: AudioLDM2Pipeline, guided: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if candidates are ranked, for which CLAP's embedding of the prompt is used again."""
    batches: dict[str, list[int]] = {}

    def count(name: str, owner: object, method: str) -> None:
        original = getattr(owner, method)

        def counting(*arguments: Tensor, **options: Tensor) -> object:
            batches.setdefault(name, []).append(len([*arguments, *options.values()][0]))
            return original(*arguments, **options)

        monkeypatch.setattr(owner, method, counting)

    count("clap", pipe.text_encoder, "text_features")
    count("t5", pipe.text_encoder_2, "forward")
    count("projection", pipe.projection_model, "forward")
    count("gpt2", pipe.language_model, "generate")
    sound(pipe, [HAMMER, RAIN], num_waveforms_per_prompt=2, guidance_scale=3.5 if guided else 1.0)
    assert batches == {name: [4 if guided else 2] for name in ("clap", "t5", "projection", "gpt2")}


# --- texts that are too long


def test_a_warning_says_what_is_cut_off(base: Both) -> None:
    with pytest.warns(UserWarning, match=r"longer than the 32 tokens that are read; cut off: .*birds'"):
        base.ours.encode_prompt(" ".join([HAMMER] * 4) + " and birds")
    with pytest.warns(UserWarning, match=r"longer than the prompt's \d+ tokens; cut off: '.*dull\.'"):
        base.ours.encode_prompt("Rain", negative_prompt="Low quality, noisy and dull.")


def test_there_is_one_warning_for_each_text_though_both_tokenizers_cut_it(pipe: AudioLDM2Pipeline) -> None:
    prompts = [" ".join([one] * 9) for one in (HAMMER, RAIN)]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        sound(pipe, prompts, num_waveforms_per_prompt=2)
    messages = [str(warning.message) for warning in caught]
    assert [message.partition(" is longer")[0] for message in messages] == [*map(repr, prompts)]


def test_a_short_prompt_causes_no_warning(pipe: AudioLDM2Pipeline) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sound(pipe, num_waveforms_per_prompt=2)


@pytest.mark.filterwarnings("ignore:.*cut off")
def test_without_a_tokenizers_limit_prompts_may_be_as_long_as_the_stages_can_read(
    pipe: AudioLDM2Pipeline, random_checkpoint: Path, tmp_path: Path
) -> None:
    """diffusers fails with every prompt here."""
    folder = shutil.copytree(random_checkpoint, tmp_path / "unlimited")
    for name in ("tokenizer", "tokenizer_2"):
        path = folder / name / "tokenizer_config.json"
        config = json.loads(path.read_text())
        del config["model_max_length"]
        path.write_text(json.dumps(config))
    unlimited = load_pipeline(folder)
    assert unlimited.tokenizer_2.model_max_length > 10**9
    with pytest.warns(UserWarning, match="longer than the 68 tokens that are read"):
        states, _, vectors = unlimited.encode_prompt(" ".join([HAMMER] * 9))
    assert states.shape[1] == 68
    assert vectors.shape[1] == 8
    assert_same_sound(sound(unlimited), sound(pipe))


# --- embeddings in place of texts


def test_given_embeddings_equal_diffusers(base: Both) -> None:
    cond = embeddings(base.theirs, [HAMMER, RAIN])
    from_text = base.check(prompt=[HAMMER, RAIN])
    from_embeddings = base.check(**cond)
    np.testing.assert_allclose(from_embeddings, from_text, atol=1e-3)

    uncond = embeddings(base.theirs, ["Low quality, noisy", "Low quality"], UNCOND)
    missing = cond["prompt_embeds"].shape[1] - uncond["negative_prompt_embeds"].shape[1]
    uncond["negative_prompt_embeds"] = F.pad(uncond["negative_prompt_embeds"], (0, 0, 0, missing))
    uncond["negative_attention_mask"] = F.pad(uncond["negative_attention_mask"], (0, missing))
    both_given = base.check(**cond, **uncond)
    assert np.abs(both_given - from_embeddings).max() > 0.01, "the negative embeddings have no effect"

    base.check(prompt=[HAMMER, RAIN], **uncond)
    base.check(**cond, num_waveforms_per_prompt=2)  # without a text there is nothing to rank by
    without_mask = {name: value for name, value in cond.items() if name != "attention_mask"}
    base.check(**without_mask, guidance_scale=1.0)


TEXTS: dict[str, dict[str, Any]] = {
    "base": {"prompt": [HAMMER, RAIN], "negative_prompt": ["Low quality", "Techno"]},
    "speech": {
        "prompt": ["A woman is speaking", "A man"],
        "negative_prompt": ["Low quality", "noisy"],
        "transcription": ["go home", "stay"],
    },
}


@pytest.mark.filterwarnings("ignore:negative_prompt has no effect")
@pytest.mark.parametrize("layout", TEXTS)
@pytest.mark.parametrize(("cond_is", "uncond_is"), product(("text", "embeddings"), repeat=2))
@pytest.mark.parametrize("guided", [True, False])
def test_each_side_may_be_given_as_text_or_as_embeddings(
    request: pytest.FixtureRequest, layout: str, cond_is: str, uncond_is: str, guided: bool
) -> None:
    pipe, texts = request.getfixturevalue(layout).ours, TEXTS[layout]
    expected = pipe.encode_prompt(**texts)
    uncond, cond = zip(*(x.chunk(2) for x in expected), strict=True)
    arguments: dict[str, Any] = {"prompt": None}
    if cond_is == "text":
        arguments |= {name: text for name, text in texts.items() if name != "negative_prompt"}
    else:
        arguments |= dict(zip(COND, (cond[0], cond[1], cond[2]), strict=True))
    if uncond_is == "text":
        arguments |= {"negative_prompt": texts["negative_prompt"]}
    else:
        arguments |= dict(zip(UNCOND, uncond, strict=True))
    actual = pipe.encode_prompt(**arguments, do_classifier_free_guidance=guided)
    for got, wanted in zip(actual, expected if guided else cond, strict=True):
        # Up to rounding, which depends on the size of the batch.
        assert_close(got, wanted, 1e-5)


def test_embeddings_without_a_mask_have_no_padding(base: Both) -> None:
    states, mask, vectors = base.ours.encode_prompt([HAMMER, RAIN], do_classifier_free_guidance=False)
    assert not mask.all()
    found = base.ours.encode_prompt(
        None, do_classifier_free_guidance=False, prompt_embeds=states, generated_prompt_embeds=vectors
    )
    assert torch.equal(found[1], torch.ones_like(mask))
    assert torch.equal(found[0], states)


def test_prompt_embeddings_beside_a_negative_text_give_what_two_texts_give(base: Both) -> None:
    """diffusers refuses this, because it asks for both sides in one form."""
    given = embeddings(base.ours, HAMMER)
    # A prompt that is encoded alone is rounded differently than beside a negative one.
    assert_same_sound(
        sound(base.ours, None, **given, negative_prompt="Low quality"),
        sound(base.ours, negative_prompt="Low quality"),
        1e-5,
    )


@pytest.mark.parametrize("longer", ["cond", "uncond"])
def test_the_side_with_fewer_states_is_padded_behind_its_mask(base: Both, longer: str) -> None:
    """diffusers cannot concatenate sides of different lengths. The values of the padding do not matter."""
    pipe = base.ours
    texts = (HAMMER, "Low") if longer == "cond" else ("Rain", "Low quality, average quality, noisy")
    cond, uncond = embeddings(pipe, texts[0]), embeddings(pipe, texts[1], UNCOND)
    short, names = (uncond, UNCOND) if longer == "cond" else (cond, COND)
    lengths = cond["prompt_embeds"].shape[1], uncond["negative_prompt_embeds"].shape[1]
    missing = max(lengths) - min(lengths)
    assert missing > 0
    assert short[names[0]].shape[1] == min(lengths)
    actual = sound(pipe, None, **cond, **uncond)
    short[names[0]] = F.pad(short[names[0]], (0, 0, 0, missing), value=3.0)
    short[names[1]] = F.pad(short[names[1]], (0, missing))
    assert_same_sound(actual, sound(pipe, None, **cond, **uncond))


def test_given_embeddings_are_repeated_for_each_waveform(base: Both) -> None:
    given = embeddings(base.ours, [HAMMER, RAIN])
    from_text = base.ours.encode_prompt([HAMMER, RAIN], None, 2, False)
    found = base.ours.encode_prompt(None, None, 2, False, **given)
    assert all(map(torch.equal, found, from_text))


def test_embeddings_of_another_dtype_are_converted(base: Both) -> None:
    given = embeddings(base.ours, HAMMER)
    doubles = {name: x.double() if x.is_floating_point() else x for name, x in given.items()}
    expected = base.ours(**given, num_inference_steps=1, generator=seeded()).audios
    np.testing.assert_array_equal(
        base.ours(**doubles, num_inference_steps=1, generator=seeded()).audios, expected
    )
