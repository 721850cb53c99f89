"""The samplers against diffusers: whole walks with a made-up network, over a grid of settings."""

from __future__ import annotations

import copy
import itertools
import json
import math
import pickle
import warnings

import diffusers
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from audioldm2.schedulers import SCHEDULERS, DDIMScheduler, DPMSolverMultistepScheduler
from audioldm2.schedulers.noise_schedule import dynamic_threshold, randn

THEIRS = {
    DDIMScheduler: diffusers.DDIMScheduler,
    DPMSolverMultistepScheduler: diffusers.DPMSolverMultistepScheduler,
}
AUDIOLDM2 = {"beta_schedule": "scaled_linear", "beta_start": 0.0015, "beta_end": 0.0195}
SHAPE = (2, 3, 4, 5)
NOISE = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))


def network(x, t):
    """A fixed function of sample and timestep: not linear, but tame: a walk must not magnify rounding."""
    return torch.tanh(x.float() + 0.2 * math.sin(0.01 * float(t))).to(x.dtype)


def walk(scheduler, steps, start=0, sample=NOISE, **arguments):
    """Every sample of a walk, (steps, ...)."""
    scheduler.set_timesteps(steps)
    trajectory = []
    for t in scheduler.timesteps[start:]:
        sample = scheduler.step(
            network(sample, t), t, scheduler.scale_model_input(sample, t), **arguments
        ).prev_sample
        trajectory.append(sample)
    return torch.stack(trajectory)


def assert_close(ours, theirs, bound=1e-5):
    assert torch.isfinite(theirs.float()).all(), "the reference itself is not finite: the case says nothing"
    assert ours.shape == theirs.shape
    assert ours.dtype == theirs.dtype
    error = (ours.double() - theirs.double()).abs().max() / theirs.double().abs().max()
    assert error <= bound, f"{error:.2e} of the reference's largest value"


def compare(cls, settings, steps, start=0, bound=1e-5, **arguments):
    ours, theirs = cls(**settings), THEIRS[cls](**settings)

    def seeded():
        return {**arguments, "generator": torch.Generator().manual_seed(1)}

    a, b = walk(ours, steps, start, **seeded()), walk(theirs, steps, start, **seeded())
    assert torch.equal(ours.timesteps, theirs.timesteps)
    assert ours.num_inference_steps == theirs.num_inference_steps
    if cls is DPMSolverMultistepScheduler:
        assert torch.equal(ours.sigmas, theirs.sigmas)
    assert_close(a, b, bound)


# ---------------------------------------------------------------- DDIM


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize("betas", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_ddim_walks(prediction, spacing, zero_snr, betas):
    if zero_snr and prediction == "epsilon" and spacing != "leading":
        return  # diffusers divides by zero; see test_zero_snr_with_epsilon
    # Where abar is (nearly) 0 and eta is 1, diffusers takes the root of a rounding error, which may be
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


# ---------------------------------------------------------------- DPM-Solver++


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("algorithm", ["dpmsolver++", "sde-dpmsolver++"])
@pytest.mark.parametrize("solver", ["midpoint", "heun"])
@pytest.mark.parametrize("spaced", ["", "use_karras_sigmas", "use_exponential_sigmas", "use_lu_lambdas"])
def test_dpm_walks(order, algorithm, solver, spaced):
    final = itertools.product([True, False], [True, False], ["zero", "sigma_min"])
    for lower, euler, last in final:
        if last == "sigma_min" and spaced and not (order == 1 or lower or euler):
            continue  # the last step has no length; diffusers divides 0 by 0, see test_step_without_length
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


@pytest.mark.parametrize("spaced", ["", "use_karras_sigmas", "use_exponential_sigmas", "use_lu_lambdas"])
@pytest.mark.parametrize("betas", ["linear", "scaled_linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
def test_dpm_levels_of_every_length(spaced, betas, spacing):
    if spaced and spacing != "linspace":
        return  # spaced by level, whatever the spacing in time
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
        kept = theirs.timesteps >= 0  # a trailing walk of theirs may end at timestep -1
        assert torch.equal(ours.timesteps, theirs.timesteps[kept]), steps
        assert torch.equal(ours.sigmas, theirs.sigmas[torch.cat([kept, torch.tensor([True])])]), steps


def test_carried_sigma_limits():
    config = diffusers.EulerDiscreteScheduler(
        sigma_min=0.1, sigma_max=9.0, use_karras_sigmas=True, **AUDIOLDM2
    ).config
    ours, theirs = (
        cls.from_config(config) for cls in (DPMSolverMultistepScheduler, THEIRS[DPMSolverMultistepScheduler])
    )
    assert_close(walk(ours, 10), walk(theirs, 10))
    assert torch.equal(ours.sigmas, theirs.sigmas)
    assert ours.sigmas[0] == 9.0


@pytest.mark.parametrize("karras", [False, True])
def test_dpm_start_in_the_middle(karras):
    settings = {**AUDIOLDM2, "use_karras_sigmas": karras}
    for start in (0, 3, 11, 24):
        compare(DPMSolverMultistepScheduler, settings, 25, start=start)


def test_dpm_duplicate_timesteps():
    """Karras' levels crowd where noise is low, so that timesteps repeat; each still has its own level."""
    ours = DPMSolverMultistepScheduler(**AUDIOLDM2, use_karras_sigmas=True)
    theirs = diffusers.DPMSolverMultistepScheduler(**AUDIOLDM2, use_karras_sigmas=True)
    ours.set_timesteps(65)
    values = ours.timesteps.tolist()
    second = next(i for i in range(1, 65) if values[i] == values[i - 1])
    assert values[second + 1] != values[second]
    reference = walk(theirs, 65, start=second)
    assert_close(walk(ours, 65, start=second), reference)
    # by value, the second of the two is meant as well
    ours.set_timesteps(65)
    sample = NOISE
    for value in values[second:]:
        sample = ours.step(network(sample, value), value, sample).prev_sample
    assert_close(sample, reference[-1])
    # by place, a walk from the first of the two takes one step more
    assert len(walk(ours, 65, start=second - 1)) == len(reference) + 1
    assert ours.step_index == 65

    x0 = torch.randn(3, 4, 5)
    steps = torch.tensor([values[0], values[second], values[-1]])
    assert_close(ours.add_noise(x0, x0 * 2 + 1, steps), theirs.add_noise(x0, x0 * 2 + 1, steps))


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
    with pytest.raises(ValueError, match="no step 20 of 20"):
        ours.step(NOISE, 1, NOISE)


def test_dpm_second_walk_starts_anew():
    ours = DPMSolverMultistepScheduler(**AUDIOLDM2)
    first = walk(ours, 10)
    sample = NOISE
    for t in ours.timesteps:  # no set_timesteps in between
        sample = ours.step(network(sample, t), t, sample).prev_sample
    assert torch.equal(sample, first[-1])


def test_step_without_length():
    """Karras' last level is sigma_min itself: the step to it changes nothing, and no 0 / 0 comes of it."""
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
        trajectory = walk(ours, 20)
        assert torch.isfinite(trajectory).all()
        assert torch.equal(trajectory[-1], trajectory[-2])


# ---------------------------------------------------------------- noise


@pytest.mark.parametrize(
    ("cls", "extra"),
    [(DDIMScheduler, {}), (DPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++"})],
)
@pytest.mark.parametrize("kind", ["one", "list", "list of one", "given"])
def test_noise_of_a_step(cls, extra, kind):
    results = []
    for scheduler in (cls(**AUDIOLDM2, **extra), THEIRS[cls](**AUDIOLDM2, **extra)):
        generators = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
        arguments = {
            "one": {"generator": generators[0]},
            "list": {"generator": generators},
            "list of one": {"generator": generators[:1]},
            "given": {"variance_noise": NOISE.flip(1)},
        }[kind]
        if cls is DDIMScheduler:
            arguments["eta"] = 0.8
        results.append(walk(scheduler, 9, **arguments))
    assert_close(*results)


def test_randn():
    randn_tensor = diffusers.utils.torch_utils.randn_tensor
    for dtype in (torch.float32, torch.float16):
        for seeds in ([1], [1, 2, 3]):
            pair = []
            for draw in (randn, randn_tensor):
                generators = [torch.Generator().manual_seed(seed) for seed in seeds]
                pair.append(draw((3, 2, 4), generator=generators, device=torch.device("cpu"), dtype=dtype))
            assert torch.equal(*pair)
            assert pair[0].dtype == dtype
    assert randn((2, 3), torch.Generator().manual_seed(0), "meta").device.type == "meta"
    with pytest.raises(ValueError, match="2 generators for a batch of 3"):
        randn((3, 2), [torch.Generator(), torch.Generator()])


@pytest.mark.parametrize("cls", THEIRS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_add_noise(cls, dtype):
    ours, theirs = cls(**AUDIOLDM2), THEIRS[cls](**AUDIOLDM2)
    ours.set_timesteps(20)
    theirs.set_timesteps(20)
    bound = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 4e-2}[dtype]  # they round abar first
    x, noise = NOISE.to(dtype), NOISE.flip(2).to(dtype)
    for steps in (ours.timesteps[[0, 19]], ours.timesteps[[7, 7]], ours.timesteps[5:6]):
        assert_close(ours.add_noise(x, noise, steps), theirs.add_noise(x, noise, steps), bound)


def test_add_noise_off_the_walk_follows_training():
    ddim, dpm = diffusers.DDIMScheduler(**AUDIOLDM2), DPMSolverMultistepScheduler(**AUDIOLDM2)
    steps = torch.tensor([17, 803])
    expected = ddim.add_noise(NOISE, NOISE.flip(0), steps)
    assert_close(dpm.add_noise(NOISE, NOISE.flip(0), steps), expected)
    dpm.set_timesteps(10)
    assert not set(steps.tolist()) & set(dpm.timesteps.tolist())
    assert_close(dpm.add_noise(NOISE, NOISE.flip(0), steps), expected)


@pytest.mark.parametrize("cls", THEIRS)
@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float16, 1e-2), (torch.bfloat16, 6e-2), (torch.float64, 1e-5)]
)
def test_other_dtypes(cls, dtype, bound):
    for settings in (AUDIOLDM2, {**AUDIOLDM2, "thresholding": True, "sample_max_value": 2.0}):
        a = walk(cls(**settings), 12, sample=NOISE.to(dtype))
        b = walk(THEIRS[cls](**settings), 12, sample=NOISE.to(dtype))
        assert a.dtype == dtype
        assert_close(a, b, bound)
    hard = walk(
        cls(
            **AUDIOLDM2,
            timestep_spacing="trailing",
            rescale_betas_zero_snr=True,
            prediction_type="v_prediction",
        ),
        8,
        sample=NOISE.to(dtype),
    )
    assert torch.isfinite(hard).all()


# ---------------------------------------------------------------- nothing waits


class NoReading(TorchDispatchMode):
    """Fails when a tensor's value is read into Python: on an accelerator that would wait for it."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            raise AssertionError(f"{func} waits for the device")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("scheduler", "arguments"),
    [
        (DDIMScheduler(**AUDIOLDM2), {"eta": 0.5}),
        (DDIMScheduler(**AUDIOLDM2, thresholding=True), {}),
        (DPMSolverMultistepScheduler(**AUDIOLDM2, solver_order=3), {}),
        (DPMSolverMultistepScheduler(**AUDIOLDM2, algorithm_type="sde-dpmsolver++", thresholding=True), {}),
        (DPMSolverMultistepScheduler(**AUDIOLDM2, use_karras_sigmas=True), {}),
    ],
)
@pytest.mark.parametrize("start", [0, 5])
def test_step_reads_no_tensor(scheduler, arguments, start):
    scheduler.set_timesteps(20)
    sample = NOISE
    with NoReading():
        for t in scheduler.timesteps[start:]:
            sample = scheduler.step(0.3 * sample, t, sample, **arguments).prev_sample
    with NoReading(), pytest.raises(AssertionError, match="waits"):
        scheduler.step(sample, torch.tensor(int(scheduler.timesteps[0])), sample)


def test_a_view_that_was_written_to_is_read():
    ours, theirs = DDIMScheduler(**AUDIOLDM2), diffusers.DDIMScheduler(**AUDIOLDM2)
    ours.set_timesteps(10)
    theirs.set_timesteps(10)
    ours.timesteps += 3
    theirs.timesteps += 3
    for a, b in zip(ours.timesteps, theirs.timesteps, strict=True):
        assert_close(ours.step(NOISE, a, NOISE)[0], theirs.step(NOISE, b, NOISE)[0])


def test_inference_mode():
    with torch.inference_mode():
        inside = walk(DPMSolverMultistepScheduler(**AUDIOLDM2), 6)
    assert torch.equal(inside, walk(DPMSolverMultistepScheduler(**AUDIOLDM2), 6))


# ---------------------------------------------------------------- settings


def plain(config):
    """A config without what cannot be compared: the order of the unstated settings, the library's version."""
    skip = ("_diffusers_version",)
    return {
        k: sorted(v) if k == "_use_default_values" else v for k, v in dict(config).items() if k not in skip
    }


HUB = {
    "_class_name": "DDIMScheduler",
    "_diffusers_version": "0.20.0.dev0",
    "beta_end": 0.0195,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.0015,
    "clip_sample": False,
    "clip_sample_range": 1.0,
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "rescale_betas_zero_snr": False,
    "sample_max_value": 1.0,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "thresholding": False,
    "timestep_spacing": "leading",
    "trained_betas": None,
}


@pytest.mark.parametrize("cls", THEIRS)
@pytest.mark.parametrize(
    "config",
    [
        HUB,
        {k: v for k, v in HUB.items() if k != "timestep_spacing"},
        {"_class_name": "PNDMScheduler", "skip_prk_steps": True, "beta_start": 0.001},
        {
            "_class_name": "DEISMultistepScheduler",
            "algorithm_type": "deis",
            "solver_type": "logrho",
            "final_sigmas_type": "sigma_min",
        },
        {"_class_name": "UniPCMultistepScheduler", "solver_type": "bh2", "solver_order": 3},
        {"_class_name": "DDPMScheduler", "variance_type": "fixed_small"},
        {},
    ],
)
def test_from_config_of_a_file(cls, config):
    ours, theirs = cls.from_config(config), THEIRS[cls].from_config(config)
    assert plain(ours.config) == plain(theirs.config)
    other = next(one for one in THEIRS if one is not cls)
    across = {"ours": ours, "theirs": theirs}
    for source in across.values():  # each library reads the other's config object
        converted = other.from_config(source.config), THEIRS[other].from_config(source.config)
        assert plain(converted[0].config) == plain(converted[1].config)
        back = cls.from_config(converted[0].config), THEIRS[cls].from_config(converted[1].config)
        assert plain(back[0].config) == plain(back[1].config)
        assert_close(walk(converted[0], 5), walk(converted[1], 5))
        assert_close(walk(back[0], 5), walk(back[1], 5))


def test_from_config_takes_own_defaults_and_overrides():
    unstated = DDIMScheduler(**AUDIOLDM2)
    assert unstated.config.timestep_spacing == "leading"
    assert DPMSolverMultistepScheduler.from_config(unstated.config).config.timestep_spacing == "linspace"
    stated = DDIMScheduler(**AUDIOLDM2, timestep_spacing="leading")
    assert DPMSolverMultistepScheduler.from_config(stated.config).config.timestep_spacing == "leading"
    over = {"solver_order": 3, "timestep_spacing": "trailing", "clip_sample": True}
    theirs = diffusers.DPMSolverMultistepScheduler.from_config(unstated.config, **over)
    ours = DPMSolverMultistepScheduler.from_config(unstated.config, **over)
    assert plain(ours.config) == plain(theirs.config)
    assert ours.config.solver_order == 3


@pytest.mark.parametrize("cls", THEIRS)
def test_config_is_read_only(cls):
    config = cls(**AUDIOLDM2).config
    assert config.beta_start == config["beta_start"] == dict(config)["beta_start"] == 0.0015
    for change in (
        lambda: config.update(beta_start=1),
        lambda: config.__setitem__("beta_start", 1),
        lambda: setattr(config, "beta_start", 1),
        lambda: config.pop("beta_start"),
        lambda: config.__delitem__("beta_start"),
        lambda: config.clear(),
    ):
        with pytest.raises(TypeError, match="read-only"):
            change()
    with pytest.raises(AttributeError, match="no setting 'sigma'"):
        _ = config.sigma
    for twin in (copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert twin == config
        assert twin.beta_start == 0.0015


@pytest.mark.parametrize("cls", THEIRS)
def test_saved_config_loads_in_diffusers(cls, tmp_path):
    ours = cls(**AUDIOLDM2, steps_offset=1, trained_betas=torch.linspace(0.001, 0.02, 1000))
    (tmp_path / "scheduler_config.json").write_text(json.dumps(ours.config_dict()))
    theirs = THEIRS[cls].from_pretrained(tmp_path)
    assert_close(walk(ours, 6), walk(theirs, 6))
    theirs.save_pretrained(tmp_path)
    ours = cls.from_config(json.loads((tmp_path / "scheduler_config.json").read_text()))
    assert_close(walk(ours, 6), walk(theirs, 6))
    assert ours.config_dict()["_class_name"] == cls.__name__
    assert SCHEDULERS[cls.__name__] is cls


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize("cls", THEIRS)
@pytest.mark.parametrize("steps", [0, -1, 1001, 2.0, "20", None, True])
def test_bad_number_of_steps(cls, steps):
    with pytest.raises(ValueError, match="num_inference_steps must be"):
        cls().set_timesteps(steps)


@pytest.mark.parametrize("cls", THEIRS)
def test_bad_steps(cls):
    scheduler = cls(**AUDIOLDM2)
    with pytest.raises(ValueError, match="call set_timesteps"):
        scheduler.step(NOISE, 1, NOISE)
    scheduler.set_timesteps(10)
    for t in (-1, 1000, 2.5, torch.tensor(-1)):
        with pytest.raises(ValueError, match="timestep"):
            scheduler.step(NOISE, t, NOISE)
    with pytest.raises(ValueError, match="one timestep"):
        scheduler.step(NOISE, torch.tensor([1, 2]), NOISE)
    with pytest.raises(ValueError, match="must lie in 0 to 999"):
        scheduler.add_noise(NOISE, NOISE, torch.tensor([3, 1000]))


@pytest.mark.parametrize(
    "settings",
    [
        {"beta_schedule": "sigmoid"},
        {"prediction_type": "flow_prediction"},
        {"timestep_spacing": "middle"},
        {"num_train_timesteps": 0},
        {"num_train_timesteps": 10.5},
        {"beta_start": 0.0},
        {"beta_end": 1.5},
        {"dynamic_thresholding_ratio": 1.5},
        {"trained_betas": [0.1, 0.2]},
        {"trained_betas": [1.5] * 1000},
    ],
)
@pytest.mark.parametrize("cls", THEIRS)
def test_bad_settings(cls, settings):
    name = next(iter(settings))
    with pytest.raises(ValueError, match=name):
        cls(**settings)
    with pytest.raises(ValueError, match=name):
        cls.from_config(settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"algorithm_type": "dpmsolver"},
        {"algorithm_type": "sde-dpmsolver"},
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


@pytest.mark.parametrize("cls", THEIRS)
def test_bad_from_config(cls):
    with pytest.raises(TypeError, match="mapping"):
        cls.from_config("cvssp/audioldm2")
    with pytest.raises(TypeError, match="'solver_ordre'"):
        cls.from_config({}, solver_ordre=2)


def test_bad_ddim_steps():
    scheduler = DDIMScheduler(**AUDIOLDM2)
    scheduler.set_timesteps(10)
    for eta in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match="eta"):
            scheduler.step(NOISE, 1, NOISE, eta=eta)
    with pytest.raises(ValueError, match="not both"):
        scheduler.step(NOISE, 1, NOISE, eta=1.0, generator=torch.Generator(), variance_noise=NOISE)


def test_walks_out_of_training_are_refused():
    """Where diffusers fails in the middle of a walk, or makes NaN, the walk is refused at the start."""
    offset = {**AUDIOLDM2, "steps_offset": 1}
    with pytest.raises(IndexError):
        walk(diffusers.DDIMScheduler(**offset), 1000)
    with pytest.raises(ValueError, match="timestep 1000, outside 0 to 999"):
        DDIMScheduler(**offset).set_timesteps(1000)
    scheduler = DDIMScheduler(**offset)
    scheduler.set_timesteps(5)
    before = scheduler.timesteps
    with pytest.raises(ValueError, match="outside 0 to 999"):
        scheduler.set_timesteps(1000)
    assert scheduler.timesteps is before  # a refused call changes nothing

    assert walk(diffusers.DPMSolverMultistepScheduler(**AUDIOLDM2), 1000).isnan().any()
    with pytest.raises(ValueError, match="twice"):
        DPMSolverMultistepScheduler(**AUDIOLDM2).set_timesteps(1000)
    DPMSolverMultistepScheduler(**AUDIOLDM2, solver_order=1).set_timesteps(1000)
    dpm = DPMSolverMultistepScheduler(**AUDIOLDM2)
    dpm.set_timesteps(10)
    with pytest.raises(ValueError, match="not one of this walk"):
        dpm.step(NOISE, 5, NOISE)


def test_zero_snr_with_epsilon():
    settings = {**AUDIOLDM2, "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert not walk(diffusers.DDIMScheduler(**settings, clip_sample=False), 5).isfinite().all()
    with pytest.raises(ValueError, match="epsilon"):
        DDIMScheduler(**settings).set_timesteps(5)


@pytest.mark.parametrize("prediction", ["sample", "v_prediction"])
def test_zero_snr_with_full_noise(prediction):
    settings = {**AUDIOLDM2, "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    assert torch.isfinite(walk(DDIMScheduler(**settings, prediction_type=prediction), 7, eta=1.0)).all()


def test_dynamic_threshold_by_hand():
    x0 = torch.tensor([[[0.5, -4.0, 2.0, 1.0]], [[0.1, 0.2, -0.3, 0.4]]])  # (2, 1, 4)
    out = dynamic_threshold(x0, ratio=1.0, largest=3.0)
    torch.testing.assert_close(out, torch.tensor([[[0.5 / 3, -1.0, 2 / 3, 1 / 3]], [[0.1, 0.2, -0.3, 0.4]]]))


@pytest.mark.parametrize("cls", THEIRS)
def test_a_run_is_silent(cls):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        walk(cls(**AUDIOLDM2), 20)
