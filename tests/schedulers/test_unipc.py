"""UniPC against diffusers: sampling runs over a grid of settings, its corrector, and what is refused."""

from __future__ import annotations

import itertools
import json

import diffusers
import numpy as np
import pytest
import torch

from audioldm2.schedulers import DDIMScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler
from tests.schedulers.helpers import AUDIOLDM2, NOISE, THEIRS, assert_close, compare, sampling_run, steps_over

SPACED = ["", "use_karras_sigmas", "use_exponential_sigmas"]


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("solver", ["bh1", "bh2"])
@pytest.mark.parametrize("spaced", SPACED)
def test_unipc_runs(order, solver, spaced):
    for last, lower, uncorrected in itertools.product(("zero", "sigma_min"), (True, False), ([], [0, 2])):
        settings = {
            **AUDIOLDM2,
            "solver_order": order,
            "solver_type": solver,
            "final_sigmas_type": last,
            "lower_order_final": lower,
            "disable_corrector": uncorrected,
        }
        if spaced:
            settings[spaced] = True
        if (spaced and last == "sigma_min") or (last == "zero" and not lower and order > 1):
            continue  # see test_steps_that_diffusers_cannot_take
        for steps in (1, 2, 5, 20):
            if last == "zero" and solver == "bh1":
                ours, theirs = (
                    sampling_run(cls(**settings), steps)
                    for cls in (UniPCMultistepScheduler, THEIRS[UniPCMultistepScheduler])
                )
                assert not theirs[-1].isfinite().any()
                assert torch.isfinite(ours[-1]).all()
                if steps > 1:
                    assert_close(ours[:-1], theirs[:-1])
            else:
                compare(UniPCMultistepScheduler, settings, steps)


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
@pytest.mark.parametrize("betas", ["linear", "scaled_linear"])
@pytest.mark.parametrize("zero_snr", [False, True])
def test_unipc_predictions_and_spacings(prediction, spacing, betas, zero_snr):
    for order, offset, steps in ((1, 0, 6), (2, 1, 9), (3, 0, 25)):
        settings = {
            "beta_schedule": betas,
            "prediction_type": prediction,
            "timestep_spacing": spacing,
            "rescale_betas_zero_snr": zero_snr,
            "solver_order": order,
            "steps_offset": offset,
            "thresholding": order == 2,
            "sample_max_value": 2.0,
        }
        compare(UniPCMultistepScheduler, settings, steps)


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("solver", ["bh1", "bh2"])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_unipc_of_the_noise(order, solver, prediction):
    """diffusers computes lambda in float32, of which this form is less forgiving."""
    settings = {
        **AUDIOLDM2,
        "solver_order": order,
        "solver_type": solver,
        "predict_x0": False,
        "prediction_type": prediction,
        "final_sigmas_type": "sigma_min",
    }
    for steps in (2, 5, 12):
        compare(UniPCMultistepScheduler, settings, steps, bound=1e-4)


def test_high_orders():
    for order in (4, 5, 6):
        compare(UniPCMultistepScheduler, {**AUDIOLDM2, "solver_order": order}, 12, bound=1e-4)


def test_numbers_of_steps():
    for steps, order in itertools.product((14, 15, 50), (2, 3)):
        compare(UniPCMultistepScheduler, {**AUDIOLDM2, "solver_order": order}, steps)
    zero_snr = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
    compare(UniPCMultistepScheduler, {**AUDIOLDM2, **zero_snr, "timestep_spacing": "trailing"}, 400)


# Where the noise levels are spaced, timestep_spacing has no effect.
@pytest.mark.parametrize(
    ("spaced", "spacing"),
    [("", "leading"), ("", "trailing"), *itertools.product(SPACED, ["linspace"])],
)
@pytest.mark.parametrize("betas", ["linear", "scaled_linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("last", ["zero", "sigma_min"])
def test_levels_of_every_length(spaced, betas, spacing, last):
    settings = {"beta_schedule": betas, "timestep_spacing": spacing, "final_sigmas_type": last}
    if spaced:
        settings[spaced] = True
    ours, theirs = UniPCMultistepScheduler(**settings), diffusers.UniPCMultistepScheduler(**settings)
    for steps in (*range(1, 40, 3), 64, 243):
        theirs.set_timesteps(steps)
        ours.set_timesteps(steps)
        kept = theirs.timesteps >= 0  # with trailing spacing, diffusers can end at timestep -1
        assert torch.equal(ours.timesteps, theirs.timesteps[kept]), steps
        assert torch.equal(ours.sigmas, theirs.sigmas[torch.cat([kept, torch.tensor([True])])]), steps


def test_limits_of_the_noise_levels():
    for spaced, limits in itertools.product(
        SPACED[1:], ({"sigma_min": 0.1, "sigma_max": 9.0}, {"sigma_max": 5})
    ):
        settings = {**AUDIOLDM2, spaced: True, **limits}
        compare(UniPCMultistepScheduler, settings, 10)
        scheduler = UniPCMultistepScheduler(**settings)
        scheduler.set_timesteps(10)
        assert scheduler.sigmas[0] == limits["sigma_max"]


@pytest.mark.parametrize("karras", [False, True])
def test_unipc_start_in_the_middle(karras):
    for start in (0, 3, 24):
        compare(UniPCMultistepScheduler, {**AUDIOLDM2, "use_karras_sigmas": karras}, 25, start=start)


def test_unipc_begin_index():
    samples = []
    for cls in (UniPCMultistepScheduler, diffusers.UniPCMultistepScheduler):
        scheduler = cls(**AUDIOLDM2)
        scheduler.set_timesteps(20)
        scheduler.set_begin_index(8)
        noisy = scheduler.add_noise(NOISE, NOISE.flip(0), scheduler.timesteps[8:9].repeat(2))
        samples.append(steps_over(scheduler, scheduler.timesteps[8:], noisy))
    assert_close(*samples)


# ---------------------------------------------------------------- the corrector


def test_a_second_run_is_not_corrected_by_the_first():
    scheduler = UniPCMultistepScheduler(**AUDIOLDM2)
    first = sampling_run(scheduler, 10)
    assert torch.equal(steps_over(scheduler, scheduler.timesteps), first)  # without another set_timesteps
    later = steps_over(scheduler, scheduler.timesteps[4:])
    scheduler.set_timesteps(10)
    assert torch.equal(steps_over(scheduler, scheduler.timesteps[4:]), later)


def test_without_the_corrector_order_2_is_dpm_solver():
    """And order 1 is DDIM, which is DPM-Solver++ of order 1."""
    for order in (1, 2):
        uncorrected = UniPCMultistepScheduler(**AUDIOLDM2, solver_order=order, disable_corrector=[*range(20)])
        dpm = DPMSolverMultistepScheduler(**AUDIOLDM2, solver_order=order)
        expected = sampling_run(dpm, 12)
        assert_close(sampling_run(uncorrected, 12), expected)
        corrected = sampling_run(UniPCMultistepScheduler(**AUDIOLDM2, solver_order=order), 12)
        assert (corrected - expected).abs().max() > 1e-3


def test_the_correction_keeps_what_was_done_to_a_sample():
    """A sample that is moved between two steps, as inpainting does, stays moved."""
    scheduler = UniPCMultistepScheduler(**AUDIOLDM2, prediction_type="sample")
    ends = []
    for moved in (0.0, 1.0):
        scheduler.set_timesteps(10)
        sample = steps_over(scheduler, scheduler.timesteps[:5])[-1] + moved
        estimate = torch.full_like(sample, 0.1)  # the same x_0, whatever the sample
        ends.append(scheduler.step(estimate, scheduler.timesteps[5], sample).prev_sample)
    now, after = scheduler.sigmas[5:7].double()
    weight = after / (after**2 + 1).sqrt() / (now / (now**2 + 1).sqrt())  # sigma_t / sigma_s
    assert_close(ends[1] - ends[0], torch.full_like(NOISE, float(weight)), bound=1e-5)


# ---------------------------------------------------------------- equal noise levels


def test_steps_that_diffusers_cannot_take():
    """Two levels at sigma_min, or a full order to no noise at all: NaN in diffusers, finite here."""
    for order, solver in itertools.product((1, 2, 3, 6), ("bh1", "bh2")):
        settings = {**AUDIOLDM2, "solver_order": order, "solver_type": solver}
        trajectory = sampling_run(
            UniPCMultistepScheduler(**settings, use_karras_sigmas=True, final_sigmas_type="sigma_min"), 20
        )
        assert torch.isfinite(trajectory).all()
        whole = {**settings, "lower_order_final": False}
        ours = sampling_run(UniPCMultistepScheduler(**whole), 12)
        assert torch.isfinite(ours).all()
        if order == 2:
            theirs = sampling_run(diffusers.UniPCMultistepScheduler(**whole), 12)
            assert not theirs[-1].isfinite().any()
            assert_close(ours[:-1], theirs[:-1])


@pytest.mark.parametrize("order", [2, 3])
def test_a_run_that_repeats_a_noise_level_is_finite(order):
    """As many steps as training steps visit one twice."""
    scheduler = UniPCMultistepScheduler(**AUDIOLDM2, num_train_timesteps=40, solver_order=order)
    assert torch.isfinite(sampling_run(scheduler, 40)).all()
    assert any(scheduler.sigmas[i] == scheduler.sigmas[i + 1] for i in range(39))


# ---------------------------------------------------------------- settings


@pytest.mark.parametrize("form", [list, np.array, torch.tensor])
def test_given_timesteps(form):
    """diffusers has no such argument; its own spacing, given back, is the same run."""
    settings = {**AUDIOLDM2, "solver_order": 3, "prediction_type": "v_prediction"}
    expected = diffusers.UniPCMultistepScheduler(**settings)
    trajectory = sampling_run(expected, 9)
    scheduler = UniPCMultistepScheduler(**settings)
    scheduler.set_timesteps(timesteps=form(expected.timesteps.tolist()))
    assert torch.equal(scheduler.sigmas, expected.sigmas)
    assert scheduler.num_inference_steps == 9
    assert_close(steps_over(scheduler, scheduler.timesteps), trajectory)
    # The list of "Align Your Steps" for Stable Diffusion, and DPM-Solver++ at the same levels.
    listed = [999, 850, 736, 645, 545, 455, 343, 233, 124, 24]
    dpm = DPMSolverMultistepScheduler(**settings)
    for one in (scheduler, dpm):
        one.set_timesteps(10, timesteps=form(listed))
    assert scheduler.timesteps.tolist() == listed
    assert torch.equal(scheduler.sigmas, dpm.sigmas)
    assert torch.isfinite(steps_over(scheduler, scheduler.timesteps)).all()


def test_a_config_of_ddim_and_a_saved_one(tmp_path):
    ddim = DDIMScheduler(
        **AUDIOLDM2, steps_offset=1, timestep_spacing="leading", clip_sample=False, set_alpha_to_one=False
    )
    ours = UniPCMultistepScheduler.from_config(ddim.config, solver_order=3, disable_corrector=(0, 1))
    theirs = diffusers.UniPCMultistepScheduler.from_config(
        ddim.config, solver_order=3, disable_corrector=[0, 1]
    )
    expected = sampling_run(theirs, 8)
    assert_close(sampling_run(ours, 8), expected)
    assert ours.config.disable_corrector == [0, 1]
    ours.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "scheduler_config.json").read_text())["disable_corrector"] == [0, 1]
    loaded = UniPCMultistepScheduler.from_pretrained(tmp_path)
    assert loaded.config_dict() == ours.config_dict()
    assert_close(sampling_run(loaded, 8), expected)
    assert_close(sampling_run(diffusers.UniPCMultistepScheduler.from_pretrained(tmp_path), 8), expected)
    back = DDIMScheduler.from_config(ours.config)
    assert torch.equal(sampling_run(back, 8), sampling_run(ddim, 8))
    # DPM-Solver++'s names of solvers, as in diffusers
    dpm = DPMSolverMultistepScheduler(**AUDIOLDM2, solver_type="heun")
    assert UniPCMultistepScheduler.from_config(dpm.config).config.solver_type == "bh2"
    assert DPMSolverMultistepScheduler.from_config(ours.config).config.solver_type == "midpoint"


def test_the_list_of_uncorrected_steps_is_copied():
    given = [2, 3]
    scheduler = UniPCMultistepScheduler(disable_corrector=given)
    given.append(4)
    assert scheduler.config.disable_corrector == [2, 3]
    assert UniPCMultistepScheduler().config.disable_corrector == []


@pytest.mark.parametrize(
    "settings",
    [
        {"solver_type": "rk4"},
        {"solver_order": 0},
        {"solver_order": 7},
        {"final_sigmas_type": "one"},
        {"predict_x0": False},  # to a noise level of 0
        {"thresholding": True, "predict_x0": False, "final_sigmas_type": "sigma_min"},
        {"disable_corrector": [-1]},
        {"disable_corrector": [0.5]},
        {"disable_corrector": 3},
        {"solver_p": object()},
        {"use_beta_sigmas": True},
        {"use_flow_sigmas": True},
        {"use_dynamic_shifting": True},
        {"shift_terminal": 0.1},
        {"use_karras_sigmas": True, "use_exponential_sigmas": True},
        {"sigma_min": 0.0},
        {"sigma_min": 3.0, "sigma_max": 2.0},
        {"sigma_max": 1e40},
    ],
)
def test_bad_settings(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        UniPCMultistepScheduler(**settings)


def test_bad_arguments_of_set_timesteps():
    scheduler = UniPCMultistepScheduler(**AUDIOLDM2, use_karras_sigmas=True)
    with pytest.raises(ValueError, match="timesteps cannot be given together with use_karras_sigmas"):
        scheduler.set_timesteps(timesteps=[999, 5])
    with pytest.raises(ValueError, match="sigmas is not supported"):
        scheduler.set_timesteps(sigmas=[5.0, 1.0])
    with pytest.raises(ValueError, match="mu is not supported"):
        scheduler.set_timesteps(5, mu=1.0)
