"""Schedulers in a pipeline's checkpoint: this package's, and those of diffusers by their class."""

from __future__ import annotations

import json
import shutil
import sys

import diffusers
import pytest

from audioldm2 import AudioLDM2Pipeline, CheckpointError, DDIMScheduler, DPMSolverMultistepScheduler
from audioldm2.checkpoints.formats import index_entry, pipeline_config, scheduler_class
from tests.checkpoints.files import edit_json
from tests.helpers import load_pipeline

FOREIGN = ["HeunDiscreteScheduler", "PNDMScheduler"]


@pytest.fixture(scope="module")
def parts(random_checkpoint):
    """All parts but the scheduler, to be loaded with one that a test has saved."""
    pipe = load_pipeline(random_checkpoint)
    return {name: getattr(pipe, name) for name in pipeline_config(vars(pipe), "") if name[0] != "_"}


def index_of(folder):
    return json.loads((folder / "model_index.json").read_text())


@pytest.mark.parametrize("name", FOREIGN)
def test_a_scheduler_of_diffusers_is_saved_and_loaded(parts, tmp_path, name):
    scheduler = getattr(diffusers, name).from_config(parts["scheduler"].config)
    AudioLDM2Pipeline(**{**parts, "scheduler": scheduler}).save_pretrained(tmp_path)
    assert index_of(tmp_path)["scheduler"] == ["diffusers", name]
    others = {part: parts[part] for part in parts if part != "scheduler"}
    loaded = load_pipeline(tmp_path, **others).scheduler
    assert type(loaded) is type(scheduler)
    saved = {key: value for key, value in scheduler.config.items() if key != "_use_default_values"}
    assert {key: loaded.config[key] for key in saved} == saved
    theirs = type(scheduler).from_pretrained(tmp_path, subfolder="scheduler")
    assert {key: theirs.config[key] for key in saved} == saved


@pytest.mark.parametrize("ours", [DDIMScheduler, DPMSolverMultistepScheduler])
def test_this_packages_class_is_used_where_there_is_one(ours):
    assert index_entry("scheduler", getattr(diffusers, ours.__name__)()) == ("diffusers", ours.__name__)
    for library in ("diffusers", "audioldm2"):
        assert scheduler_class(library, ours.__name__) is ours


def test_a_subclass_is_saved_as_the_scheduler_that_it_extends(pipe, tmp_path):
    class Mine(DDIMScheduler):
        pass

    pipe.scheduler = Mine()
    pipe.save_pretrained(tmp_path)
    assert index_of(tmp_path)["scheduler"] == ["diffusers", "DDIMScheduler"]
    assert '"DDIMScheduler"' in (tmp_path / "scheduler" / "scheduler_config.json").read_text()


def test_a_scheduler_that_could_not_be_loaded_again_is_not_saved(pipe, tmp_path):
    class Mine(diffusers.HeunDiscreteScheduler):
        pass

    for wrong in (Mine(), object(), diffusers.HeunDiscreteScheduler):
        pipe.scheduler = wrong
        with pytest.raises(
            TypeError, match=r"^scheduler is a \w+, which this package cannot save as a sched"
        ):
            pipe.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


@pytest.fixture
def heun(random_checkpoint, tmp_path):
    """A checkpoint with a scheduler of diffusers and no other part's files."""
    folder = tmp_path / "checkpoint"
    shutil.copytree(random_checkpoint / "scheduler", folder / "scheduler")
    shutil.copy(random_checkpoint / "model_index.json", folder)
    edit_json(folder / "model_index.json", scheduler=["diffusers", "HeunDiscreteScheduler"])
    return folder


def test_without_diffusers_the_error_says_what_to_do(heun, parts, monkeypatch):
    others = {part: parts[part] for part in parts if part != "scheduler"}
    assert type(load_pipeline(heun, **others).scheduler) is diffusers.HeunDiscreteScheduler
    monkeypatch.setitem(sys.modules, "diffusers", None)
    message = (
        "scheduler is diffusers' HeunDiscreteScheduler, and diffusers is not installed; pip install "
        "diffusers, or pass scheduler=DDIMScheduler, DPMSolverMultistepScheduler or UniPCMultistepScheduler"
    )
    with pytest.raises(CheckpointError, match=r"model_index\.json: ") as caught:
        AudioLDM2Pipeline.from_pretrained(heun)
    assert message in str(caught.value)
    assert load_pipeline(heun, **parts).scheduler is parts["scheduler"]


@pytest.mark.parametrize(
    ("library", "name"),
    [
        ("diffusers", "AudioLDM2Pipeline"),
        ("diffusers", "DiffusionPipeline"),
        ("diffusers", "SchedulerMixin"),
        ("diffusers", "UNet2DModel"),
        ("diffusers", "schedulers"),
        ("diffusers", "load_file"),
        ("diffusers", "NoSuchScheduler"),
        ("diffusers", "../HeunDiscreteScheduler"),
        ("diffusers", "schedulers.HeunDiscreteScheduler"),
        ("diffusers", "HeunDiscreteScheduler\n"),
        ("diffusers", "X" * 10_000 + "Scheduler"),
        ("diffusers", ["DDIMScheduler"]),
        ("diffusers", {}),
        ("audioldm2", "HeunDiscreteScheduler"),
        ("transformers", "HeunDiscreteScheduler"),
        ("os", "HeunDiscreteScheduler"),
        ("os", "DDIMScheduler"),
        (["diffusers"], "DDIMScheduler"),
        (None, "DDIMScheduler"),
    ],
)
def test_nothing_else_is_imported(heun, library, name):
    edit_json(heun / "model_index.json", scheduler=[library, name])
    with pytest.raises(CheckpointError, match=r"model_index\.json: scheduler is (of class|from) ") as caught:
        AudioLDM2Pipeline.from_pretrained(heun)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


def test_a_dummy_or_a_broken_diffusers_is_one_line(monkeypatch):
    class Namespace:
        SchedulerMixin = object

        def __getattr__(self, name: str) -> type:
            raise RuntimeError("needs torchsde\nand more")

    monkeypatch.setitem(sys.modules, "diffusers", Namespace())
    with pytest.raises(ValueError, match=r"DPMSolverSDEScheduler, which cannot be imported: needs torchsde$"):
        scheduler_class("diffusers", "DPMSolverSDEScheduler")
    monkeypatch.setattr(Namespace, "__getattr__", lambda self, name: int)  # no scheduler at all
    with pytest.raises(ValueError, match="scheduler is of class DPMSolverSDEScheduler, not DDIMScheduler, "):
        scheduler_class("diffusers", "DPMSolverSDEScheduler")


@pytest.mark.parametrize(
    "settings",
    [
        {"num_train_timesteps": 10**8},
        {"num_train_timesteps": "many"},
        {"beta_schedule": "unknown"},
        {"trained_betas": {"a": []}},
    ],
    ids=str,
)
def test_wrong_settings_of_a_scheduler_of_diffusers_are_refused(heun, parts, settings):
    edit_json(heun / "scheduler" / "scheduler_config.json", **settings)
    with pytest.raises(CheckpointError, match=r"scheduler_config\.json: ") as caught:
        AudioLDM2Pipeline.from_pretrained(heun, **{n: part for n, part in parts.items() if n != "scheduler"})
    assert "\n" not in str(caught.value)


def test_other_libraries_are_refused_for_every_part(heun):
    edit_json(heun / "model_index.json", unet=["my_unets", "AudioLDM2UNet2DConditionModel"])
    with pytest.raises(
        CheckpointError, match="unet is from my_unets, not transformers, diffusers or audioldm2"
    ):
        AudioLDM2Pipeline.from_pretrained(heun)


# --- the config of a pipeline


def test_the_config_is_that_of_diffusers_and_what_is_saved(base, tmp_path):
    ours = pipeline_config(vars(base.ours), "here")
    theirs = {
        name: value
        for name, value in base.theirs.config.items()
        if name not in ("_diffusers_version", "_name_or_path", "language_model")  # wrapped by the tests
    }
    assert {name: ours[name] for name in theirs} == theirs
    assert ours.keys() - theirs.keys() - {"_class_name"} == {
        "_diffusers_version",
        "_name_or_path",
        "language_model",
    }
    assert ours._name_or_path == "here"
    assert ours.unet == ("audioldm2", "AudioLDM2UNet2DConditionModel")
    base.ours.save_pretrained(tmp_path)
    saved = index_of(tmp_path)
    assert {**saved, "_name_or_path": "here"} == json.loads(json.dumps(dict(ours)))


def test_the_config_names_parts_that_cannot_be_saved(pipe):
    pipe.scheduler = object()
    assert pipeline_config(vars(pipe), "").scheduler == ("builtins", "object")
