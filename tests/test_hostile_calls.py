"""Arguments of any kind give a finite sound of the right length, or one line that names the argument."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st

from audioldm2 import AudioLDM2Pipeline, DDIMScheduler, resample
from audioldm2.tensors import NonFiniteError
from tests.helpers import HAMMER, noise, seeded
from tests.reference import Both

NAN = math.nan
NUMBERS = st.one_of(
    st.floats(allow_nan=True, allow_infinity=True),
    st.integers(-3, 3),
    st.sampled_from(
        [None, "3", True, 1e400, -0.0, 10**400, np.int64(2), np.float32(2), 2j, [2], torch.tensor(2.0)]
    ),
)
COUNTS = st.sampled_from([0, -1, 1, 2, True, 2.0, "2", None, np.int64(2), np.uint8(1), 10**9, NAN, [1]])
TEXTS = st.one_of(
    st.text(max_size=5),
    st.sampled_from([None, 3, [], [""], ["a", "b"], ("a",), ["a", 3], b"a", "\udcff", "a" * 3000, {"a": 1}]),
)


def tensors(*shape: int) -> st.SearchStrategy[Any]:
    """Tensors of a shape that fits and of others, good and bad, and what is not a tensor."""
    good = noise(*shape)
    return st.sampled_from(
        [
            None,
            good,
            good.double(),
            good.half(),
            good[:, :0],
            good[:0],
            good[0],
            good[..., None],
            good[..., :-1],
            good.long(),
            good.bool(),
            good.to(torch.complex64),
            good.to("meta"),
            good.to_sparse(),
            good * NAN,
            good / 0,
            good * 1e30,
            good.numpy(),
            good.tolist(),
            "x",
            3,
        ]
    )


WAVE = 0.1 * noise(4000)
SPANS = st.sampled_from(
    [
        None,
        [(0.0, 0.1)],
        (0.1, None),
        (0.1, 0.9),
        (0.2, 0.1),
        [],
        [3],
        (NAN, 1),
        (0, 8000),
        (100, 2000),
        "0-1",
        3,
    ]
)


def is_large(value: object) -> bool:
    """Whether a value is a number that makes a sound long."""
    return isinstance(value, float | int) and not isinstance(value, bool) and 0.5 < value <= 3600


ARGUMENTS: dict[str, st.SearchStrategy[Any]] = {
    "prompt": TEXTS,
    "transcription": st.sampled_from([None, None, "hello", 3]),
    "audio_length_in_s": st.one_of(
        st.sampled_from([None, 0.16, 0.32, np.float64(0.16)]),
        NUMBERS.filter(lambda x: not is_large(x)),
    ),
    "num_inference_steps": COUNTS.filter(lambda x: x is not None),  # the default is 200
    "guidance_scale": NUMBERS,
    "negative_prompt": TEXTS,
    "num_waveforms_per_prompt": COUNTS.filter(lambda x: x != 10**9),
    "eta": NUMBERS,
    "generator": st.sampled_from(
        [None, seeded(), [seeded()], (seeded(),), [], [None], 3, "x", [seeded()] * 3]
    ),
    "latents": tensors(1, 4, 8, 4),
    "prompt_embeds": tensors(1, 3, 20),
    "generated_prompt_embeds": tensors(1, 8, 16),
    "negative_prompt_embeds": tensors(1, 4, 20),
    "negative_generated_prompt_embeds": tensors(1, 8, 16),
    "attention_mask": tensors(1, 3),
    "negative_attention_mask": tensors(1, 4),
    "max_new_tokens": COUNTS,
    "callback": st.sampled_from([None, 3, "x", lambda *step: None]),
    "callback_steps": COUNTS,
    "cross_attention_kwargs": st.sampled_from([None, {}, {"scale": 0.5}, {"scale": None}, {"x": 1}, 3]),
    "adapters": st.sampled_from([None, {}, {"dog": 0.5}, {3: 1}, ["dog"], "dog", 3]),
    "audio": st.sampled_from(
        [
            None,
            WAVE,
            WAVE.numpy(),
            WAVE.double(),
            [WAVE],
            [WAVE, WAVE],
            WAVE[:50],
            0 * WAVE,
            WAVE * NAN,
            [],
            3,
            "no.wav",
        ]
    ),
    "sampling_rate": st.one_of(st.sampled_from([None, 16000, 8000, 44100]), COUNTS),
    "strength": NUMBERS,
    "keep": SPANS,
    "replace": SPANS,
    "replace_band": SPANS,
    "extend": st.one_of(st.sampled_from([None, 0.1]), NUMBERS.filter(lambda x: not is_large(x))),
    "loop": st.sampled_from([None, True, False, 3, "x"]),
    "window": NUMBERS,
    "exact_decoding": st.sampled_from([None, True, False, 3, "x"]),
    "inverted": st.sampled_from([None, None, 3, {}]),
    "skip": NUMBERS,
    "word_weights": st.sampled_from(
        [None, {}, {"Rain": 2.0}, {"rain": NAN}, {"x": 1.0}, {3: 1.0}, [{"rain": 0.5}], "rain", 3]
    ),
    "clap_embeds": tensors(1, 16),
    "output_type": st.sampled_from(["np", "pt", "latent", "pil", None, 3, ["np"]]),
    "callback_on_step_end": st.sampled_from([None, 3, lambda *step: None, lambda *step: {"latents": 3}]),
    "callback_on_step_end_tensor_inputs": st.sampled_from(["latents", ["latents"], [], ["x"], None, 3, [[]]]),
}
# What an error may call an argument, beside its own name: those that are only valid together.
ALSO = {
    "prompt": "negative prompts|prompts|prompt_embeds",
    "latents": "audio_length_in_s",
    "generator": "generators",
    "audio": "no.wav",
}


def call(pipe: AudioLDM2Pipeline, arguments: dict[str, Any]) -> None:
    """Call the pipeline: it returns finite numbers, or what it raises names an argument in one short line."""
    arguments = {"num_inference_steps": 1, "audio_length_in_s": None, "generator": seeded(), **arguments}
    if all(arguments.get(name) is None for name in ("audio_length_in_s", "latents", "audio")):
        arguments["audio_length_in_s"] = 0.16
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*(cut off|has no effect|is quiet)")
        try:
            output = pipe(**arguments)
        except (ValueError, TypeError, FileNotFoundError) as error:
            refused = error
        else:
            refused = None
    if refused is not None:
        names = [*arguments, *(ALSO.get(name, name) for name in arguments)]
        named = r"^unet turned|^vae turned" if isinstance(refused, NonFiniteError) else "|".join(names)
        message = str(refused)
        assert re.search(named, message), message
        assert len(message) < 400
        assert "\n" not in message
        return
    audios = torch.as_tensor(output.audios)
    assert bool(audios.isfinite().all())
    assert audios.shape[-1] > 0
    assert len(audios) >= 1


@pytest.fixture(scope="module")
def session_pipe(_base: Both) -> AudioLDM2Pipeline:
    _base.use("DDIMScheduler")
    return _base.ours


@pytest.mark.parametrize("name", ARGUMENTS)
@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=[*HealthCheck])
@given(data=st.data())
def test_one_argument_of_any_kind(session_pipe: AudioLDM2Pipeline, name: str, data: st.DataObject) -> None:
    arguments = {"prompt": HAMMER, name: data.draw(ARGUMENTS[name])}
    if "embeds" in name or "mask" in name:
        negative = "negative_" if name.startswith("negative") else ""
        if not negative:
            del arguments["prompt"]
        shape = (1, 4, 20) if negative else (1, 3, 20)
        arguments = {
            f"{negative}prompt_embeds": noise(*shape),
            f"{negative}generated_prompt_embeds": noise(1, 8, 16),
            **arguments,
        }
    call(session_pipe, arguments)


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[*HealthCheck])
@given(
    arguments=st.fixed_dictionaries(
        {"prompt": st.sampled_from([HAMMER, [HAMMER, "Rain"], ""])},
        optional={name: values for name, values in ARGUMENTS.items() if name != "prompt"},
    )
)
def test_several_arguments_of_any_kind(session_pipe: AudioLDM2Pipeline, arguments: dict[str, Any]) -> None:
    call(session_pipe, arguments)


# --- each kind that was found, by name


REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "transcription": (
        {
            "prompt": None,
            "prompt_embeds": noise(1, 3, 20),
            "generated_prompt_embeds": noise(1, 8, 16),
            "transcription": "hello",
        },
        ValueError,
        "transcription is for the speech checkpoints",
    ),
    "negative of another type": (
        {"negative_prompt": 123, "guidance_scale": 1.0},
        TypeError,
        "negative_prompt",
    ),
    "negative embeddings of another type": (
        {"negative_prompt_embeds": "x", "negative_generated_prompt_embeds": "x", "guidance_scale": 1.0},
        TypeError,
        "negative_prompt_embeds must be a torch.Tensor",
    ),
    "nan": ({"guidance_scale": NAN}, ValueError, "guidance_scale must be a finite number, got nan"),
    "infinity": ({"guidance_scale": math.inf}, ValueError, "guidance_scale must be a finite number, got inf"),
    "lengths": (
        {"latents": noise(1, 4, 8, 4), "audio_length_in_s": 0.64},
        ValueError,
        r"latents have 8 rows, which are 0\.32 s, but audio_length_in_s = 0\.64 needs 16",
    ),
    "complex": (
        {"latents": noise(1, 4, 8, 4) * 1j},
        ValueError,
        "latents must be floating-point, got complex64",
    ),
    "not finite": ({"latents": noise(1, 4, 8, 4) / 0}, ValueError, "latents has numbers that are not finite"),
    "sparse": ({"latents": noise(1, 4, 8, 4).to_sparse()}, ValueError, "latents is a sparse_coo tensor"),
    "meta": ({"latents": noise(1, 4, 8, 4).to("meta")}, ValueError, "latents is a meta tensor"),
    "empty": ({"latents": noise(1, 4, 0, 4)}, ValueError, r"latents has shape \(1, 4, 0, 4\)"),
    "array": ({"latents": noise(1, 4, 8, 4).numpy()}, TypeError, "latents must be a torch.Tensor"),
    "seed": ({"generator": 3}, TypeError, r"generator must be .* got 3; for a seed pass torch\.Generator"),
    "callback": ({"callback": 3}, TypeError, "callback must be a function, got 3"),
    "attention": ({"cross_attention_kwargs": {"gligen": 0.5}}, ValueError, "no attention processors"),
    "attention's scale": ({"cross_attention_kwargs": {"scale": "x"}}, ValueError, "must be a finite number"),
    "adapters": ({"adapters": {"dog": 0.5}}, ValueError, "there is no adapter 'dog'; none is loaded"),
    "adapters' type": ({"adapters": ["dog"]}, TypeError, r"adapters must be a dict such as .* got \['dog'\]"),
    "vectors": (
        {
            "prompt": None,
            "prompt_embeds": noise(1, 3, 20),
            "generated_prompt_embeds": noise(1, 8, 16),
            "max_new_tokens": 3,
        },
        ValueError,
        "max_new_tokens = 3, but generated_prompt_embeds has 8 vectors",
    ),
    "callback's guidance": (
        {"callback_on_step_end": lambda pipe, *step: setattr(pipe, "_guidance_scale", NAN)},
        ValueError,
        "_guidance_scale must be a finite number, got nan",
    ),
    "callback's tensors": (
        {"callback_on_step_end": lambda pipe, i, t, given: {"latents": given["latents"] * NAN}},
        ValueError,
        "latents of callback_on_step_end has numbers that are not finite",
    ),
    "callback's result": (
        {"callback_on_step_end": lambda *step: 3},
        TypeError,
        "callback_on_step_end must return a dict",
    ),
    "callback's scheduler": (
        {"callback_on_step_end": lambda pipe, *step: setattr(pipe, "scheduler", DDIMScheduler())},
        ValueError,
        r"the callback replaced pipe\.scheduler",
    ),
    "widths": (
        {"prompt": None, "prompt_embeds": noise(1, 3, 21), "generated_prompt_embeds": noise(1, 8, 16)},
        ValueError,
        r"prompt_embeds has shape \(1, 3, 21\); its width must be this checkpoint's, 20",
    ),
}


@pytest.mark.parametrize(("arguments", "kind", "message"), REFUSED.values(), ids=REFUSED)
def test_each_kind_is_refused_by_name(
    base: Both, arguments: dict[str, Any], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        base.ours(**{"prompt": HAMMER, "num_inference_steps": 1, "audio_length_in_s": None, **arguments})


def test_encode_prompt_refuses_what_the_call_refuses(base: Both) -> None:
    with pytest.raises(ValueError, match="num_waveforms_per_prompt must be an integer of at least 1, got 0"):
        base.ours.encode_prompt(HAMMER, num_waveforms_per_prompt=0)
    with pytest.raises(TypeError, match="negative_prompt must be a string"):
        base.ours.encode_prompt(HAMMER, do_classifier_free_guidance=False, negative_prompt=3)


def test_what_has_no_effect_is_a_warning(base: Both) -> None:
    with pytest.warns(UserWarning, match="negative_prompt has no effect without guidance"):
        base.ours.encode_prompt(HAMMER, do_classifier_free_guidance=False, negative_prompt="Rain")
    base.use("DPMSolverMultistepScheduler")
    with pytest.warns(UserWarning, match=r"eta = 0\.5 has no effect: DPMSolverMultistepScheduler"):
        base.ours(HAMMER, num_inference_steps=1, audio_length_in_s=0.16, eta=0.5)


# --- the stage at which numbers stop being finite


@pytest.mark.parametrize("name", AudioLDM2Pipeline.stage_names)
def test_the_stage_that_turns_finite_numbers_into_nan_is_named(pipe: AudioLDM2Pipeline, name: str) -> None:
    for parameter in pipe.stages[name].parameters():
        parameter.data.fill_(NAN)
    with pytest.raises(
        NonFiniteError, match=rf"^{name} turned finite numbers into NaN or infinity, in float32"
    ):
        pipe(HAMMER, num_inference_steps=1, audio_length_in_s=0.16, num_waveforms_per_prompt=2)


def test_an_audio_tower_that_returns_nan_is_named(pipe: AudioLDM2Pipeline) -> None:
    next(pipe.text_encoder.audio.parameters()).data.fill_(NAN)
    with pytest.raises(NonFiniteError, match=r"^text_encoder turned finite numbers into NaN"):
        pipe(HAMMER, num_inference_steps=1, audio_length_in_s=0.16, num_waveforms_per_prompt=2)


def test_too_much_guidance_is_named(base: Both) -> None:
    with pytest.raises(NonFiniteError, match=r"unet turned.*guidance_scale = 1e\+38"):
        base.ours(HAMMER, num_inference_steps=3, audio_length_in_s=0.16, guidance_scale=1e38)


# --- the other methods


METHODS: dict[str, tuple[Callable[[AudioLDM2Pipeline], Any], str]] = {
    "sequence": (lambda pipe: pipe.generate_language_model(noise(1, 4)), "inputs_embeds has shape"),
    "mask": (
        lambda pipe: pipe.generate_language_model(noise(1, 4, 16), attention_mask="x"),
        "attention_mask must be a torch.Tensor",
    ),
    "spectrogram": (
        lambda pipe: pipe.mel_spectrogram_to_waveform(noise(1, 8, 16).numpy()),
        "mel_spectrogram must be a torch.Tensor",
    ),
    "channels": (lambda pipe: pipe.vocode(noise(1, 2, 8, 16)), "mel has shape .* one channel"),
    "device": (lambda pipe: pipe.encode_prompt(HAMMER, "foo"), "unknown device 'foo'"),
    "latents' device": (
        lambda pipe: pipe.prepare_latents(1, 4, 16, torch.float32, "foo"),
        "unknown device 'foo'",
    ),
    "latents' dtype": (lambda pipe: pipe.prepare_latents(1, 4, 16, torch.int64, "cpu"), "int64 is not supp"),
    "scored": (lambda pipe: pipe.score_waveforms(HAMMER, noise(3, 500), 2), "audio has 3 sounds"),
}


@pytest.mark.parametrize(("call", "message"), METHODS.values(), ids=METHODS)
def test_other_methods_name_what_they_refuse(
    base: Both, call: Callable[[AudioLDM2Pipeline], Any], message: str
) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        call(base.ours)


def test_a_sequence_of_another_dtype_is_converted(base: Both) -> None:
    sequence = noise(1, 4, 16)
    expected = base.ours.generate_language_model(sequence)
    assert torch.equal(base.ours.generate_language_model(sequence.double()), expected)


def test_recommended_settings_are_checked_before_anything_is_written(
    pipe: AudioLDM2Pipeline, tmp_path: Path
) -> None:
    for bad in (None, "x", {"guidance_scale": "x"}, {"prompt": "a"}):
        pipe.recommended = bad
        with pytest.raises((ValueError, TypeError), match=r"recommended|guidance_scale"):
            pipe.save_pretrained(tmp_path / "saved")
        assert not (tmp_path / "saved").exists()
    pipe.recommended = {"guidance_scale": np.float32(2), "num_inference_steps": np.int64(20)}
    pipe.save_pretrained(tmp_path / "saved")
    again = AudioLDM2Pipeline.from_pretrained(tmp_path / "saved")
    assert again.recommended | {"eta": 0} == {"guidance_scale": 2.0, "num_inference_steps": 20, "eta": 0}


def test_a_waveform_that_overflows_is_refused() -> None:
    with pytest.raises(ValueError, match="too loud to be resampled"):
        resample(torch.tensor([3e38, 3e38, -3e38, -3e38]).repeat(4000), 16000, 44100)
