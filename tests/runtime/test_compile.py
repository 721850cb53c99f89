"""Compiled stages give the same numbers, and each is compiled to one graph, once for each shape.

Most tests hand the graphs to a backend that counts them and runs them unchanged: what matters is how often
PyTorch traces a stage, and whether it gets it in one piece. One test, marked slow, runs the real compiler.
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
from diffusers import AudioLDM2UNet2DConditionModel
from torch import nn

from audioldm2 import AudioLDM2Pipeline, FeatureCaching
from audioldm2.runtime.compile import DYNAMIC, TARGETS, TOKEN_BUCKET, CompiledUNet, default_mode, rounded_up
from tests import helpers
from tests.helpers import HAMMER, RAIN, assert_same_sound, load_pipeline
from tests.reference import SMALL, assert_close, make_checkpoint

COMPILE = torch.compile
TOLERANCE = 1e-4  # of a waveform in [-1, 1]
ENCODERS = ("text_encoder", "text_encoder_2", "projection_model", "language_model")
GRAPHS = {  # of each stage, in a first call with guidance
    "text_encoder": 1,
    "text_encoder_2": 1,
    "projection_model": 1,
    "language_model": 2,  # the sequence, then one vector after the other
    "unet": 1,
    "vae": 1,
    "vocoder": 1,
}
# As few layers as possible, because each takes time to trace.
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
        "up_block_types": ["UpBlock2D"] * 2,
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
    """In place of torch.compile: records the options it is called with, and counts the graphs."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []
        self.graphs = 0

    def __call__(self, target: Any, **options: Any) -> Any:
        self.asked.append(options)
        return COMPILE(target, **{**options, "mode": None, "backend": self.backend})

    def take_over(self, patch: pytest.MonkeyPatch) -> None:
        patch.setattr(torch, "compile", self)
        # pytest would capture the compiler's log of all that it traces, which doubles the time.
        patch.setattr(logging.getLogger("torch.__trace"), "propagate", False)

    def backend(self, graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        self.graphs += 1
        return graph.forward


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> Compiler:
    found = Compiler()
    found.take_over(monkeypatch)
    return found


@pytest.fixture(scope="module", autouse=True)
def _reset() -> Iterator[None]:
    """In the end, forget what was compiled. Until then each test has a backend, and so code, of its own."""
    limit = torch._dynamo.config.cache_size_limit
    yield
    torch._dynamo.reset()
    torch._dynamo.config.cache_size_limit = limit


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("compile") / "few layers", SIZES)


@pytest.fixture
def pipe(folder: Path) -> AudioLDM2Pipeline:
    return load_pipeline(folder)


@pytest.fixture(scope="module")
def plain(folder: Path) -> AudioLDM2Pipeline:
    """A pipeline of which nothing is compiled; not to be changed."""
    return load_pipeline(folder)


def sound(pipe: AudioLDM2Pipeline, prompt: str | list[str] = HAMMER, **arguments: Any) -> np.ndarray:
    """Three steps, so that a compiled UNet is called again after its first call."""
    audio: np.ndarray = helpers.sound(pipe, prompt, **{"num_inference_steps": 3, **arguments})
    return audio


same = partial(assert_same_sound, tolerance=TOLERANCE)


@contextlib.contextmanager
def nothing_compiled(compiler: Compiler) -> Iterator[None]:
    """Check that nothing is compiled inside the block."""
    before = compiler.graphs
    stance = getattr(torch.compiler, "set_stance", None)
    with stance("fail_on_recompile") if stance else contextlib.nullcontext():
        yield
    assert compiler.graphs == before


class Compiled(NamedTuple):
    """A pipeline whose stages are all compiled and were called once, with SHORT; not to be changed."""

    pipe: AudioLDM2Pipeline
    compiler: Compiler
    first: np.ndarray
    graphs: int  # compiled in the first call


SHORT = {"prompt": "Rain falls", "negative_prompt": "Low"}


@pytest.fixture(scope="module")
def compiled(folder: Path) -> Iterator[Compiled]:
    with pytest.MonkeyPatch.context() as patch:
        compiler, pipe = Compiler(), load_pipeline(folder)
        compiler.take_over(patch)
        pipe.compile(mode="default")
        assert compiler.graphs == 0, "stages are compiled when they are first called"
        first = sound(pipe, **SHORT)
        yield Compiled(pipe, compiler, first, compiler.graphs)


def test_compiled_stages_equal_eager_ones_and_are_one_graph_each(
    compiled: Compiled, plain: AudioLDM2Pipeline
) -> None:
    """Nothing is compiled again within a call, or in another call with the same shapes."""
    assert len(compiled.compiler.asked) == len(TARGETS)
    assert all(options["fullgraph"] for options in compiled.compiler.asked)
    same(compiled.first, sound(plain, **SHORT))
    assert compiled.graphs == sum(GRAPHS.values())
    with nothing_compiled(compiled.compiler):
        assert np.array_equal(sound(compiled.pipe, **SHORT), compiled.first)
        arguments = {**SHORT, "num_inference_steps": 5}
        same(sound(compiled.pipe, **arguments), sound(plain, **arguments))


def test_another_prompt_compiles_nothing(compiled: Compiled, plain: AudioLDM2Pipeline) -> None:
    """With another number of tokens in the same bucket, and another negative prompt."""
    lengths = set()
    with nothing_compiled(compiled.compiler):
        for prompt, negative in (("It rains", "Techno"), ("Rain", "Loud"), ("Rain falls now", "Bad, dull.")):
            length = plain.encode_prompt(prompt, negative_prompt=negative)[0].shape[1]
            lengths.add(length)
            expected = sound(plain, prompt, negative_prompt=negative)
            same(sound(compiled.pipe, prompt, negative_prompt=negative), expected)
    assert len(lengths) == 3
    assert 10 < max(lengths) <= TOKEN_BUCKET


@pytest.mark.slow
def test_another_shape_is_compiled_once(compiled: Compiled, plain: AudioLDM2Pipeline) -> None:
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
    fixed = [count for name, count in GRAPHS.items() if name not in DYNAMIC]
    assert compiled.compiler.graphs == before + sum(fixed)
    with nothing_compiled(compiled.compiler):
        same(sound(compiled.pipe, **arguments), expected)
        same(sound(compiled.pipe, **SHORT), compiled.first)


def test_ranking_compiles_nothing_more_of_clap(
    pipe: AudioLDM2Pipeline, plain: AudioLDM2Pipeline, compiler: Compiler
) -> None:
    pipe.compile(mode="default", stages=["text_encoder"])
    same(sound(pipe, num_waveforms_per_prompt=3), sound(plain, num_waveforms_per_prompt=3))
    assert compiler.graphs == 1


@pytest.mark.slow
def test_without_guidance_the_unet_is_compiled_once(
    pipe: AudioLDM2Pipeline, plain: AudioLDM2Pipeline, compiler: Compiler
) -> None:
    pipe.compile(mode="default", stages=["unet"])
    expected = sound(plain, guidance_scale=1.0)
    same(sound(pipe, guidance_scale=1.0), expected)
    with nothing_compiled(compiler):
        same(sound(pipe, guidance_scale=1.0), expected)


@pytest.mark.slow
def test_feature_caching_and_less_guidance_add_one_graph_each(
    pipe: AudioLDM2Pipeline, plain: AudioLDM2Pipeline, compiler: Compiler
) -> None:
    """The UNet has a graph that keeps features and one that takes them, with guidance and without."""
    pipe.compile(mode="default", stages=["unet"])
    steps = {"num_inference_steps": 6, "guidance_scale": 2.0}
    cached = {**steps, "feature_cache": 2}
    expected = sound(plain, **cached)
    same(sound(pipe, **cached), expected)
    assert compiler.graphs == 2
    less = {**cached, "feature_cache": FeatureCaching(steps=[0, 2, 4]), "guidance_interval": (0, 0.5)}
    same(sound(pipe, **less), sound(plain, **less))
    assert compiler.graphs == 4
    with nothing_compiled(compiler):
        same(sound(pipe, **cached), expected)
        same(sound(pipe, **less), sound(plain, **less))


def test_kept_features_are_copies_which_another_call_does_not_overwrite(
    pipe: AudioLDM2Pipeline,
) -> None:
    """As CUDA graphs do, each call writes its outputs into the buffers of those before it."""
    forward, buffers = pipe.unet.forward, {}

    def replayed(*args: Any, **kwargs: Any) -> Any:
        result = forward(*args, **kwargs)
        outputs = result if isinstance(result, tuple) else (result,)
        kept = [
            buffers.setdefault((len(outputs), i, x.shape), torch.empty_like(x)).copy_(x)
            for i, x in enumerate(outputs)
        ]
        return tuple(kept) if len(kept) > 1 else kept[0]

    stage, contexts = (
        CompiledUNet(pipe.unet),
        pipe.unet.contexts(*(helpers.noise(1, n, width) for n, width in ((8, 16), (5, 20)))),
    )
    pipe.unet.forward = replayed
    first, second = helpers.noise(1, 4, 12, 4), helpers.noise(1, 4, 12, 4, seed=1)
    with torch.no_grad():
        _, features = stage(first, torch.tensor(500), contexts=contexts, level=0)
        before = features.clone()
        stage(second, torch.tensor(500), contexts=contexts, level=0)
    assert torch.equal(features, before)


@pytest.mark.slow
def test_more_than_8_shapes_stay_compiled(pipe: AudioLDM2Pipeline, compiler: Compiler) -> None:
    """By default PyTorch stops to compile a function after 8 shapes."""
    pipe.compile(mode="default", stages=["text_encoder_2"])
    for tokens in range(1, 10):
        pipe.text_encoder_2(torch.ones(1, tokens, dtype=torch.long), torch.ones(1, tokens))
    assert compiler.graphs == 9


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*cut off")
def test_the_longest_prompt_is_not_padded_past_the_last_position(
    pipe: AudioLDM2Pipeline, plain: AudioLDM2Pipeline, compiler: Compiler
) -> None:
    pipe.compile(mode="default", stages=ENCODERS)
    prompt = " ".join([HAMMER] * 9)
    same(sound(pipe, prompt), sound(plain, prompt))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*cut off")
def test_the_encoders_of_a_speech_checkpoint_can_be_compiled(
    random_speech_checkpoint: Path, compiler: Compiler
) -> None:
    pipe = load_pipeline(random_speech_checkpoint)
    expected = pipe.encode_prompt(HAMMER, transcription="go home")
    pipe.compile(mode="default", stages=ENCODERS)
    for actual, wanted in zip(pipe.encode_prompt(HAMMER, transcription="go home"), expected, strict=True):
        assert_close(actual, wanted, 1e-5)
    with nothing_compiled(compiler):
        pipe.encode_prompt("Rain", transcription="stay")


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in TARGETS if name != "unet"])
def test_one_stage_can_be_compiled_alone(
    name: str, pipe: AudioLDM2Pipeline, plain: AudioLDM2Pipeline, compiler: Compiler
) -> None:
    pipe.compile(mode="default", stages=[name])
    assert len(compiler.asked) == 1
    expected = sound(plain)
    same(sound(pipe), expected)
    assert compiler.graphs == GRAPHS[name]
    with nothing_compiled(compiler):
        same(sound(pipe), expected)


@pytest.mark.parametrize("stages", [["unet", "decoder"], "tokenizer"])
def test_an_unknown_stage_is_refused(stages: Any, pipe: AudioLDM2Pipeline, compiler: Compiler) -> None:
    with pytest.raises(
        ValueError, match=r"no stage '(decoder|tokenizer)' to compile; choose from text_encoder"
    ) as e:
        pipe.compile(stages=stages)
    assert all(name in str(e.value) for name in pipe.stages)
    assert not compiler.asked, "some of the stages were compiled"


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("text_encoder", "text.pooler"),
        ("text_encoder_2", "norm"),
        ("projection_model", "projection"),
        ("language_model", "norm"),
        ("unet", "conv_in"),
        ("vae", "decoder.conv_in"),
        ("vocoder", "conv_in"),
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


@pytest.mark.slow
def test_a_unet_that_replaces_a_compiled_one_is_used(
    folder: Path, pipe: AudioLDM2Pipeline, compiler: Compiler
) -> None:
    pipe.compile(mode="default", stages=["unet"])
    before = sound(pipe)
    assert compiler.graphs == 1
    other = load_pipeline(folder)
    with torch.no_grad():
        other.unet.conv_out.weight.mul_(0.7)
    expected = sound(other)
    assert np.abs(expected - before).max() > 0.01
    pipe.unet = other.unet
    with nothing_compiled(compiler):
        same(sound(pipe), expected)
    pipe.compile(mode="default", stages=["unet"])
    same(sound(pipe), expected)
    assert [len(compiler.asked), compiler.graphs] == [2, 1], "both run the same code in the same shapes"


def test_a_unet_of_diffusers_can_replace_a_compiled_one(
    folder: Path, pipe: AudioLDM2Pipeline, plain: AudioLDM2Pipeline, compiler: Compiler
) -> None:
    pipe.compile(mode="default", stages=["unet"])
    pipe.unet = AudioLDM2UNet2DConditionModel.from_pretrained(folder / "unet")
    with nothing_compiled(compiler):
        same(sound(pipe), sound(plain))


def test_a_stage_that_replaces_a_compiled_one_is_given_texts_without_padding(
    folder: Path, pipe: AudioLDM2Pipeline, plain: AudioLDM2Pipeline, compiler: Compiler
) -> None:
    """Nothing is compiled, so the shapes may vary."""
    lengths: list[int] = []
    pipe.compile(mode="default", stages=["text_encoder_2"])
    sound(pipe)
    pipe.text_encoder_2 = load_pipeline(folder).text_encoder_2
    pipe.text_encoder_2.register_forward_pre_hook(
        lambda module, arguments: lengths.append(arguments[0].shape[1])
    )
    same(sound(pipe), sound(plain))
    assert lengths == [plain.encode_prompt(HAMMER)[0].shape[1]]
    assert lengths[0] % TOKEN_BUCKET != 0


def test_a_changed_weight_is_used(folder: Path, pipe: AudioLDM2Pipeline, compiler: Compiler) -> None:
    other = load_pipeline(folder)
    pipe.compile(mode="default", stages=["text_encoder_2", "vocoder"])
    before = sound(pipe)
    with torch.no_grad():
        for p in (pipe, other):
            for layer in (p.text_encoder_2.norm, p.vocoder.conv_in):
                layer.weight.mul_(0.7)
    expected = sound(other)
    assert np.abs(expected - before).max() > 0.01
    with nothing_compiled(compiler):
        same(sound(pipe), expected)


@pytest.mark.slow  # compiling takes long
def test_a_unet_that_the_caller_compiled_is_used(
    pipe: AudioLDM2Pipeline, plain: AudioLDM2Pipeline, compiler: Compiler
) -> None:
    """By torch.compile, and by the module's own method."""
    expected = sound(plain)
    original = pipe.unet
    pipe.unet = torch.compile(original, fullgraph=True)
    same(sound(pipe), expected)
    assert compiler.graphs == 1
    pipe.unet = original
    pipe.unet.compile(fullgraph=True)
    same(sound(pipe), expected)
    assert len(compiler.asked) == 2
    with nothing_compiled(compiler):
        same(sound(pipe), expected)


@pytest.mark.slow
@pytest.mark.parametrize("first", ["offload", "compile"])
def test_compiled_stages_can_be_offloaded(
    first: str, pipe: AudioLDM2Pipeline, plain: AudioLDM2Pipeline, compiler: Compiler
) -> None:
    if first == "offload":
        pipe.enable_model_cpu_offload(device="cpu")
    pipe.compile(mode="default", stages=["text_encoder_2", "language_model", "vocoder"])
    if first == "compile":
        pipe.enable_model_cpu_offload(device="cpu")
    expected = sound(plain)
    same(sound(pipe), expected)
    with nothing_compiled(compiler):
        same(sound(pipe), expected)


def test_compiled_stages_can_be_saved(
    pipe: AudioLDM2Pipeline, plain: AudioLDM2Pipeline, compiler: Compiler, tmp_path: Path
) -> None:
    pipe.compile(mode="default")
    pipe.save_pretrained(tmp_path)
    same(sound(load_pipeline(tmp_path)), sound(plain))


@pytest.mark.slow
def test_a_copy_of_a_compiled_pipeline_is_not_compiled_and_has_its_own_weights(
    pipe: AudioLDM2Pipeline, plain: AudioLDM2Pipeline, compiler: Compiler
) -> None:
    pipe.compile(mode="default", stages=["language_model", "vocoder"])
    sound(pipe)
    other = copy.deepcopy(pipe)
    with torch.no_grad():
        pipe.vocoder.conv_in.weight.mul_(0.7)
        pipe.language_model.norm.weight.mul_(0.7)
    with nothing_compiled(compiler):
        same(sound(other), sound(plain))


def test_stages_without_fixed_shapes_are_not_recorded_in_cuda_graphs(
    pipe: AudioLDM2Pipeline, compiler: Compiler
) -> None:
    """GPT-2, which writes into caches, and the projection, which takes sequences of any length."""
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


def test_rounding_up_to_a_multiple() -> None:
    assert [rounded_up(n, 16) for n in (0, 1, 16, 17)] == [0, 16, 16, 32]


@pytest.mark.slow
def test_the_real_compiler_gives_the_same_numbers(pipe: AudioLDM2Pipeline, plain: AudioLDM2Pipeline) -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    pipe.compile()
    same(sound(pipe), sound(plain))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == sum(GRAPHS.values())
    with torch.compiler.set_stance("fail_on_recompile"):
        same(sound(pipe, RAIN, negative_prompt="Techno"), sound(plain, RAIN, negative_prompt="Techno"))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == sum(GRAPHS.values())
    assert not torch._dynamo.utils.counters["graph_break"]
