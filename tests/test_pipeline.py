"""The whole pipeline against diffusers: same weights, same seed, same samples."""

from __future__ import annotations

import inspect
import io
import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch

import audioldm2
import audioldm2.pipeline
from audioldm2 import AudioLDM2Pipeline, DPMSolverMultistepScheduler
from audioldm2.models.unet import UNet
from scripts.random_checkpoint import BASE, LARGE
from tests.reference import (
    SMALL_SPEECH,
    assert_close,
    make_checkpoint,
    randomize,
    reference_pipeline,
)
from tests.schedulers.helpers import NoReading

TOLERANCE = 1e-3  # of a waveform in [-1, 1]
HAMMER = "A hammer hitting a wooden surface."
RAIN = "Rain falls on a tin roof"


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Both:
    """diffusers' pipeline and ours on one checkpoint."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.theirs = reference_pipeline(folder)
        self.ours = AudioLDM2Pipeline.from_pretrained(folder)
        self.ours.set_progress_bar_config(disable=True)

    def use(self, scheduler: str, **options: object) -> None:
        self.theirs.scheduler = getattr(diffusers, scheduler).from_config(
            self.theirs.scheduler.config, **options
        )
        self.ours.scheduler = getattr(audioldm2, scheduler).from_config(self.ours.scheduler.config, **options)

    def run(self, generators: object = seeded, **arguments: object) -> tuple[np.ndarray, np.ndarray]:
        arguments = {"num_inference_steps": 3, "audio_length_in_s": 0.64, **arguments}
        theirs = self.theirs(generator=generators(), **arguments).audios
        ours = self.ours(generator=generators(), **arguments).audios
        return np.asarray(ours), np.asarray(theirs)

    def check(self, **arguments: object) -> np.ndarray:
        ours, theirs = self.run(**arguments)
        same(ours, theirs)
        return ours


def same(ours: np.ndarray, theirs: np.ndarray) -> None:
    assert ours.shape == theirs.shape
    assert ours.dtype == theirs.dtype
    assert np.isfinite(ours).all()
    assert theirs.std() > 0.02, "silence proves nothing"
    assert np.abs(ours - theirs).max() <= TOLERANCE


@pytest.fixture(scope="module")
def tiny(random_checkpoint: Path) -> Both:
    return Both(random_checkpoint)


@pytest.fixture(scope="module")
def tiny_large(random_large_checkpoint: Path) -> Both:
    return Both(random_large_checkpoint)


@pytest.fixture
def both(request: pytest.FixtureRequest) -> Both:
    pair: Both = request.getfixturevalue(request.param)
    pair.use("DDIMScheduler")
    return pair


@pytest.fixture
def base_layout(tiny: Both) -> Both:
    tiny.use("DDIMScheduler")
    return tiny


LAYOUTS = pytest.mark.parametrize("both", ["tiny", "tiny_large"], indirect=True)
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
@LAYOUTS
def test_ddim_equals_diffusers(both: Both, arguments: dict) -> None:
    both.check(**arguments)


@pytest.mark.filterwarnings("ignore:.*cut off")
@pytest.mark.parametrize(
    "options",
    [{}, {"algorithm_type": "sde-dpmsolver++"}, {"use_karras_sigmas": True, "solver_order": 3}],
    ids=["default", "sde", "karras"],
)
@pytest.mark.parametrize("name", ["one prompt", "several", "no guidance", "odd length"])
@LAYOUTS
def test_dpm_solver_equals_diffusers(both: Both, name: str, options: dict) -> None:
    both.use("DPMSolverMultistepScheduler", **options)
    both.check(**CALLS[name], num_inference_steps=5)


def test_many_steps_equal_diffusers(base_layout: Both) -> None:
    base_layout.check(prompt=HAMMER, num_inference_steps=50)


def test_a_list_of_generators(base_layout: Both) -> None:
    base_layout.check(prompt=[HAMMER, RAIN], eta=0.5, generators=lambda: [seeded(3), seeded(4)])


@pytest.mark.parametrize("height", [16, 13])
def test_given_latents(base_layout: Both, height: int) -> None:
    latents = torch.randn(1, 4, height, 4, generator=seeded(1))
    base_layout.check(prompt=HAMMER, latents=latents)


def test_given_numpy_latents_of_another_precision(base_layout: Both) -> None:
    latents = np.random.RandomState(0).standard_normal((1, 4, 16, 4))
    ours = base_layout.ours(HAMMER, latents=torch.from_numpy(latents), num_inference_steps=2).audios
    theirs = base_layout.theirs(
        HAMMER, latents=torch.from_numpy(latents).float(), num_inference_steps=2
    ).audios
    same(ours, theirs)


def embeddings(pipe: object, prompt: object, names: tuple[str, str, str]) -> dict[str, torch.Tensor]:
    values = pipe.encode_prompt(prompt, torch.device("cpu"), 1, False)
    return dict(zip(names, values, strict=True))


POSITIVE = ("prompt_embeds", "attention_mask", "generated_prompt_embeds")
NEGATIVE = ("negative_prompt_embeds", "negative_attention_mask", "negative_generated_prompt_embeds")


def test_given_embeddings(base_layout: Both) -> None:
    positive = embeddings(base_layout.theirs, [HAMMER, RAIN], POSITIVE)
    from_text = base_layout.check(prompt=[HAMMER, RAIN])
    from_vectors = base_layout.check(**positive)
    np.testing.assert_allclose(from_vectors, from_text, atol=TOLERANCE)

    negative = embeddings(base_layout.theirs, ["Low quality, noisy", "Low quality"], NEGATIVE)
    length = positive["prompt_embeds"].shape[1]
    pad = length - negative["negative_prompt_embeds"].shape[1]
    negative["negative_prompt_embeds"] = torch.nn.functional.pad(
        negative["negative_prompt_embeds"], (0, 0, 0, pad)
    )
    negative["negative_attention_mask"] = torch.nn.functional.pad(
        negative["negative_attention_mask"], (0, pad)
    )
    both_given = base_layout.check(**positive, **negative)
    assert np.abs(both_given - from_vectors).max() > 0.01, "the negative side had no effect"

    base_layout.check(prompt=[HAMMER, RAIN], **negative)
    base_layout.check(**positive, num_waveforms_per_prompt=2)  # no text, so nothing to rank by
    no_mask = {name: value for name, value in positive.items() if name != "attention_mask"}
    base_layout.check(**no_mask, guidance_scale=1.0)


def test_given_embeddings_beside_a_negative_text(base_layout: Both) -> None:
    """diffusers refuses this, as it wants both of one type; it is what both as texts give."""
    ours = base_layout.ours
    given = embeddings(ours, HAMMER, POSITIVE)
    arguments = {"negative_prompt": "Low quality", "num_inference_steps": 2, "audio_length_in_s": 0.32}
    from_text = ours(HAMMER, generator=seeded(), **arguments).audios
    # A prompt that is encoded alone is rounded otherwise than beside a negative one.
    np.testing.assert_allclose(
        ours(**given, generator=seeded(), **arguments).audios, from_text, rtol=0, atol=1e-5
    )


def test_negative_embeddings_of_another_length_are_padded(base_layout: Both) -> None:
    """diffusers cannot join these; the mask hides the padding, so they equal what was padded beforehand."""
    ours = base_layout.ours
    negative = embeddings(ours, "Low quality", NEGATIVE)
    short = ours(HAMMER, **negative, generator=seeded(), num_inference_steps=2).audios
    missing = ours.encode_prompt(HAMMER)[0].shape[1] - negative["negative_prompt_embeds"].shape[1]
    assert missing > 0
    pad = torch.nn.functional.pad
    negative["negative_prompt_embeds"] = pad(
        negative["negative_prompt_embeds"], (0, 0, 0, missing), value=3.0
    )
    negative["negative_attention_mask"] = pad(negative["negative_attention_mask"], (0, missing))
    padded = ours(HAMMER, **negative, generator=seeded(), num_inference_steps=2).audios
    np.testing.assert_allclose(short, padded, atol=TOLERANCE)


@pytest.mark.parametrize("guided", [True, False])
@pytest.mark.parametrize("waveforms", [1, 3])
def test_encode_prompt_equals_diffusers(base_layout: Both, guided: bool, waveforms: int) -> None:
    arguments = ([HAMMER, RAIN], torch.device("cpu"), waveforms, guided)
    ours = base_layout.ours.encode_prompt(*arguments, negative_prompt=["Low quality", "noisy"])
    theirs = base_layout.theirs.encode_prompt(*arguments, negative_prompt=["Low quality", "noisy"])
    for mine, reference in zip(ours, theirs, strict=True):
        assert mine.dtype == reference.dtype
        assert_close(mine, reference)


def test_callbacks(base_layout: Both) -> None:
    calls: dict[str, list] = {}
    for name, pipe in (("ours", base_layout.ours), ("theirs", base_layout.theirs)):
        seen = calls.setdefault(name, [])
        pipe(
            HAMMER,
            num_inference_steps=5,
            generator=seeded(),
            callback=lambda step, t, latents, seen=seen: seen.append((step, int(t), latents.clone())),
            callback_steps=2,
        )
    assert [call[:2] for call in calls["ours"]] == [call[:2] for call in calls["theirs"]]
    for (*_, mine), (*_, reference) in zip(calls["ours"], calls["theirs"], strict=True):
        assert_close(mine, reference)


def test_output_types(base_layout: Both) -> None:
    ours, theirs = base_layout.run(prompt=HAMMER, output_type="latent")
    assert_close(torch.as_tensor(ours), torch.as_tensor(theirs))
    pt = base_layout.ours(HAMMER, num_inference_steps=2, generator=seeded(), output_type="pt").audios
    (plain,) = base_layout.ours(HAMMER, num_inference_steps=2, generator=seeded(), return_dict=False)
    assert isinstance(pt, torch.Tensor)
    assert pt.dtype == torch.float32
    assert isinstance(plain, np.ndarray)
    np.testing.assert_array_equal(pt.numpy(), plain)


def test_candidates_of_one_prompt_are_ranked_as_in_diffusers(base_layout: Both) -> None:
    base_layout.check(prompt=HAMMER, num_waveforms_per_prompt=4)


def test_candidates_stay_with_their_prompt(base_layout: Both) -> None:
    """Each prompt's candidates are its own, in the order in which diffusers ranks that prompt alone."""
    theirs, prompts = base_layout.theirs, [HAMMER, RAIN]
    arguments = {"num_waveforms_per_prompt": 3, "num_inference_steps": 3, "audio_length_in_s": 0.64}
    # With embeddings in place of the text, diffusers has nothing to rank by.
    drawn = theirs(**embeddings(theirs, prompts, POSITIVE), **arguments, generator=seeded()).audios
    ranked = [
        theirs.score_waveforms(prompt, torch.from_numpy(block), 3, "cpu", torch.float32).numpy()
        for prompt, block in zip(prompts, np.split(drawn, 2), strict=True)
    ]
    assert any(
        np.abs(one - block).max() > TOLERANCE for one, block in zip(ranked, np.split(drawn, 2), strict=True)
    ), "they were in order from the start: the test would say nothing"
    same(base_layout.ours(prompts, **arguments, generator=seeded()).audios, np.concatenate(ranked))


def test_the_generator_decides_where_clap_listens(base_layout: Both, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is longer than CLAP's window is cut at random: the same seed has to give the same order."""
    ours, generators = base_layout.ours, []
    listen = ours.feature_extractor

    def listening(*arguments: object) -> torch.Tensor:
        generators.append(arguments[2])
        return listen(*arguments)

    listening.config = listen.config  # type: ignore[attr-defined]
    monkeypatch.setattr(ours, "feature_extractor", listening)
    one, each = seeded(), [seeded(1), seeded(2)]
    for generator in (one, each):
        arguments = {"num_inference_steps": 1, "audio_length_in_s": 0.32, "num_waveforms_per_prompt": 2}
        ours(HAMMER, generator=generator, **arguments)
    assert generators[0] is one
    assert generators[1] is each[0]


def test_the_steps_a_scheduler_needs(base_layout: Both) -> None:
    counted: list[int] = []
    arguments = {"audio_length_in_s": 0.05, "callback": lambda step, t, x: counted.append(step)}
    base_layout.ours(HAMMER, **arguments)
    assert len(counted) == 200
    counted.clear()
    base_layout.use("DPMSolverMultistepScheduler")
    base_layout.ours(HAMMER, **arguments)
    assert len(counted) == 20


def test_a_scheduler_of_diffusers_can_be_put_in(base_layout: Both) -> None:
    scheduler = diffusers.EulerDiscreteScheduler.from_config(base_layout.theirs.scheduler.config)
    base_layout.theirs.scheduler = base_layout.ours.scheduler = scheduler
    base_layout.check(prompt=HAMMER)


SCRIPT = """
import torch
from diffusers import AudioLDM2Pipeline, DPMSolverMultistepScheduler

pipe = AudioLDM2Pipeline.from_pretrained(FOLDER, torch_dtype=torch.float32)
pipe = pipe.to("cpu")
pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)

prompt = "The sound of a hammer hitting a wooden surface."
negative_prompt = "Low quality."

generator = torch.Generator("cpu")
generator.manual_seed(0)

audio = pipe(
    prompt,
    negative_prompt=negative_prompt,
    num_inference_steps=20,
    audio_length_in_s=1.0,
    num_waveforms_per_prompt=3,
    generator=generator,
).audios
"""


@pytest.mark.parametrize("name", ["__call__", "encode_prompt"])
def test_arguments_are_diffusers_in_their_order(name: str) -> None:
    ours, theirs = (
        list(inspect.signature(getattr(kind, name)).parameters)
        for kind in (AudioLDM2Pipeline, diffusers.AudioLDM2Pipeline)
    )
    # What it would hold is for attention processors, which there are none of here.
    assert ours == [argument for argument in theirs if argument != "cross_attention_kwargs"]


def test_only_the_import_changes(random_checkpoint: Path) -> None:
    ours: dict = {"FOLDER": str(random_checkpoint)}
    exec(SCRIPT.replace("from diffusers import", "from audioldm2 import"), ours)
    assert type(ours["pipe"]) is AudioLDM2Pipeline
    assert type(ours["pipe"].scheduler) is DPMSolverMultistepScheduler

    # diffusers cannot run the checkpoint on current transformers unless its language model is wrapped.
    theirs: dict = {"FOLDER": str(random_checkpoint), "reference_pipeline": reference_pipeline}
    exec(SCRIPT.replace("AudioLDM2Pipeline.from_pretrained", "reference_pipeline"), theirs)
    same(ours["audio"], theirs["audio"])


def test_what_is_saved_runs_in_diffusers(base_layout: Both, tmp_path: Path) -> None:
    base_layout.ours.save_pretrained(tmp_path)
    theirs = reference_pipeline(tmp_path)
    arguments = {"prompt": HAMMER, "negative_prompt": "Techno", "num_inference_steps": 3}
    ours = base_layout.ours(**arguments, generator=seeded()).audios
    same(ours, theirs(**arguments, generator=seeded()).audios)


def test_weights_changed_here_change_there(base_layout: Both, tmp_path: Path) -> None:
    """The way back for every line of the maps: random weights of ours, saved, run alike in diffusers."""
    pipe = AudioLDM2Pipeline.from_pretrained(base_layout.folder)
    pipe.set_progress_bar_config(disable=True)
    for number, stage in enumerate(pipe.stages.values()):
        randomize(stage, seed=900 + number)
    pipe.save_pretrained(tmp_path)
    arguments = {"prompt": HAMMER, "num_inference_steps": 3, "num_waveforms_per_prompt": 2}
    theirs = reference_pipeline(tmp_path)(**arguments, generator=seeded()).audios
    same(pipe(**arguments, generator=seeded()).audios, theirs)
    before = base_layout.ours(**arguments, generator=seeded()).audios
    assert np.abs(before - theirs).max() > 0.05


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_near(base_layout: Both, dtype: torch.dtype) -> None:
    arguments = {"num_inference_steps": 3, "audio_length_in_s": 0.32}
    whole = base_layout.ours(HAMMER, generator=seeded(), **arguments).audios
    pipe = AudioLDM2Pipeline.from_pretrained(base_layout.folder, torch_dtype=dtype)
    pipe.set_progress_bar_config(disable=True)
    assert pipe.dtype == dtype
    latents = torch.randn(1, 4, 8, 4, generator=seeded())  # halves draw other noise
    halves = pipe(HAMMER, latents=latents, **arguments).audios
    whole = base_layout.ours(HAMMER, latents=latents, **arguments).audios
    assert halves.dtype == np.float32
    assert np.isfinite(halves).all()
    # Three steps from pure noise magnify what rounding does; the sound is the same, its samples nearly.
    correlation = np.corrcoef(halves[0], whole[0])[0, 1]
    assert correlation > (0.999 if dtype == torch.float16 else 0.98)


def test_stages_may_differ_in_precision(base_layout: Both) -> None:
    pipe = AudioLDM2Pipeline.from_pretrained(base_layout.folder)
    pipe.set_progress_bar_config(disable=True)
    pipe.unet.to(torch.bfloat16)
    pipe.text_encoder_2.to(torch.bfloat16)
    audio = pipe(HAMMER, num_inference_steps=2, num_waveforms_per_prompt=2).audios
    assert np.isfinite(audio).all()


def test_offload_gives_the_same_sound(base_layout: Both) -> None:
    pipe = AudioLDM2Pipeline.from_pretrained(base_layout.folder)
    pipe.set_progress_bar_config(disable=True)
    pipe.enable_model_cpu_offload(device="cpu")
    arguments = {"num_inference_steps": 2, "num_waveforms_per_prompt": 2}
    offloaded = pipe(HAMMER, generator=seeded(), **arguments).audios
    # Copies lie elsewhere in memory than a mapped file, and products of matrices round by where they lie.
    plain = base_layout.ours(HAMMER, generator=seeded(), **arguments).audios
    np.testing.assert_allclose(offloaded, plain, atol=1e-5)
    with pytest.raises(ValueError, match="do not call to"):
        pipe.to("cpu")


@pytest.mark.filterwarnings("ignore:.*cut off")
def test_speech_equals_diffusers(tmp_path: Path) -> None:
    both = Both(make_checkpoint(tmp_path / "speech", SMALL_SPEECH))
    arguments = {"prompt": "A woman is speaking", "num_inference_steps": 3, "max_new_tokens": 20}
    first = both.check(**arguments, transcription="wish you a good day")
    second = both.check(**arguments, transcription="go home")
    assert np.abs(first - second).max() > 0.01, "the words had no effect"
    both.check(
        prompt=["A woman is speaking", "A man"], transcription=["go home", "stay"], num_inference_steps=2
    )
    with pytest.raises(ValueError, match="pass transcription"):
        both.ours("A woman is speaking")
    with pytest.raises(ValueError, match="2 transcriptions for 1 prompts"):
        both.ours("A woman is speaking", transcription=["go", "home"])

    both.ours.save_pretrained(tmp_path / "saved")
    theirs = reference_pipeline(tmp_path / "saved")
    again = theirs(**arguments, transcription="go home", audio_length_in_s=0.64, generator=seeded()).audios
    same(second, again)


def test_warns_of_what_is_cut(base_layout: Both) -> None:
    ours = base_layout.ours
    with pytest.warns(UserWarning, match=r"longer than the 32 tokens that are read; cut off: .*birds'"):
        ours.encode_prompt(" ".join([HAMMER] * 4) + " and birds")
    with pytest.warns(UserWarning, match=r"longer than the prompt's \d+ tokens; cut off: '.*dull\.'"):
        ours.encode_prompt("Rain", negative_prompt="Low quality, noisy and dull.")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours(HAMMER, num_inference_steps=1, num_waveforms_per_prompt=2)


@pytest.mark.filterwarnings("ignore:.*cut off")
def test_a_tokenizer_that_states_no_limit(random_checkpoint: Path, tmp_path: Path) -> None:
    """Prompts are then as long as the stages can read; diffusers fails with every prompt."""
    folder = shutil.copytree(random_checkpoint, tmp_path / "unlimited")
    for name in ("tokenizer", "tokenizer_2"):
        path = folder / name / "tokenizer_config.json"
        config = json.loads(path.read_text())
        del config["model_max_length"]
        path.write_text(json.dumps(config))
    pipe = AudioLDM2Pipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    assert pipe.tokenizer_2.model_max_length > 10**9
    with pytest.warns(UserWarning, match="longer than the 68 tokens that are read"):
        states, _, vectors = pipe.encode_prompt(" ".join([HAMMER] * 9))
    assert states.shape[1] == 68
    assert vectors.shape[1] == 8
    arguments = {"num_inference_steps": 2, "audio_length_in_s": 0.32}
    limited = AudioLDM2Pipeline.from_pretrained(random_checkpoint)
    limited.set_progress_bar_config(disable=True)
    same(
        pipe(HAMMER, generator=seeded(), **arguments).audios,
        limited(HAMMER, generator=seeded(), **arguments).audios,
    )


BAD = {
    "nothing": ({}, ValueError, "pass prompt"),
    "empty": ({"prompt": ""}, ValueError, "prompt is empty"),
    "blank": ({"prompt": [HAMMER, "  "]}, ValueError, "prompt is empty"),
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
    "more vectors than places": ({"prompt": HAMMER, "max_new_tokens": 500}, ValueError, "n_positions"),
}


@pytest.mark.parametrize(("arguments", "kind", "message"), BAD.values(), ids=BAD)
def test_bad_arguments(base_layout: Both, arguments: dict, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message) as caught:
        base_layout.ours(**arguments)
    assert "\n" not in str(caught.value)


def test_devices_that_are_not_there(base_layout: Both) -> None:
    for name, message in (("banana", "unknown device 'banana'"), ("cuda:99", "not available")):
        with pytest.raises(ValueError, match=message):
            base_layout.ours.to(name)
        with pytest.raises(ValueError, match=message):
            base_layout.ours.enable_model_cpu_offload(device=name)


def test_one_negative_prompt_serves_all(base_layout: Both) -> None:
    arguments = {"prompt": [HAMMER, RAIN], "num_inference_steps": 2}
    one = base_layout.ours(negative_prompt="Techno", generator=seeded(), **arguments).audios
    each = base_layout.ours(negative_prompt=["Techno"] * 2, generator=seeded(), **arguments).audios
    np.testing.assert_array_equal(one, each)


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
def test_a_gpu_gives_the_same_sound(random_checkpoint: Path) -> None:
    """Also behind offload, which leaves nothing there. Noise is drawn on the CPU, so it is the same."""
    arguments = {"num_inference_steps": 3, "num_waveforms_per_prompt": 2}
    sounds = []
    for place in ("cpu", "cuda", "offload"):
        pipe = AudioLDM2Pipeline.from_pretrained(random_checkpoint)
        pipe.set_progress_bar_config(disable=True)
        if place == "offload":
            pipe.enable_model_cpu_offload()
        else:
            pipe.to(place)
        sounds.append(pipe(HAMMER, generator=seeded(), **arguments).audios)
    assert all(p.device.type == "cpu" for stage in pipe.stages.values() for p in stage.parameters())
    np.testing.assert_allclose(sounds[1], sounds[0], atol=5e-3)
    np.testing.assert_allclose(sounds[2], sounds[1], atol=1e-5)


# --- how the UNet is called


@pytest.fixture
def fresh(random_checkpoint: Path) -> AudioLDM2Pipeline:
    """A pipeline of the test's own."""
    pipe = AudioLDM2Pipeline.from_pretrained(random_checkpoint)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def quick(pipe: AudioLDM2Pipeline, prompt: str | list[str] = HAMMER, **arguments: object) -> np.ndarray:
    arguments = {"negative_prompt": "Low", "num_inference_steps": 2, "audio_length_in_s": 0.32, **arguments}
    audio: np.ndarray = pipe(prompt, generator=seeded(), **arguments).audios
    return audio


@pytest.mark.parametrize("guided", [True, False])
def test_prompts_are_encoded_once_and_in_one_batch(
    fresh: AudioLDM2Pipeline, guided: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where candidates are ranked, for which CLAP's embedding of the prompt is used again."""
    batches: dict[str, list[int]] = {}

    def count(name: str, owner: object, method: str) -> None:
        original = getattr(owner, method)

        def counting(first: torch.Tensor, *arguments: object) -> object:
            batches.setdefault(name, []).append(len(first))
            return original(first, *arguments)

        monkeypatch.setattr(owner, method, counting)

    count("clap", fresh.text_encoder, "text_features")
    count("t5", fresh.text_encoder_2, "forward")
    count("projection", fresh.projection_model, "forward")
    count("gpt2", fresh.language_model, "generate")
    quick(fresh, [HAMMER, RAIN], num_waveforms_per_prompt=2, guidance_scale=3.5 if guided else 1.0)
    assert batches == {name: [4 if guided else 2] for name in ("clap", "t5", "projection", "gpt2")}


def test_one_warning_for_a_prompt_that_is_cut_off(fresh: AudioLDM2Pipeline) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        quick(fresh, " ".join([HAMMER] * 9), negative_prompt=None, num_waveforms_per_prompt=2)
    cut = [str(warning.message) for warning in caught if "cut off" in str(warning.message)]
    assert len(cut) == 2, "one for each tokenizer"


class ItsOwnForward(UNet):
    """As a subclass from before `contexts` was an argument."""

    def forward(self, sample: torch.Tensor, timestep: object, **states: object) -> torch.Tensor:  # type: ignore[override]
        seen.append(sample.shape)
        return super().forward(sample, timestep, **states)  # type: ignore[arg-type]


class Foreign(torch.nn.Module):
    """Called as diffusers calls its UNet; gives a tuple, as diffusers' UNet does."""

    def __init__(self, inner: UNet):
        super().__init__()
        self.inner, self.config = inner, inner.config

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        encoder_hidden_states_1: torch.Tensor,
        encoder_attention_mask_1: torch.Tensor,
    ) -> tuple[torch.Tensor]:
        seen.append(sample.shape)
        states = (encoder_hidden_states, encoder_hidden_states_1, encoder_attention_mask_1)
        return (self.inner(sample, timestep, *states),)


seen: list[torch.Size] = []


def hooked(unet: UNet) -> UNet:
    unet.register_forward_hook(lambda module, arguments, output: seen.append(arguments[0].shape))
    return unet


def hooked_before(unet: UNet) -> UNet:
    unet.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0].shape))
    return unet


def subclass(unet: UNet) -> UNet:
    own = ItsOwnForward(unet.config)
    own.load_state_dict(unet.state_dict())
    return own.eval()


def data_parallel(unet: UNet) -> torch.nn.Module:
    hooked(unet)
    return torch.nn.DataParallel(unet)


@pytest.mark.parametrize(
    "make",
    [hooked, hooked_before, subclass, Foreign, data_parallel],
    ids=lambda make: make.__name__,
)
@pytest.mark.parametrize("guided", [True, False])
def test_the_unet_is_called_at_every_step_whoever_wraps_it(
    fresh: AudioLDM2Pipeline, make: Callable[[UNet], UNet], guided: bool
) -> None:
    arguments = {"prompt": [HAMMER, RAIN], "guidance_scale": 3.5 if guided else 1.0, "num_inference_steps": 3}
    expected = quick(fresh, **arguments)
    fresh.unet = make(fresh.unet)
    seen.clear()
    np.testing.assert_allclose(quick(fresh, **arguments), expected, atol=1e-5)
    # Our UNet takes the latents once for both sides of guidance, any other twice.
    rows = 4 if guided and make in (Foreign, data_parallel) else 2
    assert seen == [(rows, 4, 8, 4)] * 3


def test_a_diffusers_unet_can_be_put_in(base_layout: Both) -> None:
    pipe = AudioLDM2Pipeline.from_pretrained(base_layout.folder)
    pipe.set_progress_bar_config(disable=True)
    expected = quick(pipe)
    pipe.unet = base_layout.theirs.unet
    np.testing.assert_allclose(quick(pipe), expected, atol=TOLERANCE)


def test_hooks_on_the_unets_blocks_fire_at_every_step(fresh: AudioLDM2Pipeline) -> None:
    fired: dict[str, int] = {}
    unet = fresh.unet
    down = unet.down[1]
    block = down.transformers[1].blocks[0]
    watched = {
        "unet": unet,
        "level": down,
        "resnet": down.resnets[0],
        "transformer": down.transformers[0],
        "self-attention": block.self_attention,
        "cross-attention": block.cross_attention,
        "up": unet.up[0],
        "middle": unet.middle,
    }
    for name, module in watched.items():
        module.register_forward_hook(lambda *_, name=name: fired.update({name: fired.get(name, 0) + 1}))
    quick(fresh, num_inference_steps=3)
    assert fired == dict.fromkeys(watched, 3)


# --- nothing waits for the device


@pytest.mark.parametrize(
    "scheduler",
    [("DDIMScheduler", {}), ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"})],
    ids=["DDIM", "DPM-Solver++"],
)
@pytest.mark.parametrize("guidance_scale", [3.5, 1.0])
@pytest.mark.parametrize("whole", [False, True], ids=["ours", "a watched UNet"])
def test_denoising_reads_no_tensor(
    fresh: AudioLDM2Pipeline,
    scheduler: tuple[str, dict],
    guidance_scale: float,
    whole: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """From the first step to the last, as a GPU would have to finish what it was given before it answers."""
    name, options = scheduler
    fresh.scheduler = getattr(audioldm2, name).from_config(fresh.scheduler.config, **options)
    fresh.set_progress_bar_config(file=io.StringIO())
    if whole:
        fresh.unet = hooked(fresh.unet)
    denoise = audioldm2.pipeline.denoise

    def refuse(*arguments: object, **options: object) -> None:
        raise AssertionError("waits for the device")

    def watched(*arguments: object, **options: object) -> torch.Tensor:
        with NoReading(), pytest.MonkeyPatch.context() as patch:
            # These reach no operator where a tensor is in main memory already.
            for method in ("cpu", "numpy", "tolist", "item", "__bool__", "__float__", "__int__", "__array__"):
                patch.setattr(torch.Tensor, method, refuse)
            return denoise(*arguments, **options)

    monkeypatch.setattr(audioldm2.pipeline, "denoise", watched)
    arguments = {"eta": 0.5, "num_inference_steps": 5, "guidance_scale": guidance_scale}
    assert quick(fresh, **arguments).std() > 0.02
    with pytest.raises(AssertionError, match="waits for the device"):
        quick(fresh, **arguments, callback=lambda step, t, latents: latents.sum().item())


@pytest.mark.gpu
def test_denoising_does_not_wait_for_a_gpu(fresh: AudioLDM2Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    denoise = audioldm2.pipeline.denoise
    fresh.to("cuda")
    quick(fresh)

    def watched(*arguments: object, **options: object) -> torch.Tensor:
        torch.cuda.set_sync_debug_mode("error")
        try:
            return denoise(*arguments, **options)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(audioldm2.pipeline, "denoise", watched)
    assert quick(fresh).std() > 0.02
