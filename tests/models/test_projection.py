"""The projection model against diffusers' AudioLDM2ProjectionModel."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from diffusers.pipelines.audioldm2.modeling_audioldm2 import AudioLDM2ProjectionModel

from audioldm2.checkpoints.errors import CheckpointError
from audioldm2.checkpoints.fill import TensorDict, fill
from audioldm2.checkpoints.weight_map import weight_map
from audioldm2.models.projection import ProjectionConfig, ProjectionModel
from tests.reference import assert_close, ours, randomize

MAP = "projection_model.diffusers"
PLAIN = {"text_encoder_dim": 5, "text_encoder_1_dim": 7, "langauge_model_dim": 6}
SPEECH = {**PLAIN, "use_learned_position_embedding": True, "max_seq_length": 4}


def pair(config: dict) -> tuple[AudioLDM2ProjectionModel, ProjectionModel]:
    reference = randomize(AudioLDM2ProjectionModel(**config))
    return reference, ours(ProjectionModel, ProjectionConfig, MAP, reference, config)


def inputs(batch: int, n: int, m: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, n, 5, generator=generator), torch.randn(batch, m, 7, generator=generator)


@pytest.mark.parametrize("config", [PLAIN, SPEECH, {**SPEECH, "use_learned_position_embedding": False}])
@pytest.mark.parametrize(("batch", "n"), [(1, 1), (3, 2)])
def test_equals_diffusers(config, batch, n):
    reference, stage = pair(config)
    states = inputs(batch, n, 4)
    masks = torch.ones(batch, n, dtype=torch.long), torch.tensor([[1, 1, 1, 0]] * batch)
    expected = reference(*states, *masks)
    actual, mask = stage(*states, *masks)
    assert_close(actual, expected.hidden_states)
    assert torch.equal(mask, expected.attention_mask)
    assert mask.dtype == masks[0].dtype
    actual, mask = stage(*states)
    assert_close(actual, expected.hidden_states)
    assert mask is None


def test_any_length_without_position_embedding():
    reference, stage = pair(PLAIN)
    states = inputs(2, 1, 9)
    assert_close(stage(*states)[0], reference(*states).hidden_states)


def test_a_missing_mask_is_all_ones():
    # diffusers fails here, so the expected masks are written out.
    _, stage = pair(PLAIN)
    states = inputs(2, 2, 3)
    _, mask = stage(*states, torch.tensor([[1, 0], [1, 1]]), None)
    assert mask.tolist() == [[1, 1, 0, 1, 1, 1, 1, 1, 1], [1] * 9]
    _, mask = stage(*states, None, torch.tensor([[1, 0, 0], [1, 1, 0]]))
    assert mask.tolist() == [[1, 1, 1, 1, 1, 1, 0, 0, 1], [1, 1, 1, 1, 1, 1, 1, 0, 1]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    _, stage = pair(SPEECH)
    states = inputs(2, 1, 4)
    expected, _ = stage(*states)
    actual, _ = stage.to(dtype)(*(x.to(dtype) for x in states))
    assert actual.dtype == dtype
    assert_close(actual, expected, 2e-2)


def test_gradient_reaches_every_parameter():
    _, stage = pair(SPEECH)
    stage.train()
    states, _ = stage(*inputs(2, 1, 4))
    (states * torch.randn_like(states)).sum().backward()
    for name, parameter in stage.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


def test_round_trip():
    reference, stage = pair(SPEECH)
    saved = weight_map(MAP).save(stage.state_dict())
    again = AudioLDM2ProjectionModel(**dataclasses.asdict(stage.config))
    again.load_state_dict(saved, strict=True)
    states = inputs(2, 1, 4)
    assert torch.equal(again(*states).hidden_states, reference(*states).hidden_states)


def test_bad_shapes_and_configs_are_refused():
    _, stage = pair(SPEECH)
    with pytest.raises(ValueError, match=r"9 tokens.*max_seq_length=4"):
        stage(*inputs(2, 1, 9))
    with pytest.raises(ValueError, match=r"1 tokens.*max_seq_length=4"):
        stage(*inputs(2, 1, 1))
    one, two = inputs(2, 1, 4)
    with pytest.raises(ValueError, match="hidden_states_1 has shape"):
        stage(one, two[..., :3])
    with pytest.raises(ValueError, match="hidden_states has shape"):
        stage(one[:, 0], two)
    with pytest.raises(ValueError, match="attention_mask_1 has shape"):
        stage(one, two, torch.ones(2, 1), torch.ones(2, 5))
    with pytest.raises(ValueError, match=r"batch of 1 .* one of 2"):
        stage(one[:1], two)
    with pytest.raises(ValueError, match="needs max_seq_length"):
        ProjectionConfig.from_dict({**PLAIN, "use_learned_position_embedding": True})
    with pytest.raises(ValueError, match="lacks langauge_model_dim"):
        ProjectionConfig.from_dict({"text_encoder_dim": 5, "text_encoder_1_dim": 7})


def test_loading_is_exact():
    reference, _ = pair(SPEECH)
    state = reference.state_dict()
    del state["eos_embed"]
    state["sos_embed"] = torch.zeros(9)
    state["extra"] = torch.zeros(1)
    with torch.device("meta"):
        stage = ProjectionModel(ProjectionConfig.from_dict(SPEECH))
    with pytest.raises(CheckpointError, match=r"missing: eos_embed") as caught:
        fill(stage, weight_map(MAP), TensorDict(state))
    assert "unexpected: extra" in str(caught.value)
    assert "wrong shape: sos_embed" in str(caught.value)
    # A position embedding that the config does not ask for is not ignored.
    with torch.device("meta"):
        stage = ProjectionModel(ProjectionConfig.from_dict(PLAIN))
    with pytest.raises(CheckpointError, match="unexpected: learnable_positional_embedding"):
        fill(stage, weight_map(MAP), TensorDict(reference.state_dict()))
