"""GPT-2 against transformers, its generation against diffusers' own loop."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import torch
import transformers
from diffusers import AudioLDM2Pipeline
from transformers import GPT2LMHeadModel, GPT2Model

from audioldm2.checkpoints.errors import CheckpointError
from audioldm2.checkpoints.fill import TensorDict, fill
from audioldm2.checkpoints.weight_map import weight_map
from audioldm2.models.gpt2 import GPT2, GPT2Config
from tests.reference import assert_close, ours, randomize

MAP = "language_model.transformers"
SMALL = {"vocab_size": 11, "n_positions": 32, "n_embd": 12, "n_layer": 3, "n_head": 3, "max_new_tokens": 5}
CONFIGS = {
    "tiny": SMALL,
    "inner": {**SMALL, "n_inner": 7, "activation_function": "relu", "layer_norm_epsilon": 1e-2, "n_head": 1},
    "unscaled": {**SMALL, "scale_attn_weights": False, "activation_function": "gelu", "n_layer": 1},
    "by_layer": {
        **SMALL,
        "scale_attn_by_inverse_layer_idx": True,
        "n_head": 4,
        "reorder_and_upcast_attn": True,
    },
}
# No padding; padding in the middle and at the end, as after the projection; padding at the start.
MASKS = {
    "none": None,
    "middle": [[1, 1, 1, 1, 1, 0, 0, 1], [1, 1, 1, 1, 1, 1, 1, 1], [1, 0, 1, 0, 1, 1, 0, 0]],
    "ones": [[1] * 8] * 3,
}


def pair(config: dict, gain: float = 2.0) -> tuple[GPT2Model, GPT2]:
    # With sharp attention (gain) a wrong mask or position is seen at once.
    sizes = {key: value for key, value in config.items() if key != "max_new_tokens"}
    reference = randomize(GPT2Model(transformers.GPT2Config(**sizes)), gain=gain)
    return reference, ours(GPT2, GPT2Config, MAP, reference, config)


def inputs(batch: int = 3, length: int = 8, width: int = 12) -> torch.Tensor:
    return torch.randn(batch, length, width, generator=torch.Generator().manual_seed(2))


def mask_of(name: str) -> torch.Tensor | None:
    return None if MASKS[name] is None else torch.tensor(MASKS[name])


def diffusers_generate(
    reference: GPT2Model, x: torch.Tensor, mask: torch.Tensor | None, new: int, use_cache: bool = True
) -> torch.Tensor:
    """The loop of diffusers' pipeline, which needs a GPT2LMHeadModel on current transformers."""
    wrapped = GPT2LMHeadModel(reference.config)
    wrapped.transformer = reference
    pipeline = SimpleNamespace(language_model=wrapped.eval(), device=torch.device("cpu"))
    with torch.no_grad():
        return AudioLDM2Pipeline.generate_language_model(
            pipeline, x, max_new_tokens=new, attention_mask=mask, use_cache=use_cache
        )


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("mask_name", MASKS)
def test_forward_equals_transformers(name, mask_name):
    reference, stage = pair(CONFIGS[name])
    mask = mask_of(mask_name)
    expected = reference(inputs_embeds=inputs(), attention_mask=mask).last_hidden_state
    assert_close(stage(inputs(), mask), expected)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("mask_name", MASKS)
def test_generate_equals_diffusers(name, mask_name):
    reference, stage = pair(CONFIGS[name])
    mask = mask_of(mask_name)
    expected = diffusers_generate(reference, inputs(), mask, 5)
    assert expected.shape == (3, 5, 12)
    # The vectors change from step to step, or the comparison would say little.
    assert (expected[:, 1:] - expected[:, :-1]).abs().amax(dim=-1).min() > 1e-2
    with torch.no_grad():
        assert_close(stage.generate(inputs(), mask), expected)
        assert_close(stage.generate(inputs(), mask, max_new_tokens=3), expected[:, :3])


def recompute(stage: GPT2, x: torch.Tensor, mask: torch.Tensor | None, new: int) -> torch.Tensor:
    for _ in range(new):
        x = torch.cat([x, stage(x, mask)[:, -1:]], dim=1)
        mask = None if mask is None else torch.nn.functional.pad(mask, (0, 1), value=1)
    return x[:, -new:]


@pytest.mark.parametrize("gradient", [True, False])
@pytest.mark.parametrize("mask_name", MASKS)
def test_cache_equals_recomputing(mask_name, gradient):
    _, stage = pair(SMALL)
    with torch.set_grad_enabled(gradient):
        expected = recompute(stage, inputs(), mask_of(mask_name), 6)
        assert_close(stage.generate(inputs(), mask_of(mask_name), 6), expected, 1e-5)


def test_gradient_through_generation_equals_recomputing():
    _, stage = pair(SMALL)
    stage.train()
    mask = mask_of("middle")
    gradients = []
    for run in (lambda x: stage.generate(x, mask, 4), lambda x: recompute(stage, x, mask, 4)):
        stage.zero_grad()
        x = inputs().requires_grad_()
        out = run(x)
        (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
        gradients.append({"x": x.grad, **{n: p.grad.clone() for n, p in stage.named_parameters()}})
    for name, gradient in gradients[0].items():
        # Softmax does not feel a constant added to all scores: the key's bias has no gradient but rounding.
        assert_close(gradient, gradients[1][name], 1e-3)


@pytest.mark.parametrize("batch", [1, 2])
def test_batch_and_length(batch):
    reference, stage = pair(SMALL)
    for length in (1, 5):
        x = inputs(batch, length)
        with torch.no_grad():
            assert_close(stage.generate(x, None, 2), diffusers_generate(reference, x, None, 2))


def test_padding_does_not_matter():
    _, stage = pair(SMALL)
    # The last vector is no padding here, as it never is after the projection: the first new one is its state.
    x, mask = inputs(2), torch.tensor(MASKS["middle"])[:2]
    other = torch.where(mask.bool().unsqueeze(-1), x, torch.tensor(3.0))
    assert not torch.equal(other, x)
    assert_close(stage.generate(other, mask), stage.generate(x, mask), 1e-6)


def test_padding_at_the_start_gives_numbers():
    _, stage = pair(SMALL)
    mask = torch.ones(3, 8, dtype=torch.long)
    mask[:, :3] = 0
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert torch.isfinite(stage.to(dtype).generate(inputs().to(dtype), mask)).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    # What is generated is fed back, so rounding adds up: hence the wide bound, and gain 1.
    _, stage = pair(SMALL, gain=1.0)
    mask = mask_of("middle")
    with torch.no_grad():
        expected, whole = stage.generate(inputs(), mask), stage(inputs(), mask)
        half = stage.to(dtype)
        actual = half.generate(inputs().to(dtype), mask)
        assert actual.dtype == dtype
        bound = 0.1 if dtype == torch.bfloat16 else 0.02
        assert_close(actual, expected, bound)
        assert_close(half(inputs().to(dtype), mask), whole, bound)


def test_the_last_position_can_be_used_and_no_more():
    reference, stage = pair({**SMALL, "n_positions": 10})
    with torch.no_grad():
        assert_close(stage.generate(inputs(), None, 3), diffusers_generate(reference, inputs(), None, 3))
    with pytest.raises(ValueError, match=r"need 11 positions.*n_positions = 10"):
        stage.generate(inputs(), None, 4)
    with pytest.raises(ValueError, match=r"11 inputs.*n_positions = 10"):
        stage(inputs(length=11))


def test_refuses_bad_input():
    _, stage = pair(SMALL)
    with pytest.raises(ValueError, match="inputs_embeds has shape"):
        stage(inputs()[..., :3])
    with pytest.raises(ValueError, match="inputs_embeds has shape"):
        stage.generate(inputs()[:, :0])
    with pytest.raises(ValueError, match=r"attention_mask has shape \(3, 7\)"):
        stage.generate(inputs(), torch.ones(3, 7))
    with pytest.raises(ValueError, match="max_new_tokens is 0"):
        stage.generate(inputs(), max_new_tokens=0)


@pytest.mark.parametrize(
    ("key", "value"), [("add_cross_attention", True), ("activation_function", "tanh"), ("n_head", 5)]
)
def test_refuses_configs(key, value):
    with pytest.raises(ValueError, match=f"{key} = {value!r}"):
        GPT2Config.from_dict({**SMALL, key: value})


def test_config_reads_what_matters():
    config = GPT2Config.from_dict(
        {**SMALL, "n_inner": None, "summary_type": "mean", "n_ctx": 3, "max_new_tokens": None}
    )
    assert (config.n_inner, config.max_new_tokens, config.n_embd) == (None, 8, 12)


@pytest.mark.parametrize("form", ["bare", "wrapped", "wrapped without head", "old buffers"])
def test_every_spelling_loads(form):
    reference, expected = pair(SMALL)
    state = reference.state_dict()
    if form == "old buffers":
        for layer in range(SMALL["n_layer"]):
            state[f"h.{layer}.attn.bias"] = torch.ones(1, 1, 32, 32).tril().bool()
            state[f"h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    if form.startswith("wrapped"):
        wrapped = GPT2LMHeadModel(reference.config)
        wrapped.transformer = reference
        state = wrapped.state_dict()
        assert "transformer.wte.weight" in state
        if form.endswith("without head"):
            del state["lm_head.weight"]
    with torch.device("meta"):
        stage = GPT2(GPT2Config.from_dict(SMALL))
    stage = fill(stage, weight_map(MAP), TensorDict(state))
    assert torch.equal(stage(inputs()), expected(inputs()))


def test_loading_is_exact():
    reference, _ = pair(SMALL)
    state = reference.state_dict()
    del state["h.1.attn.c_proj.bias"]
    state["h.2.mlp.c_fc.weight"] = state["h.2.mlp.c_fc.weight"].t()
    state["h.3.ln_1.bias"] = torch.zeros(12)
    with torch.device("meta"):
        stage = GPT2(GPT2Config.from_dict(SMALL))
    with pytest.raises(CheckpointError, match=r"missing: h\.1\.attn\.c_proj\.bias") as caught:
        fill(stage, weight_map(MAP), TensorDict(state))
    assert "unexpected: h.3.ln_1.bias" in str(caught.value)
    assert "wrong shape: transpose(h.2.mlp.c_fc.weight) gives (12, 48)" in str(caught.value)


def test_round_trip():
    reference, stage = pair(CONFIGS["by_layer"])
    saved = weight_map(MAP).save(stage.state_dict())
    again = GPT2Model(transformers.GPT2Config(**dataclasses.asdict(stage.config))).eval()
    missing, unexpected = again.load_state_dict(saved, strict=False)
    assert missing == ["wte.weight"]
    assert unexpected == []
    assert torch.equal(
        again(inputs_embeds=inputs()).last_hidden_state, reference(inputs_embeds=inputs()).last_hidden_state
    )
