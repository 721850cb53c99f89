"""The text encoder of VITS against transformers' VitsModel, called as diffusers calls it."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from transformers import VitsConfig, VitsModel

from audioldm2.checkpoints.errors import CheckpointError
from audioldm2.checkpoints.fill import TensorDict, fill
from audioldm2.checkpoints.weight_map import weight_map
from audioldm2.models.vits import VitsTextConfig, VitsTextEncoder
from tests.reference import assert_close, ours, randomize

MAP = "text_encoder_2.vits"
# The other parts of VITS, as small as it allows.
REST = {
    "flow_size": 16,
    "upsample_initial_channel": 8,
    "upsample_rates": [2],
    "upsample_kernel_sizes": [4],
    "posterior_encoder_num_wavenet_layers": 2,
    "duration_predictor_filter_channels": 8,
    "spectrogram_bins": 9,
}
SMALL = {
    **REST,
    "vocab_size": 13,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "window_size": 2,
    "ffn_dim": 10,
    "ffn_kernel_size": 3,
}
CONFIGS = {
    "tiny": SMALL,
    "even_kernel": {
        **SMALL,
        "ffn_kernel_size": 4,
        "hidden_act": "gelu",
        "window_size": 1,
        "num_attention_heads": 4,
    },
    "no_bias": {
        **SMALL,
        "use_bias": False,
        "ffn_kernel_size": 1,
        "layer_norm_eps": 1e-2,
        "hidden_act": "silu",
    },
    "speakers": {
        **SMALL,
        "num_speakers": 3,
        "speaker_embedding_size": 4,
        "use_stochastic_duration_prediction": False,
    },
}


def pair(config: dict) -> tuple[VitsModel, VitsTextEncoder]:
    reference = randomize(VitsModel(VitsConfig(**config)), gain=1.5)
    return reference, ours(VitsTextEncoder, VitsTextConfig, MAP, reference, config)


def as_diffusers(reference: VitsModel, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return reference.text_encoder(ids, attention_mask=mask, padding_mask=mask.unsqueeze(-1))[0]


def inputs(length: int) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(0, 13, (3, length), generator=torch.Generator().manual_seed(4))
    mask = torch.ones(3, length, dtype=torch.long)
    mask[1, -length // 3 :] = 0
    mask[2, 1:] = 0
    return ids, mask


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("length", [1, 2, 3, 9])  # below, at and above the window's reach
def test_equals_transformers(name, length):
    reference, stage = pair(CONFIGS[name])
    ids, mask = inputs(max(length, 2))
    ids, mask = ids[:, :length], mask[:, :length]
    mask[:, 0] = 1
    expected = as_diffusers(reference, ids, mask)
    assert expected.shape == (3, length, 16)
    assert_close(stage(ids, mask), expected)
    assert_close(stage(ids[:1], mask[:1]), expected[:1])


def test_padding_is_zero_and_changes_nothing():
    _, stage = pair(SMALL)
    ids, mask = inputs(9)
    out = stage(ids, mask)
    assert out[mask == 0].abs().max() == 0
    assert_close(stage(torch.where(mask.bool(), ids, 7), mask), out, 1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    _, stage = pair(SMALL)
    expected = stage(*inputs(9))
    actual = stage.to(dtype)(*inputs(9))
    assert actual.dtype == dtype
    assert_close(actual, expected, 0.1 if dtype == torch.bfloat16 else 0.01)


def test_gradient_reaches_every_parameter():
    _, stage = pair(SMALL)
    stage.train()
    out = stage(*inputs(9))
    (out * torch.randn(out.shape, generator=torch.Generator().manual_seed(5))).sum().backward()
    for name, parameter in stage.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


def test_round_trip():
    reference, stage = pair(CONFIGS["no_bias"])
    saved = weight_map(MAP).save(stage.state_dict())
    again = VitsModel(VitsConfig(**{**REST, **dataclasses.asdict(stage.config)})).eval()
    missing, unexpected = again.load_state_dict(saved, strict=False)
    assert unexpected == []
    assert {name for name in missing if name.startswith("text_encoder.")} == {
        "text_encoder.project.weight",
        "text_encoder.project.bias",
    }
    ids, mask = inputs(9)
    assert torch.equal(as_diffusers(again, ids, mask), as_diffusers(reference, ids, mask))


def test_loading_is_exact():
    reference, _ = pair(SMALL)
    state = reference.state_dict()
    layer = "text_encoder.encoder.layers"
    del state[f"{layer}.1.attention.v_proj.bias"]
    state[f"{layer}.0.attention.emb_rel_k"] = torch.zeros(1, 7, 8)
    state["text_encoder.extra.weight"] = torch.zeros(1)
    with torch.device("meta"):
        stage = VitsTextEncoder(VitsTextConfig.from_dict(SMALL))
    with pytest.raises(CheckpointError, match=rf"missing: {layer}\.1\.attention\.v_proj\.bias") as caught:
        fill(stage, weight_map(MAP), TensorDict(state))
    assert f"wrong shape: {layer}.0.attention.emb_rel_k" in str(caught.value)
    assert "unexpected: text_encoder.extra.weight" in str(caught.value)
    assert str(caught.value).startswith("3 of")


def test_bad_shapes_are_refused():
    _, stage = pair(SMALL)
    ids, mask = inputs(9)
    with pytest.raises(ValueError, match=r"attention_mask \(3, 8\)"):
        stage(ids, mask[:, :8])
    with pytest.raises(ValueError, match=r"input_ids has shape \(9,\)"):
        stage(ids[0], mask[0])


@pytest.mark.parametrize(
    ("key", "value"), [("hidden_act", "tanh"), ("window_size", 0), ("num_attention_heads", 3)]
)
def test_unsupported_config_values_are_named(key, value):
    with pytest.raises(ValueError, match=f"{key} = {value!r}"):
        VitsTextConfig.from_dict({**SMALL, key: value})
