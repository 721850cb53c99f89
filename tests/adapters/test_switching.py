"""Switching adapters: off is bitwise the base, for one call or for good."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from audioldm2 import AudioLDM2Pipeline
from audioldm2.adapters.layers import LowRank, attach
from audioldm2.attention import record_attention
from tests.adapters.helpers import add_random_adapter, prediction, reference_unet
from tests.helpers import load_pipeline, noise, sound
from tests.reference import randomize

LAYERS = ["to_q", "to_v", "ff.net.2", "conv1", "proj_out"]


@pytest.fixture
def adapted(pipe: AudioLDM2Pipeline) -> AudioLDM2Pipeline:
    """A pipeline with two adapters, all off."""
    add_random_adapter(pipe, "dog", 1, target_modules=LAYERS)
    add_random_adapter(pipe, "rain", 2, target_modules=["to_k", "conv1", "time_emb_proj"])
    pipe.set_adapters([])
    return pipe


OFF: dict[str, Callable[[AudioLDM2Pipeline], Any]] = {
    "none set": lambda pipe: pipe.set_adapters([]),
    "weights 0": lambda pipe: pipe.set_adapters(["dog", "rain"], 0.0),
    "disabled": lambda pipe: pipe.disable_lora(),
    "unfused": lambda pipe: (pipe.fuse_lora(), pipe.unfuse_lora(), pipe.set_adapters([])),
    "deleted": lambda pipe: pipe.delete_adapters(["dog", "rain"]),
    "unloaded": lambda pipe: pipe.unload_lora_weights(),
}


@pytest.mark.parametrize("off", OFF)
def test_off_is_bitwise_the_base_and_costs_nothing(adapted: AudioLDM2Pipeline, off: str) -> None:
    base, state = prediction(adapted.unet), copy.deepcopy(adapted.unet.state_dict())
    adapted.set_adapters(["dog", "rain"], [0.8, 0.3])
    assert (prediction(adapted.unet) - base).abs().max() > 0.01
    OFF[off](adapted)
    assert torch.equal(prediction(adapted.unet), base)
    now = adapted.unet.state_dict()
    assert now.keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in now.items())
    assert not any("Lora" in type(module).__name__ for module in adapted.unet.modules())


def test_adapters_of_one_call_are_restored_also_after_an_error(adapted: AudioLDM2Pipeline) -> None:
    base = sound(adapted)
    adapted.set_adapters("dog")
    dog = sound(adapted)
    assert np.abs(dog - base).max() > 1e-3
    assert np.array_equal(sound(adapted, adapters={}), base)
    both = sound(adapted, adapters={"dog": 0.8, "rain": 0.3})
    assert not np.array_equal(both, dog)
    half = sound(adapted, cross_attention_kwargs={"scale": 0.5})
    assert np.array_equal(half, sound(adapted, adapters={"dog": 0.5}))
    adapted.disable_lora()
    assert np.array_equal(sound(adapted, adapters={"dog": 1.0}), dog), "the call's own choice counts"
    assert np.array_equal(sound(adapted), base)
    adapted.enable_lora()

    def fail(*_: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sound(adapted, adapters={"rain": 1.0}, callback=fail)
    assert np.array_equal(sound(adapted), dog)
    adapted.set_adapters(["dog", "rain"], [0.8, None])
    adapted.set_adapters(["dog", "rain"], [0.8, 0.3])
    assert np.array_equal(sound(adapted), both)


def test_a_callback_may_switch_during_a_generation(adapted: AudioLDM2Pipeline) -> None:
    dog = sound(adapted, adapters={"dog": 1.0}, output_type="latent")

    def switch(pipe: Any, step: int, *_: Any) -> None:
        if step == 0:
            pipe.set_adapters("dog")

    late = sound(adapted, callback_on_step_end=switch, output_type="latent")
    base = sound(adapted, adapters={}, output_type="latent")
    assert not torch.equal(late, base)
    assert not torch.equal(late, dog)
    adapted.set_adapters([])
    adapted.enable_model_cpu_offload(device="cpu")
    assert torch.equal(sound(adapted, callback_on_step_end=switch, output_type="latent"), late)


def test_offload_and_dtypes_reach_adapters_that_are_on_and_off(adapted: AudioLDM2Pipeline) -> None:
    adapted.set_adapters("dog")
    dog, rain = sound(adapted), sound(adapted, adapters={"rain": 1.0})
    adapted.enable_model_cpu_offload(device="cpu")
    for _ in range(2):
        assert np.array_equal(sound(adapted), dog)
        assert np.array_equal(sound(adapted, adapters={"rain": 1.0}), rain)
    adapted.to(torch.bfloat16)
    adapted.set_adapters(["dog", "rain"])
    assert {p.dtype for p in adapted.unet.parameters()} == {torch.bfloat16}
    assert np.isfinite(sound(adapted)).all()
    kept = adapted.adapter_parameters("dog")
    adapted.to(torch.float32)
    assert all(a is b for a, b in zip(kept, adapted.adapter_parameters("dog"), strict=True))


def test_a_copy_has_adapters_of_its_own(adapted: AudioLDM2Pipeline) -> None:
    base = prediction(adapted.unet)
    adapted.set_adapters("dog")
    dog = prediction(adapted.unet)
    for other in (copy.deepcopy(adapted), pickle.loads(pickle.dumps(adapted))):
        assert other.get_active_adapters() == ["dog"]
        with torch.no_grad():
            for parameter in other.adapter_parameters("dog"):
                parameter.mul_(2)
        assert not torch.equal(prediction(other.unet), dog)
        other.unload_lora_weights()
        assert torch.equal(prediction(other.unet), base)
        assert torch.equal(prediction(adapted.unet), dog)
    shared = AudioLDM2Pipeline(**adapted.components)
    assert shared.get_list_adapters() == {"unet": ["dog", "rain"]}
    shared.set_adapters([])
    assert torch.equal(prediction(adapted.unet), base)


def test_threads_with_one_pipeline_get_the_adapters_that_they_ask_for(adapted: AudioLDM2Pipeline) -> None:
    chosen: list[dict[str, float]] = [{}, {"dog": 1.0}, {"rain": 0.5}]
    expected = [sound(adapted, adapters=weights) for weights in chosen]
    found: dict[int, np.ndarray] = {}

    def run(index: int) -> None:
        found[index] = sound(adapted, adapters=chosen[index])

    threads = [threading.Thread(target=run, args=(index,)) for index in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(np.array_equal(found[index], expected[index]) for index in range(3))


def test_hooks_and_recorded_attention_survive_a_switch(adapted: AudioLDM2Pipeline) -> None:
    calls = []
    layer = adapted.unet.middle.transformers[1].blocks[0].cross_attention.q
    handle = layer.register_forward_hook(lambda *_: calls.append(1))
    with record_attention(adapted) as record:
        sound(adapted, adapters={"dog": 1.0})
    assert len(record.timesteps) == 2
    assert len(calls) == 2
    handle.remove()
    adapted.set_adapters("dog")
    sound(adapted)
    assert len(calls) == 2


# --- fusing


def test_fused_adapters_stay_after_unloading_and_are_saved_with_the_checkpoint(
    random_checkpoint: Path, tmp_path: Path
) -> None:
    pipe = load_pipeline(random_checkpoint)
    add_random_adapter(pipe, "dog", target_modules=LAYERS)
    base = {name: x.clone() for name, x in pipe.unet.state_dict().items() if "updates" not in name}
    with pytest.warns(UserWarning, match=r"adapters 'dog' are not saved .* save_lora_weights.* fuse_lora"):
        pipe.save_pretrained(tmp_path / "base")
    saved = AudioLDM2Pipeline.from_pretrained(tmp_path / "base").unet.state_dict()
    assert all(torch.equal(saved[name], tensor) for name, tensor in base.items())
    assert pipe.get_active_adapters() == ["dog"]

    pipe.fuse_lora()
    fused = sound(pipe)
    pipe.save_pretrained(tmp_path / "fused")  # no warning
    pipe.unload_lora_weights()
    assert pipe.get_list_adapters() == {"unet": []}
    assert np.array_equal(sound(pipe), fused)
    assert np.array_equal(sound(load_pipeline(tmp_path / "fused")), fused)


def test_what_does_not_go_with_fused_adapters_is_refused(adapted: AudioLDM2Pipeline) -> None:
    base, original = prediction(adapted.unet), adapted.unet.middle.resnets[0].conv_1.weight.clone()
    adapted.set_adapters(["dog", "rain"], [0.5, 2.0])
    both = prediction(adapted.unet)
    adapted.fuse_lora(adapter_names="dog")
    assert adapted.get_active_adapters() == ["rain"]
    assert torch.allclose(prediction(adapted.unet), both, atol=1e-4)
    for refused in (
        lambda: adapted.set_adapters("dog"),
        lambda: adapted.delete_adapters("dog"),
        lambda: adapted.fuse_lora(adapter_names=["dog"]),
        lambda: adapted.disable_lora(),
        lambda: adapted("rain", adapters={}),
    ):
        with pytest.raises(ValueError, match="fused"):
            refused()
    adapted.fuse_lora()
    assert torch.allclose(prediction(adapted.unet), both, atol=1e-4)
    with pytest.raises(ValueError, match="nothing to fuse"):
        adapted.fuse_lora()
    adapted.to(torch.bfloat16)
    adapted.unfuse_lora()
    adapted.set_adapters([])
    with pytest.raises(ValueError, match="no adapter is fused"):
        adapted.unfuse_lora()
    layer = adapted.unet.middle.resnets[0].conv_1
    assert torch.equal(layer.weight, original.bfloat16()), "the dtype that the UNet has now"
    assert (prediction(adapted.unet.float()) - base).abs().max() < 0.1


@pytest.mark.parametrize("change", ["counted", "not counted", "replaced"])
def test_weights_that_changed_while_fused_are_not_overwritten(
    adapted: AudioLDM2Pipeline, change: str
) -> None:
    adapted.fuse_lora(adapter_names=["dog"])
    layer = adapted.unet.middle.resnets[0].conv_1
    with torch.no_grad():
        if change == "counted":
            layer.weight[0, 0, 0, 0] += 1e-3
        elif change == "not counted":
            layer.weight.data[0, 0, 0, 0] += 1e-3
        else:
            layer.weight = nn.Parameter(layer.weight * 1.001)
    changed = layer.weight.clone()
    with pytest.raises(ValueError, match=r"1 of the fused weights have changed .*middle\.resnets\.0\.conv_1"):
        adapted.unfuse_lora()
    assert torch.equal(layer.weight, changed)
    adapted.unload_lora_weights()
    assert torch.equal(layer.weight, changed)


# --- compiling


class Layers(nn.Module):
    """A convolution, and linear layers in a list, as in the UNet."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.linears = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x).flatten(2).mT
        for linear in self.linears:
            x = linear(x)
        return x


def test_compiled_layers_notice_every_switch() -> None:
    model = randomize(Layers())
    model.compile(backend="eager", fullgraph=True)
    conv = [LowRank(noise(2, 3, 3, 3), noise(4, 2, 1, 1), 0, 1, 1.0, 0.0, torch.float32)]
    rows = [LowRank(noise(1, 4, seed=s), noise(2, 1), 2 * s, 1, 1.0, 0.0, torch.float32) for s in (0, 1)]
    x = noise(1, 3, 4, 4)
    seen = []

    def check() -> None:
        with torch.no_grad():
            expected = model.forward(x)
            assert torch.equal(model(x), expected)
        seen.append(expected)

    check()
    attach(model.conv, conv)
    check()
    attach(model.linears[1], rows)
    check()
    rows[0].scale = 2.0
    check()
    attach(model.linears[1], rows[1:])
    check()
    with torch.no_grad():
        rows[1].b.mul_(3)
    check()
    attach(model.conv, [])
    check()
    attach(model.linears[1], [])
    check()
    assert torch.equal(seen[0], seen[-1])
    assert all(not torch.equal(one, other) for one, other in pairwise(seen))


@pytest.mark.slow
def test_a_compiled_unet_notices_every_switch(
    adapted: AudioLDM2Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, compiler, graphs = copy.deepcopy(adapted), torch.compile, []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(
        torch, "compile", lambda target, **_: compiler(target, backend=backend, fullgraph=True, dynamic=False)
    )
    adapted.compile(stages=["unet"])
    for weights in ({}, {"dog": 1.0}, {"dog": 0.5}, {"rain": 1.0}, {}):
        found = sound(adapted, adapters=weights, output_type="latent")
        assert torch.allclose(found, sound(plain, adapters=weights, output_type="latent"), atol=1e-4)
    assert len(graphs) >= 3
    torch._dynamo.reset()


# --- what is refused


def test_names_and_weights_that_cannot_be_used_are_named(adapted: AudioLDM2Pipeline) -> None:
    nan: Any = float("nan")
    for call, message in (
        (lambda: adapted.set_adapters(["dog", "cat"]), "no adapter 'cat'; there are 'dog', 'rain'"),
        (lambda: adapted.set_adapters("dog", [1.0, 2.0]), "2 adapter_weights for 1 adapter_names"),
        (lambda: adapted.set_adapters(["dog", "dog"]), "twice"),
        (lambda: adapted.set_adapters(3), "adapter_names must be a name or a list of names, got 3"),
        (lambda: adapted.set_adapters("dog", nan), r"adapter_weights \('dog'\) must be a finite number"),
        (lambda: adapted.set_adapters("dog", {"unet": 1.0}), r"adapter_weights .* must be a finite number"),
        (lambda: adapted("rain", adapters={"cat": 1.0}), "no adapter 'cat'"),
        (lambda: adapted("rain", adapters={"dog": nan}), r"adapters \('dog'\) must be a finite number"),
        (lambda: adapted.delete_adapters(["dog", "cat"]), "no adapter 'cat'"),
        (lambda: adapted.adapter_parameters("cat"), "no adapter 'cat'"),
        (lambda: adapted.fuse_lora(components=["text_encoder"]), "components"),
        (lambda: adapted.fuse_lora(lora_scale=nan), "lora_scale must be a finite number"),
        (lambda: adapted.add_adapter("dog"), "there is an adapter 'dog' already"),
        (lambda: adapted.add_adapter(" "), "name of an adapter must be text"),
        (lambda: adapted.save_lora_weights("x"), "needs an adapter_name; there are 'dog', 'rain'"),
        (lambda: adapted.save_lora_weights("x", "dog", {"format": "y"}), "metadata must be texts by name"),
        (lambda: adapted.save_lora_weights(__file__, "dog"), "is a file"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            call()
    assert adapted.get_list_adapters() == {"unet": ["dog", "rain"]}
    with pytest.warns(UserWarning, match="no adapter is on"):
        sound(adapted, cross_attention_kwargs={"scale": 0.5})


def test_another_unet_is_refused_and_saves_as_before(pipe: AudioLDM2Pipeline) -> None:
    pipe.unet = reference_unet()
    for call in (
        lambda: pipe.load_lora_weights({"x": noise(1)}),
        lambda: pipe.add_adapter("dog"),
        lambda: pipe("rain", adapters={}),
    ):
        with pytest.raises(TypeError, match=r"this package's UNet; pipe\.unet is of class AudioLDM2UNet2D"):
            call()
    with pipe._without_adapters():
        pass


def test_layers_that_are_not_plain_are_refused(pipe: AudioLDM2Pipeline) -> None:
    torch.nn.utils.parametrizations.weight_norm(pipe.unet.middle.resnets[0].conv_1)
    with pytest.raises(TypeError, match=r"middle\.resnets\.0\.conv_1 of pipe\.unet is of class Param"):
        pipe.add_adapter("dog", target_modules=["conv1"])
    pipe.add_adapter("dog", target_modules=["to_q"])
