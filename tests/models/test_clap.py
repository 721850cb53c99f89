"""text_encoder against transformers' ClapModel."""

from __future__ import annotations

import copy
import dataclasses
import json
import re

import pytest
import torch
import transformers
from torch import Tensor, nn

from audioldm2.checkpoints.errors import CheckpointError
from audioldm2.checkpoints.fill import TensorDict, fill
from audioldm2.checkpoints.weight_map import weight_map
from audioldm2.models.clap import ClapConfig, ClapModel
from tests.helpers import noise
from tests.reference import assert_close, ours, randomize

MAP = "text_encoder.transformers"
TEXT = {
    "vocab_size": 41,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 29,
    "hidden_act": "gelu",
    "max_position_embeddings": 40,
    "type_vocab_size": 2,
    "layer_norm_eps": 1e-3,
    "pad_token_id": 1,
}
AUDIO = {  # 8 x 8 patches in windows of 4, then 4 x 4
    "spec_size": 32,
    "num_mel_bins": 8,
    "window_size": 4,
    "patch_size": 4,
    "patch_stride": [4, 4],
    "patch_embeds_hidden_size": 12,
    "hidden_size": 24,
    "depths": [2, 2],
    "num_attention_heads": [2, 3],
    "mlp_ratio": 2.3,
    "layer_norm_eps": 1e-3,
}
UNEVEN = {  # 12 x 24 patches in windows of 5, which do not divide them, then 6 x 12; patches overlap
    **AUDIO,
    "spec_size": 48,
    "num_mel_bins": 16,
    "window_size": 5,
    "patch_size": 8,
    "patch_stride": [4, 2],
    "enable_patch_layer_norm": False,
    "qkv_bias": False,
    "hidden_act": "relu",
}
DEEP = {  # 16 x 8, 8 x 4 and 4 x 2 patches in windows of 2; as many mel bins as the image is high
    **AUDIO,
    "num_mel_bins": 32,
    "window_size": 2,
    "patch_size": [2, 4],
    "patch_stride": [2, 4],
    "hidden_size": 48,
    "depths": [1, 2, 3],
    "num_attention_heads": [1, 4, 6],
}
CONFIGS = {
    "hub-like": {"text_config": TEXT, "audio_config": AUDIO, "projection_dim": 10},
    "uneven": {
        "text_config": {**TEXT, "num_attention_heads": 4, "num_hidden_layers": 1, "pad_token_id": 3},
        "audio_config": UNEVEN,
        "projection_dim": 7,
        "projection_hidden_act": "gelu",
        "logit_scale_init_value": 5.0,
    },
    "deep": {
        "text_config": {**TEXT, "hidden_act": "relu", "num_hidden_layers": 3},
        "audio_config": DEEP,
        "projection_dim": 9,
    },
}
Pair = tuple[nn.Module, ClapModel]


def reference(config: dict, seed: int = 0) -> nn.Module:
    # "eager" adds the mask to the scores, which defines the result for a row of padding alone.
    settings = transformers.ClapConfig(**copy.deepcopy(config))
    return randomize(transformers.ClapModel._from_config(settings, attn_implementation="eager"), seed)


def stage(tensors: dict[str, Tensor], config: dict, dtype: torch.dtype | None = None) -> ClapModel:
    with torch.device("meta"):
        clap = ClapModel(ClapConfig.from_dict(config))
    return fill(clap, weight_map(MAP), TensorDict(tensors), dtype)


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def text_of(model: nn.Module, ids: Tensor, mask: Tensor) -> Tensor:
    return model.get_text_features(input_ids=ids, attention_mask=mask).pooler_output


def audio_of(model: nn.Module, features: Tensor) -> Tensor:
    return model.get_audio_features(input_features=features).pooler_output


def prompts(batch: int, length: int, pad: int, padded: str = "right") -> tuple[Tensor, Tensor]:
    """Token ids and mask; row i is padded by i + 1 tokens."""
    ids = torch.randint(4, TEXT["vocab_size"], (batch, length), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    for row in range(batch):
        some = min(row + 1, length - 1)
        start = {"right": length - some, "left": 0, "middle": 1, "none": length, "whole": 0}[padded]
        mask[row, start : length if padded == "whole" and row == 0 else start + some] = 0
    return torch.where(mask == 1, ids, pad), mask


def sounds(config: dict, batch: int, frames: int | None = None, seed: int = 0) -> Tensor:
    audio = config["audio_config"]
    mels = audio["num_mel_bins"]
    full = audio["spec_size"] ** 2 // mels
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 1, full if frames is None else frames, mels, generator=generator)


@pytest.fixture(scope="module", params=list(CONFIGS))
def pair(request: pytest.FixtureRequest) -> Pair:
    config = CONFIGS[request.param]
    model = reference(config)
    # transformers' own config.json, with every key that it writes
    return model, ours(ClapModel, ClapConfig, MAP, model, json.loads(model.config.to_json_string()))


@pytest.mark.parametrize("padded", ["none", "right", "left", "middle", "whole"])
@pytest.mark.parametrize(("batch", "length"), [(1, 1), (2, 9), (3, 35)])
def test_text_features_equal_transformers(pair: Pair, batch: int, length: int, padded: str) -> None:
    model, clap = pair
    ids, mask = prompts(batch, length, clap.config.text_config.pad_token_id, padded)
    expected = text_of(model, ids, mask)
    assert_close(clap.text_features(ids, mask), expected)
    assert_close(clap.text_features(ids, mask.bool()), expected)


def test_padding_tokens_that_are_not_masked_equal_transformers(pair: Pair) -> None:
    model, clap = pair
    for padded in ("right", "left", "middle"):
        ids, mask = prompts(3, 9, clap.config.text_config.pad_token_id, padded)
        unmasked = torch.ones_like(mask)
        assert_close(clap.text_features(ids, unmasked), text_of(model, ids, unmasked))


def test_text_features_do_not_depend_on_the_padding(pair: Pair) -> None:
    clap = pair[1]
    pad = clap.config.text_config.pad_token_id
    ids, mask = prompts(3, 8, pad)
    expected = clap.text_features(ids, mask)
    for more in (1, 10, clap.text.max_tokens - 8):
        longer = torch.cat([ids, torch.full((3, more), pad)], dim=1)
        assert_close(
            clap.text_features(longer, torch.cat([mask, mask.new_zeros(3, more)], dim=1)), expected, 1e-5
        )


@pytest.mark.parametrize(("batch", "frames"), [(1, None), (3, None), (2, 31), (2, 30), (1, 1)])
def test_audio_features_equal_transformers(pair: Pair, batch: int, frames: int | None) -> None:
    model, clap = pair
    features = sounds(dataclasses.asdict(clap.config), batch, frames)
    actual = clap.audio_features(features)
    assert_close(actual, audio_of(model, features))
    assert_close(actual.norm(dim=-1), torch.ones(batch), 1e-5)


def test_patches_equal_transformers(pair: Pair) -> None:
    # Before the mean over all patches, which would hide patches in the wrong order.
    model, clap = pair
    features = sounds(dataclasses.asdict(clap.config), 2)
    expected = model.audio_model(input_features=features, output_hidden_states=True).hidden_states
    seen = []
    for level in clap.audio.levels:
        level.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    clap.audio_features(features)
    assert len(seen) == len(expected) - 1
    for ours_, theirs in zip(seen, expected[1:], strict=True):
        assert_close(ours_.permute(0, 3, 1, 2).flatten(2), theirs.flatten(2))


def test_logits_equal_transformers(pair: Pair) -> None:
    model, clap = pair
    ids, mask = prompts(2, 9, clap.config.text_config.pad_token_id)
    features = sounds(dataclasses.asdict(clap.config), 3, seed=1)
    expected = model(input_ids=ids, attention_mask=mask, input_features=features)
    assert_close(clap(ids, mask, features), expected.logits_per_text)
    per_text, per_audio = clap.logits(clap.text_features(ids, mask), clap.audio_features(features))
    assert_close(per_text, expected.logits_per_text)
    assert_close(per_audio, expected.logits_per_audio)


def test_training_equals_transformers() -> None:
    config = copy.deepcopy(CONFIGS["hub-like"])
    config["text_config"] |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config["audio_config"] |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model = reference(config)
    clap = stage(tensors_of(model), config).train()
    model.train()
    features = sounds(config, 3)
    assert_close(clap.audio_features(features), audio_of(model, features))
    norm = model.audio_model.audio_encoder.batch_norm
    assert_close(clap.audio.mel_norm.running_mean, norm.running_mean)
    assert_close(clap.audio.mel_norm.running_var, norm.running_var)


@pytest.mark.parametrize("name", list(CONFIGS))
def test_gradient_reaches_every_parameter(name: str) -> None:
    config = CONFIGS[name]
    clap = stage(tensors_of(reference(config)), config).train()
    ids, mask = prompts(3, 9, config["text_config"]["pad_token_id"])
    texts, audios = clap.text_features(ids, mask), clap.audio_features(sounds(config, 3))
    loss = sum(nn.functional.cross_entropy(x, torch.arange(3)) for x in clap.logits(texts, audios))
    loss.backward()
    for parameter_name, parameter in clap.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.abs().sum() > 0, parameter_name


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float16, 1e-2), (torch.bfloat16, 6e-2)])
def test_half_precision(pair: Pair, dtype: torch.dtype, bound: float) -> None:
    model, clap = pair
    half = stage(tensors_of(model), dataclasses.asdict(clap.config), dtype)
    pad = clap.config.text_config.pad_token_id
    for padded in ("right", "whole"):
        ids, mask = prompts(3, 30, pad, padded)
        actual = half.text_features(ids, mask)
        assert actual.dtype == dtype
        assert torch.isfinite(actual).all()
        # The result for a row of padding alone has no meaning; only that it is finite matters.
        rows = mask.any(dim=1)
        assert_close(actual[rows], text_of(model, ids, mask)[rows], bound)
    for frames in (None, 30):
        features = sounds(dataclasses.asdict(clap.config), 2, frames)
        actual = half.audio_features(features)
        assert actual.dtype == dtype
        assert_close(actual, audio_of(model, features), bound)


def test_buffers_of_older_and_newer_releases_may_be_absent() -> None:
    config = CONFIGS["hub-like"]
    tensors = tensors_of(reference(config))
    derived = [
        name
        for name in tensors
        if re.search(r"position_ids|token_type_ids|relative_position_index|num_batches_tracked", name)
    ]
    assert len(derived) == 2 + sum(AUDIO["depths"]) + 1
    ids, mask = prompts(2, 9, 1)
    features = sounds(config, 2)
    expected = stage(tensors, config)(ids, mask, features)
    for name in derived:
        tensors.pop(name)
        assert torch.equal(stage(tensors, config)(ids, mask, features), expected)


def test_round_trip() -> None:
    config = CONFIGS["uneven"]
    model = reference(config)
    clap = stage(tensors_of(model), config)
    saved = weight_map(MAP).save({n: t for n, t in clap.state_dict().items() if t.is_floating_point()})
    content = json.loads(json.dumps(dataclasses.asdict(clap.config)))
    assert ClapConfig.from_dict(content) == clap.config
    again = transformers.ClapModel(transformers.ClapConfig(**content)).eval()
    missing, unexpected = again.load_state_dict(saved, strict=False)
    assert not unexpected
    assert all(re.search(r"position_ids|token_type_ids|relative_position_index|tracked", m) for m in missing)
    ids, mask = prompts(2, 9, 3)
    features = sounds(config, 3)
    expected = again(input_ids=ids, attention_mask=mask, input_features=features)
    assert_close(clap(ids, mask, features), expected.logits_per_text)


def test_all_tensors_that_do_not_fit_are_listed() -> None:
    config = CONFIGS["hub-like"]
    tensors = tensors_of(reference(config))
    del tensors["text_model.encoder.layer.1.attention.self.key.bias"]
    tensors["audio_model.audio_encoder.patch_embed.mel_conv2d.bias"] = torch.zeros(3)
    tensors["audio_projection.linear1.weight"] = torch.zeros(10, 23)
    with pytest.raises(CheckpointError) as caught:
        stage(tensors, config)
    message = str(caught.value)
    assert "missing: text_model.encoder.layer.1.attention.self.key.bias" in message
    assert "unexpected: audio_model.audio_encoder.patch_embed.mel_conv2d.bias" in message
    assert "wrong shape: audio_projection.linear1.weight" in message
    assert message.startswith("3 ")


@pytest.mark.parametrize(
    ("part", "key", "value"),
    [
        (None, "projection_hidden_act", "swiglu"),
        ("text_config", "hidden_act", "swiglu"),
        ("text_config", "position_embedding_type", "relative_key"),
        ("text_config", "num_attention_heads", 7),
        ("text_config", "pad_token_id", None),
        ("audio_config", "hidden_act", "swiglu"),
        ("audio_config", "enable_fusion", True),
        ("audio_config", "flatten_patch_embeds", False),
        ("audio_config", "num_attention_heads", [2, 5]),
        ("audio_config", "num_attention_heads", [2]),
        ("audio_config", "hidden_size", 48),
        ("audio_config", "num_mel_bins", 12),
        ("audio_config", "patch_size", 5),
    ],
)
def test_unsupported_config_values_are_named(part: str | None, key: str, value: object) -> None:
    config = copy.deepcopy(CONFIGS["hub-like"])
    (config[part] if part else config)[key] = value
    shown = str(tuple(value) if isinstance(value, list) else value)
    with pytest.raises(ValueError, match=f"{key}.*{re.escape(shown)}"):
        ClapConfig.from_dict(config)


def test_a_tower_that_cannot_run_is_told_at_load_and_refused_at_the_call() -> None:
    """transformers builds it, too, and fails when it is called; the text tower can be used."""
    config = copy.deepcopy(CONFIGS["hub-like"])
    config["audio_config"]["window_size"] = 5
    with pytest.warns(UserWarning, match=r"cannot rank sounds .* window_size = 5 is more than the 4 patches"):
        clap = ClapModel(ClapConfig.from_dict(config))
    frames = clap.audio.frames
    with pytest.raises(ValueError, match="audio tower cannot run: window_size = 5"):
        clap.audio_features(noise(1, 1, frames, clap.audio.mels))


def test_a_tower_may_take_several_channels() -> None:
    config = copy.deepcopy(CONFIGS["hub-like"])
    config["audio_config"]["patch_embed_input_channels"] = 4
    model = reference(config)
    clap = stage(tensors_of(model), config)
    features = noise(2, 4, clap.audio.frames - 3, clap.audio.mels)
    assert_close(clap.audio_features(features), audio_of(model, features))
    with pytest.raises(ValueError, match=r"input_features must be \(batch, 4, frames"):
        clap.audio_features(features[:, :1])


def test_irrelevant_config_keys_are_ignored() -> None:
    config = copy.deepcopy(CONFIGS["hub-like"])
    expected = ClapConfig.from_dict(config)
    config |= {
        "architectures": ["ClapModel"],
        "hidden_size": 24,
        "num_hidden_layers": 4,
        "model_type": "clap",
    }
    config["text_config"] |= {"projection_dim": 3, "classifier_dropout": None, "fusion_num_hidden_layers": 2}
    config["text_config"] |= {
        "position_embedding_type": "absolute",
        "num_beams": 1,
        "initializer_range": 0.02,
    }
    config["audio_config"] |= {"projection_hidden_act": "gelu", "fusion_type": None, "aff_block_r": 4}
    config["audio_config"] |= {"enable_fusion": False, "drop_path_rate": 0.1, "num_hidden_layers": 4}
    assert ClapConfig.from_dict(config) == expected
    assert ClapConfig.from_dict({"text_config": None}) == ClapConfig()


def test_bad_shapes_are_refused() -> None:
    config = CONFIGS["hub-like"]
    clap = stage(tensors_of(reference(config)), config)
    with pytest.raises(ValueError, match="input_ids and attention_mask"):
        clap.text_features(torch.zeros(2, 5, dtype=torch.long), torch.ones(2, 6))
    with pytest.raises(ValueError, match="39 tokens are too many for CLAP; the limit is 38"):
        clap.text_features(torch.zeros(2, 39, dtype=torch.long), torch.ones(2, 39))
    for shape in ((2, 128, 8), (2, 4, 128, 8), (2, 1, 128, 9), (2, 1, 129, 8)):
        with pytest.raises(ValueError, match=re.escape(f"the shape is {shape}")):
            clap.audio_features(torch.zeros(shape))


def test_the_base_model_has_as_many_parameters_as_the_reference() -> None:
    audio = {"patch_embeds_hidden_size": 128, "depths": [2, 2, 12, 2], "hidden_size": 1024}
    config = {"audio_config": audio, "text_config": {}}
    with torch.device("meta"):
        clap = ClapModel(ClapConfig.from_dict(config))
        model = transformers.ClapModel(transformers.ClapConfig(**config))
    count = sum(parameter.numel() for parameter in clap.parameters())
    assert count == sum(parameter.numel() for parameter in model.parameters())
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    targets = {name: tuple(t.shape) for name, t in clap.state_dict().items() if t.is_floating_point()}
    assert weight_map(MAP).plan(targets, shapes).keys() == targets.keys()
