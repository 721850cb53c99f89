"""The settings of the samplers: `config`, `from_config` and `config_dict` against diffusers."""

from __future__ import annotations

import copy
import inspect
import json
import math
import pickle
import subprocess
import sys

import diffusers
import pytest
import torch

from audioldm2.schedulers import (
    SAMPLERS,
    SCHEDULERS,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    UniPCMultistepScheduler,
)
from tests.schedulers.helpers import AUDIOLDM2, THEIRS, assert_close, sampling_run


def plain(config):
    """A config without the library's version, and with the settings left at their defaults in order."""
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
    for source in across.values():  # each library reads the other's `config`
        converted = other.from_config(source.config), THEIRS[other].from_config(source.config)
        assert plain(converted[0].config) == plain(converted[1].config)
        back = cls.from_config(converted[0].config), THEIRS[cls].from_config(converted[1].config)
        assert plain(back[0].config) == plain(back[1].config)
        assert_close(sampling_run(converted[0], 5), sampling_run(converted[1], 5))
        assert_close(sampling_run(back[0], 5), sampling_run(back[1], 5))


def test_from_config_takes_own_defaults_and_overrides():
    unstated = DDIMScheduler(**AUDIOLDM2)
    assert unstated.config.timestep_spacing == "leading"
    assert DPMSolverMultistepScheduler.from_config(unstated.config).config.timestep_spacing == "linspace"
    stated = DDIMScheduler(**AUDIOLDM2, timestep_spacing="leading")
    assert DPMSolverMultistepScheduler.from_config(stated.config).config.timestep_spacing == "leading"
    over = {"solver_order": 3, "timestep_spacing": "trailing", "clip_sample": True}
    theirs = diffusers.DPMSolverMultistepScheduler.from_config(unstated.config, **over)
    with pytest.warns(UserWarning, match="overrides without effect on DPMSolver.*: clip_sample=True"):
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
    assert_close(sampling_run(ours, 6), sampling_run(theirs, 6))
    theirs.save_pretrained(tmp_path)
    ours = cls.from_config(json.loads((tmp_path / "scheduler_config.json").read_text()))
    assert_close(sampling_run(ours, 6), sampling_run(theirs, 6))
    assert ours.config_dict()["_class_name"] == cls.__name__
    assert SCHEDULERS[cls.__name__] is cls


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
        {"trained_betas": ["a"] * 1000},
        {"trained_betas": [1e-9] * 1000},
        {"num_train_timesteps": 10**8},
        {"num_train_timesteps": "1000"},
        {"num_train_timesteps": True},
        {"beta_start": math.nan},
        {"beta_start": "0.1"},
        {"beta_start": 1e-9},
        {"beta_end": 0.999},
        {"steps_offset": -1},
        {"steps_offset": 10**30},
        {"steps_offset": 1.5},
        {"sample_max_value": 0},
        {"rescale_betas_zero_snr": "false"},
        {"thresholding": 1},
        {"timestep_spacing": ["leading"]},
    ],
)
@pytest.mark.parametrize("cls", THEIRS)
def test_bad_settings(cls, settings):
    name = next(iter(settings))
    with pytest.raises(ValueError, match=name):
        cls(**settings)
    with pytest.raises(ValueError, match=name):
        cls.from_config(settings)


@pytest.mark.parametrize("cls", THEIRS)
def test_bad_from_config(cls):
    with pytest.raises(TypeError, match="mapping"):
        cls.from_config("cvssp/audioldm2")
    with pytest.raises(TypeError, match="'solver_ordre'"):
        cls.from_config({}, solver_ordre=2)


# ---------------------------------------------------------------- signatures and the table


@pytest.mark.parametrize("cls", THEIRS)
def test_signature_is_that_of_diffusers(cls):
    ours, theirs = inspect.signature(cls).parameters, inspect.signature(THEIRS[cls]).parameters
    assert list(ours) == list(theirs)
    for name, parameter in ours.items():
        assert parameter.default == theirs[name].default, name
        assert parameter.annotation is not inspect.Parameter.empty, name


@pytest.mark.parametrize("cls", THEIRS)
def test_positional_settings(cls):
    positional, named = (
        cls(500, 0.001, 0.01, "scaled_linear"),
        cls(num_train_timesteps=500, beta_start=0.001, beta_end=0.01, beta_schedule="scaled_linear"),
    )
    assert positional.config == named.config
    assert "beta_end" not in positional.config["_use_default_values"]
    with pytest.raises(TypeError, match="beta_stop"):
        cls(beta_stop=0.01)


def test_table_of_samplers():
    assert {
        "DDIMScheduler": DDIMScheduler,
        "DPMSolverMultistepScheduler": DPMSolverMultistepScheduler,
        "UniPCMultistepScheduler": UniPCMultistepScheduler,
    } == SCHEDULERS
    assert [class_name for _, class_name in SAMPLERS.values()] == list(SCHEDULERS)


def test_table_is_read_without_torch():
    code = "import sys; from audioldm2.schedulers import SAMPLERS; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
