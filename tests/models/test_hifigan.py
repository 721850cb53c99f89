"""HiFi-GAN against transformers' SpeechT5HifiGan."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn
from transformers import SpeechT5HifiGan, SpeechT5HifiGanConfig

from audioldm2.checkpoints.errors import CheckpointError
from audioldm2.checkpoints.fill import TensorDict, fill
from audioldm2.checkpoints.weight_map import weight_map
from audioldm2.models.hifigan import HifiGan, HifiGanConfig
from tests.reference import assert_close, ours, randomize

MAP = "vocoder.transformers"
SMALL = {
    "model_in_dim": 6,
    "upsample_initial_channel": 12,
    "upsample_rates": [3, 2],
    "upsample_kernel_sizes": [5, 4],
    "resblock_kernel_sizes": [3, 5],
    "resblock_dilation_sizes": [[1, 3], [2]],
    "leaky_relu_slope": 0.2,
    "normalize_before": False,
}
CONFIGS = {
    "tiny": SMALL,
    "normalized": {**SMALL, "normalize_before": True},
    "one_block": {**SMALL, "resblock_kernel_sizes": [7], "resblock_dilation_sizes": [[1, 3, 5]]},
    # kernel - rate odd in both steps; 10 channels halve to 5 and 2
    "odd": {
        **SMALL,
        "upsample_rates": [5, 1],
        "upsample_kernel_sizes": [16, 4],
        "upsample_initial_channel": 10,
    },
}


def pair(config: dict) -> tuple[SpeechT5HifiGan, HifiGan]:
    # At this gain samples reach about 0.9, so that the last tanh matters without flattening differences.
    reference = randomize(SpeechT5HifiGan(SpeechT5HifiGanConfig(**config)), gain=1.0)
    return reference, ours(HifiGan, HifiGanConfig, MAP, reference, config)


def empty(config: dict) -> HifiGan:
    with torch.device("meta"):
        return HifiGan(HifiGanConfig.from_dict(config))


def mel(batch: int = 2, frames: int = 7) -> torch.Tensor:
    return torch.randn(batch, frames, 6, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(("batch", "frames"), [(1, 1), (2, 7), (3, 4)])
def test_equals_transformers(name, batch, frames):
    reference, stage = pair(CONFIGS[name])
    expected = reference(mel(batch, frames))
    assert_close(stage(mel(batch, frames)), expected)
    if name != "odd":
        assert expected.shape == (batch, frames * stage.hop_length)
    assert stage.hop_length == (5 if name == "odd" else 6)


def test_the_hub_configuration_equals_transformers():
    # Rates, kernels and dilations of cvssp/audioldm2's vocoder, with fewer channels.
    config = {
        "model_in_dim": 6,
        "upsample_initial_channel": 64,
        "upsample_rates": [5, 4, 2, 2, 2],
        "upsample_kernel_sizes": [16, 16, 8, 4, 4],
        "resblock_kernel_sizes": [3, 7, 11],
        "resblock_dilation_sizes": [[1, 3, 5]] * 3,
        "normalize_before": False,
    }
    reference, stage = pair(config)
    assert_close(stage(mel(1, 5)), reference(mel(1, 5)))
    assert stage.hop_length == 160
    assert stage.config.leaky_relu_slope == 0.1


def test_the_input_is_not_modified():
    _, stage = pair(CONFIGS["normalized"])
    x = mel()
    stage(x)
    assert torch.equal(x, mel())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    _, stage = pair(CONFIGS["normalized"])
    expected = stage(mel())
    actual = stage.to(dtype)(mel().to(dtype))
    assert actual.dtype == dtype
    assert_close(actual, expected, 0.05 if dtype == torch.bfloat16 else 0.01)


def test_gradient_reaches_every_parameter():
    _, stage = pair(SMALL)
    stage.train()
    stage(mel()).square().sum().backward()
    for name, parameter in stage.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


def convolutions(module: nn.Module) -> list[nn.Module]:
    return [m for m in module.modules() if isinstance(m, nn.Conv1d | nn.ConvTranspose1d)]


def with_weight_norm(spelling: str) -> SpeechT5HifiGan:
    reference = SpeechT5HifiGan(SpeechT5HifiGanConfig(**SMALL))
    if spelling == "parametrizations":
        reference.apply_weight_norm()
    else:
        for layer in convolutions(reference):
            nn.utils.weight_norm(layer)
    return randomize(reference)


@pytest.mark.parametrize(
    ("spelling", "ending"), [("parametrizations", "parametrizations.weight.original0"), ("old", "weight_g")]
)
def test_weight_norm_is_folded(spelling, ending):
    reference = with_weight_norm(spelling)
    names = set(reference.state_dict())
    assert sum(name.endswith(ending) for name in names) == len(convolutions(reference))
    assert not any(name.endswith(".weight") for name in names)
    stage = ours(HifiGan, HifiGanConfig, MAP, reference, SMALL)
    assert_close(stage(mel()), reference(mel()), 1e-5)


def test_folded_and_unfolded_weights_in_one_checkpoint():
    reference = with_weight_norm("old")
    state = reference.state_dict()
    gain, direction = state.pop("conv_pre.weight_g"), state.pop("conv_pre.weight_v")
    state["conv_pre.weight"] = gain * F.normalize(direction, dim=(1, 2))
    stage = fill(empty(SMALL), weight_map(MAP), TensorDict(state))
    assert_close(stage(mel()), reference(mel()), 1e-5)


@pytest.mark.parametrize("name", ["tiny", "normalized"])
def test_round_trip(name, tmp_path):
    reference, stage = pair(CONFIGS[name])
    save_file(
        weight_map(MAP).save(stage.state_dict()), tmp_path / "model.safetensors", metadata={"format": "pt"}
    )
    config = {"architectures": ["SpeechT5HifiGan"], "model_type": "speecht5_hifigan"}
    (tmp_path / "config.json").write_text(json.dumps({**config, **dataclasses.asdict(stage.config)}))
    again, info = SpeechT5HifiGan.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert torch.equal(again(mel()), reference(mel()))


def test_loading_is_exact():
    reference, _ = pair(SMALL)
    state = reference.state_dict()
    del state["resblocks.1.convs1.0.bias"]
    del state["upsampler.0.weight"]
    state["conv_post.weight"] = torch.zeros(1, 3, 5)
    state["resblocks.4.convs1.0.bias"] = torch.zeros(3)
    with pytest.raises(CheckpointError, match=r"missing: resblocks\.1\.convs1\.0\.bias") as caught:
        fill(empty(SMALL), weight_map(MAP), TensorDict(state))
    for part in (
        "missing: upsampler.0.",
        "wrong shape: conv_post.weight",
        "unexpected: resblocks.4.convs1.0.bias",
    ):
        assert part in str(caught.value)


def test_a_gain_without_its_direction_is_an_error():
    state = with_weight_norm("old").state_dict()
    del state["conv_pre.weight_v"]
    with pytest.raises(CheckpointError, match=r"missing: conv_pre\.weight_v "):
        fill(empty(SMALL), weight_map(MAP), TensorDict(state))


@pytest.mark.parametrize("name", ["mean", "scale"])
def test_a_missing_normalization_is_an_error(name):
    state = pair(CONFIGS["normalized"])[0].state_dict()
    del state[name]
    with pytest.raises(CheckpointError, match=f"missing: {name} "):
        fill(empty(SMALL), weight_map(MAP), TensorDict(state))


def test_bad_shapes_are_refused():
    _, stage = pair(SMALL)
    for x in (mel()[0], mel()[:, :0], mel()[..., :5], mel()[:, None]):
        with pytest.raises(ValueError, match=r"mel has shape .* \(batch, frames, 6\)"):
            stage(x)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("upsample_rates", [3, 2, 2]),
        ("upsample_rates", []),
        ("upsample_kernel_sizes", [5, 1]),
        ("upsample_initial_channel", 3),
        ("resblock_kernel_sizes", [3, 4]),
        ("resblock_dilation_sizes", [[1, 3]]),
    ],
)
def test_unsupported_config_values_are_named(key, value):
    with pytest.raises(ValueError, match=key):
        HifiGanConfig.from_dict({**SMALL, key: value})


def test_irrelevant_config_keys_are_ignored():
    config = HifiGanConfig.from_dict({**SMALL, "initializer_range": 0.3, "sampling_rate": 8000})
    assert config.sampling_rate == 8000
    assert config.resblock_dilation_sizes == ((1, 3), (2,))
    assert hash(config) == hash(HifiGanConfig.from_dict({**SMALL, "sampling_rate": 8000}))
