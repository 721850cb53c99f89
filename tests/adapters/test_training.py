"""Adapters that are trained here: they begin without effect, learn, and load in PEFT."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch

from audioldm2 import AudioLDM2Pipeline
from audioldm2.adapters.targets import targets
from tests.adapters.helpers import prediction, reference_unet
from tests.helpers import noise, seeded
from tests.reference import assert_close


def test_a_trained_adapter_begins_as_the_base_learns_and_loads_in_peft(
    pipe: AudioLDM2Pipeline, tmp_path: Path
) -> None:
    unet = pipe.unet
    base = prediction(unet)
    unet.requires_grad_(False)
    before = {name: weight.clone() for name, weight in unet.state_dict().items()}
    layers = ["to_q", "conv1", "proj_in"]
    pipe.add_adapter("new", 3, 6, layers, use_rslora=True, dropout=0.1, generator=seeded())
    assert pipe.get_active_adapters() == ["new"]
    assert torch.equal(prediction(unet), base)

    parameters = pipe.adapter_parameters("new")
    assert {id(p) for p in unet.parameters() if p.requires_grad} == {id(p) for p in parameters}
    unet.enable_gradient_checkpointing()
    unet.train()
    optimizer = torch.optim.Adam(parameters, lr=0.005)
    losses = []
    for _ in range(5):
        torch.manual_seed(0)  # of dropout
        output = unet(noise(2, 4, 6, 4), 7, noise(2, 3, 16, seed=1), noise(2, 5, 20, seed=2))
        loss = output.square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    unet.eval()
    trained = prediction(unet)
    assert (trained - base).abs().max() > 0.01
    pipe.save_lora_weights(tmp_path, metadata={"steps": "5"})
    pipe.unload_lora_weights()
    assert all(torch.equal(weight, before[name]) for name, weight in unet.state_dict().items())

    loaded = peft.PeftModel.from_pretrained(reference_unet(), tmp_path).eval()
    assert_close(prediction(loaded), trained, 1e-5)
    config = loaded.peft_config["default"]
    assert (config.r, config.lora_alpha, config.use_rslora, config.lora_dropout) == (3, 6, True, 0.1)
    assert config.target_modules == {"to_q", "conv1", "proj_in"}


def test_new_adapters_are_drawn_as_peft_draws_them(pipe: AudioLDM2Pipeline) -> None:
    pipe.add_adapter("new", rank=4, target_modules=["conv2", "to_k"], generator=seeded(3))
    first = [p.clone() for p in pipe.adapter_parameters("new")]
    pipe.add_adapter("again", rank=4, target_modules=["conv2", "to_k"], generator=seeded(3))
    assert all(map(torch.equal, first, pipe.adapter_parameters("again")))
    for a, b in zip(first[::2], first[1::2], strict=True):
        bound = 1 / a[0].numel() ** 0.5  # of torch.nn.Linear's own weights
        assert 0.8 * bound < a.abs().max() <= bound
        assert not b.any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank must be an integer of at least 1, got 0"),
        ({"alpha": float("nan")}, "alpha must be a finite number, got nan"),
        ({"dropout": 1}, "dropout must be from 0 to less than 1, got 1"),
        (
            {"target_modules": ["to_q", "q_proj"]},
            r"target_modules has 'q_proj', but no layer .* 'all-linear'|to_q",
        ),
        ({"target_modules": []}, "target_modules is empty"),
        ({"target_modules": 3}, "target_modules must be a list of names of layers, got 3"),
        ({"dtype": torch.int8}, "int8 is not supported"),
    ],
    ids=str,
)
def test_an_argument_that_cannot_be_used_is_named(
    pipe: AudioLDM2Pipeline, options: dict, message: str
) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        pipe.add_adapter("new", **options)
    assert pipe.get_list_adapters() == {"unet": []}


def test_all_linear_are_the_layers_that_peft_chooses(pipe: AudioLDM2Pipeline) -> None:
    pipe.add_adapter("new", target_modules="all-linear")
    reference = peft.get_peft_model(reference_unet(), peft.LoraConfig(target_modules="all-linear"))
    names = {
        name.removeprefix("base_model.model.").removesuffix(".lora_A")
        for name, _ in reference.named_modules()
        if name.endswith(".lora_A")
    }
    assert len(pipe.adapter_parameters("new")) == 2 * len(names)
    known = targets(pipe.unet)
    assert names == {name for name in known if len(known[name].shapes(1)[0]) == 2}
