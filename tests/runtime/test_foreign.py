"""Parts in place of ours: those of diffusers and transformers, and wrappers; the sound stays the same."""

from __future__ import annotations

import contextlib
import copy
import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor, nn

from audioldm2 import AudioLDM2Pipeline, DDIMScheduler
from audioldm2.runtime.foreign import unwrapped
from tests.helpers import HAMMER, RAIN, ROOT, assert_same_sound, noise, sound
from tests.reference import Both, assert_close

STAGES = AudioLDM2Pipeline.stage_names
PARTS = (*STAGES, "feature_extractor")


class Wrapper(nn.Module):
    """Any module around another: it forwards the call and nothing else."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner
        self.calls = 0

    def forward(self, *arguments: Any, **options: Any) -> Any:
        self.calls += 1
        return self.inner(*arguments, **options)


@pytest.fixture(scope="module")
def expected(_base: Both) -> Any:
    """Three ranked candidates of two prompts, by our own parts."""
    _base.use("DDIMScheduler")
    return sound(_base.ours, [HAMMER, RAIN], num_waveforms_per_prompt=3)


def check(pipe: AudioLDM2Pipeline, expected: Any) -> None:
    assert_same_sound(sound(pipe, [HAMMER, RAIN], num_waveforms_per_prompt=3), expected)


# --- diffusers and transformers


@pytest.mark.parametrize("name", PARTS)
def test_a_part_of_diffusers_or_transformers_gives_the_same_sound(
    base: Both, pipe: AudioLDM2Pipeline, expected: Any, name: str
) -> None:
    setattr(pipe, name, getattr(base.theirs, name))
    check(pipe, expected)


def test_all_parts_may_be_foreign_ones(base: Both, expected: Any) -> None:
    check(AudioLDM2Pipeline(**base.theirs.components), expected)


def test_gpt2_needs_no_head_for_words(base: Both, pipe: AudioLDM2Pipeline, expected: Any) -> None:
    assert isinstance(base.theirs.language_model, transformers.GPT2LMHeadModel)
    pipe.language_model = base.theirs.language_model.transformer
    check(pipe, expected)


def test_a_whole_t5_is_used_as_its_encoder(base: Both, pipe: AudioLDM2Pipeline, expected: Any) -> None:
    encoder = base.theirs.text_encoder_2
    whole = transformers.T5ForConditionalGeneration(
        transformers.T5Config(**{**encoder.config.to_dict(), "num_decoder_layers": 1})
    )
    whole.encoder, whole.shared = encoder.encoder, encoder.shared
    pipe.text_encoder_2 = whole.eval()
    check(pipe, expected)


def test_vits_of_transformers_speaks_as_ours(speech: Both) -> None:
    arguments = {"transcription": "go home", "num_inference_steps": 2, "audio_length_in_s": 0.32}
    ours = speech.ours
    own = ours.text_encoder_2
    expected = sound(ours, "A woman is speaking", **arguments)
    try:
        ours.text_encoder_2 = speech.theirs.text_encoder_2
        assert_same_sound(sound(ours, "A woman is speaking", **arguments), expected)
    finally:
        ours.text_encoder_2 = own


def test_a_foreign_vae_encodes(base: Both, pipe: AudioLDM2Pipeline) -> None:
    mel = noise(1, 1, 64, 16)
    own = pipe.part("vae").encode(mel).mode()
    pipe.vae = base.theirs.vae
    assert_close(pipe.part("vae").encode(mel).mode(), own)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_foreign_parts_are_converted_with_the_pipeline(base: Both, dtype: torch.dtype, expected: Any) -> None:
    pipe = AudioLDM2Pipeline(**copy.deepcopy(base.theirs.components)).to(dtype=dtype)
    pipe.set_progress_bar_config(disable=True)
    assert {part.dtype for part in pipe.stages.values()} == {dtype}
    assert_same_sound(sound(pipe), sound(base.ours), 0.1)


# --- wrappers


@pytest.mark.parametrize("wrap", [torch.compile, nn.DataParallel])
def test_wrapped_parts_give_the_same_sound(
    pipe: AudioLDM2Pipeline, expected: Any, wrap: Callable[[nn.Module], Any]
) -> None:
    own = pipe.stages
    for name, stage in own.items():
        setattr(pipe, name, wrap(stage))
        assert getattr(pipe, name) is not stage
        assert unwrapped(getattr(pipe, name)) is stage
    # Compiling would take minutes; how the wrappers are called is the same without.
    stance = getattr(torch.compiler, "set_stance", None)
    if wrap is torch.compile and stance is None:
        pytest.skip("this PyTorch cannot run what is marked to be compiled without compiling it")
    with stance("force_eager") if stance else contextlib.nullcontext():
        check(pipe, expected)


@pytest.mark.parametrize("name", ["text_encoder_2", "projection_model", "unet"])
def test_a_plain_wrapper_is_called(pipe: AudioLDM2Pipeline, expected: Any, name: str) -> None:
    wrapper = Wrapper(getattr(pipe, name))
    setattr(pipe, name, wrapper)
    check(pipe, expected)
    assert wrapper.calls == (2 if name == "unet" else 1)


def test_gpt2_in_a_plain_wrapper_is_called_for_each_vector(pipe: AudioLDM2Pipeline, expected: Any) -> None:
    pipe.language_model = Wrapper(pipe.language_model)
    check(pipe, expected)
    assert pipe.language_model.calls == 8


def test_a_wrapper_may_wrap_a_foreign_part(base: Both, pipe: AudioLDM2Pipeline, expected: Any) -> None:
    pipe.text_encoder_2 = Wrapper(nn.DataParallel(base.theirs.text_encoder_2))
    check(pipe, expected)


def test_float16_keeps_the_exceptions_of_a_wrapped_stage(pipe: AudioLDM2Pipeline) -> None:
    kept = {name for name, p in pipe.text_encoder_2.to(torch.float32).named_parameters() if "down" in name}
    pipe.text_encoder_2 = nn.DataParallel(pipe.text_encoder_2)
    pipe.to(torch.float16)
    dtypes = {name: p.dtype for name, p in pipe.text_encoder_2.module.named_parameters()}
    assert {name for name, dtype in dtypes.items() if dtype == torch.float32} == kept
    assert sound(pipe).std() > 0.02


def test_the_example_of_the_page_runs() -> None:
    page = (ROOT / "docs" / "replacing-parts.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    names: dict[str, Any] = {}
    exec(compile(code, "replacing-parts.md", "exec"), names)
    assert names["audio"].std() > 0.01


# --- what cannot take a place


class NoDecode(nn.Module):
    config = SimpleNamespace(scaling_factor=1.0, latent_channels=4, block_out_channels=[1, 2, 3])

    def forward(self, mel: Tensor) -> Tensor:
        return mel


REFUSED: dict[str, tuple[str, Any, str]] = {
    "none": ("unet", None, "unet is of class NoneType.*a forward method"),
    "text": ("vae", "vae", "vae is of class str.*a forward method"),
    "clap without audio": ("text_encoder", nn.Linear(2, 2), "text_encoder is of class Linear.*text_features"),
    "vae without decode": ("vae", NoDecode(), "vae is of class NoDecode.*decode"),
    "vae without config": ("vae", nn.Linear(2, 2), r"config\.scaling_factor, config\.latent_channels"),
    "vocoder without rate": ("vocoder", nn.Linear(2, 2), r"config\.sampling_rate"),
    "projection": ("projection_model", nn.ReLU(), r"config\.text_encoder_1_dim"),
    "another stage": ("unet", nn.Conv2d(4, 4, 1), "unet is of class Conv2d.*encoder_hidden_states"),
    "scheduler class": ("scheduler", DDIMScheduler, r"the class DDIMScheduler; .*DDIMScheduler\.from_config"),
    "scheduler name": ("scheduler", "ddim", "scheduler is 'ddim', which has no method set_timesteps"),
    "tokenizer": ("tokenizer", None, "tokenizer is None; it must be one of transformers'"),
    "extractor": ("feature_extractor", lambda x: x, "feature_extractor is of class function.*sampling_rate"),
}


@pytest.mark.parametrize(("name", "part", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_take_a_place_is_named_before_anything_runs(
    pipe: AudioLDM2Pipeline, name: str, part: Any, message: str
) -> None:
    setattr(pipe, name, part)
    with pytest.raises(TypeError, match=message):
        sound(pipe, num_waveforms_per_prompt=2)


def test_an_encoder_that_returns_something_else_is_named(pipe: AudioLDM2Pipeline) -> None:
    class Pooled(Wrapper):
        def forward(self, *arguments: Any, **options: Any) -> Tensor:
            pooled: Tensor = self.inner(*arguments, **options).mean(1)
            return pooled

    pipe.text_encoder_2 = Pooled(pipe.text_encoder_2)
    with pytest.raises(ValueError, match=r"text_encoder_2 returned \(2, 20\)"):
        sound(pipe)


def test_a_stage_without_weights_is_named(pipe: AudioLDM2Pipeline) -> None:
    pipe.vae = pipe.vae.to("meta")
    with pytest.raises(ValueError, match=r"pipe\.vae has no weights"):
        sound(pipe)


def test_compile_names_a_foreign_stage(base: Both, pipe: AudioLDM2Pipeline) -> None:
    pipe.vae = base.theirs.vae
    with pytest.raises(ValueError, match=r"cannot compile pipe\.vae, a AutoencoderKL"):
        pipe.compile(stages=["vae"])


# --- wrappers with code of their own


class Scaled(nn.Module):
    """An adapter that keeps its module where DataParallel does, and changes what it returns."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, *arguments: Any, **options: Any) -> Any:
        return 0.5 * self.module(*arguments, **options)

    def decode(self, latents: Tensor) -> Tensor:
        return 0.5 * self.module.decode(latents)

    def generate(self, *arguments: Any) -> Tensor:
        return 0.5 * self.module.generate(*arguments)

    def text_features(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return 0.5 * self.module.text_features(input_ids, attention_mask)

    def audio_features(self, input_features: Tensor) -> Tensor:
        return self.module.audio_features(input_features)


@pytest.mark.parametrize("name", [name for name in STAGES if name != "projection_model"])
def test_a_wrappers_own_code_is_run_whatever_it_calls_its_module(
    pipe: AudioLDM2Pipeline, expected: Any, name: str
) -> None:
    own = getattr(pipe, name)
    wrapper = Scaled(own)
    if name == "vae":
        wrapper.downsampling = own.downsampling
    if name == "vocoder":
        wrapper.hop_length = own.hop_length
    setattr(pipe, name, wrapper)
    changed = sound(pipe, [HAMMER, RAIN], num_waveforms_per_prompt=3)
    assert np.abs(changed - expected).max() > 1e-3
    with pytest.raises(TypeError, match=f"{name} is a Scaled"):
        pipe.save_pretrained("/nowhere")


class Returns(nn.Module):
    """A part whose output is put into something else."""

    def __init__(self, inner: nn.Module, change: Callable[[Any], Any]):
        super().__init__()
        self.inner, self.change = inner, change
        self.hop_length = getattr(inner, "hop_length", None)

    def forward(self, *arguments: Any, **options: Any) -> Any:
        return self.change(self.inner(*arguments, **options))


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("unet", lambda noise: {"sample": noise}),
        ("unet", lambda noise: (noise, "more")),
        ("projection_model", lambda found: {"states": found[0], "mask": found[1]}),
        ("text_encoder_2", lambda states: [states]),
        ("vocoder", lambda waveform: {"waveform": waveform}),
    ],
)
def test_outputs_are_unwrapped(
    pipe: AudioLDM2Pipeline, expected: Any, name: str, change: Callable[[Any], Any]
) -> None:
    setattr(pipe, name, Returns(getattr(pipe, name), change))
    check(pipe, expected)


@pytest.mark.parametrize(
    ("name", "change", "kind", "message"),
    [
        ("unet", lambda noise: None, TypeError, "unet returned None; it must return a tensor"),
        ("unet", lambda noise: noise[:1], ValueError, r"unet returned \(1, 4, 8, 4\) for 2 latents"),
        ("text_encoder_2", lambda states: "x", TypeError, "text_encoder_2 returned 'x'"),
        ("projection_model", lambda found: found[:1], TypeError, "projection_model returned 1 tensors"),
        ("vocoder", lambda waveform: waveform[:, None], ValueError, r"vocoder returned \(1, 1, 51\d\d\)"),
        ("vocoder", lambda waveform: waveform[:, :100], ValueError, r"must return waveforms, \(1, 5120\)"),
    ],
)
def test_outputs_that_cannot_be_used_are_named(
    pipe: AudioLDM2Pipeline, name: str, change: Callable[[Any], Any], kind: type[Exception], message: str
) -> None:
    setattr(pipe, name, Returns(getattr(pipe, name), change))
    with pytest.raises(kind, match=message):
        sound(pipe)
