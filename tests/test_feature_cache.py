"""Feature caching: which steps run which levels, and what must not change."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from audioldm2 import AudioLDM2Pipeline, DPMSolverMultistepScheduler, record_attention
from audioldm2.feature_cache import FeatureCaching, as_feature_caching
from tests.helpers import assert_same_sound, noise, sound
from tests.reference import Both

CUT = FeatureCaching(interval=3, level=1)


def calls_of_the_levels(pipe: AudioLDM2Pipeline, calls: list[str]) -> None:
    for name, module in (*pipe.unet.down.named_children(), ("middle", pipe.unet.middle)):
        module.register_forward_hook(lambda *_, name=name: calls.append(name))


@pytest.mark.parametrize(
    ("caching", "steps", "expected"),
    [
        (FeatureCaching(3), 7, [0, 3, 6]),
        (FeatureCaching(1), 3, [0, 1, 2]),
        (FeatureCaching(9), 4, [0]),
        (FeatureCaching(3, power=2), 12, [0, 1, 3, 7]),
        (FeatureCaching(2, power=0.5), 8, [0, 4, 6, 7]),
        (FeatureCaching(2, power=50), 8, [0, 1, 2, 3]),
        (FeatureCaching(2, power=0.01), 8, [0, 5, 6, 7]),
        (FeatureCaching(steps=[0, 1, 5]), 6, [0, 1, 5]),
    ],
)
def test_the_steps_that_run_all_levels(caching: FeatureCaching, steps: int, expected: list[int]) -> None:
    assert caching.full_steps(steps) == expected


@pytest.mark.parametrize("level", [0, 1])
def test_features_of_the_same_latents_give_the_same_prediction(base: Both, level: int) -> None:
    unet = base.ours.unet
    latents = noise(2, 4, 13, 4)  # an odd height, which halving rounds up
    for rows in (2, 4):
        contexts = unet.contexts(noise(rows, 8, 16), noise(rows, 5, 20))
        with torch.no_grad():
            expected = unet(latents, 500, contexts=contexts)
            actual, features = unet(latents, 500, contexts=contexts, level=level)
            again = unet(latents, 500, contexts=contexts, level=level, features=features)
            other = unet(latents, 500, contexts=contexts, level=level, features=features.flip(2))
        assert torch.equal(actual, expected)
        assert torch.equal(again, expected)
        assert not torch.allclose(other, expected, atol=1e-3)


def test_levels_and_features_that_do_not_fit_are_refused(base: Both) -> None:
    unet = base.ours.unet
    contexts = unet.contexts(noise(1, 8, 16), noise(1, 5, 20))
    options: list[tuple[dict[str, Any], str]] = [
        ({"features": noise(1, 24, 12, 4)}, "features go with level"),
        ({"level": 2}, "level = 2 has none below it; this UNet has features for 0 to 1"),
        ({"level": -1}, "level = -1"),
        ({"level": 0, "features": noise(1, 24, 12, 4)}, r"should be \(1, 16, time, frequency\)"),
    ]
    for given, message in options:
        with pytest.raises(ValueError, match=message):
            unet(noise(1, 4, 12, 4), 500, contexts=contexts, **given)
    with pytest.raises(ValueError, match="level = 5 has none below it"):
        sound(base.ours, feature_cache=FeatureCaching(level=5))


def test_only_the_upper_levels_run_at_the_other_steps(pipe: AudioLDM2Pipeline) -> None:
    calls: list[str] = []
    calls_of_the_levels(pipe, calls)
    sound(pipe, num_inference_steps=7, feature_cache=3)
    assert Counter(calls) == {"0": 7, "1": 3, "2": 3, "middle": 3}
    calls.clear()
    sound(pipe, num_inference_steps=7, feature_cache=CUT)
    assert Counter(calls) == {"0": 7, "1": 7, "2": 3, "middle": 3}
    # Heun's method evaluates the UNet twice at each step but the last; evaluations count.
    from diffusers import HeunDiscreteScheduler

    calls.clear()
    pipe.scheduler = HeunDiscreteScheduler.from_config(dict(pipe.scheduler.config))
    sound(pipe, num_inference_steps=4, feature_cache=3)
    assert Counter(calls) == {"0": 7, "1": 3, "2": 3, "middle": 3}


def test_an_interval_of_1_changes_no_bit_and_others_little(pipe: AudioLDM2Pipeline) -> None:
    expected = sound(pipe, num_inference_steps=10)
    assert np.array_equal(sound(pipe, num_inference_steps=10, feature_cache=1), expected)
    cached = sound(pipe, num_inference_steps=10, feature_cache=2)
    assert not np.array_equal(cached, expected)
    assert np.abs(cached - expected).max() < 0.5 * np.abs(expected).max()
    pipe.enable_feature_cache(interval=2)
    assert np.array_equal(sound(pipe, num_inference_steps=10), cached)
    assert np.array_equal(sound(pipe, num_inference_steps=10, feature_cache=False), expected)
    pipe.disable_feature_cache()
    assert np.array_equal(sound(pipe, num_inference_steps=10), expected)


def test_a_sound_with_cached_features_does_not_depend_on_its_batch(pipe: AudioLDM2Pipeline) -> None:
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    options: dict[str, Any] = {"num_inference_steps": 4, "feature_cache": 2, "audio_length_in_s": 0.32}
    generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    pair = pipe(["Rain falls", "Rain rises"], generator=generators, **options).audios
    for number, prompt in enumerate(("Rain falls", "Rain rises")):
        alone = sound(pipe, prompt, seed=number, **options)
        assert_same_sound(pair[number : number + 1], alone, 1e-5)


def test_guidance_that_ends_or_begins_between_cached_steps(pipe: AudioLDM2Pipeline) -> None:
    # Without guidance, the second half of the features is used; with it again, all levels run.
    calls: list[str] = []
    calls_of_the_levels(pipe, calls)
    options: dict[str, Any] = {"num_inference_steps": 8, "feature_cache": 4}
    sound(pipe, guidance_interval=(0, 0.25), **options)
    assert Counter(calls)["middle"] == 2
    calls.clear()
    sound(pipe, guidance_interval=(0.25, 1), **options)
    assert Counter(calls)["middle"] == 3  # steps 0, 2 and 4


@pytest.mark.parametrize("change", ["weights", "conditioning", "nothing"])
def test_what_a_callback_changes_runs_all_levels_again(pipe: AudioLDM2Pipeline, change: str) -> None:
    calls: list[str] = []
    calls_of_the_levels(pipe, calls)

    def on_step_end(pipe: Any, step: int, t: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        if step == 1 and change == "weights":
            with torch.no_grad():
                pipe.unet.middle.resnets[0].conv_1.weight.mul_(1.5)
        changed = step == 1 and change == "conditioning"
        return {"generated_prompt_embeds": 2 * tensors["generated_prompt_embeds"]} if changed else {}

    arguments: dict[str, Any] = {
        "callback_on_step_end": on_step_end,
        "callback_on_step_end_tensor_inputs": ["generated_prompt_embeds"],
    }
    sound(pipe, num_inference_steps=4, feature_cache=4, **arguments)
    assert Counter(calls)["middle"] == (1 if change == "nothing" else 2)


def test_parts_windows_loops_and_offload_have_their_own_features(pipe: AudioLDM2Pipeline) -> None:
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    options: dict[str, Any] = {"audio_length_in_s": 0.64, "num_inference_steps": 4}
    for more in (
        {"window": 0.32},
        {"loop": True},
        {"loop": True, "window": 0.32},
        {"audio": noise(10240).clamp(-1, 1), "sampling_rate": 16000, "replace": [(0.2, 0.5)]},
    ):
        if "audio" in more:
            options["audio_length_in_s"] = None
        expected = sound(pipe, **options, **more)
        cached = sound(pipe, **options, **more, feature_cache=2)
        # Features of another window, or of another cut of the circle, would not fit.
        assert np.abs(cached - expected).max() < 0.3 * np.abs(expected).max(), more
    before = sound(pipe, feature_cache=2, num_inference_steps=3)
    pipe.enable_model_cpu_offload(device="cpu")
    assert_same_sound(sound(pipe, feature_cache=2, num_inference_steps=3), before, 1e-5)


def test_what_cannot_be_cached_is_refused(base: Both, pipe: AudioLDM2Pipeline) -> None:
    for value, kind, message in (
        (0, ValueError, "feature_cache must be an integer of at least 1"),
        (True, TypeError, "feature_cache must be an interval"),
        ("3", TypeError, "feature_cache must be an interval"),
        (FeatureCaching(steps=[0, 5]), ValueError, "lists step 5, but the last of the run's 2 steps is 1"),
    ):
        with pytest.raises(kind, match=message):
            sound(pipe, feature_cache=value)
    for given, kind, message in (
        ({"interval": 2.5}, ValueError, "interval must be an integer"),
        ({"level": -1}, ValueError, "level must be an integer"),
        ({"power": 0}, ValueError, "power must be a positive number"),
        ({"steps": [1, 2]}, ValueError, "steps must increase from 0"),
        ({"steps": [0, 2, 2]}, ValueError, "steps must increase from 0"),
        ({"steps": "012"}, TypeError, "steps must be a list"),
    ):
        with pytest.raises(kind, match=message):
            pipe.enable_feature_cache(**given)
    assert as_feature_caching(None) is as_feature_caching(1) is None
    with record_attention(pipe), pytest.raises(ValueError, match="pass feature_cache=False"):
        sound(pipe, feature_cache=2)
    pipe.unet = base.theirs.unet
    with pytest.raises(TypeError, match="feature_cache needs a UNet that takes level and features"):
        sound(pipe, feature_cache=2)
