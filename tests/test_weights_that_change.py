"""However weights change, the next sound is that of the new weights: nothing computed from them is kept.

The checkpoint is wide enough for the fast convolutions on a CPU, which precompute kernels from the weights
while a stage runs.
"""

from __future__ import annotations

import copy
import gc
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from audioldm2 import AudioLDM2Pipeline
from scripts.random_checkpoint import changed
from tests import helpers
from tests.helpers import load_pipeline
from tests.reference import SMALL, make_checkpoint

WIDE = changed(
    SMALL,
    unet={
        "block_out_channels": [64, 64],
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
        "cross_attention_dim": [[None, 16, 20]] * 2,
    },
    vae={"block_out_channels": [64, 64, 64]},
    vocoder={"upsample_initial_channel": 256, "upsample_rates": [10, 16], "upsample_kernel_sizes": [20, 32]},
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Written by this package, so that weights that are saved and loaded again have the same alignment."""
    folder = tmp_path_factory.mktemp("wide")
    load_pipeline(make_checkpoint(folder / "theirs", WIDE)).save_pretrained(folder / "ours")
    return folder / "ours"


@pytest.fixture
def pipe(folder: Path) -> AudioLDM2Pipeline:
    return load_pipeline(folder)


def sound(pipe: AudioLDM2Pipeline, **arguments: Any) -> Any:
    """Long enough for the fast convolutions."""
    return helpers.sound(pipe, "Rain falls", audio_length_in_s=1.28, **arguments)


def layers(pipe: AudioLDM2Pipeline) -> list[nn.Module]:
    """A layer of every stage: convolutions, for which kernels are precomputed, and linear layers."""
    return [
        pipe.unet.down[0].resnets[0].conv_2,
        pipe.unet.down[1].transformers[1].blocks[0].cross_attention.kv,
        pipe.vae.decoder.middle.resnets[0].conv_1,
        pipe.vocoder.blocks[0].plain[0],
        pipe.text_encoder.text.pooler,
        pipe.text_encoder_2.blocks[0].attention.qkv,
        pipe.projection_model.projection,
        pipe.language_model.blocks[0].up,
    ]


def write_data(pipe: AudioLDM2Pipeline) -> None:
    for layer in layers(pipe):
        layer.weight.data.mul_(1.5)


def add_a_delta(pipe: AudioLDM2Pipeline) -> None:
    """As PEFT does to merge an adapter."""
    for layer in layers(pipe):
        layer.weight.data += 0.3 * layer.weight.data.flip(0)


def take_a_step(pipe: AudioLDM2Pipeline) -> None:
    parameters = [layer.weight for layer in layers(pipe)]
    optimizer = torch.optim.AdamW(parameters, lr=0.02, fused=True)
    for _ in range(3):
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        optimizer.zero_grad()


def copy_an_average(pipe: AudioLDM2Pipeline) -> None:
    from diffusers.training_utils import EMAModel

    for layer in layers(pipe):
        average = EMAModel(layer.parameters(), decay=0.5)
        average.shadow_params = [1.5 * parameter for parameter in average.shadow_params]
        average.copy_to(layer.parameters())


def write_through_numpy(pipe: AudioLDM2Pipeline) -> None:
    for layer in layers(pipe):
        layer.weight.detach().numpy()[...] *= 1.5


@torch.no_grad()
def write_in_place(pipe: AudioLDM2Pipeline) -> None:
    for layer in layers(pipe):
        layer.weight.mul_(1.5)


def write_in_inference_mode(pipe: AudioLDM2Pipeline) -> None:
    with torch.inference_mode():
        for layer in layers(pipe):
            layer.weight.mul_(1.5)


def load_a_state(pipe: AudioLDM2Pipeline) -> None:
    for layer in layers(pipe):
        layer.load_state_dict({name: 1.5 * tensor for name, tensor in layer.state_dict().items()})


def replace_parameters(pipe: AudioLDM2Pipeline) -> None:
    for layer in layers(pipe):
        layer.weight = nn.Parameter(1.5 * layer.weight.detach())


CHANGES = [
    write_data,
    add_a_delta,
    take_a_step,
    copy_an_average,
    write_through_numpy,
    write_in_place,
    write_in_inference_mode,
    load_a_state,
    replace_parameters,
]


@pytest.fixture(scope="module")
def unchanged(folder: Path) -> np.ndarray:
    return sound(load_pipeline(folder))


@pytest.mark.parametrize("when", ["before the first generation", "between two generations"])
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_the_next_sound_is_the_one_of_the_changed_weights(
    pipe: AudioLDM2Pipeline,
    unchanged: np.ndarray,
    tmp_path: Path,
    change: Callable[[AudioLDM2Pipeline], None],
    when: str,
) -> None:
    """Bit for bit the sound of the same weights saved and loaded again."""
    if when == "between two generations":
        np.testing.assert_array_equal(sound(pipe), unchanged)
    change(pipe)
    after = sound(pipe)
    assert np.abs(after - unchanged).max() > 0.01
    pipe.save_pretrained(tmp_path)
    np.testing.assert_array_equal(after, sound(load_pipeline(tmp_path)))


def test_a_change_in_a_callback_counts_from_the_next_step(folder: Path) -> None:
    """Compared with PyTorch's own convolutions, and contexts that are computed again at every step."""

    def halve_at_the_first_step(pipe: AudioLDM2Pipeline) -> Callable[..., None]:
        layers_of_the_unet = layers(pipe)[:2]

        def callback(step: int, t: torch.Tensor, latents: torch.Tensor) -> None:
            if step == 0:
                for layer in layers_of_the_unet:
                    layer.weight.data.mul_(0.5)

        return callback

    class Plain(nn.Module):
        """Hides a UNet: no kernels are precomputed from its weights, and no contexts."""

        def __init__(self, unet: nn.Module):
            super().__init__()
            self.inner, self.config = [unet], unet.config
            self.parameter = nn.Parameter(torch.zeros(1))

        def forward(self, *args: torch.Tensor, **kwargs: torch.Tensor) -> torch.Tensor:
            return self.inner[0](*args, **kwargs)

    results = {}
    for name in ("ours", "plain", "changed before"):
        pipe = load_pipeline(folder)
        callback = halve_at_the_first_step(pipe)
        if name == "plain":
            pipe.unet = Plain(pipe.unet)
        if name == "changed before":
            callback(0, None, None)
            callback = None
        results[name] = sound(pipe, num_inference_steps=4, callback=callback, output_type="latent")
    scale = results["plain"].abs().max().item()
    assert (results["ours"] - results["plain"]).abs().max().item() <= 1e-4 * scale
    assert (results["ours"] - results["changed before"]).abs().max().item() > 1e-3 * scale


def tensors_alive() -> int:
    # type(), not isinstance(): the latter asks an object for its __class__, and a dead weakref.proxy raises.
    return sum(issubclass(type(x), torch.Tensor) for x in gc.get_objects())


def test_a_generation_leaves_no_tensors_behind(pipe: AudioLDM2Pipeline) -> None:
    sound(pipe)
    gc.collect()
    before = tensors_alive()
    sound(pipe)
    gc.collect()
    assert tensors_alive() <= before


def test_a_generation_does_not_change_the_stages(pipe: AudioLDM2Pipeline) -> None:
    def description() -> list[tuple]:
        return [
            (name, type(module), sorted(module.__dict__), [p.stride() for p in module.parameters()])
            for stage in pipe.stages.values()
            for name, module in stage.named_modules()
        ]

    before = description()
    sound(pipe)
    assert description() == before
    assert {type(m) for m in pipe.unet.modules() if isinstance(m, nn.Conv2d)} == {nn.Conv2d}


@pytest.mark.parametrize("used", [False, True], ids=["new", "used"])
@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda pipe: pickle.loads(pickle.dumps(pipe))], ids=["deepcopy", "pickle"]
)
def test_a_copy_has_weights_of_its_own(
    pipe: AudioLDM2Pipeline, unchanged: np.ndarray, duplicate: Callable, used: bool
) -> None:
    if used:
        sound(pipe)
    other = duplicate(pipe)
    write_data(pipe)
    np.testing.assert_allclose(sound(other), unchanged, atol=1e-5)
    assert np.abs(sound(pipe) - unchanged).max() > 0.01
