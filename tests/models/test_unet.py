"""The UNet against diffusers' AudioLDM2UNet2DConditionModel, with every parameter random."""

from __future__ import annotations

import dataclasses
from functools import cache

import pytest
import torch
from diffusers import AudioLDM2UNet2DConditionModel
from torch import Tensor

from audioldm2.checkpoints.errors import CheckpointError
from audioldm2.checkpoints.fill import TensorDict, fill
from audioldm2.checkpoints.weight_map import weight_map
from audioldm2.models.unet import UNet, UNetConfig
from tests.helpers import noise
from tests.reference import assert_close, ours, randomize

GPT2, T5 = 12, 20  # widths of the states


def layout(levels: int, first_attends: bool = False) -> dict:
    """Block types of AudioLDM 2: attention everywhere but at the widest level, unless told."""
    first = "CrossAttn" if first_attends else ""
    return {
        "down_block_types": [f"{first}DownBlock2D"] + ["CrossAttnDownBlock2D"] * (levels - 1),
        "up_block_types": ["CrossAttnUpBlock2D"] * (levels - 1) + [f"{first}UpBlock2D"],
    }


SMALL = {"in_channels": 3, "out_channels": 3, "norm_num_groups": 4, "sample_size": 8}
CONFIGS: dict[str, dict] = {
    "base": {
        **SMALL,
        **layout(4),
        "block_out_channels": [8, 12, 16, 24],
        "attention_head_dim": [1, 2, 4, 6],
        "cross_attention_dim": [[None, GPT2, T5]] * 4,
    },
    "large": {
        **SMALL,
        **layout(3),
        "block_out_channels": [8, 16, 24],
        "layers_per_block": 1,
        "transformer_layers_per_block": 2,
        "attention_head_dim": 2,
        "cross_attention_dim": [[None, GPT2, T5, None]] * 3,
    },
    "speech, GPT-2 alone": {
        **SMALL,
        **layout(2),
        "block_out_channels": [12, 8],
        "layers_per_block": 1,
        "attention_head_dim": 4,
        "cross_attention_dim": [[None, GPT2]] * 2,
    },
    "attention everywhere, null last, entries by level": {
        **SMALL,
        **layout(2, first_attends=True),
        "block_out_channels": [8, 12],
        "layers_per_block": [2, 1],
        "transformer_layers_per_block": [2, 1],
        "attention_head_dim": [2, 3],
        "cross_attention_dim": [[GPT2, GPT2, T5, None], [GPT2]],
        "in_channels": 2,
        "out_channels": 5,
    },
    "no attention lowest, one width, odd time embedding": {
        **SMALL,
        "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
        "block_out_channels": [9, 12],
        "norm_num_groups": 3,
        "layers_per_block": 1,
        "attention_head_dim": 2,  # does not divide 9
        "cross_attention_dim": GPT2,
        "flip_sin_to_cos": False,
        "freq_shift": 1,
        "time_embedding_dim": 20,
        "act_fn": "gelu",
        "conv_in_kernel": 1,
        "conv_out_kernel": 5,
        "norm_eps": 1e-2,
    },
    "up and down differ, ints by level": {
        **SMALL,
        "down_block_types": ["DownBlock2D", "DownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        "block_out_channels": [8, 4, 16],
        "layers_per_block": [1, 3, 2],
        "attention_head_dim": [1, 2, 2],
        "cross_attention_dim": [None, GPT2, GPT2],
        "act_fn": "mish",
    },
}


def random_unet(config: dict, seed: int = 1) -> AudioLDM2UNet2DConditionModel:
    theirs = randomize(AudioLDM2UNet2DConditionModel(**config), seed)
    with torch.no_grad():
        # `randomize` takes these layers for tables of embeddings; so large, the time would drown all else.
        for layer in (theirs.time_embedding.linear_1, theirs.time_embedding.linear_2):
            layer.weight.mul_(2 / layer.in_features**0.5)
    return theirs


@cache
def pair(name: str) -> tuple[AudioLDM2UNet2DConditionModel, UNet]:
    theirs = random_unet(CONFIGS[name])
    return theirs, ours(UNet, UNetConfig, "unet.diffusers", theirs, CONFIGS[name])


def inputs(name: str, batch: int, height: int, width: int, masked: bool = False, seed: int = 0) -> dict:
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    found = {
        "sample": noise(batch, CONFIGS[name]["in_channels"], height, width),
        "timestep": torch.tensor(321),
        "encoder_hidden_states": noise(batch, 5, GPT2),
    }
    if "T5" in needs(name):
        found["encoder_hidden_states_1"] = noise(batch, 7, T5)
    if masked:
        for key, tokens in {"encoder_attention_mask": 5, "encoder_attention_mask_1": 7}.items():
            found[key] = (torch.rand(batch, tokens, generator=generator) < 0.5).long()
            found[key][:, 1] = 1
    return found


def needs(name: str) -> set[str]:
    entries = CONFIGS[name]["cross_attention_dim"]
    runs = [entry for entry in entries if isinstance(entry, list)] if isinstance(entries, list) else []
    return {"GPT-2", *("T5" for run in runs if T5 in run)}


@torch.no_grad()
def outputs(name: str, **given: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    theirs, mine = pair(name)
    return mine(**given), theirs(**given).sample


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(("batch", "height", "width"), [(2, 16, 8), (1, 13, 8), (3, 9, 5)])
def test_equals_diffusers(name: str, batch: int, height: int, width: int) -> None:
    """Also heights and widths that the down-sampling does not divide."""
    assert_close(*outputs(name, **inputs(name, batch, height, width)), tolerance=1e-5)


@pytest.mark.parametrize("name", ["base", "large", "attention everywhere, null last, entries by level"])
def test_masks(name: str) -> None:
    given = inputs(name, 3, 8, 8, masked=True)
    actual, expected = outputs(name, **given)
    assert_close(actual, expected, tolerance=1e-5)
    for mask in ("encoder_attention_mask", "encoder_attention_mask_1"):
        unmasked, _ = outputs(name, **{**given, mask: None})
        assert (unmasked - actual).abs().max() > 1e-3 * actual.abs().max(), f"{mask} changes nothing"


def test_nothing_to_attend_to() -> None:
    """An example whose mask is all zeros is no NaN, and leaves the others alone.

    Beside a bias of -10000, float32 keeps but three digits of the scores; diffusers' numbers hold no more.
    """
    given = inputs("base", 3, 8, 8, masked=True)
    given["encoder_attention_mask_1"][2] = 0
    actual, expected = outputs("base", **given)
    assert_close(actual[:2], expected[:2], tolerance=1e-5)
    assert_close(actual[2], expected[2], tolerance=2e-3)


def test_one_bool_mask_and_padding_that_does_not_count() -> None:
    given = inputs("base", 2, 8, 8)
    mask = torch.ones(2, 7, dtype=torch.bool)
    mask[:, 4:] = False
    actual, expected = outputs("base", **given, encoder_attention_mask_1=mask)
    assert_close(actual, expected, tolerance=1e-5)
    cut = {**given, "encoder_hidden_states_1": given["encoder_hidden_states_1"][:, :4]}
    assert_close(pair("base")[1](**cut), actual, tolerance=1e-5)


def test_states_of_the_same_width_and_without_t5() -> None:
    """Without T5's states GPT-2's vectors stand in, under T5's mask: which is what diffusers does."""
    config = {**CONFIGS["base"], "cross_attention_dim": [[None, GPT2, GPT2]] * 4}
    theirs = random_unet(config)
    mine = ours(UNet, UNetConfig, "unet.diffusers", theirs, config)
    given = inputs("base", 2, 8, 8)
    given["encoder_hidden_states_1"] = torch.randn(2, 6, GPT2, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert_close(mine(**given), theirs(**given).sample, tolerance=1e-5)
    del given["encoder_hidden_states_1"]
    mask = torch.tensor([[1, 1, 0, 1, 0], [0, 1, 1, 1, 0]])
    with torch.no_grad():
        for masks in (
            {},
            {"encoder_attention_mask": mask},
            {"encoder_attention_mask": mask, "encoder_attention_mask_1": mask.flip(1)},
        ):
            assert_close(mine(**given, **masks), theirs(**given, **masks).sample, tolerance=1e-5)


@pytest.mark.parametrize(
    "timestep", [0, 999, 12.5, torch.tensor(7), torch.tensor([3.5]), torch.tensor([1, 500, 999])]
)
@pytest.mark.parametrize("name", ["large", "no attention lowest, one width, odd time embedding"])
def test_timesteps(name: str, timestep: float | torch.Tensor) -> None:
    given = {**inputs(name, 3, 8, 8), "timestep": timestep}
    assert_close(*outputs(name, **given), tolerance=1e-5)


def encoders(given: dict) -> dict:
    return {key: value for key, value in given.items() if "encoder" in key}


@torch.no_grad()
def test_contexts_serve_every_step() -> None:
    _, mine = pair("large")
    given = inputs("large", 2, 8, 8, masked=True)
    contexts = mine.contexts(**encoders(given))
    for step in (900, 500, 1):
        given["timestep"] = step
        torch.testing.assert_close(
            mine(given["sample"], step, contexts=contexts), mine(**given), rtol=0, atol=0
        )


@torch.no_grad()
def test_hooks_fire_at_every_step() -> None:
    """Whatever a module is called, it is called at every step: only keys and values are computed once."""
    _, mine = pair("large")
    given = inputs("large", 2, 8, 8, masked=True)
    contexts = mine.contexts(**encoders(given))
    fired: dict[str, int] = {}
    once = {name for name, _ in mine.named_modules() if name.endswith("cross_attention.kv")}
    for name, module in mine.named_modules():
        if isinstance(module, torch.nn.ModuleList | torch.nn.Identity):
            continue
        module.register_forward_hook(
            lambda *_, name=name: fired.update({name: fired.get(name, 0) + 1}), always_call=True
        )
    for step in range(3):
        mine(given["sample"], step, contexts=contexts)
    containers = {
        n for n, m in mine.named_modules() if isinstance(m, torch.nn.ModuleList | torch.nn.Identity)
    }
    expected = {name: 3 for name, _ in mine.named_modules() if name not in containers | once}
    assert fired == expected
    assert {"", "down.1", "middle", "up.0", "down.1.resnets.0", "down.1.transformers.0"} <= fired.keys()
    assert once, "no cross-attention: the test would say nothing"


ONE_SIDE: dict[str, dict] = {
    "null first": CONFIGS["base"],
    "null last": CONFIGS["attention everywhere, null last, entries by level"],
    "a condition at once": CONFIGS["no attention lowest, one width, odd time embedding"],
    "null first and last, two blocks": CONFIGS["large"],
    "a condition below alone": {
        **CONFIGS["base"],
        "cross_attention_dim": [[None], [None], [None], [None, GPT2, T5]],
    },
}


@torch.no_grad()
@pytest.mark.parametrize("config", ONE_SIDE.values(), ids=ONE_SIDE)
@pytest.mark.parametrize(("batch", "sides"), [(1, 2), (3, 2), (2, 3)])
def test_latents_of_one_side_of_guidance(config: dict, batch: int, sides: int) -> None:
    """The sides repeat the latents: they are one until a condition is attended to, with the same result."""
    theirs = random_unet(config)
    mine = ours(UNet, UNetConfig, "unet.diffusers", theirs, config)
    given = inputs("base", sides * batch, 13, 8, masked=True)
    one = torch.randn(batch, config["in_channels"], 13, 8, generator=torch.Generator().manual_seed(4))
    given |= {"sample": one.repeat(sides, 1, 1, 1)}
    expected = mine(**given)
    contexts = mine.contexts(**encoders(given))
    actual = mine(one, given["timestep"], contexts=contexts)
    assert_close(actual, expected, tolerance=1e-5)
    assert (actual[:batch] - actual[batch : 2 * batch]).abs().max() > 1e-3, "the conditions say the same"
    steps = torch.arange(batch) * 100
    given["timestep"] = steps.repeat(sides)
    assert_close(mine(one, steps, contexts=contexts), mine(**given), tolerance=1e-5)


@torch.no_grad()
def test_latents_of_one_side_where_nothing_attends_to_a_condition() -> None:
    config = {**CONFIGS["base"], "cross_attention_dim": [[None]] * 4}
    mine = randomize(UNet(UNetConfig.from_dict(config)))
    given = inputs("base", 2, 8, 8)
    sample, step = given["sample"][:1], given["timestep"]
    actual = mine(sample, step, contexts=mine.contexts(**encoders(given)))
    assert_close(actual, mine(sample.repeat(2, 1, 1, 1), step, **encoders(given)), tolerance=1e-5)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 0.15), (torch.float16, 0.025)])
@pytest.mark.parametrize("name", ["base", "large"])
def test_half_precision(name: str, dtype: torch.dtype, bound: float) -> None:
    """Against float32; diffusers in the same dtype is off by 0.06 and 0.006 on the deeper one."""
    theirs, mine = pair(name)
    given = inputs(name, 2, 8, 8, masked=True)
    halved = {k: v.to(dtype) if v.is_floating_point() else v for k, v in given.items()}
    with torch.no_grad():
        expected = theirs(**given).sample
        half = fill(
            _empty(name), weight_map("unet.diffusers"), TensorDict(dict(theirs.state_dict())), dtype=dtype
        )
        actual = half(**halved)
    assert actual.dtype == dtype
    assert_close(actual, expected, tolerance=bound)
    assert next(mine.parameters()).dtype == torch.float32


def _empty(name: str) -> UNet:
    with torch.device("meta"):
        return UNet(UNetConfig.from_dict(CONFIGS[name]))


@pytest.mark.parametrize("name", CONFIGS)
def test_every_parameter_learns(name: str) -> None:
    """In train mode, with diffusers' own gradients; in float64, as machines round float32 differently."""
    theirs = random_unet(CONFIGS[name], seed=2).train()
    mine = ours(UNet, UNetConfig, "unet.diffusers", theirs, CONFIGS[name]).train().requires_grad_()
    theirs.double(), mine.double()
    given = {k: v.double() if v.is_floating_point() else v for k, v in inputs(name, 2, 8, 8).items()}
    mine(**given).square().mean().backward()
    theirs(**given).sample.square().mean().backward()
    gradients = {k: p.grad for k, p in mine.named_parameters()}
    assert not [key for key, gradient in gradients.items() if gradient is None or not gradient.any()]
    expected = {k: p.grad for k, p in theirs.named_parameters()}
    scale = max(gradient.abs().max() for gradient in expected.values())
    for key, gradient in weight_map("unet.diffusers").save(gradients).items():
        assert (gradient - expected[key]).abs().max() <= 1e-9 * scale, key


@pytest.mark.parametrize("name", CONFIGS)
def test_saves_what_diffusers_loads(name: str) -> None:
    theirs, mine = pair(name)
    saved = weight_map("unet.diffusers").save(mine.state_dict())
    original = theirs.state_dict()
    assert saved.keys() == original.keys()
    assert all(torch.equal(saved[key], original[key]) for key in saved)
    kept = {**dataclasses.asdict(mine.config), "_class_name": "AudioLDM2UNet2DConditionModel"}
    with torch.device("meta"):
        again = AudioLDM2UNet2DConditionModel.from_config(_lists(kept))
    assert {k: v.shape for k, v in again.state_dict().items()} == {k: v.shape for k, v in original.items()}
    assert UNetConfig.from_dict(_lists(kept)) == mine.config


def _lists(value: object) -> object:
    """As JSON holds it."""
    if isinstance(value, dict):
        return {key: _lists(entry) for key, entry in value.items()}
    return [_lists(entry) for entry in value] if isinstance(value, tuple | list) else value


def test_a_checkpoint_that_does_not_fit_lists_all_misfits() -> None:
    theirs, _ = pair("base")
    tensors = dict(theirs.state_dict())
    dropped = "down_blocks.1.attentions.2.transformer_blocks.0.attn2.to_k.weight"
    misshaped = "up_blocks.0.upsamplers.0.conv.bias"
    del tensors[dropped]
    tensors[misshaped] = torch.zeros(3)
    tensors["class_embedding.weight"] = torch.zeros(2, 2)
    with pytest.raises(CheckpointError) as error:
        fill(_empty("base"), weight_map("unet.diffusers"), TensorDict(tensors))
    message = str(error.value)
    assert f"missing: {dropped}" in message
    assert f"wrong shape: {misshaped} gives (3,)" in message
    assert "unexpected: class_embedding.weight" in message
    assert message.startswith("3 of")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("use_linear_projection", True),
        ("class_embed_type", "timestep"),
        ("num_class_embeds", 10),
        ("class_embeddings_concat", True),
        ("only_cross_attention", True),
        ("only_cross_attention", [False, False, False, True]),
        ("dual_cross_attention", True),
        ("resnet_time_scale_shift", "scale_shift"),
        ("mid_block_scale_factor", 1.5),
        ("downsample_padding", 0),
        ("time_embedding_type", "fourier"),
        ("time_embedding_act_fn", "silu"),
        ("timestep_post_act", "silu"),
        ("time_cond_proj_dim", 8),
        ("mid_block_type", "UNetMidBlock2D"),
        ("num_attention_heads", 4),
        ("act_fn", "tanh"),
        ("down_block_types", ["DownBlock2D", "CrossAttnDownBlock2D", "AttnDownBlock2D", "DownBlock2D"]),
        ("up_block_types", ["UpBlock2D"] * 3),
        ("layers_per_block", [2, 2]),
        ("transformer_layers_per_block", [[1, 1], 1, 1, 1]),
        ("attention_head_dim", 0),
        ("cross_attention_dim", [None, 12, 20]),
        ("cross_attention_dim", [12, 12, 12, None]),
    ],
)
def test_refuses_by_name(key: str, value: object) -> None:
    with pytest.raises(ValueError, match=key):
        UNetConfig.from_dict({**CONFIGS["base"], key: value})


def test_ignores_what_changes_nothing() -> None:
    given = {"_class_name": "x", "_diffusers_version": "0.1", "upcast_attention": True, "center": 1}
    allowed = {"only_cross_attention": [False] * 4, "mid_block_scale_factor": 1.0, "class_embed_type": None}
    base = UNetConfig.from_dict(CONFIGS["base"])
    assert UNetConfig.from_dict({**CONFIGS["base"], **given, **allowed}) == base
    # What upcast_attention asks for changes no number in diffusers either.
    config = {**CONFIGS["large"], "upcast_attention": True}
    theirs = random_unet(config)
    given = inputs("large", 1, 8, 8)
    with torch.no_grad():
        assert_close(pair("large")[1](**given), theirs(**given).sample, tolerance=1e-5)


def test_defaults_are_those_of_diffusers() -> None:
    with torch.device("meta"):
        theirs = AudioLDM2UNet2DConditionModel()
        mine = UNet(UNetConfig())
    weight_map("unet.diffusers").plan(
        {k: tuple(v.shape) for k, v in mine.state_dict().items()},
        {k: tuple(v.shape) for k, v in theirs.state_dict().items()},
    )
    known = {field.name for field in dataclasses.fields(UNetConfig)}
    assert dataclasses.asdict(UNetConfig()) == {k: v for k, v in theirs.config.items() if k in known}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sample": torch.zeros(2, 4, 8, 8)}, "sample has shape"),
        ({"sample": torch.zeros(3, 8, 8)}, "sample has shape"),
        ({"timestep": torch.arange(3)}, "3 timesteps for a batch of 2"),
        ({"encoder_hidden_states": torch.zeros(1, 5, GPT2)}, "encoder states"),
        ({"encoder_hidden_states": torch.zeros(2, GPT2)}, "encoder states"),
        ({"encoder_hidden_states_1": torch.zeros(2, 5, GPT2)}, "cross_attention_dim"),
        ({"encoder_hidden_states_1": None}, "cross_attention_dim"),
        ({"encoder_attention_mask_1": torch.ones(2, 6)}, "mask has shape"),
        ({"encoder_attention_mask": torch.ones(1, 5)}, "mask has shape"),
    ],
)
def test_bad_input_is_one_clear_line(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        pair("base")[1](**{**inputs("base", 2, 8, 8), **change})
    assert "\n" not in str(error.value)


@torch.no_grad()
def test_contexts_and_encoder_states_exclude_each_other() -> None:
    _, mine = pair("base")
    given = inputs("base", 2, 8, 8, masked=True)
    contexts = mine.contexts(**encoders(given))
    with pytest.raises(ValueError, match="pass either"):
        mine(**given, contexts=contexts)
    with pytest.raises(ValueError, match="pass either"):
        mine(given["sample"], 1)
    with pytest.raises(ValueError, match="pass either"):
        mine(given["sample"], 1, encoder_attention_mask_1=torch.ones(2, 5), contexts=contexts)
    with pytest.raises(ValueError, match="sample has a batch of 3, the encoder states have one of 2"):
        mine(torch.zeros(3, 3, 8, 8), 1, contexts=contexts)


@pytest.mark.parametrize(
    ("run", "depth", "millions"), [([None, 768, 1024], 1, 347), ([None, 768, 1024, None], 2, 718)]
)
def test_full_size_has_as_many_parameters(run: list, depth: int, millions: int) -> None:
    """Base and large, on the meta device: shapes only."""
    config = {
        **layout(4),
        "in_channels": 8,
        "out_channels": 8,
        "sample_size": 32,
        "block_out_channels": [128, 256, 384, 640],
        "attention_head_dim": [4, 8, 12, 20],
        "cross_attention_dim": [run] * 4,
        "transformer_layers_per_block": depth,
    }
    with torch.device("meta"):
        theirs = AudioLDM2UNet2DConditionModel(**config)
        mine = UNet(UNetConfig.from_dict(config))
    count = sum(parameter.numel() for parameter in mine.parameters())
    assert count == sum(parameter.numel() for parameter in theirs.parameters())
    assert round(count / 1e6) == millions


# --- training


def test_gradient_checkpointing_computes_layers_again_and_gives_the_same_gradients() -> None:
    unet = UNet(UNetConfig.from_dict(CONFIGS["base"]))
    randomize(unet)
    arguments = (noise(2, 3, 8, 4), 7, noise(2, 4, GPT2), noise(2, 5, T5))
    calls: list[int] = []
    unet.down[0].resnets[0].register_forward_pre_hook(lambda *call: calls.append(1))

    def gradients() -> list[Tensor]:
        calls.clear()
        unet.zero_grad()
        unet(*arguments).square().mean().backward()
        return [p.grad.clone() for p in unet.parameters()]

    expected = gradients()
    assert len(calls) == 1
    unet.enable_gradient_checkpointing()
    assert unet.is_gradient_checkpointing
    for actual, wanted in zip(gradients(), expected, strict=True):
        torch.testing.assert_close(actual, wanted)
    assert len(calls) == 2
    with torch.no_grad():
        calls.clear()
        unet(*arguments)
    assert len(calls) == 1
    unet.disable_gradient_checkpointing()
    gradients()
    assert len(calls) == 1
    assert not unet.is_gradient_checkpointing
