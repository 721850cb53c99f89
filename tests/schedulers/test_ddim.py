"""DDIM against diffusers: whole sampling runs over a grid of settings, and the inputs that are refused."""

from __future__ import annotations

import itertools
import math
import pickle
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


@pytest.mark.parametrize("eta", [0.0, 0.8])
def test_given_timesteps(eta):
    """diffusers has none for DDIM: evenly spaced ones give the ordinary run, others are composed of pairs."""
    settings = {**AUDIOLDM2, "timestep_spacing": "trailing", "prediction_type": "v_prediction"}
    ordinary, given = DDIMScheduler(**settings), DDIMScheduler(**settings)
    ordinary.set_timesteps(20)

    def run(scheduler, timesteps, sample=NOISE):
        for t in timesteps:
            sample = scheduler.step(network(sample, t), t, sample, eta, variance_noise=NOISE.flip(0))[0]
        return sample

    for timesteps in (ordinary.timesteps, ordinary.timesteps.tolist(), ordinary.timesteps.numpy()):
        given.set_timesteps(timesteps=timesteps)
        assert given.num_inference_steps == 20
        assert torch.equal(run(given, given.timesteps), run(ordinary, ordinary.timesteps))
    given.set_timesteps(3, timesteps=[999, 499, 99])
    middle = run(given, given.timesteps[:1])
    ordinary.set_timesteps(2)  # from 999 to 499
    assert torch.equal(middle, run(ordinary, ordinary.timesteps[:1]))
    assert torch.equal(run(given, [499, 99], middle), run(given, given.timesteps[1:], middle))
    ordinary.set_timesteps(10)  # from 99 to the end
    last = run(given, [99], middle)
    assert torch.equal(last, run(ordinary, ordinary.timesteps[-1:], middle))
    with pytest.raises(ValueError, match="timestep 300 is not in this sampling run"):
        given.step(NOISE, 300, NOISE)
    for wrong in ([True], torch.tensor([True]), [3.5], "x", 3):
        with pytest.raises(ValueError, match="timesteps must be"):
            given.set_timesteps(timesteps=wrong)
    with pytest.raises(ValueError, match="num_inference_steps is 4, but there are 3 timesteps"):
        given.set_timesteps(4, timesteps=[999, 499, 99])


@pytest.mark.parametrize("change", ["assigned", "in place"])
def test_a_changed_schedule_is_used_by_the_next_run(change):
    """As in diffusers, where scripts rescale the schedule of a scheduler that is there."""
    ours, theirs = DDIMScheduler(**AUDIOLDM2), diffusers.DDIMScheduler(**AUDIOLDM2)
    for scheduler in (ours, theirs):
        if change == "assigned":
            scheduler.alphas_cumprod = scheduler.alphas_cumprod**1.2
        else:
            scheduler.alphas_cumprod *= 0.9
        scheduler.final_alpha_cumprod = torch.tensor(0.9999)
    assert_close(sampling_run(ours, 7), sampling_run(theirs, 7))
    t = ours.timesteps[2:4]
    assert_close(ours.add_noise(NOISE, NOISE.flip(0), t), theirs.add_noise(NOISE, NOISE.flip(0), t))


def test_velocity_and_variance():
    ours, theirs = DDIMScheduler(**AUDIOLDM2), diffusers.DDIMScheduler(**AUDIOLDM2)
    t = torch.tensor([3, 900])
    assert_close(ours.get_velocity(NOISE, NOISE.flip(0), t), theirs.get_velocity(NOISE, NOISE.flip(0), t))
    assert_close(
        DPMSolverMultistepScheduler(**AUDIOLDM2).get_velocity(NOISE, NOISE.flip(0), t),
        theirs.get_velocity(NOISE, NOISE.flip(0), t),
    )
    for pair in ((999, 998), (420, 400), (3, -17)):
        torch.testing.assert_close(ours._get_variance(*pair), theirs._get_variance(*pair))


def test_the_output_is_an_object_a_mapping_and_a_tuple():
    ours, theirs = DDIMScheduler(**AUDIOLDM2), diffusers.DDIMScheduler(**AUDIOLDM2)
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(10)
    output, reference = (one.step(NOISE, 500, NOISE) for one in (ours, theirs))
    assert list(output.keys()) == list(reference.keys()) == ["prev_sample", "pred_original_sample"]
    for i, name in enumerate(reference.keys()):
        assert getattr(output, name) is output[name] is output[i] is dict(output.items())[name]
        assert_close(output[name], reference[name])
        assert name in output
    assert len(output.to_tuple()) == len(list(output.values())) == 2
    prev_sample, _ = ours.step(NOISE, 500, NOISE, return_dict=False)
    assert torch.equal(prev_sample, output.prev_sample)
    assert "prev_sample=tensor" in repr(output)
    twin = pickle.loads(pickle.dumps(output))
    assert torch.equal(twin.pred_original_sample, output.pred_original_sample)
    with pytest.raises(KeyError):
        _ = output["sample"]
    with pytest.raises(TypeError, match="got 1 tensors"):
        type(output)(NOISE)
