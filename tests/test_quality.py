"""Presets of quality: each is its arguments, arguments take precedence, and timesteps can be chosen."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from audioldm2 import (
    QUALITIES,
    AudioLDM2Pipeline,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    FeatureCaching,
    Quality,
    UniPCMultistepScheduler,
)

SOUND = torch.sin(torch.arange(8000) / 10)
SETTINGS = {"audio_length_in_s": 0.64, "guidance_scale": 2.0, "output_type": "latent"}


@pytest.fixture(scope="module")
def pipe():
    pipe = AudioLDM2Pipeline.from_pretrained("tiny")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generated(pipe, **arguments):
    return pipe("rain", generator=torch.Generator().manual_seed(0), **{**SETTINGS, **arguments}).audios


def sampler_of(pipe, quality):
    return pipe.components | {"scheduler": quality.make_scheduler(pipe.scheduler)}


@pytest.mark.parametrize("name", QUALITIES)
def test_a_preset_is_its_sampler_and_arguments(pipe, name):
    preset = QUALITIES[name]
    other = AudioLDM2Pipeline(**sampler_of(pipe, preset))
    other.set_progress_bar_config(disable=True)
    arguments = {field: value for field, value in vars(preset).items() if field != "sampler"}
    found = generated(pipe, quality=name)
    assert torch.equal(found, generated(other, **arguments))
    assert torch.equal(found, generated(pipe, quality=preset))


def test_the_schedulers_settings_are_kept(pipe):
    before = pipe.scheduler
    ddim = DDIMScheduler.from_config(before.config, beta_end=0.05)
    sampler = Quality("dpmsolver++").make_scheduler(ddim)
    assert isinstance(sampler, DPMSolverMultistepScheduler)
    assert sampler.config.beta_end == 0.05
    assert Quality("ddim").make_scheduler(ddim) is ddim
    generated(pipe, quality=Quality("ddim", 2))
    assert pipe.scheduler is before


def test_timesteps_of_a_preset_replace_a_spacing_of_noise_levels(pipe):
    expected = generated(pipe, quality="draft")
    karras = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config, use_karras_sigmas=True)
    unipc = UniPCMultistepScheduler.from_config(pipe.scheduler.config, use_exponential_sigmas=True)
    leading = DDIMScheduler.from_config(pipe.scheduler.config, timestep_spacing="leading", steps_offset=1)
    for scheduler in (karras, unipc, leading):
        other = AudioLDM2Pipeline(**pipe.components | {"scheduler": scheduler})
        other.set_progress_bar_config(disable=True)
        assert torch.equal(generated(other, quality="draft"), expected)
    other = AudioLDM2Pipeline(**pipe.components | {"scheduler": karras})
    kept = Quality("dpmsolver++", 4).make_scheduler(karras)
    assert kept is karras, "without timesteps, its own spacing counts"
    with pytest.raises(ValueError, match="timesteps cannot be given together with use_karras_sigmas"):
        generated(other, timesteps=[900, 500])


def test_arguments_take_precedence(pipe):
    preset = Quality("dpmsolver++", 3, feature_cache=3, guidance_interval=(0, 0.5))
    for argument in (
        {"num_inference_steps": 2},
        {"timesteps": [900, 300]},
        {"feature_cache": False},
        {"feature_cache": FeatureCaching(steps=[0, 2])},
        {"guidance_interval": (0, 1)},
    ):
        changes = {"num_inference_steps": None, **argument} if "timesteps" in argument else argument
        found = generated(pipe, quality=preset, **argument)
        assert torch.equal(found, generated(pipe, quality=replace(preset, **changes)))
        assert not torch.equal(found, generated(pipe, quality=preset))


def test_a_preset_takes_precedence_over_the_pipelines_cache(pipe):
    expected = generated(pipe, quality=Quality("dpmsolver++", 3, feature_cache=False))
    pipe.enable_feature_cache(3)
    try:
        assert torch.equal(generated(pipe, quality=Quality("dpmsolver++", 3, feature_cache=False)), expected)
        assert not torch.equal(generated(pipe, quality=Quality("dpmsolver++", 3)), expected)
    finally:
        pipe.disable_feature_cache()


def test_without_guidance_a_presets_interval_has_no_effect(pipe):
    preset = Quality("dpmsolver++", 2, guidance_interval=(0, 0.5))
    expected = generated(pipe, quality=replace(preset, guidance_interval=None), guidance_scale=1)
    assert torch.equal(generated(pipe, quality=preset, guidance_scale=1), expected)
    with pytest.raises(ValueError, match="guidance_interval has no effect"):
        generated(pipe, quality=preset, guidance_interval=(0, 0.5), guidance_scale=1)


@pytest.mark.parametrize("sampler", ["ddim", "dpmsolver++"])
def test_chosen_timesteps(pipe, sampler):
    seen = []

    def record(step, t, latents):
        seen.append(int(t))

    generated(pipe, quality=Quality(sampler), timesteps=[901, 500, 20], callback=record)
    assert seen == [901, 500, 20]
    found = generated(pipe, quality=Quality(sampler), timesteps=np.array([901, 500, 20]))
    assert torch.equal(found, generated(pipe, quality=Quality(sampler, timesteps=(901, 500, 20))))


def test_chosen_timesteps_of_an_edit_and_of_an_extension(pipe):
    steps = []

    def record(step, t, latents):
        steps.append((step, int(t)))

    common = {"audio": SOUND, "sampling_rate": 16000, "timesteps": [901, 500], "callback": record}
    settings = {"prompt": "rain", "guidance_scale": 2.0, "output_type": "latent"}
    pipe(**settings, **common, strength=0.5)
    assert steps == [(0, 500)]
    steps.clear()
    pipe(**settings, **common, extend=0.3)
    assert steps == [(0, 901), (1, 500)]


def test_bad_arguments(pipe):
    for arguments, message in (
        ({"quality": "fast"}, "quality must be"),
        ({"quality": 3}, "quality must be one of draft, normal, best or a Quality, got 3"),
        ({"timesteps": [5, 500]}, "timesteps"),
        ({"timesteps": []}, "timesteps"),
        ({"timesteps": "many"}, "timesteps must be a list of integers"),
        ({"timesteps": [900.5]}, "timesteps must be a list of integers"),
        ({"timesteps": [900], "num_inference_steps": 1}, "num_inference_steps or timesteps, not both"),
        ({"quality": "draft", "timesteps": [900], "num_inference_steps": 1}, "not both"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            generated(pipe, **arguments)
    for arguments, message in (
        ({"sampler": "euler"}, "sampler must be"),
        ({"num_inference_steps": 0}, "num_inference_steps"),
        ({"feature_cache": 0}, "feature_cache"),
        ({"feature_cache": "on"}, "feature_cache must be"),
        ({"guidance_interval": (3, 5)}, "guidance_interval must be"),
        ({"guidance_interval": 0.5}, "guidance_interval must be"),
        ({"timesteps": []}, "timesteps must be decreasing"),
        ({"timesteps": [5, 500]}, "timesteps must be decreasing"),
        ({"timesteps": [500, -1]}, "timesteps must be decreasing"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            Quality(**arguments)


def test_a_scheduler_without_a_config(pipe):
    class Sampler:
        def set_timesteps(self, number, device=None):
            self.timesteps = torch.tensor([900])

        def scale_model_input(self, latents, t):
            return latents

        def step(self, noise, t, latents):
            raise AssertionError("not reached")

    other = AudioLDM2Pipeline(**pipe.components | {"scheduler": Sampler()})
    with pytest.raises(ValueError, match="Sampler has none; set"):
        generated(other, quality="draft")
    with pytest.raises(ValueError, match="Sampler chooses its timesteps itself"):
        generated(other, timesteps=[900])


def test_an_inversion_settles_the_sampler(pipe):
    inverted = pipe.invert(SOUND, 16000, prompt="rain", num_inference_steps=2)
    for arguments in ({"quality": "draft"}, {"timesteps": [900]}):
        with pytest.raises(ValueError, match="does not go with inverted"):
            pipe("noise", inverted=inverted, **arguments)


def test_another_sampler_keeps_the_rest():
    timed = Quality("dpmsolver++", timesteps=[900, 500, 20], feature_cache=3)
    assert timed.with_sampler(None) is timed
    assert timed.with_sampler("ddim") == Quality("ddim", timesteps=[900, 500, 20], feature_cache=3)
