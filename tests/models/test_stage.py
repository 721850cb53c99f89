"""What all stages have in common: they load, save, copy, pickle and convert as any PyTorch module does."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.ao.nn.quantized.dynamic import Linear as QuantizedLinear

from audioldm2 import VAE, UNet
from audioldm2.checkpoints.folder import load_stage
from audioldm2.checkpoints.formats import PARTS, format_of
from audioldm2.models.stage import Stage
from audioldm2.runtime.precision import parameter_dtype
from tests.helpers import noise
from tests.reference import SMALL, SMALL_SPEECH, assert_close, make_checkpoint

SPEECH = "text_encoder_2 (vits)"
NAMES = [*PARTS, SPEECH]


@pytest.fixture(scope="module")
def speech_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("speech"), SMALL_SPEECH)


@pytest.fixture
def folder(request: pytest.FixtureRequest, random_checkpoint: Path, name: str) -> Path:
    """The folder of the stage `name`."""
    if name == SPEECH:
        speech: Path = request.getfixturevalue("speech_checkpoint")
        return speech / "text_encoder_2"
    return random_checkpoint / name


@pytest.fixture
def stage(folder: Path, name: str) -> Stage[Any]:
    form = PARTS["text_encoder_2"][1] if name == SPEECH else PARTS[name][0]
    return load_stage(folder, form)


IDS = torch.tensor([[5, 9, 2, 7], [3, 4, 6, 0]])
MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])
CALLS: dict[str, Callable[[Any], Tensor]] = {
    "text_encoder": lambda clap: torch.cat(
        [clap.text_features(IDS, MASK), clap.audio_features(noise(2, 1, 100, 64))]
    ),
    "text_encoder_2": lambda t5: t5(IDS, MASK),
    SPEECH: lambda vits: vits(IDS, MASK),
    "projection_model": lambda projection: projection(noise(2, 1, 12), noise(2, 4, 20))[0],
    "language_model": lambda gpt2: gpt2.generate(noise(2, 5, 16)),
    "unet": lambda unet: unet(noise(2, 4, 8, 4), 7, noise(2, 8, 16), noise(2, 4, 20), MASK),
    "vae": lambda vae: vae(noise(2, 1, 16, 16)),
    "vocoder": lambda vocoder: vocoder(noise(2, 6, 16)),
}


def same(first: Stage[Any], second: Stage[Any]) -> None:
    a, b = first.state_dict(), second.state_dict()
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)


# Of outputs with the same weights at other addresses, whose alignment decides which kernels a CPU uses.
ROUNDING = 1e-6


@torch.no_grad()
def output(name: str, stage: nn.Module) -> Tensor:
    return CALLS[name](stage)


@pytest.mark.parametrize("name", NAMES)
def test_a_pickled_stage_gives_the_same_output(name: str, stage: Stage[Any]) -> None:
    content = pickle.dumps(stage)
    again = pickle.loads(content)
    same(again, stage)
    assert_close(output(name, again), output(name, stage), ROUNDING)
    assert again.config == stage.config
    assert type(again) is type(stage)
    # The tensors alone, not the memory-mapped file behind each of them.
    assert len(content) < 1.5 * sum(t.nbytes for t in stage.state_dict().values()) + 200_000


@pytest.mark.parametrize("name", NAMES)
def test_a_copied_stage_gives_the_same_output_and_is_independent(name: str, stage: Stage[Any]) -> None:
    expected = output(name, stage)
    copied = copy.deepcopy(stage)
    same(copied, stage)
    assert_close(output(name, copied), expected, ROUNDING)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.zero_()
    assert torch.equal(output(name, stage), expected)
    assert not torch.equal(output(name, copied), expected)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_parameters_are_contiguous(name: str, folder: Path, stage: Stage[Any], dtype: torch.dtype) -> None:
    for loaded in (stage, type(stage).from_pretrained(folder, torch_dtype=dtype)):
        tensors = {**dict(loaded.named_parameters()), **dict(loaded.named_buffers())}
        assert len(tensors) >= 8
        assert [name for name, tensor in tensors.items() if not tensor.is_contiguous()] == []


@pytest.mark.parametrize("name", NAMES)
def test_a_state_dict_is_saved_by_safetensors(name: str, stage: Stage[Any], tmp_path: Path) -> None:
    state = stage.state_dict()
    save_file(state, tmp_path / "state.safetensors")
    again = load_file(tmp_path / "state.safetensors")
    assert again.keys() == state.keys()
    assert all(torch.equal(again[key], state[key]) for key in state)


@pytest.mark.parametrize("name", NAMES)
def test_parameters_become_a_vector_and_back(name: str, stage: Stage[Any]) -> None:
    vector = nn.utils.parameters_to_vector(stage.parameters())
    assert len(vector) == sum(parameter.numel() for parameter in stage.parameters())
    expected = output(name, stage)
    with torch.no_grad():
        for parameter in stage.parameters():
            parameter.zero_()
    nn.utils.vector_to_parameters(vector.detach(), stage.parameters())
    assert_close(output(name, stage), expected, ROUNDING)


@pytest.mark.filterwarnings(
    "ignore:torch.quantize_per_tensor:UserWarning", "ignore:torch.ao.quantization is deprecated"
)
@pytest.mark.parametrize(
    "name", ["text_encoder", "text_encoder_2", SPEECH, "projection_model", "language_model", "unet"]
)
def test_dynamic_quantization_quantizes_every_linear_layer(name: str, stage: Stage[Any]) -> None:
    linear = [key for key, module in stage.named_modules() if isinstance(module, nn.Linear)]
    expected = output(name, stage)
    quantized = torch.ao.quantization.quantize_dynamic(stage, {nn.Linear}, dtype=torch.qint8)
    replaced = [key for key, module in quantized.named_modules() if isinstance(module, QuantizedLinear)]
    assert linear
    assert replaced == linear
    actual = output(name, quantized)
    assert not torch.equal(actual, expected)
    assert_close(actual, expected, 0.15)


@pytest.mark.parametrize("name", NAMES)
def test_a_state_dict_loads_into_a_stage_built_from_its_config(name: str, stage: Stage[Any]) -> None:
    built = type(stage)(stage.config).eval()
    assert not torch.equal(output(name, built), output(name, stage))
    built.load_state_dict(stage.state_dict())
    assert_close(output(name, built), output(name, stage), ROUNDING)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dtype_and_device_are_those_of_the_weights(
    name: str, folder: Path, stage: Stage[Any], dtype: torch.dtype
) -> None:
    loaded = type(stage).from_pretrained(folder, torch_dtype=dtype)
    assert loaded.dtype == dtype
    assert loaded.device == torch.device("cpu")
    assert loaded.to("meta").device == torch.device("meta")
    floats = {tensor.dtype for tensor in loaded.state_dict().values() if tensor.is_floating_point()}
    # T5 keeps some matrices in float32 where float16 is asked for.
    exact = name == "text_encoder_2" and dtype == torch.float16
    assert floats == ({dtype, torch.float32} if exact else {dtype})


def test_parameters_that_stay_float32_decide_the_dtype_where_there_are_no_others() -> None:
    class Exact(Stage[Any]):
        float32_parameters = ("scale",)

        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(2))

    assert Exact().dtype == torch.float32
    assert parameter_dtype(Exact, "scale", torch.float16) == torch.float32
    assert parameter_dtype(Exact, "scale", torch.bfloat16) == torch.bfloat16
    assert parameter_dtype(Exact, "scales", torch.float16) == torch.float16


def test_a_subclass_is_loaded_and_saved_as_its_base_class_is(random_checkpoint: Path, tmp_path: Path) -> None:
    class LouderUNet(UNet):
        def forward(self, *arguments: Any, **options: Any) -> Tensor:
            return 2 * super().forward(*arguments, **options)

    plain = UNet.from_pretrained(random_checkpoint, "unet")
    louder = LouderUNet.from_pretrained(random_checkpoint, "unet")
    assert type(louder) is LouderUNet
    assert torch.equal(output("unet", louder), 2 * output("unet", plain))
    louder.save_pretrained(tmp_path)
    assert torch.equal(output("unet", UNet.from_pretrained(tmp_path)), output("unet", plain))
    assert format_of(LouderUNet) is PARTS["unet"][0]


def test_a_class_that_is_not_registered_says_so(tmp_path: Path) -> None:
    class Own(Stage[Any]):
        pass

    with pytest.raises(TypeError, match=r"Own has no checkpoint format: .*formats\.PARTS"):
        Own.from_pretrained("tiny")
    with pytest.raises(TypeError, match="Own has no checkpoint format"):
        Own().save_pretrained(tmp_path / "own")
    assert not (tmp_path / "own").exists()


def test_all_stages_of_the_small_checkpoint_are_tested() -> None:
    assert set(CALLS) == set(NAMES)
    assert set(PARTS) <= set(SMALL)


# --- what scripts for diffusers ask of a stage


def test_return_dict_is_refused_with_what_to_write_instead(random_checkpoint: Path) -> None:
    unet = UNet.from_pretrained(random_checkpoint, subfolder="unet")
    with pytest.raises(TypeError, match=r"UNet returns plain tensors and takes no return_dict: leave it out"):
        unet(noise(1, 4, 8, 4), 7, noise(1, 8, 16), noise(1, 4, 20), return_dict=False)
    vae = VAE.from_pretrained(random_checkpoint, subfolder="vae")
    for method, x in ((vae.decode, noise(1, 4, 8, 4)), (vae.encode, noise(1, 1, 16, 16))):
        with pytest.raises(TypeError, match=rf"VAE\.{method.__name__} returns plain tensors"):
            method(x, return_dict=False)
    with pytest.raises(AttributeError, match=r"write vae\.encode\(mel\)\.mode\(\) in place of"):
        _ = vae.encode(noise(1, 1, 16, 16)).latent_dist
