"""Compiled stages: the same numbers, each stage one graph, compiled once for a shape.

Most tests give the graphs to a compiler that only counts and runs them as they are: what is looked at is how
often PyTorch traces a stage, and whether it can in one piece. One, marked slow, runs the real compiler.
"""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import nn

from audioldm2 import AudioLDM2Pipeline
from audioldm2.runtime.compile import DYNAMIC, TARGETS, TOKEN_BUCKET, default_mode, rounded_up
from tests.reference import SMALL, SMALL_SPEECH, assert_close, make_checkpoint

COMPILE = torch.compile
TOLERANCE = 1e-4  # of a waveform in [-1, 1]
ENCODERS = ("text_encoder", "text_encoder_2", "projection_model", "language_model")
HAMMER = "A hammer hitting a wooden surface."
RAIN = "Rain falls on a tin roof"
WITHIN_A_CALL = {  # what a first call compiles, with guidance
    "text_encoder": 1,
    "text_encoder_2": 1,
    "projection_model": 1,
    "language_model": 2,  # the sequence, then one vector after the other
    "unet": 1,
    "vae": 1,
    "vocoder": 1,
}
# As few layers as there can be: tracing takes a time for each.
SIZES: dict[str, dict] = {
    **SMALL,
    "vae": {
        **SMALL["vae"],
        "down_block_types": ["DownEncoderBlock2D"] * 2,
        "up_block_types": ["UpDecoderBlock2D"] * 2,
        "block_out_channels": [8, 12],
    },
    "text_encoder": {
        **SMALL["text_encoder"],
        "text_config": {**SMALL["text_encoder"]["text_config"], "num_hidden_layers": 1},
    },
    "text_encoder_2": {**SMALL["text_encoder_2"], "num_layers": 1},
    "language_model": {**SMALL["language_model"], "n_layer": 1},
    "unet": {
        **SMALL["unet"],
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
        "block_out_channels": [8, 16],
        "cross_attention_dim": [[None, 16, 20]] * 2,
    },
    "vocoder": {
        **SMALL["vocoder"],
        "sampling_rate": 2000,
        "upsample_rates": [5, 4],
        "upsample_kernel_sizes": [8, 8],
        "resblock_kernel_sizes": [3],
        "resblock_dilation_sizes": [[1]],
    },
}


class Compiler:
    """In place of torch.compile: keeps what it was asked for, and counts the graphs that are made."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []
        self.graphs = 0

    def __call__(self, target: Any, **options: Any) -> Any:
        self.asked.append(options)
        return COMPILE(target, **{**options, "mode": None, "backend": self.run_as_it_is})

    def take_over(self, patch: pytest.MonkeyPatch) -> None:
        patch.setattr(torch, "compile", self)
        # pytest would keep all that the compiler traces, which takes as long again.
        patch.setattr(logging.getLogger("torch.__trace"), "propagate", False)

    def run_as_it_is(self, graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        self.graphs += 1
        return graph.forward


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> Compiler:
    found = Compiler()
    found.take_over(monkeypatch)
    return found


@pytest.fixture(scope="module", autouse=True)
def _nothing_left_behind() -> Iterator[None]:
    """Each test has a compiler of its own, so what others compiled is not used; in the end it all goes."""
    limit = torch._dynamo.config.cache_size_limit
    yield
    torch._dynamo.reset()
    torch._dynamo.config.cache_size_limit = limit


def load(folder: Path) -> AudioLDM2Pipeline:
    pipe = AudioLDM2Pipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("compile") / "few layers", SIZES)


@pytest.fixture
def pipe(folder: Path) -> AudioLDM2Pipeline:
    return load(folder)


@pytest.fixture(scope="module")
def plain(folder: Path) -> AudioLDM2Pipeline:
    """Without anything compiled."""
    return load(folder)


def sound(pipe: AudioLDM2Pipeline, prompt: str | list[str] = HAMMER, **arguments: Any) -> np.ndarray:
    arguments = {"num_inference_steps": 3, "audio_length_in_s": 0.32, **arguments}
    audio: np.ndarray = pipe(prompt, generator=torch.Generator().manual_seed(0), **arguments).audios
    return audio


def same(actual: np.ndarray, expected: np.ndarray) -> None:
    assert actual.shape == expected.shape
    assert expected.std() > 0.02, "silence proves nothing"
    assert np.abs(actual - expected).max() <= TOLERANCE


@contextlib.contextmanager
def no_more(compiler: Compiler) -> Iterator[None]:
    """Nothing is compiled within: neither counted, nor asked of PyTorch."""
    before = compiler.graphs
    stance = getattr(torch.compiler, "set_stance", None)
    with stance("fail_on_recompile") if stance else contextlib.nullcontext():
        yield
    assert compiler.graphs == before


class Compiled(NamedTuple):
    """A pipeline of which every stage is compiled and was called once, for SHORT; not to be changed."""

    pipe: AudioLDM2Pipeline
    compiler: Compiler
    first: np.ndarray
    graphs: int  # that the first call took


SHORT = {"prompt": "Rain falls", "negative_prompt": "Low"}


@pytest.fixture(scope="module")
def compiled(folder: Path) -> Iterator[Compiled]:
    with pytest.MonkeyPatch.context() as patch:
        compiler, pipe = Compiler(), load(folder)
        compiler.take_over(patch)
        pipe.compile(mode="default")
        assert compiler.graphs == 0, "it compiles when first called"
        first = sound(pipe, **SHORT)
        yield Compiled(pipe, compiler, first, compiler.graphs)


def test_compiled_equals_eager_in_one_graph_a_stage(compiled: Compiled, plain: AudioLDM2Pipeline) -> None:
    """With no recompilation within a call, nor in another of the same shape."""
    assert len(compiled.compiler.asked) == len(TARGETS)
    assert all(options["fullgraph"] for options in compiled.compiler.asked)
    same(compiled.first, sound(plain, **SHORT))
    assert compiled.graphs == sum(WITHIN_A_CALL.values())
    with no_more(compiled.compiler):
        assert np.array_equal(sound(compiled.pipe, **SHORT), compiled.first)
        arguments = {**SHORT, "num_inference_steps": 5}
        same(sound(compiled.pipe, **arguments), sound(plain, **arguments))


def test_another_prompt_does_not_compile_anew(compiled: Compiled, plain: AudioLDM2Pipeline) -> None:
    """Of another number of tokens in the same bucket, each with a negative prompt of its own."""
    lengths = set()
    with no_more(compiled.compiler):
        for prompt, negative in (("It rains", "Techno"), ("Rain", "Loud"), ("Rain falls now", "Bad, dull.")):
            length = plain.encode_prompt(prompt, negative_prompt=negative)[0].shape[1]
            lengths.add(length)
            expected = sound(plain, prompt, negative_prompt=negative)
            same(sound(compiled.pipe, prompt, negative_prompt=negative), expected)
    assert len(lengths) == 3
    assert 10 < max(lengths) <= TOKEN_BUCKET


def test_another_shape_compiles_once_more(compiled: Compiled, plain: AudioLDM2Pipeline) -> None:
    arguments: dict = {
        "prompt": [HAMMER, RAIN],
        "audio_length_in_s": 0.277,
        "max_new_tokens": 11,
        "negative_prompt": None,
    }
    expected = sound(plain, **arguments)
    before = compiled.compiler.graphs
    same(sound(compiled.pipe, **arguments), expected)
    # The projection and GPT-2 were compiled for any length and batch.
    fixed = [count for name, count in WITHIN_A_CALL.items() if name not in DYNAMIC]
    assert compiled.compiler.graphs == before + sum(fixed)
    with no_more(compiled.compiler):
        same(sound(compiled.pipe, **arguments), expected)
        same(sound(compiled.pipe, **SHORT), compiled.first)


def test_ranking_compiles_nothing_more_of_the_text(
    pipe: AudioLDM2Pipeline, plain: AudioLDM2Pipeline, compiler: Compiler
) -> None:
    pipe.compile(mode="default", stages=["text_encoder"])
    same(sound(pipe, num_waveforms_per_prompt=3), sound(plain, num_waveforms_per_prompt=3))
    assert compiler.graphs == 1


def test_without_guidance(pipe: AudioLDM2Pipeline, plain: AudioLDM2Pipeline, compiler: Compiler) -> None:
    pipe.compile(mode="default", stages=["unet"])
    expected = sound(plain, guidance_scale=1.0)
    same(sound(pipe, guidance_scale=1.0), expected)
    with no_more(compiler):
        same(sound(pipe, guidance_scale=1.0), expected)


def test_many_shapes_stay_compiled(pipe: AudioLDM2Pipeline, compiler: Compiler) -> None:
    """PyTorch gives a function up after 8 shapes, unless told."""
    pipe.compile(mode="default", stages=["text_encoder_2"])
    for tokens in range(1, 11):
        pipe.text_encoder_2(torch.ones(1, tokens, dtype=torch.long), torch.ones(1, tokens))
    assert compiler.graphs == 10


@pytest.mark.filterwarnings("ignore:.*cut off")
def test_the_longest_prompt(pipe: AudioLDM2Pipeline, plain: AudioLDM2Pipeline, compiler: Compiler) -> None:
    """It is rounded up to no more tokens than there are positions."""
    pipe.compile(mode="default", stages=ENCODERS)
    prompt = " ".join([HAMMER] * 9)
    same(sound(pipe, prompt), sound(plain, prompt))


@pytest.mark.filterwarnings("ignore:.*cut off")
def test_the_encoders_of_the_speech_checkpoints(tmp_path: Path, compiler: Compiler) -> None:
    pipe = load(make_checkpoint(tmp_path / "speech", SMALL_SPEECH))
    expected = pipe.encode_prompt(HAMMER, transcription="go home")
    pipe.compile(mode="default", stages=ENCODERS)
    for actual, wanted in zip(pipe.encode_prompt(HAMMER, transcription="go home"), expected, strict=True):
        assert_close(actual, wanted, 1e-5)
    with no_more(compiler):
        pipe.encode_prompt("Rain", transcription="stay")


@pytest.mark.parametrize("name", [name for name in TARGETS if name != "unet"])
def test_one_stage_alone(
    name: str, pipe: AudioLDM2Pipeline, plain: AudioLDM2Pipeline, compiler: Compiler
) -> None:
    pipe.compile(mode="default", stages=[name])
    assert len(compiler.asked) == 1
    expected = sound(plain)
    same(sound(pipe), expected)
    assert compiler.graphs == WITHIN_A_CALL[name]
    with no_more(compiler):
        same(sound(pipe), expected)


@pytest.mark.parametrize("stages", [["unet", "decoder"], "tokenizer"])
def test_an_unknown_stage(stages: Any, pipe: AudioLDM2Pipeline, compiler: Compiler) -> None:
    with pytest.raises(
        ValueError, match=r"no stage '(decoder|tokenizer)' to compile; choose from text_encoder"
    ) as e:
        pipe.compile(stages=stages)
    assert all(name in str(e.value) for name in pipe.stages)
    assert not compiler.asked, "nothing is compiled by halves"


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("text_encoder", "text.pooler"),
        ("text_encoder_2", "norm"),
        ("projection_model", "projection"),
        ("language_model", "norm"),
        ("unet", "conv_out"),
        ("vae", "decoder.conv_out"),
        ("vocoder", "conv_out"),
    ],
)
def test_a_graph_break_is_an_error(name: str, path: str, pipe: AudioLDM2Pipeline, compiler: Compiler) -> None:
    def breaking(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
        torch._dynamo.graph_break()
        y: torch.Tensor = type(layer).forward(layer, x)
        return y

    layer = getattr(pipe, name).get_submodule(path)
    layer.forward = partial(breaking, layer)
    sound(pipe)
    pipe.compile(mode="default", stages=[name])
    with pytest.raises(torch._dynamo.exc.Unsupported, match="graph_break"):
        sound(pipe)


def test_a_replaced_unet_is_used(folder: Path, pipe: AudioLDM2Pipeline, compiler: Compiler) -> None:
    pipe.compile(mode="default", stages=["unet"])
    before = sound(pipe)
    assert compiler.graphs == 1
    other = load(folder)
    with torch.no_grad():
        other.unet.conv_out.weight.mul_(0.7)
    expected = sound(other)
    assert np.abs(expected - before).max() > 0.01
    pipe.unet = other.unet
    with no_more(compiler):
        same(sound(pipe), expected)
    pipe.compile(mode="default", stages=["unet"])
    same(sound(pipe), expected)
    assert [len(compiler.asked), compiler.graphs] == [2, 1], "the same code in the same shapes serves both"


def test_a_changed_weight_counts(folder: Path, pipe: AudioLDM2Pipeline, compiler: Compiler) -> None:
    other = load(folder)
    pipe.compile(mode="default", stages=["text_encoder_2", "unet", "vocoder"])
    before = sound(pipe)
    with torch.no_grad():
        for p in (pipe, other):
            for layer in (p.text_encoder_2.norm, p.unet.conv_out, p.vocoder.conv_in):
                layer.weight.mul_(0.7)
    expected = sound(other)
    assert np.abs(expected - before).max() > 0.01
    with no_more(compiler):
        same(sound(pipe), expected)


def test_a_unet_that_was_compiled_elsewhere(
    pipe: AudioLDM2Pipeline, plain: AudioLDM2Pipeline, compiler: Compiler
) -> None:
    """By torch.compile, and by its own method."""
    expected = sound(plain)
    original = pipe.unet
    pipe.unet = torch.compile(original, fullgraph=True)
    same(sound(pipe), expected)
    assert compiler.graphs == 1
    pipe.unet = original
    pipe.unet.compile(fullgraph=True)
    same(sound(pipe), expected)
    assert len(compiler.asked) == 2
    with no_more(compiler):
        same(sound(pipe), expected)


def test_compiled_stages_may_move(
    pipe: AudioLDM2Pipeline, plain: AudioLDM2Pipeline, compiler: Compiler
) -> None:
    pipe.enable_model_cpu_offload(device="cpu")
    pipe.compile(mode="default", stages=["text_encoder_2", "language_model", "unet", "vocoder"])
    expected = sound(plain)
    same(sound(pipe), expected)
    with no_more(compiler):
        same(sound(pipe), expected)


def test_what_is_compiled_can_be_saved(
    pipe: AudioLDM2Pipeline, plain: AudioLDM2Pipeline, compiler: Compiler, tmp_path: Path
) -> None:
    pipe.compile(mode="default")
    pipe.save_pretrained(tmp_path)
    same(sound(load(tmp_path)), sound(plain))


def test_a_copy_of_a_compiled_pipeline_has_its_own_weights(
    pipe: AudioLDM2Pipeline, plain: AudioLDM2Pipeline, compiler: Compiler
) -> None:
    pipe.compile(mode="default", stages=["language_model", "unet"])
    sound(pipe)
    other = copy.deepcopy(pipe)
    with torch.no_grad():
        pipe.unet.conv_out.weight.mul_(0.7)
        pipe.language_model.norm.weight.mul_(0.7)
    same(sound(other), sound(plain))


def test_modes(pipe: AudioLDM2Pipeline, compiler: Compiler) -> None:
    """What writes into caches or takes sequences of any length is not recorded in CUDA graphs."""
    assert default_mode(torch.device("cpu")) == "default"
    assert default_mode(torch.device("cuda")) == "reduce-overhead"
    for mode, unrecorded in {
        "reduce-overhead": "default",
        "max-autotune": "max-autotune-no-cudagraphs",
        None: "default",
    }.items():
        compiler.asked.clear()
        pipe.compile(mode=mode)
        asked = dict(zip(TARGETS, compiler.asked, strict=True))
        for name, options in asked.items():
            free = name in ("language_model", "projection_model")  # of any length
            assert options["mode"] == (unrecorded if free or mode is None else mode)
            assert options["dynamic"] == free


def test_rounded_up() -> None:
    assert [rounded_up(n, 16) for n in (0, 1, 16, 17)] == [0, 16, 16, 32]


@pytest.mark.slow
def test_the_real_compiler(pipe: AudioLDM2Pipeline, plain: AudioLDM2Pipeline) -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    pipe.compile()
    same(sound(pipe), sound(plain))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == sum(WITHIN_A_CALL.values())
    with torch.compiler.set_stance("fail_on_recompile"):
        same(sound(pipe, RAIN, negative_prompt="Techno"), sound(plain, RAIN, negative_prompt="Techno"))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == sum(WITHIN_A_CALL.values())
    assert not torch._dynamo.utils.counters["graph_break"]
