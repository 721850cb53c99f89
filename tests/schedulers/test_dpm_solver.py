"""DPM-Solver++ against diffusers: sampling runs over a grid of settings, and the inputs that are refused."""

from __future__ import annotations

import itertools

import diffusers
import numpy as np
import pytest
import torch

from audioldm2.schedulers import DPMSolverMultistepScheduler
from tests.schedulers.helpers import AUDIOLDM2, NOISE, THEIRS, assert_close, compare, network, sampling_run


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("algorithm", ["dpmsolver++", "sde-dpmsolver++", "dpmsolver", "sde-dpmsolver"])
@pytest.mark.parametrize("solver", ["midpoint", "heun"])
@pytest.mark.parametrize("spaced", ["", "use_karras_sigmas", "use_exponential_sigmas", "use_lu_lambdas"])
def test_dpm_runs(order, algorithm, solver, spaced):
    if (algorithm == "sde-dpmsolver" and order == 3) or (spaced and not algorithm.endswith("++")):
        return  # diffusers has no such update; the noise levels are independent of the algorithm
    final = itertools.product([True, False], [True, False], ["zero", "sigma_min"])
    for lower, euler, last in final:
        if last == "zero" and not algorithm.endswith("++"):
            continue  # refused by both
        if last == "sigma_min" and spaced and not (order == 1 or lower or euler):
            continue  # diffusers divides 0 by 0 in the last step; see test_step_between_equal_noise_levels
        settings = {
            **AUDIOLDM2,
            "solver_order": order,
            "algorithm_type": algorithm,
            "solver_type": solver,
            "lower_order_final": lower,
            "euler_at_final": euler,
            "final_sigmas_type": last,
        }
        if spaced:
            settings[spaced] = True
        for steps in (1, 2, 5, 12, 20) if not (spaced and last == "sigma_min") else (2, 5, 12):
            compare(DPMSolverMultistepScheduler, settings, steps)


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
@pytest.mark.parametrize("betas", ["linear", "scaled_linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("zero_snr", [False, True])
def test_dpm_predictions_and_spacings(prediction, spacing, betas, zero_snr):
    for order, offset, steps in ((1, 0, 6), (2, 1, 9), (3, 0, 25)):
        settings = {
            "beta_schedule": betas,
            "prediction_type": prediction,
            "timestep_spacing": spacing,
            "rescale_betas_zero_snr": zero_snr,
            "solver_order": order,
            "steps_offset": offset,
        }
        if betas == "squaredcos_cap_v2":
            settings["lambda_min_clipped"] = -5.1
        compare(DPMSolverMultistepScheduler, settings, steps)


@pytest.mark.parametrize("steps", [14, 15, 16, 50, 100])
@pytest.mark.parametrize("algorithm", ["dpmsolver++", "sde-dpmsolver++"])
def test_dpm_lengths(steps, algorithm):
    for order in (2, 3):
        settings = {**AUDIOLDM2, "solver_order": order, "algorithm_type": algorithm}
        compare(DPMSolverMultistepScheduler, settings, steps)
        compare(
            DPMSolverMultistepScheduler, {**settings, "thresholding": True, "sample_max_value": 2.0}, steps
        )


# Where the noise levels are spaced, timestep_spacing has no effect.
@pytest.mark.parametrize(
    ("spaced", "spacing"),
    [
        ("", "leading"),
        ("", "linspace"),
        ("", "trailing"),
        ("use_karras_sigmas", "linspace"),
        ("use_exponential_sigmas", "linspace"),
        ("use_lu_lambdas", "linspace"),
    ],
)
@pytest.mark.parametrize("betas", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_dpm_levels_of_every_length(spaced, betas, spacing):
    settings = {
        "beta_schedule": betas,
        "timestep_spacing": spacing,
        "solver_order": 1,
        "lambda_min_clipped": -6.0,
    }
    if spaced:
        settings[spaced] = True
    ours, theirs = DPMSolverMultistepScheduler(**settings), diffusers.DPMSolverMultistepScheduler(**settings)
    for steps in (*range(1, 40, 3), 64, 100, 243, 500):
        theirs.set_timesteps(steps)
        ours.set_timesteps(steps)
        kept = theirs.timesteps >= 0  # with trailing spacing, diffusers can end at timestep -1
        assert torch.equal(ours.timesteps, theirs.timesteps[kept]), steps
        assert torch.equal(ours.sigmas, theirs.sigmas[torch.cat([kept, torch.tensor([True])])]), steps


def test_carried_sigma_limits():
    config = diffusers.EulerDiscreteScheduler(
        sigma_min=0.1, sigma_max=9.0, use_karras_sigmas=True, **AUDIOLDM2
    ).config
    ours, theirs = (
        cls.from_config(config) for cls in (DPMSolverMultistepScheduler, THEIRS[DPMSolverMultistepScheduler])
    )
    assert_close(sampling_run(ours, 10), sampling_run(theirs, 10))
    assert torch.equal(ours.sigmas, theirs.sigmas)
    assert ours.sigmas[0] == 9.0


def test_leading_spacing_needs_one_more_training_step():
    scheduler = DPMSolverMultistepScheduler(**AUDIOLDM2, timestep_spacing="leading")
    scheduler.set_timesteps(999)
    assert scheduler.timesteps.tolist() == list(range(999, 0, -1))
    with pytest.raises(ValueError, match="1000 is too large for timestep_spacing 'leading'"):
        scheduler.set_timesteps(1000)


@pytest.mark.parametrize("karras", [False, True])
def test_dpm_start_in_the_middle(karras):
    settings = {**AUDIOLDM2, "use_karras_sigmas": karras}
    for start in (0, 3, 11, 24):
        compare(DPMSolverMultistepScheduler, settings, 25, start=start)


def test_dpm_duplicate_timesteps():
    """Karras' noise levels are dense where noise is low: timesteps repeat, each with its own level."""
    ours = DPMSolverMultistepScheduler(**AUDIOLDM2, use_karras_sigmas=True)
    theirs = diffusers.DPMSolverMultistepScheduler(**AUDIOLDM2, use_karras_sigmas=True)
    ours.set_timesteps(65)
    values = ours.timesteps.tolist()
    second = next(i for i in range(1, 65) if values[i] == values[i - 1])
    assert values[second + 1] != values[second]
    reference = sampling_run(theirs, 65, start=second)
    assert_close(sampling_run(ours, 65, start=second), reference)
    # A value stands for the second of the two as well.
    ours.set_timesteps(65)
    sample = NOISE
    with pytest.warns(UserWarning, match=f"timestep {values[second]} occurs 2 times .* index {second};"):
        sample = ours.step(network(sample, values[second]), values[second], sample).prev_sample
    for value in values[second + 1 :]:
        sample = ours.step(network(sample, value), value, sample).prev_sample
    assert_close(sample, reference[-1])
    # A run from the index of the first takes one step more.
    assert len(sampling_run(ours, 65, start=second - 1)) == len(reference) + 1
    assert ours.step_index == 65

    x0 = torch.randn(3, 4, 5)
    steps = torch.tensor([values[0], values[second], values[-1]])
    expected = theirs.add_noise(x0, x0 * 2 + 1, steps)
    with pytest.warns(UserWarning, match="occurs 2 times"):
        assert_close(ours.add_noise(x0, x0 * 2 + 1, steps), expected)


@pytest.mark.parametrize("steps", [400, 999])
def test_many_steps_with_zero_terminal_snr(steps):
    """Their second noise level is above the first, as in diffusers."""
    settings = {**AUDIOLDM2, "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    compare(DPMSolverMultistepScheduler, {**settings, "prediction_type": "v_prediction"}, steps)


def test_dpm_begin_index():
    ours = DPMSolverMultistepScheduler(**AUDIOLDM2)
    theirs = diffusers.DPMSolverMultistepScheduler(**AUDIOLDM2)
    samples = []
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(20)
        scheduler.set_begin_index(8)
        noisy = scheduler.add_noise(NOISE, NOISE.flip(0), scheduler.timesteps[8:9].repeat(2))
        for t in scheduler.timesteps[8:]:
            noisy = scheduler.step(network(noisy, t), t, noisy, return_dict=False)[0]
        samples.append(noisy)
    assert_close(*samples)
    with pytest.raises(ValueError, match="no step 20 in a run of 20"):
        ours.step(NOISE, 1, NOISE)


def test_dpm_second_run_starts_over():
    ours = DPMSolverMultistepScheduler(**AUDIOLDM2)
    first = sampling_run(ours, 10)
    sample = NOISE
    for t in ours.timesteps:  # without another set_timesteps
        sample = ours.step(network(sample, t), t, sample).prev_sample
    assert torch.equal(sample, first[-1])


def test_step_between_equal_noise_levels():
    """Karras' last noise level is sigma_min itself: the step to it changes nothing, without a NaN."""
    for solver, order, algorithm in itertools.product(
        ("heun", "midpoint"), (2, 3), ("dpmsolver++", "sde-dpmsolver++")
    ):
        ours = DPMSolverMultistepScheduler(
            **AUDIOLDM2,
            use_karras_sigmas=True,
            final_sigmas_type="sigma_min",
            solver_type=solver,
            solver_order=order,
            algorithm_type=algorithm,
        )
        trajectory = sampling_run(ours, 20)
        assert torch.isfinite(trajectory).all()
        assert torch.equal(trajectory[-1], trajectory[-2])


def test_add_noise_outside_the_run_follows_training():
    ddim, dpm = diffusers.DDIMScheduler(**AUDIOLDM2), DPMSolverMultistepScheduler(**AUDIOLDM2)
    steps = torch.tensor([17, 803])
    expected = ddim.add_noise(NOISE, NOISE.flip(0), steps)
    assert_close(dpm.add_noise(NOISE, NOISE.flip(0), steps), expected)
    dpm.set_timesteps(10)
    assert not set(steps.tolist()) & set(dpm.timesteps.tolist())
    assert_close(dpm.add_noise(NOISE, NOISE.flip(0), steps), expected)


@pytest.mark.parametrize(
    "settings",
    [
        {"algorithm_type": "dpmsolver"},  # to a noise level of 0
        {"algorithm_type": "sde-dpmsolver"},
        {"solver_order": 3, "algorithm_type": "sde-dpmsolver", "final_sigmas_type": "sigma_min"},
        {"variance_type": "small"},
        {"lambda_min_clipped": float("inf")},
        {"solver_type": "rk4"},
        {"solver_order": 4},
        {"solver_order": 0},
        {"final_sigmas_type": "one"},
        {"use_beta_sigmas": True},
        {"use_flow_sigmas": True},
        {"use_dynamic_shifting": True},
        {"variance_type": "learned"},
        {"variance_type": "learned_range"},
        {"use_karras_sigmas": True, "use_exponential_sigmas": True},
    ],
)
def test_bad_solver_settings(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        DPMSolverMultistepScheduler(**settings)


@pytest.mark.parametrize("solver", ["midpoint", "heun"])
@pytest.mark.parametrize("order", [2, 3])
def test_a_run_that_repeats_a_noise_level_is_finite(order, solver):
    """As many steps as training steps visit one twice. diffusers divides by the step of length 0."""
    settings = {**AUDIOLDM2, "num_train_timesteps": 40, "solver_order": order, "solver_type": solver}
    assert sampling_run(diffusers.DPMSolverMultistepScheduler(**settings), 40).isnan().any()
    scheduler = DPMSolverMultistepScheduler(**settings)
    trajectory = sampling_run(scheduler, 40)
    (twice,) = [i for i in range(39) if scheduler.sigmas[i] == scheduler.sigmas[i + 1]]
    assert torch.equal(trajectory[twice], trajectory[twice - 1])
    assert_close(
        trajectory[:twice], sampling_run(diffusers.DPMSolverMultistepScheduler(**settings), 40)[:twice]
    )
    assert_close(trajectory[-1], sampling_run(scheduler, 39)[-1], bound=1e-3)


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("algorithm", ["dpmsolver", "sde-dpmsolver"])
def test_dpm_of_the_noise_predictions_and_thresholding(prediction, algorithm):
    settings = {
        **AUDIOLDM2,
        "prediction_type": prediction,
        "algorithm_type": algorithm,
        "final_sigmas_type": "sigma_min",
    }
    compare(DPMSolverMultistepScheduler, settings, 12)
    compare(DPMSolverMultistepScheduler, {**settings, "thresholding": True, "sample_max_value": 2.0}, 12)


@pytest.mark.parametrize("form", [list, np.array, torch.tensor])
def test_given_timesteps(form):
    """The first is the schedule of "Align Your Steps" for Stable Diffusion."""
    settings = {**AUDIOLDM2, "solver_order": 3, "prediction_type": "v_prediction"}
    for timesteps in ([999, 850, 736, 645, 545, 455, 343, 233, 124, 24], [800, 3], [7]):
        ours, theirs = (
            DPMSolverMultistepScheduler(**settings),
            diffusers.DPMSolverMultistepScheduler(**settings),
        )
        ours.set_timesteps(timesteps=form(timesteps))
        theirs.set_timesteps(timesteps=timesteps)
        assert torch.equal(ours.sigmas, theirs.sigmas)
        assert ours.num_inference_steps == len(timesteps)
        samples = []
        for scheduler in (ours, theirs):
            sample = NOISE
            for t in scheduler.timesteps:
                sample = scheduler.step(network(sample, t), t, sample).prev_sample
            samples.append(sample)
        assert_close(*samples)


@pytest.mark.parametrize("setting", ["use_karras_sigmas", "use_exponential_sigmas", "use_lu_lambdas"])
def test_timesteps_are_not_given_where_noise_levels_are_spaced(setting):
    scheduler = DPMSolverMultistepScheduler(**AUDIOLDM2, **{setting: True})
    with pytest.raises(ValueError, match=f"timesteps cannot be given together with {setting}"):
        scheduler.set_timesteps(timesteps=[999, 5])
    with pytest.raises(ValueError, match="mu is not supported"):
        scheduler.set_timesteps(5, mu=1.0)


def test_index_for_timestep():
    ours = DPMSolverMultistepScheduler(**AUDIOLDM2, use_karras_sigmas=True)
    theirs = diffusers.DPMSolverMultistepScheduler(**AUDIOLDM2, use_karras_sigmas=True)
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(65)
    for value in set(ours.timesteps.tolist()):
        assert ours.index_for_timestep(value) == theirs.index_for_timestep(torch.tensor(value))
    assert [ours.index_for_timestep(t) for t in ours.timesteps] == list(range(65))
    with pytest.raises(ValueError, match="not in this sampling run"):
        ours.index_for_timestep(500 if 500 not in ours.timesteps else 501)


@pytest.mark.parametrize(
    "limits", [{"sigma_min": 3, "sigma_max": 2}, {"sigma_min": "x"}, {"sigma_max": 1e400}]
)
def test_bad_carried_limits(limits):
    config = {**AUDIOLDM2, "use_karras_sigmas": True, **limits}
    scheduler = DPMSolverMultistepScheduler.from_config(config)
    with pytest.raises(ValueError, match="sigma_m"):
        scheduler.set_timesteps(5)
