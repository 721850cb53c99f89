"""Adapters against PEFT on diffusers' UNet, with the same random weights: all layers, both ways."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from diffusers.loaders.lora_base import LoraBaseMixin
from diffusers.loaders.peft import PeftAdapterMixin
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from audioldm2 import AudioLDM2Pipeline
from tests.adapters.helpers import (
    KINDS,
    add_random_adapter,
    prediction,
    reference_unet,
    with_random_weights,
)
from tests.helpers import seeded
from tests.reference import assert_close

TOLERANCE = 1e-5  # of the largest number that the UNet predicts


@pytest.fixture(scope="module")
def _reference() -> nn.Module:
    return reference_unet()


@pytest.fixture
def reference(_reference: nn.Module) -> nn.Module:
    """diffusers' UNet, the test's own."""
    return copy.deepcopy(_reference)


def peft_model(unet: nn.Module, seed: int = 0, name: str = "default", **options: Any) -> Any:
    """PEFT's model with an adapter of random numbers."""
    config = peft.LoraConfig(**{"r": 2, "lora_alpha": 3, **options})
    if isinstance(unet, peft.PeftModel):
        model = unet
        model.add_adapter(name, config)
    else:
        model = peft.get_peft_model(unet, config, adapter_name=name)
    generator = seeded(seed)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if f".lora_A.{name}." in key or f".lora_B.{name}." in key:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model.eval()


@pytest.mark.parametrize("target_modules", KINDS, ids=["attention", "transformer", "resnet", "ends"])
def test_adapters_of_peft_give_the_same_here_and_back(
    pipe: AudioLDM2Pipeline, reference: nn.Module, tmp_path: Path, target_modules: list[str]
) -> None:
    base = prediction(pipe.unet)
    model = peft_model(reference, target_modules=target_modules)
    expected = prediction(model)
    assert (expected - base).abs().max() > 0.01
    model.save_pretrained(tmp_path / "theirs")
    pipe.load_lora_weights(tmp_path / "theirs")
    assert pipe.get_list_adapters() == {"unet": ["default_0"]}
    assert_close(prediction(pipe.unet), expected, TOLERANCE)
    pipe.fuse_lora()
    assert_close(prediction(pipe.unet), expected, TOLERANCE)
    pipe.unfuse_lora()
    pipe.save_lora_weights(tmp_path / "ours")
    theirs, ours = (
        load_file(tmp_path / folder / "adapter_model.safetensors") for folder in ("theirs", "ours")
    )
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(tensor, ours[name]) for name, tensor in theirs.items())
    plain = model.unload()
    peft.PeftModel.from_pretrained(plain, tmp_path / "ours").eval()
    assert torch.equal(prediction(plain), expected), "PEFT changes the UNet itself"
    pipe.unload_lora_weights()
    assert torch.equal(prediction(pipe.unet), base)


def test_patterns_and_several_adapters_at_once(
    pipe: AudioLDM2Pipeline, reference: nn.Module, tmp_path: Path
) -> None:
    """With ranks and alphas by pattern, one of the two rank-stabilized; some layers are shared."""
    patterns = {
        "rank_pattern": {"to_k": 3, r"^conv_in": 1},
        "alpha_pattern": {r"attn1\.to_k": 7, "conv2": 0.5},
    }
    model = peft_model(reference, 1, "dog", target_modules=["to_q", "to_k", "conv2", "conv_in"], **patterns)
    model = peft_model(model, 2, "rain", target_modules=["to_k", "to_v", "net.2"], use_rslora=True, r=4)
    model.save_pretrained(tmp_path)
    for name in ("dog", "rain"):
        pipe.load_lora_weights(tmp_path / name, adapter_name=name)
        model.set_adapter(name)
        assert pipe.get_active_adapters() == [name]
        assert_close(prediction(pipe.unet), prediction(model), TOLERANCE)

    tuner = model.base_model
    tuner.set_adapter(["dog", "rain"])
    layers = [m for m in model.modules() if isinstance(m, peft.tuners.lora.LoraLayer)]
    for layer in layers:
        layer.set_scale("dog", 0.8)
        layer.set_scale("rain", -0.3)
    pipe.set_adapters(["dog", "rain"], [0.8, -0.3])
    expected = prediction(model)
    assert_close(prediction(pipe.unet), expected, TOLERANCE)
    for layer in layers:
        layer.scale_layer(0.5)
    with pipe._adapters_of_call(None, {"scale": 0.5}):
        assert_close(prediction(pipe.unet), prediction(model), TOLERANCE)
    assert_close(prediction(pipe.unet), expected, TOLERANCE)

    pipe.fuse_lora(lora_scale=0.5)
    assert pipe.fused_loras == {"dog", "rain"}
    assert_close(prediction(pipe.unet), prediction(model), TOLERANCE)
    pipe.unfuse_lora()
    assert_close(prediction(pipe.unet), expected, TOLERANCE)

    # Written again, ranks and alphas are patterns of whole names.
    pipe.save_lora_weights(tmp_path / "again", "dog")
    model.unload()
    again = peft.PeftModel.from_pretrained(reference_unet(), tmp_path / "again").eval()
    pipe.set_adapters("dog")
    assert_close(prediction(pipe.unet), prediction(again), TOLERANCE)


def test_adapters_of_diffusers_give_the_same_here_and_back(pipe: AudioLDM2Pipeline, tmp_path: Path) -> None:
    unet = reference_unet()
    # diffusers has its methods for adapters in a base class that its own AudioLDM 2 UNet lacks.
    unet.__class__ = type("WithAdapters", (type(unet), PeftAdapterMixin), {})
    add_random_adapter(pipe, "dog", alpha=5, target_modules=["to_q", "to_out.0", "conv1", "proj_in"])
    expected = prediction(pipe.unet)
    pipe.save_lora_weights(tmp_path / "ours")
    unet.load_lora_adapter(tmp_path / "ours", prefix="unet", weight_name="pytorch_lora_weights.safetensors")
    assert_close(prediction(unet), expected, TOLERANCE)

    ((name, config),) = unet.peft_config.items()
    state, config = peft.get_peft_model_state_dict(unet, adapter_name=name), config.to_dict()
    for folder, metadata in (("with config", {"unet": config}), ("without", {})):
        LoraBaseMixin._save_lora_weights(tmp_path / folder, {"unet": state}, metadata)
        pipe.load_lora_weights(tmp_path / folder, adapter_name=folder)
        # Without a config, diffusers takes each rank for the alpha: a factor of 1 in place of 5 / 2.
        pipe.set_adapters(folder, 1.0 if metadata else 2.5)
        assert_close(prediction(pipe.unet), expected, TOLERANCE)


def older(state: dict[str, Tensor], kind: str) -> dict[str, Tensor]:
    """An adapter's tensors under the names of older formats."""
    renamed = {}
    for name, tensor in state.items():
        if kind == "processor":
            name = name.replace("to_out.0", "to_out")
            layer, _, key = name.rpartition(".lora_")
            block, _, last = layer.rpartition(".")
            name = f"{block}.processor.{last}_lora_{key}"
            name = name.replace("_lora_A", "_lora.down").replace("_lora_B", "_lora.up")
        elif kind == "unet":
            name = "unet." + name.replace("lora_A", "lora.down").replace("lora_B", "lora.up")
        elif kind == "peft in memory":
            name = "base_model.model." + name.replace(".weight", ".default.weight")
        renamed[name] = tensor
    return renamed


@pytest.mark.parametrize(
    ("kind", "form"),
    [("bare", "safetensors"), ("unet", "bin"), ("processor", "dict"), ("peft in memory", "dict")],
)
def test_older_names_and_alphas_are_read(
    pipe: AudioLDM2Pipeline, tmp_path: Path, kind: str, form: str
) -> None:
    add_random_adapter(pipe, "dog", target_modules=["to_q", "to_out.0"])
    expected = prediction(pipe.unet)
    pipe.save_lora_weights(tmp_path / "folder")
    state = {
        name.removeprefix("unet."): tensor
        for name, tensor in load_file(tmp_path / "folder" / "pytorch_lora_weights.safetensors").items()
    }
    names = sorted({name.rpartition(".lora_")[0] for name in state})
    renamed = older(state, kind)
    if kind == "unet":
        renamed |= {f"unet.{name}.alpha": torch.tensor(3.0) for name in names}
    given: Any = renamed
    if form == "safetensors":
        given = tmp_path / "mine.safetensors"
        save_file(renamed, given)
    elif form == "bin":
        given = tmp_path / "mine.bin"
        torch.save(renamed, given)
    pipe.delete_adapters("dog")
    pipe.load_lora_weights(
        given if form != "bin" else tmp_path, **({"weight_name": "mine.bin"} if form == "bin" else {})
    )
    pipe.set_adapters("default_0", 1.0 if kind == "unet" else 1.5)
    assert_close(prediction(pipe.unet), expected, TOLERANCE)


def test_what_is_written_says_what_it_is(pipe: AudioLDM2Pipeline, tmp_path: Path) -> None:
    pipe._name_or_path = "cvssp/audioldm2"
    pipe.add_adapter("dog", rank=2, target_modules=["to_q", "attn1.to_k"])
    with_random_weights(pipe, "dog")
    pipe.save_lora_weights(tmp_path, metadata={"clips": "40"})
    content = json.loads((tmp_path / "adapter_config.json").read_text())
    assert content["base_model_name_or_path"] == "cvssp/audioldm2"
    assert "to_q" in content["target_modules"]
    assert all(name == "to_q" or name.endswith("attn1.to_k") for name in content["target_modules"])
    from safetensors import safe_open

    for name in ("adapter_model", "pytorch_lora_weights"):
        with safe_open(tmp_path / f"{name}.safetensors", "pt") as file:
            assert file.metadata()["clips"] == "40"
