"""GPT-2's targets and losses."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from audioldm2.models.gpt2 import GPT2, GPT2Config
from audioldm2.models.projection import ProjectionConfig, ProjectionModel
from audioldm2.training.language import (
    generate_vectors,
    next_vectors,
    pool_features,
    pool_latents,
    weighted_squared_error,
)
from tests.helpers import noise
from tests.reference import randomize
from tests.training.helpers import descend

WIDTH, COUNT = 12, 4


@pytest.fixture
def models() -> nn.ModuleDict:
    """A projection model and a GPT-2 with random weights."""
    projection = ProjectionModel(ProjectionConfig(5, 7, WIDTH))
    gpt2 = GPT2(GPT2Config(n_positions=32, n_embd=WIDTH, n_layer=2, n_head=3, max_new_tokens=COUNT))
    return randomize(nn.ModuleDict({"projection": projection, "gpt2": gpt2}))


@pytest.fixture
def inputs() -> tuple[Tensor, Tensor, Tensor]:
    """CLAP's features, T5's states and their mask; the second text is shorter."""
    mask = torch.ones(2, 6, dtype=torch.long)
    mask[1, 4:] = 0
    return noise(2, 1, 5), noise(2, 6, 7, seed=1), mask


def test_features_are_pooled_by_average_and_maximum() -> None:
    features = noise(2, 3, 64, 8)
    pooled = pool_features(features, time=16, frequency=4)
    assert pooled.shape == (2, 8, 3)
    for vector in range(8):
        t, f = divmod(vector, 2)
        part = features[:, :, 16 * t : 16 * t + 16, 4 * f : 4 * f + 4].flatten(2)
        torch.testing.assert_close(pooled[:, vector], (part.mean(2) + part.amax(2)) / 2)
    assert pool_features(noise(1, 768, 64, 8)).shape == (1, 8, 768)  # as AudioLDM 2 does for ten seconds


def test_latents_are_pooled_over_time_and_pairs_of_frequencies() -> None:
    latents = noise(2, 3, 20, 6)
    pooled = pool_latents(latents, 4)
    assert pooled.shape == (2, 4, 9)
    expected = latents[:, 2, 5:10, 2:4].mean((1, 2))  # channel 2, second quarter, second pair
    torch.testing.assert_close(pooled[:, 1, 2 * 3 + 1], expected)


def test_the_error_leaves_the_other_channels_free() -> None:
    vectors, targets, weights = noise(2, 4, 5), noise(2, 4, 3, seed=1), torch.tensor([0.0, 1.0, 2.0])
    expected = F.mse_loss(vectors[..., 1], targets[..., 1]) + 2 * F.mse_loss(vectors[..., 2], targets[..., 2])
    torch.testing.assert_close(weighted_squared_error(vectors, targets, weights), expected / 3)


def test_teacher_forcing_equals_transformers(
    models: nn.ModuleDict, inputs: tuple[Tensor, Tensor, Tensor]
) -> None:
    import transformers

    from audioldm2.checkpoints.weight_map import weight_map

    projection, gpt2 = models["projection"], models["gpt2"]
    settings = {"n_positions": 32, "n_embd": WIDTH, "n_layer": 2, "n_head": 3}
    reference = transformers.GPT2Model(transformers.GPT2Config(vocab_size=1, **settings)).eval()
    saved = weight_map("language_model.transformers").save(gpt2.state_dict())
    missing, unexpected = reference.load_state_dict(saved, strict=False)
    assert not unexpected
    assert missing == ["wte.weight"]
    targets = noise(2, COUNT, WIDTH, seed=2)
    clap, states, mask = inputs
    sequence, sequence_mask = projection(clap, states, torch.ones(2, 1, dtype=torch.long), mask)
    expected = reference(
        inputs_embeds=torch.cat([sequence, targets], dim=1),
        attention_mask=torch.cat([sequence_mask, torch.ones(2, COUNT, dtype=torch.long)], dim=1),
    ).last_hidden_state[:, sequence.shape[1] - 1 : -1]
    actual = next_vectors(projection, gpt2, *inputs, targets)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)


def test_each_vector_depends_on_the_targets_before_it_only(
    models: nn.ModuleDict, inputs: tuple[Tensor, Tensor, Tensor]
) -> None:
    targets = noise(2, COUNT, WIDTH, seed=2).requires_grad_()
    vectors = next_vectors(models["projection"], models["gpt2"], *inputs, targets)
    vectors[:, 2].sum().backward()
    assert [bool(gradient.any()) for gradient in targets.grad[1]] == [True, True, False, False]
    clap, states, mask = inputs
    states[1, 4:] = 9.0  # padding
    again = next_vectors(models["projection"], models["gpt2"], clap, states, mask, targets)
    torch.testing.assert_close(again, vectors)


def test_teacher_forcing_with_the_generated_vectors_is_the_generation(
    models: nn.ModuleDict, inputs: tuple[Tensor, Tensor, Tensor]
) -> None:
    generated = generate_vectors(models["projection"], models["gpt2"], *inputs)
    assert generated.shape == (2, COUNT, WIDTH)
    forced = next_vectors(models["projection"], models["gpt2"], *inputs, generated.detach())
    torch.testing.assert_close(forced, generated)
    with pytest.raises(ValueError, match=r"\(2, 4, 6\); GPT-2 can only read vectors of its own width, 12"):
        next_vectors(models["projection"], models["gpt2"], *inputs, generated[..., :6])


@pytest.mark.parametrize("forced", [True, False], ids=["teacher-forced", "through the generation"])
def test_a_short_run_lowers_the_error_of_what_is_generated(
    models: nn.ModuleDict, inputs: tuple[Tensor, Tensor, Tensor], forced: bool
) -> None:
    projection, gpt2 = models["projection"], models["gpt2"]
    targets = F.layer_norm(noise(2, COUNT, WIDTH, seed=2), (WIDTH,))

    def loss(generator: torch.Generator) -> dict[str, Tensor]:
        if forced:
            return {"loss": F.l1_loss(next_vectors(projection, gpt2, *inputs, targets), targets)}
        return {"loss": F.l1_loss(generate_vectors(projection, gpt2, *inputs), targets)}

    def error() -> float:
        with torch.no_grad():
            return F.l1_loss(generate_vectors(projection, gpt2, *inputs), targets).item()

    before = error()
    descend(models, loss, steps=25, rate=2e-2)
    assert error() < 0.6 * before
