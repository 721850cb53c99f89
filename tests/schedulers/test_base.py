"""What all samplers share: noise, dtypes, finding a step by its timestep, and the state of a run."""

from __future__ import annotations

import copy
import pickle
import warnings

import diffusers
import pytest
import torch

from audioldm2.noise import randn
from audioldm2.schedulers import DDIMScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler
from audioldm2.schedulers.multistep import MultistepScheduler
from audioldm2.schedulers.prediction import dynamic_threshold
from tests.schedulers.helpers import (
    AUDIOLDM2,
    NOISE,
    THEIRS,
    NoReading,
    assert_close,
    sampling_run,
    seeded,
)


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
        results.append(sampling_run(scheduler, 9, **arguments))
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
    # diffusers rounds abar to the dtype first
    bound = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 4e-2}[dtype]
    x, noise = NOISE.to(dtype), NOISE.flip(2).to(dtype)
    for steps in (ours.timesteps[[0, 19]], ours.timesteps[[7, 7]], ours.timesteps[5:6]):
        assert_close(ours.add_noise(x, noise, steps), theirs.add_noise(x, noise, steps), bound)


@pytest.mark.parametrize("cls", THEIRS)
@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float16, 1e-2), (torch.bfloat16, 6e-2), (torch.float64, 1e-5)]
)
def test_other_dtypes(cls, dtype, bound):
    for settings in (AUDIOLDM2, {**AUDIOLDM2, "thresholding": True, "sample_max_value": 2.0}):
        a = sampling_run(cls(**settings), 12, sample=NOISE.to(dtype))
        b = sampling_run(THEIRS[cls](**settings), 12, sample=NOISE.to(dtype))
        assert a.dtype == dtype
        assert_close(a, b, bound)
    hard = sampling_run(
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


@pytest.mark.parametrize(
    ("scheduler", "arguments"),
    [
        (DDIMScheduler(**AUDIOLDM2), {"eta": 0.5}),
        (DDIMScheduler(**AUDIOLDM2, thresholding=True), {}),
        (DPMSolverMultistepScheduler(**AUDIOLDM2, solver_order=3), {}),
        (DPMSolverMultistepScheduler(**AUDIOLDM2, algorithm_type="sde-dpmsolver++", thresholding=True), {}),
        (DPMSolverMultistepScheduler(**AUDIOLDM2, use_karras_sigmas=True), {}),
        (UniPCMultistepScheduler(**AUDIOLDM2, solver_order=3, thresholding=True), {}),
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


def test_timesteps_that_were_written_to_are_read():
    ours, theirs = DDIMScheduler(**AUDIOLDM2), diffusers.DDIMScheduler(**AUDIOLDM2)
    ours.set_timesteps(10)
    theirs.set_timesteps(10)
    ours.timesteps += 3
    theirs.timesteps += 3
    for a, b in zip(ours.timesteps, theirs.timesteps, strict=True):
        assert_close(ours.step(NOISE, a, NOISE)[0], theirs.step(NOISE, b, NOISE)[0])


def test_inference_mode():
    with torch.inference_mode():
        inside = sampling_run(DPMSolverMultistepScheduler(**AUDIOLDM2), 6)
    assert torch.equal(inside, sampling_run(DPMSolverMultistepScheduler(**AUDIOLDM2), 6))


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


def test_runs_outside_the_training_steps_are_refused():
    """Where diffusers fails during a run, or returns NaN, `set_timesteps` refuses the run."""
    offset = {**AUDIOLDM2, "steps_offset": 1}
    with pytest.raises(IndexError):
        sampling_run(diffusers.DDIMScheduler(**offset), 1000)
    with pytest.raises(ValueError, match="timestep 1000, outside 0 to 999"):
        DDIMScheduler(**offset).set_timesteps(1000)
    scheduler = DDIMScheduler(**offset)
    scheduler.set_timesteps(5)
    before = scheduler.timesteps
    with pytest.raises(ValueError, match="outside 0 to 999"):
        scheduler.set_timesteps(1000)
    assert scheduler.timesteps is before  # a refused call changes nothing

    dpm = DPMSolverMultistepScheduler(**AUDIOLDM2)
    dpm.set_timesteps(10)
    with pytest.raises(ValueError, match="not in this sampling run"):
        dpm.step(NOISE, 5, NOISE)


def test_dynamic_threshold_by_hand():
    x0 = torch.tensor([[[0.5, -4.0, 2.0, 1.0]], [[0.1, 0.2, -0.3, 0.4]]])  # (2, 1, 4)
    out = dynamic_threshold(x0, ratio=1.0, max_value=3.0)
    torch.testing.assert_close(out, torch.tensor([[[0.5 / 3, -1.0, 2 / 3, 1 / 3]], [[0.1, 0.2, -0.3, 0.4]]]))


# ---------------------------------------------------------------- the state of a run

STATEFUL = [
    (DDIMScheduler, {}, {"eta": 0.5}),
    (DPMSolverMultistepScheduler, {"solver_order": 3}, {}),
    (DPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++"}, {}),
    (DPMSolverMultistepScheduler, {"use_karras_sigmas": True, "solver_order": 3}, {}),
    (UniPCMultistepScheduler, {"solver_order": 3}, {}),
    (UniPCMultistepScheduler, {"use_karras_sigmas": True, "solver_type": "bh1"}, {}),
]


def continue_run(scheduler, sample, timesteps, **arguments):
    if not isinstance(scheduler, UniPCMultistepScheduler):
        # the same at every step, so that a run can be continued elsewhere
        arguments = {"variance_noise": NOISE.flip(0), **arguments}
    for t in timesteps:
        sample = scheduler.step(network_of_samples(sample), t, sample, **arguments)[0]
    return sample


def network_of_samples(sample):
    """A network that does not look at the timestep, so that it reads no tensor."""
    return torch.tanh(sample)


@pytest.mark.parametrize(("cls", "settings", "arguments"), STATEFUL)
def test_set_timesteps_leaves_nothing_of_an_earlier_run(cls, settings, arguments):
    for start in (0, 4):  # 4 is also where the earlier run stopped
        fresh, used = cls(**AUDIOLDM2, **settings), cls(**AUDIOLDM2, **settings)
        used.set_timesteps(15)
        if issubclass(cls, MultistepScheduler):
            used.set_begin_index(0)
        continue_run(used, 3 * NOISE, used.timesteps[:4], **arguments)
        results = []
        for scheduler in (fresh, used):
            scheduler.set_timesteps(15)
            results.append(continue_run(scheduler, NOISE, scheduler.timesteps[start:], **arguments))
        assert torch.equal(*results)
        for name in ("step_index", "begin_index"):
            assert getattr(fresh, name, None) == getattr(used, name, None)


@pytest.mark.parametrize(("cls", "settings", "arguments"), STATEFUL)
def test_a_refused_set_timesteps_changes_nothing(cls, settings, arguments):
    leading = {"timestep_spacing": "leading", "steps_offset": 1}  # 1000 steps would visit timestep 1000
    undisturbed, scheduler = (cls(**AUDIOLDM2, **leading, **settings) for _ in range(2))
    for one in (undisturbed, scheduler):
        one.set_timesteps(20)
    timesteps = scheduler.timesteps
    sample = continue_run(scheduler, NOISE, timesteps[:9], **arguments)
    refused = [0, 1001] if "use_karras_sigmas" in settings else [0, 1001, 1000]
    for number in refused:
        with pytest.raises(ValueError, match="step"):
            scheduler.set_timesteps(number)
        assert scheduler.timesteps is timesteps
    sample = continue_run(scheduler, sample, timesteps[9:], **arguments)
    assert torch.equal(sample, continue_run(undisturbed, NOISE, undisturbed.timesteps, **arguments))


@pytest.mark.parametrize(("cls", "settings", "arguments"), STATEFUL)
@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda scheduler: pickle.loads(pickle.dumps(scheduler))]
)
@pytest.mark.parametrize("inference", [False, True])
def test_a_copy_continues_the_run(cls, settings, arguments, duplicate, inference):
    scheduler = cls(**AUDIOLDM2, **settings)
    with torch.inference_mode(inference):
        scheduler.set_timesteps(65)  # where Karras' timesteps repeat
        middle = continue_run(scheduler, NOISE, scheduler.timesteps[:30], **arguments)
    twin = duplicate(scheduler)
    with NoReading():
        results = [continue_run(one, middle, one.timesteps[30:], **arguments) for one in (twin, scheduler)]
    assert torch.equal(*results)
    by_value = duplicate(scheduler)
    by_value.set_timesteps(65)
    assert by_value.config == scheduler.config
    assert torch.equal(
        continue_run(by_value, NOISE, scheduler.timesteps, **arguments),
        continue_run(scheduler, NOISE, scheduler.timesteps, **arguments),
    )


def test_a_copy_made_in_inference_mode_continues_the_run():
    scheduler = DPMSolverMultistepScheduler(**AUDIOLDM2)
    with torch.inference_mode():
        scheduler.set_timesteps(20)
        middle = continue_run(scheduler, NOISE, scheduler.timesteps[:9])
        twin = copy.deepcopy(scheduler)
        results = [continue_run(one, middle, one.timesteps[9:]) for one in (twin, scheduler)]
    assert torch.equal(*results)


@pytest.mark.parametrize("inference", [False, True])
def test_timesteps_that_were_written_to_are_read_in_a_copy_too(inference):
    scheduler, theirs = DDIMScheduler(**AUDIOLDM2), diffusers.DDIMScheduler(**AUDIOLDM2)
    theirs.set_timesteps(10)
    with torch.inference_mode(inference):
        scheduler.set_timesteps(10)
        scheduler.timesteps += 3
        twin = copy.deepcopy(scheduler)
        for i, t in enumerate(theirs.timesteps + 3):
            expected = theirs.step(NOISE, t, NOISE)[0]
            assert_close(scheduler.step(NOISE, scheduler.timesteps[i], NOISE)[0], expected)
            assert_close(twin.step(NOISE, twin.timesteps[i], NOISE)[0], expected)


# ---------------------------------------------------------------- warnings


@pytest.mark.parametrize("cls", THEIRS)
def test_a_run_is_silent(cls):
    spacings = [{}, {"timestep_spacing": "trailing"}, {"timestep_spacing": "leading"}]
    others = [{"thresholding": True}, {"trained_betas": torch.linspace(0.001, 0.02, 1000)}]
    if issubclass(cls, MultistepScheduler):
        others += [{"use_karras_sigmas": True}, {"use_exponential_sigmas": True}]
    if cls is DPMSolverMultistepScheduler:
        others += [
            {"use_lu_lambdas": True},
            {"algorithm_type": "sde-dpmsolver++", "final_sigmas_type": "sigma_min"},
        ]
    zero_snr = {
        "rescale_betas_zero_snr": True,
        "prediction_type": "v_prediction",
        "timestep_spacing": "trailing",
    }
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for settings in (*spacings, *others, zero_snr):
            scheduler = cls(**{**AUDIOLDM2, **settings})
            sampling_run(scheduler, 20, **seeded(scheduler, 0))
            scheduler.add_noise(NOISE, NOISE, scheduler.timesteps[5:6])
            copy.deepcopy(cls.from_config(scheduler.config))
