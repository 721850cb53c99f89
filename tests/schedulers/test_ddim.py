"""DDIM against diffusers: whole sampling runs over a grid of settings, and the inputs that are refused."""

from __future__ import annotations

import itertools
import math
import warnings

import diffusers
import pytest
import torch

from audioldm2.schedulers import DDIMScheduler, DPMSolverMultistepScheduler
from tests.schedulers.helpers import AUDIOLDM2, NOISE, assert_close, compare, network, sampling_run


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize("betas", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_ddim_runs(prediction, spacing, zero_snr, betas):
    if zero_snr and prediction == "epsilon" and spacing != "leading":
        return  # diffusers divides by zero; see test_zero_snr_with_epsilon
    # Where abar is nearly 0 and eta is 1, diffusers takes the square root of a rounding error, which can be
    # negative; see test_zero_snr_with_full_noise.
    most = 0.95 if zero_snr or betas == "squaredcos_cap_v2" else 1.0
    variants = itertools.product([0.0, 0.7, most], [(False, 0), (True, 1)])
    for eta, (to_one, offset) in variants:
        settings = {
            "beta_schedule": betas,
            "prediction_type": prediction,
            "timestep_spacing": spacing,
            "rescale_betas_zero_snr": zero_snr,
            "set_alpha_to_one": to_one,
            "steps_offset": offset,
            "clip_sample": offset == 1,
        }
        for steps in (1, 7, 30):
            compare(DDIMScheduler, settings, steps, eta=eta)


@pytest.mark.parametrize("clipped", [False, True])
@pytest.mark.parametrize(
    "extra",
    [
        {"clip_sample_range": 0.4},
        {"thresholding": True},
        {"thresholding": True, "dynamic_thresholding_ratio": 0.8, "sample_max_value": 2.5},
        {"thresholding": True, "sample_max_value": 0.5},
        {"clip_sample": False},
    ],
)
def test_ddim_clipping(extra, clipped):
    for prediction in ("epsilon", "sample", "v_prediction"):
        settings = {**AUDIOLDM2, "prediction_type": prediction, **extra}
        compare(DDIMScheduler, settings, 11, eta=0.5, use_clipped_model_output=clipped)


@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
def test_ddim_timesteps_of_every_length(spacing):
    ours, theirs = (cls(timestep_spacing=spacing) for cls in (DDIMScheduler, diffusers.DDIMScheduler))
    for steps in (*range(1, 1001, 37), 3, 9, 27, 81, 243, 200, 500, 729, 999, 1000):
        ours.set_timesteps(steps)
        theirs.set_timesteps(steps)
        assert torch.equal(ours.timesteps, theirs.timesteps[theirs.timesteps >= 0]), steps
        assert ours.timesteps.dtype == torch.int64
        assert len(ours.timesteps) == steps


def test_ddim_200_steps_of_audioldm2():
    settings = {**AUDIOLDM2, "steps_offset": 1, "clip_sample": False, "set_alpha_to_one": False}
    compare(DDIMScheduler, settings, DDIMScheduler.default_num_inference_steps)
    assert DDIMScheduler.default_num_inference_steps == 200
    assert DPMSolverMultistepScheduler.default_num_inference_steps == 20


def test_ddim_any_timestep_in_any_order():
    ours, theirs = DDIMScheduler(**AUDIOLDM2), diffusers.DDIMScheduler(**AUDIOLDM2)
    ours.set_timesteps(50)
    theirs.set_timesteps(50)
    for t in (7, 980, 0, 19, 20, 501, 999):
        reference = theirs.step(network(NOISE, t), t, NOISE)
        for timestep in (t, torch.tensor(t), torch.tensor([t]), torch.tensor(float(t))):
            out = ours.step(network(NOISE, t), timestep, NOISE)
            assert_close(out.prev_sample, reference.prev_sample)
            assert_close(out.pred_original_sample, reference.pred_original_sample)
    for t in reversed(ours.timesteps):
        assert_close(ours.step(NOISE, t, NOISE)[0], theirs.step(NOISE, t, NOISE)[0])


def test_bad_ddim_steps():
    scheduler = DDIMScheduler(**AUDIOLDM2)
    scheduler.set_timesteps(10)
    for eta in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match="eta"):
            scheduler.step(NOISE, 1, NOISE, eta=eta)
    with pytest.raises(ValueError, match="not both"):
        scheduler.step(NOISE, 1, NOISE, eta=1.0, generator=torch.Generator(), variance_noise=NOISE)


def test_zero_snr_with_epsilon():
    settings = {**AUDIOLDM2, "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert not sampling_run(diffusers.DDIMScheduler(**settings, clip_sample=False), 5).isfinite().all()
    with pytest.raises(ValueError, match="epsilon"):
        DDIMScheduler(**settings).set_timesteps(5)


@pytest.mark.parametrize("prediction", ["sample", "v_prediction"])
def test_zero_snr_with_full_noise(prediction):
    settings = {**AUDIOLDM2, "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    scheduler = DDIMScheduler(**settings, prediction_type=prediction)
    assert torch.isfinite(sampling_run(scheduler, 7, eta=1.0)).all()
