"""docs/adding-a-sampler.md, followed to the letter in a copy of the package, adds a sampler that denoises."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import diffusers
import pytest

from audioldm2.schedulers import DDIMScheduler
from tests.helpers import ROOT, run_python
from tests.pages import files_of, follow
from tests.schedulers.helpers import AUDIOLDM2, NOISE, assert_close, network

PAGE = ROOT / "docs" / "adding-a-sampler.md"


def test_the_page_adds_a_sampler_that_works(tmp_path: Path) -> None:
    checkout = tmp_path / "checkout"
    script = follow(PAGE, checkout, "schedulers/__init__.py")
    assert script.count("assert ") >= 3
    checks = """
assert isinstance(pipe.scheduler, AdamsBashforthScheduler)
assert pipe.scheduler.config.beta_end == 0.0195
assert pipe.scheduler.config.rescale_betas_zero_snr is True
assert pipe.scheduler.num_inference_steps == 20
assert audio.std() > 0.001
"""
    run_python("-c", script + checks, cwd=tmp_path, path=checkout)
    assert (tmp_path / "bell.wav").stat().st_size > 10_000


@pytest.fixture(scope="module")
def sampler(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The class of the page's first snippet."""
    path = tmp_path_factory.mktemp("page") / "adams_bashforth.py"
    ((_, code),) = files_of(PAGE)
    path.write_text(code, encoding="utf-8")
    spec = importlib.util.spec_from_file_location("adams_bashforth", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "adams_bashforth", module)  # where NamedTuple looks up annotations
        spec.loader.exec_module(module)
    return module.AdamsBashforthScheduler


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize(("spacing", "steps"), [("leading", 20), ("trailing", 10)])
def test_the_sampler_equals_diffusers(sampler: Any, prediction: str, spacing: str, steps: int) -> None:
    """diffusers' linear multistep sampler of order 2, which works on y = x / alpha."""
    settings = {**AUDIOLDM2, "prediction_type": prediction, "timestep_spacing": spacing}
    ours, theirs = sampler(**settings), diffusers.LMSDiscreteScheduler(**settings)
    ours.set_timesteps(steps)
    theirs.set_timesteps(steps)
    assert ours.timesteps.tolist() == theirs.timesteps.tolist()
    x, y = NOISE, NOISE * float(theirs.sigmas[0] ** 2 + 1) ** 0.5
    for i, t in enumerate(ours.timesteps):
        y = theirs.step(network(theirs.scale_model_input(y, t), t), t, y, order=2).prev_sample
        x = ours.step(network(x, t), t, x).prev_sample
        assert_close(x, y / (theirs.sigmas[i + 1] ** 2 + 1) ** 0.5)


def test_the_first_step_is_that_of_ddim(sampler: Any) -> None:
    samples = []
    for scheduler in (sampler(**AUDIOLDM2), DDIMScheduler(**AUDIOLDM2, clip_sample=False)):
        scheduler.set_timesteps(20)
        t = scheduler.timesteps[0]
        samples.append(scheduler.step(network(NOISE, t), t, NOISE).prev_sample)
    assert_close(*samples)


def test_the_sampler_has_what_the_base_class_gives(sampler: Any) -> None:
    scheduler = sampler.from_config(DDIMScheduler(**AUDIOLDM2, steps_offset=1, clip_sample=False).config)
    assert scheduler.config.beta_end == 0.0195
    assert scheduler.config.steps_offset == 1
    assert DDIMScheduler.from_config(scheduler.config).config.clip_sample is False
    with pytest.raises(ValueError, match="beta_schedule"):
        sampler(beta_schedule="sigmoid")
    with pytest.raises(ValueError, match="call set_timesteps"):
        scheduler.step(NOISE, 1, NOISE)
    with pytest.raises(ValueError, match="outside 0 to 999"):
        scheduler.set_timesteps(1000)
    scheduler.set_timesteps(10)
    with pytest.raises(ValueError, match="not in this sampling run"):
        scheduler.step(NOISE, 5, NOISE)
