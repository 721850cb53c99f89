"""PyTorch's function transforms and exporters work on the stages, which are plain modules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from audioldm2.models.hifigan import HifiGan, HifiGanConfig
from audioldm2.models.unet import UNet, UNetConfig
from audioldm2.models.vae import VAE, VAEConfig
from tests.helpers import noise
from tests.reference import SMALL, assert_close, randomize


class Decoder(nn.Module):
    def __init__(self, vae: VAE):
        super().__init__()
        self.vae = vae

    def forward(self, latents: Tensor) -> Tensor:
        return self.vae.decode(latents)


def unet() -> tuple[nn.Module, tuple[Tensor, ...]]:
    stage = randomize(UNet(UNetConfig.from_dict(SMALL["unet"])))
    return stage, (noise(2, 4, 8, 4), torch.tensor([500, 20]), noise(2, 8, 16), noise(2, 5, 20))


def vae() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return Decoder(randomize(VAE(VAEConfig.from_dict(SMALL["vae"])))), (noise(2, 4, 8, 4),)


def vocoder() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return randomize(HifiGan(HifiGanConfig.from_dict(SMALL["vocoder"]))), (noise(2, 12, 16),)


STAGES = pytest.mark.parametrize("make", [unet, vae, vocoder], ids=lambda make: make.__name__)
Make = Callable[[], tuple[Any, tuple[Tensor, ...]]]


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@torch.no_grad()
@STAGES
def test_vmap_over_models(make: Make) -> None:
    """An ensemble: one call for several sets of weights."""
    stage, inputs = make()
    models = [dict(stage.state_dict()), {k: 1.1 * v for k, v in stage.state_dict().items()}]
    stacked = {key: torch.stack([model[key] for model in models]) for key in models[0]}

    def call(state: dict[str, Tensor]) -> Tensor:
        result: Tensor = torch.func.functional_call(stage, state, inputs)
        return result

    together = torch.func.vmap(call)(stacked)
    for one, model in zip(together, models, strict=True):
        assert_close(one, call(model), 1e-5)


@torch.no_grad()
@STAGES
def test_export(make: Make) -> None:
    stage, inputs = make()
    exported = torch.export.export(stage, inputs).module()
    others = tuple(x + 1 for x in inputs)
    assert_close(exported(*others), stage(*others), 1e-5)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@torch.no_grad()
@STAGES
def test_trace(make: Make) -> None:
    """What the exporters of older releases begin with; every input stays an input."""
    stage, inputs = make()
    traced = torch.jit.trace(stage, inputs, check_trace=False)
    others = tuple(x + 1 for x in inputs)
    assert_close(traced(*others), stage(*others), 1e-5)
    operators = {node.kind().split("::")[0] for node in traced.inlined_graph.nodes()}
    assert operators <= {"aten", "prim"}


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@STAGES
def test_per_sample_gradients(make: Make) -> None:
    stage, inputs = make()
    state = {k: v.detach() for k, v in stage.state_dict().items()}

    def loss(state: dict[str, Tensor], *one: Tensor) -> Tensor:
        return torch.func.functional_call(stage, state, tuple(x[None] for x in one)).square().mean()

    gradients = torch.func.vmap(torch.func.grad(loss), in_dims=(None, *[0] * len(inputs)))(state, *inputs)
    name = [key for key in state if key.endswith("conv_out.weight")][-1]
    alone = torch.func.grad(loss)(state, *(x[1] for x in inputs))
    assert_close(gradients[name][1], alone[name], 1e-4)
