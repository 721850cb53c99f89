"""The diffusion loss: targets, min-SNR weights, timesteps and dropped captions."""

from __future__ import annotations

import pytest
import torch

from audioldm2 import DDIMScheduler
from audioldm2.schedulers.noise_schedule import mix_noise
from audioldm2.schedulers.prediction import PREDICTION_TYPES, x0_and_eps
from audioldm2.training.losses import (
    diffusion_target,
    drop_conditions,
    min_snr_weights,
    prediction_type,
    spread_timesteps,
    weighted_mse,
)
from tests.helpers import noise, seeded

ABAR = DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.0015, beta_end=0.0195).alphas_cumprod


@pytest.mark.parametrize("kind", PREDICTION_TYPES)
def test_a_sampler_recovers_sound_and_noise_from_the_target(kind: str) -> None:
    clean, eps, timesteps = noise(3, 8, 4, 4), noise(3, 8, 4, 4, seed=1), torch.tensor([10, 500, 900])
    abar = ABAR[timesteps]
    noisy, target = mix_noise(clean, eps, abar), diffusion_target(kind, clean, eps, abar)
    for i in range(3):
        alpha, sigma = abar[i].sqrt().item(), (1 - abar[i]).sqrt().item()
        found = x0_and_eps(target[i], noisy[i], alpha, sigma, kind)
        torch.testing.assert_close(found, (clean[i], eps[i]), rtol=0, atol=2e-5)


@pytest.mark.parametrize("kind", PREDICTION_TYPES)
def test_min_snr_weighs_an_error_in_x0_alike_whatever_is_predicted(kind: str) -> None:
    """The paper's weight of the squared error in x_0, from the error in the prediction."""
    clean, eps, gamma = noise(1000, 2), noise(1000, 2, seed=1), 5.0
    error = noise(1000, 2, seed=2)
    target = diffusion_target(kind, clean, eps, ABAR)
    snr = ABAR / (1 - ABAR)
    alpha, sigma = ABAR.sqrt()[:, None], (1 - ABAR).sqrt()[:, None]
    # An error in x_0 at a given x_t, as an error in what is predicted.
    predicted = target + {"epsilon": -alpha / sigma, "sample": 1, "v_prediction": -1 / sigma}[kind] * error
    found = min_snr_weights(kind, ABAR, gamma) * (predicted - target).square().mean(1)
    weight = (snr + 1).clamp(max=gamma) if kind == "v_prediction" else snr.clamp(max=gamma)
    torch.testing.assert_close(found, weight * error.square().mean(1), rtol=1e-3, atol=1e-6)


def test_pure_noise_has_a_weight() -> None:
    abar = torch.tensor([0.0, 0.5, 0.999])
    assert min_snr_weights("epsilon", abar, 5.0).tolist() == pytest.approx([1, 1, 5 / 999], rel=1e-3)
    assert min_snr_weights("v_prediction", abar, 5.0).tolist() == pytest.approx([1, 1, 5 / 1000], rel=1e-3)


def test_timesteps_are_spread_evenly_and_uniform() -> None:
    batches = torch.stack([spread_timesteps(8, 1000, seeded(seed)) for seed in range(400)])
    assert ((batches // 125) == torch.arange(8)).all()
    counts = torch.histc(batches.float() % 125, 5, 0, 125) / batches.numel()
    assert counts.sub(0.2).abs().max() < 0.05
    assert spread_timesteps(3, 10, seeded()).max() < 10


def test_captions_are_dropped_with_the_probability_asked_for() -> None:
    uncond = torch.tensor([10, 11, 12])
    rows = torch.randint(3, (4000,), generator=seeded())
    found = drop_conditions(rows, uncond, 0.1, seeded(1))
    dropped = found != rows
    assert dropped.float().mean().item() == pytest.approx(0.1, abs=0.02)
    assert torch.equal(found[dropped], uncond[rows[dropped]])
    assert torch.equal(drop_conditions(rows, uncond, 0.0, seeded()), rows)


def test_the_loss_is_the_weighted_mean_of_the_examples() -> None:
    predicted, target = noise(2, 3, 4), noise(2, 3, 4, seed=1)
    each = (predicted - target).square().mean((1, 2))
    found = weighted_mse(predicted.bfloat16(), target, torch.tensor([1.0, 0.25]))
    assert found.item() == pytest.approx((each[0] + 0.25 * each[1]).item() / 2, rel=0.02)
    assert found.dtype == torch.float32


def test_an_unknown_prediction_is_refused() -> None:
    assert prediction_type({}) == "epsilon"
    with pytest.raises(ValueError, match="prediction_type"):
        prediction_type({"prediction_type": "noise"})
