"""The whole pipeline against diffusers: the same weights and the same seed give the same samples."""

from __future__ import annotations

import inspect
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch

from audioldm2 import AudioLDM2Pipeline, DPMSolverMultistepScheduler
from scripts.random_checkpoint import BASE, LARGE
from tests.helpers import HAMMER, RAIN, assert_same_sound, load_pipeline, noise, seeded, sound
from tests.reference import Both, assert_close, make_checkpoint, randomize, reference_pipeline

CALLS = {
    "one prompt": {"prompt": HAMMER},
    "negative": {"prompt": HAMMER, "negative_prompt": "Low quality, average quality, noisy and dull."},
    "several": {"prompt": [HAMMER, RAIN], "negative_prompt": ["Low quality.", "Techno"]},
    "no guidance": {"prompt": [HAMMER, RAIN], "guidance_scale": 1.0},
    "odd length": {"prompt": HAMMER, "audio_length_in_s": 0.777},
    "shortest": {"prompt": HAMMER, "audio_length_in_s": 0.05},
    "default length": {"prompt": HAMMER, "audio_length_in_s": None},
    "eta": {"prompt": [HAMMER, RAIN], "eta": 0.7},
    "strong guidance": {"prompt": HAMMER, "guidance_scale": 9.0},
    "more vectors": {"prompt": HAMMER, "max_new_tokens": 11},
    "too long a prompt": {"prompt": " ".join([HAMMER] * 9)},
}


@pytest.mark.filterwarnings("ignore:.*cut off")
@pytest.mark.parametrize("arguments", CALLS.values(), ids=CALLS)
def test_ddim_equals_diffusers(both: Both, arguments: dict) -> None:
    both.check(**arguments)


@pytest.mark.parametrize(
    "options",
    [{}, {"algorithm_type": "sde-dpmsolver++"}, {"use_karras_sigmas": True, "solver_order": 3}],
    ids=["default", "sde", "karras"],
)
@pytest.mark.parametrize("name", ["several", "odd length"])
def test_dpm_solver_equals_diffusers(both: Both, name: str, options: dict) -> None:
    both.use("DPMSolverMultistepScheduler", **options)
    both.check(**CALLS[name], num_inference_steps=5)


def test_many_steps_equal_diffusers(base: Both) -> None:
    base.check(prompt=HAMMER, num_inference_steps=50, audio_length_in_s=0.32)


@pytest.mark.filterwarnings("ignore:.*cut off")
def test_speech_equals_diffusers(speech: Both, tmp_path: Path) -> None:
    arguments = {"prompt": "A woman is speaking", "num_inference_steps": 3, "max_new_tokens": 20}
    first = speech.check(**arguments, transcription="wish you a good day")
    second = speech.check(**arguments, transcription="go home")
    assert np.abs(first - second).max() > 0.01, "the transcription has no effect"
    speech.check(
        prompt=["A woman is speaking", "A man"], transcription=["go home", "stay"], num_inference_steps=2
    )

    speech.ours.save_pretrained(tmp_path)
    theirs = reference_pipeline(tmp_path)
    again = theirs(**arguments, transcription="go home", audio_length_in_s=0.64, generator=seeded()).audios
    assert_same_sound(second, again)


# --- random numbers and latents


def test_a_list_has_one_generator_for_each_waveform(base: Both) -> None:
    base.check(prompt=[HAMMER, RAIN], eta=0.5, generators=lambda: [seeded(3), seeded(4)])


@pytest.mark.parametrize("height", [16, 13])
def test_given_latents_replace_the_noise(base: Both, height: int) -> None:
    base.check(prompt=HAMMER, latents=noise(1, 4, height, 4, seed=1), audio_length_in_s=None)


def test_given_latents_are_converted_to_the_pipelines_dtype(base: Both) -> None:
    latents = torch.from_numpy(np.random.RandomState(0).standard_normal((1, 4, 16, 4)))
    assert latents.dtype == torch.float64
    ours = base.ours(HAMMER, latents=latents, num_inference_steps=2).audios
    theirs = base.theirs(HAMMER, latents=latents.float(), num_inference_steps=2).audios
    assert_same_sound(ours, theirs)


def test_output_types(base: Both) -> None:
    ours, theirs = base.run(prompt=HAMMER, output_type="latent")
    assert_close(torch.as_tensor(ours), torch.as_tensor(theirs))
    pt = base.ours(HAMMER, num_inference_steps=2, generator=seeded(), output_type="pt").audios
    (plain,) = base.ours(HAMMER, num_inference_steps=2, generator=seeded(), return_dict=False)
    assert isinstance(pt, torch.Tensor)
    assert pt.dtype == torch.float32
    assert isinstance(plain, np.ndarray)
    np.testing.assert_array_equal(pt.numpy(), plain)


# --- a script written for diffusers

SCRIPT = """
import torch
from diffusers import AudioLDM2Pipeline, DPMSolverMultistepScheduler

pipe = AudioLDM2Pipeline.from_pretrained(FOLDER, torch_dtype=torch.float32)
pipe = pipe.to("cpu")
pipe.set_progress_bar_config(disable=True)
pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)

prompt = "The sound of a hammer hitting a wooden surface."
negative_prompt = "Low quality."

generator = torch.Generator("cpu")
generator.manual_seed(0)

audio = pipe(
    prompt,
    negative_prompt=negative_prompt,
    num_inference_steps=4,
    audio_length_in_s=0.5,
    num_waveforms_per_prompt=3,
    generator=generator,
).audios
"""


def test_a_script_for_diffusers_runs_with_another_import(random_checkpoint: Path) -> None:
    ours: dict = {"FOLDER": str(random_checkpoint)}
    exec(SCRIPT.replace("from diffusers import", "from audioldm2 import"), ours)
    assert type(ours["pipe"]) is AudioLDM2Pipeline
    assert type(ours["pipe"].scheduler) is DPMSolverMultistepScheduler

    # diffusers cannot run the checkpoint on current transformers unless its language model is wrapped.
    theirs: dict = {"FOLDER": str(random_checkpoint), "reference_pipeline": reference_pipeline}
    exec(SCRIPT.replace("AudioLDM2Pipeline.from_pretrained", "reference_pipeline"), theirs)
    assert_same_sound(ours["audio"], theirs["audio"])


@pytest.mark.parametrize("name", ["__call__", "encode_prompt"])
def test_arguments_are_in_diffusers_order(name: str) -> None:
    ours, theirs = (
        list(inspect.signature(getattr(kind, name)).parameters)
        for kind in (AudioLDM2Pipeline, diffusers.AudioLDM2Pipeline)
    )
    assert ours[: len(theirs)] == theirs


# --- weights and parts that go from one package to the other


def test_a_saved_pipeline_runs_in_diffusers(base: Both, tmp_path: Path) -> None:
    base.ours.save_pretrained(tmp_path)
    theirs = reference_pipeline(tmp_path)
    arguments = {"prompt": HAMMER, "negative_prompt": "Techno", "num_inference_steps": 3}
    ours = base.ours(**arguments, generator=seeded()).audios
    assert_same_sound(ours, theirs(**arguments, generator=seeded()).audios)


def test_every_parameter_that_changes_is_saved(base: Both, pipe: AudioLDM2Pipeline, tmp_path: Path) -> None:
    """The weight maps in the direction of saving: our stages with new random weights run in diffusers."""
    for number, stage in enumerate(pipe.stages.values()):
        randomize(stage, seed=900 + number)
    pipe.save_pretrained(tmp_path)
    arguments = {"prompt": HAMMER, "num_inference_steps": 3, "num_waveforms_per_prompt": 2}
    theirs = reference_pipeline(tmp_path)(**arguments, generator=seeded()).audios
    assert_same_sound(pipe(**arguments, generator=seeded()).audios, theirs)
    before = base.ours(**arguments, generator=seeded()).audios
    assert np.abs(before - theirs).max() > 0.05


def test_a_scheduler_of_diffusers_can_replace_ours(base: Both) -> None:
    scheduler = diffusers.EulerDiscreteScheduler.from_config(base.theirs.scheduler.config)
    base.theirs.scheduler = base.ours.scheduler = scheduler
    base.check(prompt=HAMMER)


def test_a_unet_of_diffusers_can_replace_ours(base: Both, pipe: AudioLDM2Pipeline) -> None:
    expected = sound(pipe, negative_prompt="Low")
    pipe.unet = base.theirs.unet
    assert_same_sound(sound(pipe, negative_prompt="Low"), expected)


# --- precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_close_to_float32(base: Both, dtype: torch.dtype) -> None:
    arguments = {"num_inference_steps": 3, "latents": noise(1, 4, 8, 4)}  # drawn in half, they would differ
    pipe = load_pipeline(base.folder, torch_dtype=dtype)
    assert pipe.dtype == dtype
    half, full = sound(pipe, **arguments), sound(base.ours, **arguments)
    assert half.dtype == np.float32
    assert np.isfinite(half).all()
    # Three steps from pure noise amplify rounding errors, so that the waveforms are alike and not equal.
    correlation = np.corrcoef(half[0], full[0])[0, 1]
    assert correlation > (0.999 if dtype == torch.float16 else 0.98)


def test_stages_may_differ_in_precision(pipe: AudioLDM2Pipeline) -> None:
    pipe.unet.to(torch.bfloat16)
    pipe.text_encoder_2.to(torch.bfloat16)
    assert np.isfinite(sound(pipe, num_waveforms_per_prompt=2)).all()


@pytest.mark.parametrize("frames", [4096, 48], ids=["at once", "in chunks"])
def test_default_dtype_and_device_make_no_difference(
    random_checkpoint: Path, frames: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On "meta" a tensor that the caller's defaults decide on would be of no use."""
    monkeypatch.setattr("audioldm2.decoding.FRAMES_AT_ONCE", frames)

    def generate() -> np.ndarray:
        pipe = load_pipeline(random_checkpoint)
        return sound(pipe, audio_length_in_s=1.28, num_inference_steps=1, num_waveforms_per_prompt=2)

    expected = generate()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            actual = generate()
    finally:
        torch.set_default_dtype(torch.float32)
    np.testing.assert_array_equal(actual, expected)


# --- arguments that cannot be used

BAD = {
    "nothing": ({}, ValueError, "pass prompt"),
    "no prompts": ({"prompt": []}, ValueError, "empty list"),
    "no text": ({"prompt": "\udcff"}, ValueError, "prompt is not valid UTF-8 text"),
    "no negative text": (
        {"prompt": HAMMER, "negative_prompt": "\udcff"},
        ValueError,
        "negative_prompt is not valid UTF-8 text",
    ),
    "number": ({"prompt": 3}, TypeError, "prompt must be a string"),
    "numbers": ({"prompt": [HAMMER, 3]}, TypeError, "prompt must be a string"),
    "negatives": (
        {"prompt": [HAMMER, RAIN], "negative_prompt": ["a", "b", "c"]},
        ValueError,
        "3 negative prompts for 2",
    ),
    "negative type": (
        {"prompt": HAMMER, "negative_prompt": 3},
        TypeError,
        "negative_prompt must be a string",
    ),
    "transcription": ({"prompt": HAMMER, "transcription": "hello"}, ValueError, "speech checkpoints"),
    "zero length": ({"prompt": HAMMER, "audio_length_in_s": 0}, ValueError, "audio_length_in_s"),
    "negative length": ({"prompt": HAMMER, "audio_length_in_s": -1.0}, ValueError, "audio_length_in_s"),
    "too short": ({"prompt": HAMMER, "audio_length_in_s": 0.01}, ValueError, "from 0.04"),
    "absurd": ({"prompt": HAMMER, "audio_length_in_s": 1e6}, ValueError, "to 3600"),
    "nan": ({"prompt": HAMMER, "audio_length_in_s": float("nan")}, ValueError, "audio_length_in_s"),
    "length as text": ({"prompt": HAMMER, "audio_length_in_s": "10"}, ValueError, "audio_length_in_s"),
    "no steps": ({"prompt": HAMMER, "num_inference_steps": 0}, ValueError, "num_inference_steps"),
    "many steps": ({"prompt": HAMMER, "num_inference_steps": 1001}, ValueError, "num_inference_steps"),
    "no waveforms": (
        {"prompt": HAMMER, "num_waveforms_per_prompt": 0},
        ValueError,
        "num_waveforms_per_prompt",
    ),
    "output": ({"prompt": HAMMER, "output_type": "wav"}, ValueError, "np, pt, latent"),
    "callback steps": ({"prompt": HAMMER, "callback_steps": 0}, ValueError, "callback_steps"),
    "generators": ({"prompt": HAMMER, "generator": [seeded(), seeded()]}, ValueError, "2 generators for 1"),
    "latents": ({"prompt": HAMMER, "latents": torch.zeros(1, 3, 8, 4)}, ValueError, "latents have shape"),
    "latents' batch": (
        {"prompt": HAMMER, "latents": torch.zeros(2, 4, 8, 4)},
        ValueError,
        "latents have shape",
    ),
    "text and embeddings": (
        {"prompt": HAMMER, "prompt_embeds": torch.zeros(1, 3, 20)},
        ValueError,
        "not both",
    ),
    "half the embeddings": ({"prompt_embeds": torch.zeros(1, 3, 20)}, ValueError, "go together"),
    "embeddings that differ": (
        {"prompt_embeds": torch.zeros(1, 3, 20), "generated_prompt_embeds": torch.zeros(2, 8, 16)},
        ValueError,
        "do not match",
    ),
    "half the negative": (
        {"prompt": HAMMER, "negative_prompt_embeds": torch.zeros(1, 3, 20)},
        ValueError,
        "go together",
    ),
    "negatives that differ": (
        {
            "prompt": HAMMER,
            "negative_prompt_embeds": torch.zeros(2, 3, 20),
            "negative_generated_prompt_embeds": torch.zeros(2, 8, 16),
        },
        ValueError,
        "do not go with",
    ),
    "typo": ({"promt": HAMMER}, TypeError, "the pipeline has no argument 'promt'; did you mean prompt"),
    "seed": (
        {"prompt": HAMMER, "seed": 3},
        TypeError,
        r"no argument 'seed'; write generator=torch.Generator\(\).manual_seed",
    ),
    "more vectors than positions": ({"prompt": HAMMER, "max_new_tokens": 500}, ValueError, "n_positions"),
}


@pytest.mark.parametrize(("arguments", "kind", "message"), BAD.values(), ids=BAD)
def test_bad_arguments_are_refused_in_one_line(
    base: Both, arguments: dict, kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message) as caught:
        base.ours(**arguments)
    assert "\n" not in str(caught.value)


def test_guidance_of_encode_prompt_is_a_flag(base: Both) -> None:
    with pytest.raises(TypeError, match="do_classifier_free_guidance must be True or False, got 'x'"):
        base.ours.encode_prompt("", do_classifier_free_guidance="x")
    assert len(base.ours.encode_prompt("", do_classifier_free_guidance=np.bool_(False))[0]) == 1


def test_a_transcription_is_needed_for_each_prompt_of_a_speech_checkpoint(speech: Both) -> None:
    with pytest.raises(ValueError, match="pass transcription"):
        speech.ours("A woman is speaking")
    with pytest.raises(ValueError, match="2 transcriptions for 1 prompts"):
        speech.ours("A woman is speaking", transcription=["go", "home"])


# --- full size, and a GPU


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [BASE, LARGE], ids=["base", "large"])
@pytest.mark.parametrize("scheduler", ["DDIMScheduler", "DPMSolverMultistepScheduler"])
def test_full_size_equals_diffusers(
    sizes: dict, scheduler: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.getbasetemp() / ("large" if sizes is LARGE else "base")
    if not folder.exists():
        make_checkpoint(folder, sizes)
    both = Both(folder)
    both.use(scheduler)
    both.check(prompt=HAMMER, negative_prompt="Low quality.", num_inference_steps=2, audio_length_in_s=2.56)


@pytest.mark.gpu
def test_a_gpu_gives_the_same_sound_with_and_without_offload(random_checkpoint: Path) -> None:
    """Noise is drawn on the CPU, so it is the same everywhere. Offload leaves nothing on the GPU."""
    arguments = {"num_inference_steps": 3, "num_waveforms_per_prompt": 2}
    sounds = []
    for device in ("cpu", "cuda", "offload"):
        pipe = load_pipeline(random_checkpoint)
        if device == "offload":
            pipe.enable_model_cpu_offload()
        else:
            pipe.to(device)
        sounds.append(pipe(HAMMER, generator=seeded(), **arguments).audios)
    assert all(p.device.type == "cpu" for stage in pipe.stages.values() for p in stage.parameters())
    np.testing.assert_allclose(sounds[1], sounds[0], atol=5e-3)
    np.testing.assert_allclose(sounds[2], sounds[1], atol=1e-5)
