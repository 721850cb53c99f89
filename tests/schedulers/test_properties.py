"""Properties over random settings and arguments: a finite result, or an error that names the argument.

And, for partial runs: `add_noise`, `step` and `set_begin_index` take a timestep for the same noise level.
"""

from __future__ import annotations

import inspect
import math
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings, strategies as st

from audioldm2.schedulers import DDIMScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler
from tests.schedulers.helpers import AUDIOLDM2, THEIRS, seeded

BOUNDED = settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)

# Values of which most are wrong for most arguments.
ODD = st.one_of(
    st.sampled_from([None, True, "2", "", [], {}, (1,), math.nan, math.inf, -math.inf, 1j, b"x", object()]),
    st.sampled_from([0, 1, 2, 3, 0.5, 1.0, -0.5, 1e-9, 1e-30, 1e30, 10**8, 10**400, -1]),
    st.sampled_from([np.int64(2), np.float32(0.01), np.bool_(True), np.ones(3), torch.tensor(2)]),
    st.floats(),
    st.integers(),
)
NAMES = st.sampled_from(
    ("linear", "scaled_linear", "squaredcos_cap_v2", "epsilon", "sample", "v_prediction", "leading")
    + ("linspace", "trailing", "dpmsolver", "dpmsolver++", "sde-dpmsolver", "sde-dpmsolver++", "midpoint")
    + ("heun", "bh1", "bh2", "deis", "zero", "sigma_min", "learned", "fixed_small")
)
GOOD = {
    "num_train_timesteps": st.integers(2, 60),
    "beta_start": st.floats(1e-5, 0.3),
    "beta_end": st.floats(1e-5, 0.3),
    "beta_schedule": st.sampled_from(["linear", "scaled_linear", "squaredcos_cap_v2"]),
    "trained_betas": st.none(),
    "solver_order": st.integers(1, 3),
    "prediction_type": st.sampled_from(["epsilon", "sample", "v_prediction"]),
    "algorithm_type": st.sampled_from(["dpmsolver++", "sde-dpmsolver++", "dpmsolver", "sde-dpmsolver"]),
    "solver_type": st.sampled_from(["midpoint", "heun"]),
    "timestep_spacing": st.sampled_from(["leading", "linspace", "trailing"]),
    "final_sigmas_type": st.sampled_from(["zero", "sigma_min"]),
    "lambda_min_clipped": st.sampled_from([-math.inf, -5.1, 0.0]),
    "steps_offset": st.integers(0, 2),
    "dynamic_thresholding_ratio": st.floats(0, 1),
    "sample_max_value": st.floats(0.1, 5),
    "clip_sample_range": st.floats(0.1, 5),
    "disable_corrector": st.lists(st.integers(0, 8), max_size=3),
    "sigma_min": st.one_of(st.none(), st.floats(1e-3, 1)),
    "sigma_max": st.one_of(st.none(), st.floats(1, 1e3)),
}
SETTINGS = {cls: tuple(inspect.signature(cls).parameters) for cls in THEIRS}


SAMPLE = torch.linspace(-2, 2, 24).reshape(2, 3, 4)


@st.composite
def configs(draw: Any, cls: Any) -> dict[str, Any]:
    names = draw(st.lists(st.sampled_from(SETTINGS[cls]), unique=True, max_size=8))
    config = {}
    for name in names:
        default = inspect.signature(cls).parameters[name].default
        kind = st.booleans() if isinstance(default, bool) else st.just(default)
        config[name] = draw(GOOD.get(name, kind))
        if draw(st.integers(0, 3)) == 0:
            config[name] = draw(st.one_of(ODD, NAMES))
    return config


def attempt(function: Any, *names: str) -> Any:
    """The result; None if it is refused with an error of one line that has one of these names."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return function()
    except (ValueError, TypeError) as error:
        message = str(error)
    assert any(name in message for name in names), message
    assert "\n" not in message
    assert len(message) < 1000
    return None


def sampled(scheduler: Any, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    sample = SAMPLE.to(dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for t in scheduler.timesteps:
            output = torch.tanh(sample.float()).to(dtype)
            sample = scheduler.step(output, t, sample, **seeded(scheduler, 0)).prev_sample
    return sample


@pytest.mark.parametrize("cls", THEIRS)
@given(data=st.data())
@BOUNDED
def test_settings_and_numbers_of_steps(cls: Any, data: st.DataObject) -> None:
    config = data.draw(configs(cls))
    scheduler = attempt(lambda: cls(**config), *SETTINGS[cls])
    assert (attempt(lambda: cls.from_config(config), *SETTINGS[cls]) is None) == (scheduler is None)
    if scheduler is None:
        return
    number = data.draw(st.one_of(st.integers(1, 30), ODD))
    attempt(lambda: scheduler.set_timesteps(number), "num_inference_steps", *SETTINGS[cls])
    if scheduler.num_inference_steps is None:
        return
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float64]))
    result = sampled(scheduler, dtype)
    assert result.shape == (2, 3, 4)
    assert result.dtype == dtype
    assert result.isfinite().all(), config


@pytest.mark.parametrize("cls", THEIRS)
@given(timesteps=st.one_of(st.lists(st.one_of(st.integers(-1, 60), ODD), max_size=6), ODD), data=st.data())
@BOUNDED
@example(timesteps=np.array([49, 20, 0]), data=None)
@example(timesteps=torch.tensor([49.0, 20.0]), data=None)
@example(timesteps=np.array([[49, 20]]), data=None)
@example(timesteps="abc", data=None)
def test_given_timesteps(cls: Any, timesteps: Any, data: st.DataObject | None) -> None:
    scheduler = cls(num_train_timesteps=50, beta_end=0.3)
    number = None if data is None else data.draw(st.one_of(st.none(), st.integers(0, 3)))

    def choose() -> bool:
        scheduler.set_timesteps(number, timesteps=timesteps)
        return True

    if attempt(choose, "timesteps", "num_inference_steps") is None:
        assert scheduler.num_inference_steps is None
        return
    if timesteps is not None:
        assert scheduler.timesteps.tolist() == [int(t) for t in timesteps]
    assert sampled(scheduler).isfinite().all()


TENSORS = st.one_of(
    st.sampled_from(
        [
            SAMPLE,
            SAMPLE.half(),
            SAMPLE.double(),
            SAMPLE.int(),
            SAMPLE.to(torch.complex64),
            SAMPLE > 0,
            SAMPLE[:1],
            SAMPLE[0],
            SAMPLE[:0],
            SAMPLE.sum(),
            SAMPLE.numpy(),
        ]
    ),
    ODD,
)
STEP = ("sample", "model_output", "timestep", "eta", "generator", "variance_noise")


@pytest.mark.parametrize("cls", THEIRS)
@given(data=st.data())
@BOUNDED
def test_arguments_of_a_step(cls: Any, data: st.DataObject) -> None:
    scheduler = cls(num_train_timesteps=50, beta_end=0.3, thresholding=data.draw(st.booleans()))
    scheduler.set_timesteps(5)
    mostly = st.one_of(st.just(SAMPLE), TENSORS)
    arguments = {
        "model_output": data.draw(mostly),
        "timestep": data.draw(st.one_of(st.sampled_from([*scheduler.timesteps, 30, torch.tensor(30)]), ODD)),
        "sample": data.draw(mostly),
    }
    if cls is not UniPCMultistepScheduler:
        arguments["variance_noise"] = data.draw(st.one_of(st.none(), mostly))
    if cls is DDIMScheduler:
        arguments["eta"] = data.draw(st.one_of(st.just(0.5), ODD))
    result = attempt(lambda: scheduler.step(**arguments).prev_sample, *STEP)
    if result is not None:
        assert result.shape == arguments["sample"].shape
        assert result.isfinite().all()


@pytest.mark.parametrize("cls", THEIRS)
@pytest.mark.parametrize("method", ["add_noise", "get_velocity"])
@given(data=st.data())
@BOUNDED
def test_arguments_of_adding_noise(cls: Any, method: str, data: st.DataObject) -> None:
    scheduler = cls(num_train_timesteps=50, beta_end=0.3)
    if data.draw(st.booleans()):
        scheduler.set_timesteps(5)
    mostly = st.one_of(st.just(SAMPLE), TENSORS)
    times = st.sampled_from(
        [3, torch.tensor([3, 49]), [3, 4], np.array([1, 2]), torch.tensor([1, 2, 3]), torch.tensor([2.5])]
    )
    arguments = data.draw(mostly), data.draw(mostly), data.draw(st.one_of(times, ODD))
    result = attempt(
        lambda: getattr(scheduler, method)(*arguments), "samples", "sample", "noise", "timesteps"
    )
    if result is not None:
        assert result.shape == arguments[0].shape
        assert result.isfinite().all()


# --- partial runs

REPEATING = [
    {"use_karras_sigmas": True},
    {"use_exponential_sigmas": True},
    {"use_lu_lambdas": True},
    {"use_karras_sigmas": True, "beta_schedule": "squaredcos_cap_v2"},
    {"use_exponential_sigmas": True, "beta_schedule": "squaredcos_cap_v2"},
    {"beta_schedule": "squaredcos_cap_v2", "lambda_min_clipped": -5.1, "num_train_timesteps": 20},
    {"timestep_spacing": "leading"},
    {"timestep_spacing": "trailing"},
    {"final_sigmas_type": "sigma_min", "use_karras_sigmas": True},
]


def exact_output(scheduler: Any, x: torch.Tensor, i: int) -> torch.Tensor:
    """The output of a network that knows that every x_0 is 0.5, at the noise level of step i."""
    sigma = float(scheduler.sigmas[i])
    alpha = 1 / math.sqrt(sigma**2 + 1)
    return (x - alpha * 0.5) / (sigma * alpha)


@pytest.mark.parametrize(
    ("cls", "how", "schedule"),
    [
        (cls, how, schedule)
        for cls, how in (
            (DPMSolverMultistepScheduler, "views"),
            (DPMSolverMultistepScheduler, "index"),
            (DPMSolverMultistepScheduler, "slice"),
            (UniPCMultistepScheduler, "views"),
        )
        for schedule in REPEATING
        if schedule.keys() <= {*SETTINGS[cls]}  # UniPC lacks some
    ],
)
def test_a_partial_run_steps_from_the_level_that_was_added(
    cls: Any, how: str, schedule: dict[str, Any]
) -> None:
    """With the exact network and the right level, every x on the way is on the line from x_0 to the noise."""
    scheduler = cls(**{**AUDIOLDM2, **schedule})
    clean, noise = torch.full((2, 3), 0.5), torch.tensor([[1.0, -2.0, 0.3], [0.7, 1.5, -1.0]])
    steps = 20 if "num_train_timesteps" in schedule else 24
    for start in range(steps):
        scheduler.set_timesteps(steps)
        timesteps = scheduler.timesteps[start:]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            if how == "index":
                scheduler.set_begin_index(start)
                x = scheduler.add_noise(clean, noise, timesteps[:1].repeat(2))
            elif how == "slice":
                x = scheduler.add_noise(clean, noise, timesteps[:1])
            else:
                x = scheduler.add_noise(clean, noise, timesteps[0])
            for i, t in enumerate(timesteps, start):
                sigma = float(scheduler.sigmas[i])
                on_the_line = (clean + sigma * noise) / math.sqrt(sigma**2 + 1)
                torch.testing.assert_close(x, on_the_line, rtol=1e-3, atol=1e-3)
                noisy = scheduler.add_noise(clean, noise, t)  # as inpainting does at each step
                torch.testing.assert_close(noisy, on_the_line, rtol=1e-4, atol=1e-4)
                x = scheduler.step(exact_output(scheduler, x, i), t, x).prev_sample
        assert scheduler.step_index == steps


@pytest.mark.parametrize("schedule", REPEATING)
def test_values_are_unambiguous_or_told(schedule: dict[str, Any]) -> None:
    """A run over values either follows the run over elements, or warns at its start, or is refused."""
    scheduler = DPMSolverMultistepScheduler(**{**AUDIOLDM2, **schedule})
    steps = 20 if "num_train_timesteps" in schedule else 24

    def run(timesteps: Any, start: int) -> torch.Tensor:
        x = SAMPLE
        for i, t in enumerate(timesteps, start):
            x = scheduler.step(exact_output(scheduler, x, i), t, x).prev_sample
        return x

    scheduler.set_timesteps(steps)
    values = scheduler.timesteps.tolist()
    for start in range(steps):
        expected = run(scheduler.timesteps[start:], start)
        scheduler.set_timesteps(steps)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            try:
                found = run(values[start:], start)
            except ValueError as error:
                refused = str(error)
                found = None
        if found is None:
            assert "another of several equal timesteps" in refused
            continue
        alone = values.count(values[start]) == 1
        assert told or torch.equal(found, expected)
        assert not (alone and told)


def test_after_set_begin_index_the_next_timestep_is_checked() -> None:
    scheduler = DPMSolverMultistepScheduler(**AUDIOLDM2)
    for wrong in (-1, 1.5, "2", True):
        with pytest.raises(ValueError, match="begin_index"):
            scheduler.set_begin_index(wrong)
    scheduler.set_timesteps(10)
    with pytest.raises(ValueError, match="begin_index must be an integer from 0 to 9"):
        scheduler.set_begin_index(10)
    scheduler.set_begin_index(np.int64(3))
    assert (scheduler.begin_index, scheduler.step_index) == (3, None)
    with pytest.raises(ValueError, match="the next step is that at index 3"):
        scheduler.step(SAMPLE, scheduler.timesteps[4], SAMPLE)
    for t in scheduler.timesteps[3:]:
        scheduler.step(SAMPLE, t, SAMPLE)
    # After the last step, no noise is left to add.
    assert torch.equal(scheduler.add_noise(SAMPLE, SAMPLE + 1, scheduler.timesteps[-1:]), SAMPLE)
    scheduler.set_begin_index(8)  # begins anew
    assert scheduler.step_index is None
    scheduler.step(SAMPLE, scheduler.timesteps[8], SAMPLE)
