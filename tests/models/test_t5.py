"""text_encoder_2 against transformers' T5EncoderModel."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
import transformers
from torch import Tensor, nn

from audioldm2.checkpoints.errors import CheckpointError
from audioldm2.checkpoints.fill import TensorDict, fill
from audioldm2.checkpoints.weight_map import weight_map
from audioldm2.models.t5 import RelativePositionBias, T5Config, T5Encoder
from tests.reference import assert_close, ours, randomize

MAP = "text_encoder_2.transformers"
GATED = {
    "vocab_size": 37,
    "d_model": 24,
    "d_kv": 5,  # heads · d_kv is not d_model
    "d_ff": 29,
    "num_layers": 3,
    "num_heads": 4,
    "relative_attention_num_buckets": 12,
    "relative_attention_max_distance": 20,
    "layer_norm_epsilon": 1e-3,
    "feed_forward_proj": "gated-gelu",
}
PLAIN = {**GATED, "d_kv": 8, "num_heads": 3, "num_layers": 2, "feed_forward_proj": "relu"}
FLAN = {**GATED, "d_model": 16, "d_kv": 4, "relative_attention_num_buckets": 32, "num_layers": 1}
FLAN |= {"relative_attention_max_distance": 128, "layer_norm_epsilon": 1e-6}
CONFIGS = {"gated": GATED, "plain": PLAIN, "flan": FLAN}


def reference(config: dict, seed: int = 0, kind: str = "T5EncoderModel") -> nn.Module:
    # "eager" adds the mask to the scores, which defines the result for a row of padding alone.
    settings = transformers.T5Config(**config, dropout_rate=0.1, decoder_start_token_id=0)
    settings._attn_implementation = "eager"
    model = randomize(getattr(transformers, kind)(settings), seed)
    # T5 does not scale its scores; at this size the softmax is neither uniform nor one-hot.
    for name, parameter in model.named_parameters():
        if name.endswith("SelfAttention.relative_attention_bias.weight"):
            parameter.data = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))
    return model


def stage(model: nn.Module, config: dict, dtype: torch.dtype | None = None) -> T5Encoder:
    with torch.device("meta"):
        encoder = T5Encoder(T5Config.from_dict(config))
    tensors = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    return fill(encoder, weight_map(MAP), TensorDict(tensors), dtype)


def tokens(batch: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(
        1, GATED["vocab_size"], (batch, length), generator=torch.Generator().manual_seed(seed)
    )


def masks(batch: int, length: int, kind: str) -> Tensor:
    mask = torch.ones(batch, length, dtype=torch.long)
    for row in range(batch):
        padded = min(row + 1, length - 1)
        if kind == "right":
            mask[row, length - padded :] = 0
        elif kind == "left":
            mask[row, :padded] = 0
        elif kind == "middle":
            mask[row, 1 : 1 + padded] = 0
        elif kind == "whole" and row == 0:
            mask[row] = 0
    return mask


@pytest.fixture(scope="module", params=list(CONFIGS))
def pair(request: pytest.FixtureRequest) -> tuple[nn.Module, T5Encoder]:
    config = CONFIGS[request.param]
    model = reference(config)
    return model, ours(T5Encoder, T5Config, MAP, model, model.config.to_dict())


@pytest.mark.parametrize("kind", ["none", "right", "left", "middle", "whole"])
@pytest.mark.parametrize(("batch", "length"), [(1, 1), (2, 9), (3, 40)])
def test_equals_transformers(pair: tuple[nn.Module, T5Encoder], batch: int, length: int, kind: str) -> None:
    model, encoder = pair
    ids, mask = tokens(batch, length), masks(batch, length, kind)
    expected = model(input_ids=ids, attention_mask=mask).last_hidden_state
    # Every position is compared, the padded ones too.
    assert_close(encoder(ids, mask), expected)
    assert_close(encoder(ids, mask.bool()), expected)


def test_long_prompts_equal_transformers() -> None:
    model = reference(FLAN)
    encoder = stage(model, FLAN)
    ids, mask = tokens(1, 300), masks(1, 300, "right")  # past the last bucket's distance
    assert_close(encoder(ids, mask), model(input_ids=ids, attention_mask=mask).last_hidden_state)


@pytest.mark.parametrize(("buckets", "reach"), [(32, 128), (12, 20), (4, 2), (9, 64)])
def test_buckets_equal_transformers(buckets: int, reach: int) -> None:
    from transformers.models.t5.modeling_t5 import T5Attention

    distance = torch.arange(-300, 301)
    expected = T5Attention._relative_position_bucket(distance, True, buckets, reach)
    assert torch.equal(RelativePositionBias(buckets, reach, 1).bucket(distance), expected)


def test_padding_does_not_change_the_tokens() -> None:
    encoder = stage(reference(GATED), GATED)
    ids = tokens(2, 7)
    alone = encoder(ids, torch.ones_like(ids))
    padded = torch.cat([ids, torch.zeros(2, 30, dtype=torch.long)], dim=1)
    mask = (torch.arange(37) < 7).long().expand(2, -1)
    assert_close(encoder(padded, mask)[:, :7], alone, 1e-5)


@pytest.mark.parametrize("config", [GATED, PLAIN], ids=["gated", "plain"])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float16, 1e-2), (torch.bfloat16, 6e-2)])
@pytest.mark.parametrize("kind", ["right", "whole"])
def test_half_precision(config: dict, dtype: torch.dtype, bound: float, kind: str) -> None:
    model = reference(config)
    ids, mask = tokens(2, 128), masks(2, 128, kind)
    exact = model(input_ids=ids, attention_mask=mask).last_hidden_state
    encoder = stage(model, config, dtype)
    model.to(dtype)
    if dtype == torch.float16:  # as transformers' from_pretrained keeps them
        for name, parameter in model.named_parameters():
            if name.endswith("wo.weight"):
                parameter.data = parameter.data.float()
    actual = encoder(ids, mask)
    assert actual.dtype == dtype
    assert torch.isfinite(actual).all()
    # The result for a row of padding alone has no meaning; only that it is finite matters.
    rows = mask.any(dim=1)
    assert_close(actual[rows], exact[rows], bound)
    assert_close(actual[rows], model(input_ids=ids, attention_mask=mask)[0][rows], bound)


def test_float16_survives_feed_forwards_that_overflow_it() -> None:
    model = reference(GATED)
    tensors = dict(model.named_parameters())
    for layer, scale in enumerate((2e5, 2.0, 4e5)):
        tensors[f"encoder.block.{layer}.layer.1.DenseReluDense.wo.weight"].data *= scale
    ids, mask = tokens(2, 128), masks(2, 128, "right")
    exact = model(input_ids=ids, attention_mask=mask)[0]

    encoder = stage(model, GATED, torch.float16)
    assert_close(encoder(ids, mask), exact, 1e-2)

    # With all weights in float16, transformers gives NaN, or wrong states because it clamps.
    naive = model.half()(input_ids=ids, attention_mask=mask)[0].float()
    assert not torch.allclose(naive, exact, atol=1e-2 * exact.abs().max().item())


def test_float16_survives_gates_and_attention_that_overflow_it() -> None:
    model = reference(GATED)
    tensors = dict(model.named_parameters())
    feed_forward = "encoder.block.1.layer.1.DenseReluDense"
    tensors[f"{feed_forward}.wi_0.weight"].data *= 3e2
    tensors[f"{feed_forward}.wi_1.weight"].data *= 3e2  # their product is about 1e5
    ids, mask = tokens(2, 128), masks(2, 128, "right")
    exact = model(input_ids=ids, attention_mask=mask)[0]
    assert_close(stage(model, GATED, torch.float16)(ids, mask), exact, 1e-2)

    for name in ("v", "o"):  # the attention's output is about 1e5, too, and clamped
        tensors[f"encoder.block.0.layer.0.SelfAttention.{name}.weight"].data *= 4e2
    assert torch.isfinite(stage(model, GATED, torch.float16)(ids, mask)).all()


def test_float16_survives_embeddings_whose_squares_overflow_it() -> None:
    model = reference(GATED)
    model.shared.weight.data *= 1e3
    tensors = dict(model.named_parameters())
    for name in ("v", "o"):  # so that the attention's output is as large as the residual
        tensors[f"encoder.block.0.layer.0.SelfAttention.{name}.weight"].data *= 30
    ids, mask = tokens(2, 128), masks(2, 128, "right")
    exact = model(input_ids=ids, attention_mask=mask)[0]
    assert_close(stage(model, GATED, torch.float16)(ids, mask), exact, 1e-2)


def test_float16_works_with_the_float32_parameters_in_either_dtype() -> None:
    model = reference(GATED)
    ids, mask = tokens(2, 9), masks(2, 9, "right")
    encoder = stage(model, GATED, torch.float16)
    kept = {name for name, parameter in encoder.named_parameters() if parameter.dtype == torch.float32}
    assert kept == {f"blocks.{i}.feed_forward.down.weight" for i in range(GATED["num_layers"])}
    expected = encoder(ids, mask)
    assert_close(encoder.half()(ids, mask), expected, 1e-2)


@pytest.mark.parametrize("spelling", ["shared", "embed_tokens", "both"])
def test_all_names_of_the_embedding_are_read(spelling: str) -> None:
    model = reference(GATED)
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    tensors["encoder.embed_tokens.weight"] = tensors["shared.weight"].clone()
    if spelling == "shared":
        del tensors["encoder.embed_tokens.weight"]
    if spelling == "embed_tokens":
        del tensors["shared.weight"]
    with torch.device("meta"):
        encoder = T5Encoder(T5Config.from_dict(GATED))
    fill(encoder, weight_map(MAP), TensorDict(tensors))
    ids, mask = tokens(2, 5), masks(2, 5, "right")
    assert_close(encoder(ids, mask), model(input_ids=ids, attention_mask=mask)[0])


def test_the_encoder_is_read_from_a_whole_t5() -> None:
    model = reference(GATED, kind="T5ForConditionalGeneration")
    encoder = stage(model, GATED)
    ids, mask = tokens(2, 5), masks(2, 5, "right")
    assert_close(encoder(ids, mask), model.encoder(input_ids=ids, attention_mask=mask)[0])


def test_round_trip() -> None:
    model = reference(GATED)
    encoder = stage(model, GATED)
    saved = weight_map(MAP).save(encoder.state_dict())
    settings = transformers.T5Config(**json.loads(json.dumps(dataclasses.asdict(encoder.config))))
    again = transformers.T5EncoderModel(settings).eval()
    missing, unexpected = again.load_state_dict(saved, strict=False)
    assert set(missing) <= {"encoder.embed_tokens.weight"}  # tied to shared.weight
    assert not unexpected
    ids, mask = tokens(2, 5), masks(2, 5, "right")
    assert_close(encoder(ids, mask), again(input_ids=ids, attention_mask=mask)[0])
    assert T5Config.from_dict(dataclasses.asdict(encoder.config)) == encoder.config


@pytest.mark.parametrize("config", [GATED, PLAIN], ids=["gated", "plain"])
def test_gradient_reaches_every_parameter(config: dict) -> None:
    encoder = stage(reference(config), config).train()
    ids, mask = tokens(2, 30), masks(2, 30, "right")
    encoder(ids, mask).square().mean().backward()
    for name, parameter in encoder.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_all_tensors_that_do_not_fit_are_listed() -> None:
    tensors = {name: tensor.clone() for name, tensor in reference(GATED).state_dict().items()}
    del tensors["encoder.block.1.layer.0.SelfAttention.k.weight"]
    tensors["encoder.block.0.layer.0.SelfAttention.bias"] = torch.zeros(3)
    tensors["encoder.final_layer_norm.weight"] = torch.zeros(23)
    with torch.device("meta"):
        encoder = T5Encoder(T5Config.from_dict(GATED))
    with pytest.raises(CheckpointError) as caught:
        fill(encoder, weight_map(MAP), TensorDict(tensors))
    message = str(caught.value)
    assert "missing: encoder.block.1.layer.0.SelfAttention.k.weight" in message
    assert "unexpected: encoder.block.0.layer.0.SelfAttention.bias" in message
    assert "wrong shape: encoder.final_layer_norm.weight" in message
    assert message.startswith("3 ")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("feed_forward_proj", "gated-silu"),
        ("feed_forward_proj", "gelu"),
        ("dense_act_fn", "gelu"),
        ("is_gated_act", False),
        ("is_decoder", True),
        ("relative_attention_num_buckets", 3),
        ("relative_attention_max_distance", 3),
    ],
)
def test_unsupported_config_values_are_named(key: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"{key}.*{value}"):
        T5Config.from_dict({**GATED, key: value})


def test_bad_shapes_are_refused() -> None:
    encoder = stage(reference(PLAIN), PLAIN)
    with pytest.raises(ValueError, match="input_ids and attention_mask"):
        encoder(tokens(2, 5), torch.ones(2, 6))
    with pytest.raises(ValueError, match="input_ids and attention_mask"):
        encoder(tokens(2, 5)[0], torch.ones(5))


def test_flan_t5_large_has_as_many_parameters_as_the_reference() -> None:
    config = {
        "d_model": 1024,
        "d_kv": 64,
        "d_ff": 2816,
        "num_layers": 24,
        "num_heads": 16,
        "vocab_size": 32128,
    }
    config |= {"feed_forward_proj": "gated-gelu"}
    with torch.device("meta"):
        encoder = T5Encoder(T5Config.from_dict(config))
        model = transformers.T5EncoderModel(transformers.T5Config(**config))
    count = sum(parameter.numel() for parameter in encoder.parameters())
    assert count == sum(parameter.numel() for parameter in model.parameters())
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    targets = {name: tuple(tensor.shape) for name, tensor in encoder.state_dict().items()}
    assert weight_map(MAP).plan(targets, shapes).keys() == targets.keys()
