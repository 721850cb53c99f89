"""A UNet of ours and one of diffusers with the same random weights, and adapters with random numbers."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AudioLDM2UNet2DConditionModel
from torch import Tensor, nn

from audioldm2 import AudioLDM2Pipeline
from audioldm2.models.unet import UNet, UNetConfig
from tests.helpers import noise, seeded
from tests.reference import SMALL, changed, ours, randomize

# One level with attention beside one without: every kind of layer that a UNet has, and few of each.
SIZES = changed(
    SMALL,
    unet={
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
        "block_out_channels": [8, 12],
        "attention_head_dim": 2,
        "cross_attention_dim": [[None, 16, 20]] * 2,
    },
)["unet"]
KINDS = [
    ["to_q", "to_k", "to_v", "to_out.0"],
    ["proj_in", "proj_out", "net.2", "ff.net.0.proj"],
    ["conv1", "conv2", "conv_shortcut", "conv", "time_emb_proj"],
    ["attn2.to_v", "conv_in", "conv_out", "linear_1", "linear_2"],
]


def reference_unet() -> nn.Module:
    """diffusers' UNet, every parameter random."""
    return randomize(AudioLDM2UNet2DConditionModel(**SIZES))


def our_unet() -> UNet:
    """Our UNet with the weights of `reference_unet`."""
    unet = ours(UNet, UNetConfig, "unet.diffusers", reference_unet(), SIZES)
    assert isinstance(unet, UNet)
    return unet


def with_random_weights(pipe: AudioLDM2Pipeline, name: str, seed: int = 0, size: float = 0.3) -> None:
    """Give an adapter random numbers, so that it changes what the UNet predicts."""
    generator = seeded(seed)
    with torch.no_grad():
        for parameter in pipe.adapter_parameters(name):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * size)


def add_random_adapter(pipe: AudioLDM2Pipeline, name: str, seed: int = 0, **options: Any) -> None:
    """Add an adapter with random numbers."""
    pipe.add_adapter(name, **{"rank": 2, "alpha": 3, **options})
    with_random_weights(pipe, name, seed)


@torch.no_grad()
def prediction(unet: nn.Module) -> Tensor:
    """What a UNet predicts for the same noise each time: ours, diffusers' or PEFT's."""
    output = unet(
        sample=noise(2, 4, 6, 4),
        timestep=torch.tensor(7),
        encoder_hidden_states=noise(2, 3, 16, seed=1),
        encoder_hidden_states_1=noise(2, 5, 20, seed=2),
    )
    return output if isinstance(output, Tensor) else output[0]
