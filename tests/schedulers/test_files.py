"""Schedulers in files: saved and loaded by this package and by diffusers, from folders and from "tiny"."""

from __future__ import annotations

import inspect
import json
import os
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from audioldm2.checkpoints import hub
from audioldm2.checkpoints.errors import CheckpointError
from audioldm2.schedulers import SCHEDULERS, DDIMScheduler, DPMSolverMultistepScheduler
from audioldm2.schedulers.config import OTHER_SETTINGS
from tests.schedulers.helpers import AUDIOLDM2, THEIRS, assert_close, sampling_run

CLASSES = [*THEIRS]


def written(folder: Path, content: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "scheduler_config.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


# --- loading


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("arguments", [{}, {"subfolder": "scheduler"}])
def test_the_tiny_checkpoint(cls: Any, arguments: dict[str, str]) -> None:
    scheduler = cls.from_pretrained("tiny", **arguments)
    assert type(scheduler) is cls
    assert scheduler.config.beta_end == 0.0195
    assert scheduler.config.rescale_betas_zero_snr is True
    assert scheduler.config["_class_name"] == cls.__name__
    theirs = THEIRS[cls].from_pretrained(hub.TINY_FOLDER, subfolder="scheduler")
    assert_close(sampling_run(scheduler, 5), sampling_run(theirs, 5))


@pytest.mark.parametrize("cls", CLASSES)
def test_a_folder_in_every_form(cls: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written(tmp_path / "checkpoint" / "scheduler", {**AUDIOLDM2, "_class_name": "PNDMScheduler"})
    monkeypatch.chdir(tmp_path)
    folder = Path("checkpoint")
    for scheduler in (
        cls.from_pretrained("checkpoint", subfolder="scheduler"),
        cls.from_pretrained(folder, "scheduler"),
        cls.from_pretrained(pretrained_model_name_or_path=folder),
        cls.from_pretrained(folder / "scheduler"),
        cls.from_pretrained("checkpoint/scheduler", local_files_only=True, revision=None, token=None),
        cls.from_config(cls.load_config(folder, subfolder="scheduler")),
    ):
        assert scheduler.config.beta_start == 0.0015
        assert scheduler.config["_class_name"] == cls.__name__
    changed = cls.from_pretrained(folder, subfolder="scheduler", beta_end=0.05)
    assert (changed.config.beta_start, changed.config.beta_end) == (0.0015, 0.05)


def test_the_hub_is_asked_for_the_subfolder_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written(tmp_path / "scheduler", AUDIOLDM2)
    asked = []

    def find(source: hub.Source, folders: list[str], *, first_file: str) -> Path:
        asked.append((source, folders, first_file))
        return tmp_path

    monkeypatch.setattr(hub, "checkpoint_folder", find)
    options = {"revision": "main", "cache_dir": tmp_path, "token": "x", "local_files_only": True}
    DDIMScheduler.from_pretrained("cvssp/audioldm2", subfolder="scheduler", **options)
    DDIMScheduler.from_pretrained("cvssp/audioldm2", **options)
    source = hub.Source("cvssp/audioldm2", None, "main", tmp_path, "x", True)
    assert asked == [(source, ["scheduler"], "scheduler_config.json")] * 2


@pytest.mark.parametrize("cls", CLASSES)
def test_errors_name_the_file(cls: Any, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"scheduler_config\.json is missing"):
        cls.from_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="neither a local folder"):
        cls.from_pretrained(tmp_path / "nothing")
    written(tmp_path / "a", {"beta_start": "small"})
    with pytest.raises(CheckpointError, match=r"a.scheduler_config.json: beta_start must be a number"):
        cls.from_pretrained(tmp_path / "a")
    written(tmp_path / "b", AUDIOLDM2)
    with pytest.raises(TypeError, match="'solver_ordre' is not a setting"):
        cls.from_pretrained(tmp_path / "b", solver_ordre=3)
    with pytest.raises(ValueError, match="beta_end must be a number"):
        cls.from_pretrained(tmp_path / "b", beta_end="0.1")
    written(tmp_path / "c", [])
    with pytest.raises(CheckpointError, match="JSON object"):
        cls.from_pretrained(tmp_path / "c")


# --- saving


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("method", ["save_pretrained", "save_config"])
def test_a_saved_scheduler_is_the_same_in_both_packages(cls: Any, method: str, tmp_path: Path) -> None:
    settings = {
        **AUDIOLDM2,
        "prediction_type": "v_prediction",
        "trained_betas": np.linspace(0.001, 0.02, 1000),
    }
    ours = cls(**settings, steps_offset=np.int64(1))
    getattr(ours, method)(tmp_path / "new" / "folder")
    again = cls.from_pretrained(tmp_path / "new" / "folder")
    assert {k: v for k, v in ours.config.items() if k != "_use_default_values"} == again.config
    theirs = THEIRS[cls].from_pretrained(str(tmp_path / "new" / "folder"))
    for other in (again, theirs):
        assert_close(sampling_run(ours, 6), sampling_run(other, 6))
    theirs.save_pretrained(tmp_path / "theirs")
    assert_close(sampling_run(cls.from_pretrained(tmp_path / "theirs"), 6), sampling_run(ours, 6))
    assert os.listdir(tmp_path / "new" / "folder") == ["scheduler_config.json"]
    with pytest.raises(ValueError, match="push_to_hub"):
        getattr(ours, method)(tmp_path, push_to_hub=True)


# --- conversion


def test_compatibles() -> None:
    scheduler = DDIMScheduler(**AUDIOLDM2)
    classes = {one.__name__: one for one in scheduler.compatibles}
    assert scheduler.has_compatibles
    assert classes["DDIMScheduler"] is DDIMScheduler
    assert classes["DPMSolverMultistepScheduler"] is DPMSolverMultistepScheduler
    assert classes["EulerDiscreteScheduler"] is diffusers.EulerDiscreteScheduler
    for one in classes.values():
        other = one.from_config(scheduler.config)
        assert DDIMScheduler.from_config(other.config).config.beta_start == 0.0015


def test_compatibles_without_diffusers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert DDIMScheduler().compatibles == [*SCHEDULERS.values()]


def test_settings_of_diffusers_other_samplers_are_known() -> None:
    """So that a checkpoint whose config has one loads without a warning."""
    own = set().union(*(inspect.signature(cls).parameters for cls in CLASSES))
    for name in diffusers.DDIMScheduler._compatibles:
        cls = getattr(diffusers, name)
        if not hasattr(cls, "_backends"):
            assert set(inspect.signature(cls).parameters) <= own | OTHER_SETTINGS


@pytest.mark.parametrize("cls", CLASSES)
def test_settings_without_effect_are_told(cls: Any) -> None:
    with pytest.warns(UserWarning, match="settings without effect on .*: beta_strat=0.1"):
        cls.from_config({"_class_name": "DDIMScheduler", "beta_strat": 0.1})
    foreign = {"_class_name": "MySchedulerOfMine", "strange": 1}
    scheduler, unused = cls.from_config(foreign, return_unused_kwargs=True, sigma_data=0.1, typo=3)
    assert unused == {"sigma_data": 0.1, "typo": 3, "_class_name": cls.__name__, "strange": 1}
    assert "typo" not in scheduler.config
    assert scheduler.config["strange"] == 1
    with pytest.warns(UserWarning, match="overrides without effect on .*: sigma_data=0.1"):
        cls.from_config({}, sigma_data=0.1)
    with pytest.raises(TypeError, match="typo"):
        cls.from_config({}, typo=3)
    with pytest.raises(TypeError, match="strings"):
        cls.from_config({1: 2})
    with pytest.raises(ValueError, match="_use_default_values"):
        cls.from_config({"_use_default_values": 3})


def test_a_lost_setting_of_the_training_is_told() -> None:
    from audioldm2.schedulers.base import Scheduler
    from audioldm2.schedulers.config import records_settings

    class Plain(Scheduler):
        @records_settings
        def __init__(
            self,
            num_train_timesteps: int = 1000,
            beta_start: float = 0.0001,
            beta_end: float = 0.02,
            beta_schedule: str = "linear",
            trained_betas: Any = None,
        ):
            super().__init__()

        def set_timesteps(self, *args: Any) -> None: ...

        def step(self, *args: Any) -> Any: ...

    Plain.from_config(DDIMScheduler(**AUDIOLDM2, prediction_type="epsilon").config)
    for lost in ({"rescale_betas_zero_snr": True}, {"prediction_type": "v_prediction"}):
        with pytest.warns(UserWarning, match=f"training without effect on Plain: {next(iter(lost))}="):
            Plain.from_config(DDIMScheduler(**AUDIOLDM2, **lost).config)


@pytest.mark.parametrize("cls", CLASSES)
def test_a_config_as_keyword_arguments(cls: Any) -> None:
    first = cls(**AUDIOLDM2)
    second = cls(**first.config)
    assert second.config == first.config
    assert cls.from_config(second.config).config == first.config


@pytest.mark.parametrize("cls", CLASSES)
def test_attributes(cls: Any) -> None:
    scheduler, theirs = cls(**AUDIOLDM2), THEIRS[cls](**AUDIOLDM2)
    assert len(scheduler) == len(theirs) == 1000
    assert (scheduler.config_name, scheduler.order, scheduler.init_noise_sigma) == (
        "scheduler_config.json",
        1,
        1,
    )
    for name in (
        "betas",
        "alphas",
        "alphas_cumprod",
        "alpha_t",
        "sigma_t",
        "lambda_t",
        "final_alpha_cumprod",
    ):
        assert hasattr(scheduler, name) == hasattr(theirs, name)
        if hasattr(theirs, name):
            torch.testing.assert_close(getattr(scheduler, name), getattr(theirs, name))
    for name in ("step_index", "begin_index", "set_begin_index"):
        assert hasattr(scheduler, name) == hasattr(theirs, name)
    assert "beta_start" in repr(scheduler)
    scheduler.register_to_config(extra=3, steps_offset=np.int32(2))
    assert scheduler.config.extra == 3
    assert scheduler.config.steps_offset == 2
    with pytest.raises(ValueError, match="steps_offset"):
        scheduler.register_to_config(steps_offset="2")
    with pytest.warns(FutureWarning, match="config.beta_end"):
        assert scheduler.beta_end == 0.0195
    with pytest.raises(AttributeError, match="object has no attribute 'beta_strat'"):
        _ = scheduler.beta_strat
