"""Inversion: the run that gives a sound back, and edits of it."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import numpy as np
import pytest
import torch

from audioldm2 import AudioLDM2Pipeline, DDIMScheduler
from audioldm2.editing.inversion import Inverted
from tests.helpers import load_pipeline, noise, seeded

RATE = 16000
SOUND = (0.1 * noise(RATE // 2, seed=5)).clamp(-1, 1)  # 0.5 s
PROMPT = "Rain"


@pytest.fixture(scope="module")
def tiny() -> AudioLDM2Pipeline:
    return load_pipeline("tiny")


@pytest.fixture(scope="module")
def inverted(tiny: AudioLDM2Pipeline) -> Inverted:
    return tiny.invert(SOUND, RATE, PROMPT, num_inference_steps=4, generator=seeded())


def edited(pipe: AudioLDM2Pipeline, prompt: Any, inverted: Inverted, **arguments: Any) -> Any:
    return pipe(prompt, inverted=inverted, **arguments).audios


def error(pipe: AudioLDM2Pipeline, prompt: Any, inverted: Inverted, **arguments: Any) -> float:
    """The largest error of the latents that an edit from the first step on gives."""
    latents = edited(pipe, prompt, inverted, skip=0, output_type="latent", **arguments)
    return float((latents - inverted.latents[-1]).abs().max())


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize(("steps", "guidance"), [(3, 3.0), (7, 1.0)])
def test_the_same_prompt_and_guidance_give_the_sounds_back(
    tiny: AudioLDM2Pipeline, prediction: str, steps: int, guidance: float
) -> None:
    """Also with 7 steps, which do not divide the training's 1000, and whatever the network's output is."""
    config = dict(tiny.scheduler.config) | {
        "prediction_type": prediction,
        "rescale_betas_zero_snr": prediction == "v_prediction",
        "clip_sample": True,
    }
    scheduler = DDIMScheduler.from_config(config)
    pipe = AudioLDM2Pipeline(**{**tiny.components, "scheduler": scheduler})
    pipe.set_progress_bar_config(disable=True)
    prompts = [PROMPT, "A bell"]
    found = pipe.invert(
        [SOUND, SOUND.flip(0)], RATE, prompts, num_inference_steps=steps, guidance_scale=guidance,
        negative_prompt="Wind" if guidance > 1 else None, generator=seeded(),
    )  # fmt: skip
    assert found.latents.shape[:2] == (steps + 1, 2)
    negative = {"negative_prompt": "Wind"} if guidance > 1 else {}
    assert error(pipe, prompts, found, guidance_scale=guidance, **negative) <= 1e-4
    assert error(pipe, ["A siren", "Drums"], found, guidance_scale=guidance) > 0.01


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_gives_the_sound_back(tiny: AudioLDM2Pipeline, dtype: torch.dtype) -> None:
    """The latents of the run are float32, and the UNet rounds in the same way in both runs."""
    pipe = copy.deepcopy(tiny).to(dtype)
    found = pipe.invert(SOUND, RATE, PROMPT, num_inference_steps=2, generator=seeded())
    assert found.latents.dtype == torch.float32
    assert error(pipe, PROMPT, found, guidance_scale=1) <= 1e-4


def test_the_noise_of_each_step_is_at_the_level_of_its_timestep(
    tiny: AudioLDM2Pipeline, inverted: Inverted
) -> None:
    clean = inverted.latents[-1]
    assert torch.equal(clean, tiny.encode_audio(SOUND, RATE))
    assert inverted.timesteps == (999, 749, 499, 249)
    for x, t in zip(inverted.latents, inverted.timesteps, strict=False):
        abar = float(tiny.scheduler.alphas_cumprod[t])
        eps = (x - abar**0.5 * clean) / (1 - abar) ** 0.5
        assert abs(float(eps.std()) - 1) < 0.1
        assert abs(float((eps * clean).mean())) < 0.2 * float(clean.std())
    x, noise_0 = (inverted.latents[i].flatten() - (i > 0) * clean.flatten() for i in (0, 1))
    assert abs(float(torch.corrcoef(torch.stack([x, noise_0]))[0, 1])) < 0.2, "each step has noise of its own"


def test_skipping_steps_leaves_more_of_the_sound(tiny: AudioLDM2Pipeline, inverted: Inverted) -> None:
    again = tiny.decode_latents(tiny.encode_audio(SOUND, RATE))[:, : len(SOUND)].numpy()
    assert np.array_equal(edited(tiny, "A bell", inverted, skip=1), again)
    distances = [
        np.abs(edited(tiny, "A bell", inverted, skip=skip) - again).mean() for skip in (0.75, 0.5, 0)
    ]
    assert 0 < distances[0] < distances[1] < distances[2]
    assert np.array_equal(edited(tiny, "A bell", inverted), edited(tiny, "A bell", inverted, skip=0.4))


def test_ddim_inversion_reports_the_error_of_its_reconstruction(tiny: AudioLDM2Pipeline) -> None:
    errors = []
    for steps in (2, 8):
        found = tiny.invert(SOUND, RATE, PROMPT, num_inference_steps=steps, method="ddim")
        assert found.method == "ddim"
        assert found.error is not None
        latents = edited(tiny, PROMPT, found, skip=0, guidance_scale=1, output_type="latent")
        clean = found.latents[-1]
        expected = (latents - clean).flatten(1).norm(dim=1) / clean.flatten(1).norm(dim=1)
        torch.testing.assert_close(found.error, expected, rtol=1e-3, atol=1e-5)
        errors.append(float(found.error))
    assert errors[0] > 1.5 * errors[1] > 0


def test_candidates_have_noise_of_their_own_and_are_ranked(tiny: AudioLDM2Pipeline) -> None:
    found = tiny.invert(
        [SOUND, SOUND.flip(0)], RATE, PROMPT, num_inference_steps=2, num_waveforms_per_prompt=2
    )
    assert found.latents.shape[1] == 4
    assert torch.equal(found.latents[-1, 0], found.latents[-1, 1])
    assert not torch.equal(found.latents[0, 0], found.latents[0, 1])
    output = tiny(["A bell", "Wind"], inverted=found, num_waveforms_per_prompt=2)
    assert output.audios.shape == (4, len(SOUND))
    assert output.scores[0] >= output.scores[1]
    assert output.scores[2] >= output.scores[3]


def test_what_was_inverted_can_be_pickled_and_moved(tiny: AudioLDM2Pipeline, inverted: Inverted) -> None:
    loaded = pickle.loads(pickle.dumps(inverted)).to("cpu")
    assert np.array_equal(edited(tiny, "A bell", loaded), edited(tiny, "A bell", inverted))
    assert repr(inverted) == "Inverted(ddpm, 1 sound of 8000 samples, 4 steps)"


def test_callbacks_of_an_inversion_count_evaluations_and_a_sound_has_several_prompts(
    tiny: AudioLDM2Pipeline,
) -> None:
    seen: list[tuple[int, int]] = []
    found = tiny.invert(
        SOUND,
        RATE,
        ["Rain", "A bell"],
        num_inference_steps=2,
        method="ddim",
        callback=lambda step, steps: seen.append((step, steps)),
    )
    assert seen == [(step, 6) for step in range(1, 7)]
    assert found.sounds == 2
    assert torch.equal(found.latents[-1, 0], found.latents[-1, 1])
    assert not torch.equal(found.latents[0, 0], found.latents[0, 1])


def test_callbacks_count_the_steps_that_are_taken(tiny: AudioLDM2Pipeline, inverted: Inverted) -> None:
    seen: list[tuple[int, int]] = []
    edited(tiny, "A bell", inverted, skip=0.5, callback=lambda step, t, x: seen.append((step, int(t))))
    assert seen == [(0, 499), (1, 249)]


def test_the_pipelines_own_sampler_is_left_alone(tiny: AudioLDM2Pipeline, inverted: Inverted) -> None:
    before = tiny.scheduler
    timesteps = before.timesteps.clone()
    tiny.invert(SOUND, RATE, num_inference_steps=1)
    assert tiny.scheduler is before
    assert torch.equal(before.timesteps, timesteps)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "audio": ({"audio": SOUND, "sampling_rate": RATE}, "audio does not go with inverted"),
    "length": ({"audio_length_in_s": 1.0}, "audio_length_in_s does not go with inverted"),
    "latents": ({"latents": noise(1, 8, 4, 16)}, "latents does not go with inverted"),
    "steps": ({"num_inference_steps": 4}, "num_inference_steps does not go with inverted"),
    "eta": ({"eta": 1.0}, "eta does not go with inverted"),
    "loop": ({"loop": True}, "loop does not go with inverted"),
    "extend": ({"extend": 1.0}, "extend does not go with inverted"),
    "strength": ({"strength": 0.5}, "strength does not go with inverted"),
    "candidates": ({"num_waveforms_per_prompt": 2}, "inverted has 1 for each sound"),
    "prompts": ({"prompt": ["Rain", "Wind"]}, "inverted has 1 sounds for 2 prompts"),
    "skip": ({"skip": 2}, "skip must lie between 0"),
    "skip nan": ({"skip": float("nan")}, "skip must be a finite number"),
    "skip alone": ({"inverted": None, "skip": 0.5}, "skip goes with inverted"),
    "inverted": ({"inverted": SOUND}, "inverted must be what pipe.invert returns"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_contradictions_are_named(tiny: AudioLDM2Pipeline, inverted: Inverted, name: str) -> None:
    arguments, message = REFUSED[name]
    with pytest.raises((TypeError, ValueError), match=message):
        tiny(**{"prompt": "Rain", "inverted": inverted, **arguments})


def test_generators_of_an_edit_are_checked(tiny: AudioLDM2Pipeline, inverted: Inverted) -> None:
    for generator, message in ((5, "generator must be"), ([seeded(1)] * 7, "7 generators for")):
        with pytest.raises((TypeError, ValueError), match=message):
            edited(tiny, "Rain", inverted, generator=generator)


def test_another_schedule_or_model_is_refused(
    tiny: AudioLDM2Pipeline, pipe: AudioLDM2Pipeline, inverted: Inverted
) -> None:
    other = DDIMScheduler.from_config(tiny.scheduler.config, beta_end=0.03)
    with pytest.raises(ValueError, match=r"inverted was made with beta_end = 0\.0195"):
        AudioLDM2Pipeline(**{**tiny.components, "scheduler": other})("Rain", inverted=inverted)
    with pytest.raises(ValueError, match="latents of 8 channels, and this checkpoint 4"):
        pipe("Rain", inverted=inverted)


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "method": ({"method": "ddpm++"}, "method must be one of ddpm, ddim"),
    "candidates of ddim": ({"method": "ddim", "num_waveforms_per_prompt": 2}, "needs method 'ddpm'"),
    "generator of ddim": ({"method": "ddim", "generator": seeded()}, "generator goes with method 'ddpm'"),
    "generators": ({"generator": [seeded()] * 2}, "2 generators for 1 waveforms"),
    "prompts": ({"audio": [SOUND] * 2, "prompt": ["Rain"] * 3}, "audio has 2 sounds for 3 prompts"),
    "adapters": ({"adapters": {"dog": 1}}, "adapters"),
    "callback": ({"callback": 5}, "callback must be a function, got 5"),
    "steps": ({"num_inference_steps": 0}, "num_inference_steps must be an integer"),
    "guidance": ({"guidance_scale": float("inf")}, "guidance_scale must be a finite number"),
    "silence": ({"audio": torch.zeros(8000)}, "audio is silent"),
    "rate": ({"sampling_rate": None}, "audio needs its sampling_rate"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_of_invert_are_named(tiny: AudioLDM2Pipeline, name: str) -> None:
    arguments, message = BAD[name]
    with pytest.raises((TypeError, ValueError), match=message):
        tiny.invert(**{"audio": SOUND, "sampling_rate": RATE, **arguments})


def test_ddim_refuses_a_last_step_that_ignores_its_input(tiny: AudioLDM2Pipeline) -> None:
    scheduler = DDIMScheduler.from_config(
        tiny.scheduler.config, prediction_type="sample", set_alpha_to_one=True, rescale_betas_zero_snr=False
    )
    pipe = AudioLDM2Pipeline(**{**tiny.components, "scheduler": scheduler})
    with pytest.raises(ValueError, match="cannot invert this scheduler's last step"):
        pipe.invert(SOUND, RATE, num_inference_steps=1, method="ddim")
