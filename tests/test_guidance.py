"""Guidance in an interval, rescaled guidance, and what guidance steers away from."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from audioldm2 import AudioLDM2Pipeline
from audioldm2.guidance import Guidance, guide
from tests.helpers import HAMMER, noise, sound


def test_rescaled_guidance_is_that_of_diffusers() -> None:
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg

    prediction = noise(6, 4, 12, 4) * torch.linspace(0.5, 2, 6)[:, None, None, None]
    cond = prediction[3:]
    for phi in (0.3, 0.7, 1.0):
        expected = rescale_noise_cfg(guide(prediction, 3.5), cond, phi)
        torch.testing.assert_close(guide(prediction, 3.5, phi), expected)
    deviations = guide(prediction, 3.5, 1.0).std((1, 2, 3))
    torch.testing.assert_close(deviations, cond.std((1, 2, 3)))


def test_the_steps_of_an_interval() -> None:
    def steps(start: float, end: float) -> list[int]:
        return [i for i in range(20) if Guidance(3.5, (start, end)).has_step(i, 20)]

    assert steps(0, 1) == list(range(20))
    assert steps(0, 0.75) == list(range(15))
    assert steps(0.25, 0.5) == list(range(5, 10))


def test_outside_of_the_interval_only_the_prompt_is_predicted(pipe: AudioLDM2Pipeline) -> None:
    rows: list[int] = []
    pipe.unet.register_forward_hook(lambda module, inputs, output: rows.append(len(output)))
    sound(pipe, num_inference_steps=4, guidance_interval=(0, 0.5))
    assert rows == [2, 2, 1, 1]
    rows.clear()
    pipe.scheduler.set_timesteps(8)
    sound(
        pipe,
        audio=noise(5120).clamp(-1, 1),
        sampling_rate=16000,
        audio_length_in_s=None,
        strength=0.5,
        num_inference_steps=8,
        guidance_interval=(0.75, 1),
    )
    assert rows == [1, 1, 2, 2]  # shares of all steps, of which the edit skips half


def test_an_interval_is_the_runs_of_both_kinds_joined(pipe: AudioLDM2Pipeline) -> None:
    expected = sound(pipe)
    assert np.array_equal(sound(pipe, guidance_interval=(0, 1)), expected)
    latents: dict[str, list[torch.Tensor]] = {}
    for name, more in (
        ("interval", {"guidance_interval": (0, 0.5)}),
        ("guided", {}),
    ):
        seen = latents[name] = []
        sound(pipe, num_inference_steps=4, callback=lambda i, t, x, seen=seen: seen.append(x.clone()), **more)
    assert torch.equal(latents["interval"][1], latents["guided"][1])
    assert not torch.equal(latents["interval"][2], latents["guided"][2])
    # The same steps without guidance, from the same latents.
    pipe.scheduler.set_timesteps(4)
    states, mask, vectors = pipe.encode_prompt(HAMMER, do_classifier_free_guidance=False)
    x = latents["interval"][1]
    with torch.no_grad():
        for t, expected_x in zip(pipe.scheduler.timesteps[2:], latents["interval"][2:], strict=True):
            x = pipe.scheduler.step(pipe.unet(x, t, vectors, states, mask), t, x).prev_sample
            torch.testing.assert_close(x, expected_x, rtol=1e-4, atol=1e-4)


def test_zeros_replace_the_vectors_of_the_empty_text(pipe: AudioLDM2Pipeline) -> None:
    seen: list[Any] = []
    contexts = pipe.unet.contexts
    pipe.unet.contexts = lambda vectors, states, mask: (
        seen.append((vectors, states)),
        contexts(vectors, states, mask),
    )[1]
    text = sound(pipe)
    zeros = sound(pipe, unconditional="zeros")
    (text_vectors, text_states), (zero_vectors, zero_states) = seen
    assert torch.equal(text_states, zero_states)
    assert torch.equal(text_vectors[1], zero_vectors[1])
    assert text_vectors[0].abs().min() > 0
    assert zero_vectors[0].abs().max() == 0
    assert not np.array_equal(text, zeros)


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"guidance_interval": (0.5, 0.5)}, ValueError, "guidance_interval must be"),
        ({"guidance_interval": (0, 1.5)}, ValueError, "guidance_interval must be"),
        ({"guidance_interval": (0, float("nan"))}, TypeError, "guidance_interval must be two fractions"),
        ({"guidance_interval": 0.5}, TypeError, "guidance_interval must be two fractions"),
        ({"guidance_interval": (0, 0.5), "guidance_scale": 1}, ValueError, "guidance_interval has no effect"),
        ({"guidance_rescale": 2}, ValueError, "guidance_rescale must be a number from 0 to 1"),
        ({"guidance_rescale": 0.5, "guidance_scale": 0}, ValueError, "guidance_rescale has no effect"),
        ({"unconditional": "nothing"}, ValueError, "unconditional must be one of text, zeros"),
        ({"unconditional": "zeros", "guidance_scale": 1}, ValueError, "unconditional has no effect"),
        ({"unconditional": "zeros", "negative_prompt": "noise"}, ValueError, "cannot be combined with a neg"),
    ],
)
def test_bad_arguments_are_refused(
    pipe: AudioLDM2Pipeline, arguments: dict[str, Any], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        sound(pipe, **arguments)


def test_an_encoded_prompt_has_the_unconditional_side_of_a_generation(pipe: AudioLDM2Pipeline) -> None:
    text, zeros = (pipe.encode_prompt(HAMMER, unconditional=name) for name in ("text", "zeros"))
    for one, other in zip(text[:2], zeros[:2], strict=True):
        assert torch.equal(one, other)
    assert zeros[2][0].abs().max() == 0 < text[2][0].abs().min()
    assert torch.equal(zeros[2][1], text[2][1])
    for arguments, message in (
        ({"unconditional": "noise"}, "unconditional must be one of text, zeros"),
        ({"unconditional": "zeros", "negative_prompt": "low quality"}, "cannot be combined with a neg"),
        ({"unconditional": "zeros", "do_classifier_free_guidance": False}, "no effect without guidance"),
    ):
        with pytest.raises(ValueError, match=message):
            pipe.encode_prompt(HAMMER, **arguments)
