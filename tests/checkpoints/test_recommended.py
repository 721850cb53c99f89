"""audioldm2.json: the settings that a checkpoint recommends."""

from __future__ import annotations

import copy
import json
import pickle

import pytest

from audioldm2 import AudioLDM2Pipeline, CheckpointError, DPMSolverMultistepScheduler
from audioldm2.checkpoints.recommended import read_settings
from tests.helpers import load_pipeline

SETTINGS = {
    "num_inference_steps": 3,
    "guidance_scale": 2.5,
    "negative_prompt": "Low quality",
    "audio_length_in_s": 0.64,
}


def write(folder, content: object) -> None:
    (folder / "audioldm2.json").write_text(content if isinstance(content, str) else json.dumps(content))


def test_tiny_recommends_what_its_model_card_says():
    pipe = load_pipeline("tiny")
    assert dict(pipe.recommended) == {"num_inference_steps": 20, "guidance_scale": 2.0}
    assert type(pipe.scheduler) is DPMSolverMultistepScheduler
    assert pipe.scheduler.default_num_inference_steps == 20


def test_the_call_takes_what_is_recommended_and_saving_keeps_it(checkpoint, tmp_path):
    write(checkpoint, {"recommended": SETTINGS, "log_mel": {"n_fft": 1024}})
    pipe = copy.deepcopy(load_pipeline(checkpoint))
    assert pipe.recommended == SETTINGS
    assert pipe.recommended.guidance_scale == 2.5
    with pytest.raises(TypeError, match="does not support item assignment"):
        pipe.recommended["guidance_scale"] = 3.5
    assert pickle.loads(pickle.dumps(pipe.recommended)) == pipe.recommended
    assert pipe("A hammer hits wood, twice", **pipe.recommended).audios.shape == (1, 10240)
    pipe.save_pretrained(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "audioldm2.json").read_text())
    assert saved == {"recommended": SETTINGS, "log_mel": {"n_fft": 1024}}


def test_a_checkpoint_without_the_file_recommends_nothing(checkpoint, pipe):
    assert pipe.recommended == {}
    write(checkpoint, {"recommended": SETTINGS})  # of an earlier save
    pipe.save_pretrained(checkpoint)
    assert not (checkpoint / "audioldm2.json").exists()


def test_what_cannot_be_recommended_is_not_saved(pipe, tmp_path):
    for wrong in ({"guidance": 2}, {"guidance_scale": "2"}):
        pipe.recommended = wrong
        with pytest.raises(ValueError, match="guidance"):
            pipe.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_settings_that_a_later_version_may_know_are_left_out_with_a_warning(tmp_path):
    write(tmp_path, {"recommended": {**SETTINGS, "rho\x1b": 7}, "other": 3})
    with pytest.warns(UserWarning, match=r"audioldm2.json: .*not known are ignored: \['rho\\x1b'\]"):
        assert read_settings(tmp_path) == {"recommended": SETTINGS, "other": 3}


@pytest.mark.parametrize(
    "content",
    [
        "{",
        [],
        {"recommended": 3},
        *(
            {"recommended": {name: value}}
            for name, values in {
                "num_inference_steps": (0, -1, 20.0, "20", True, None, 10**9, [20]),
                "guidance_scale": ("2", None, True, 1e9, 10**400, float("nan"), float("inf")),
                "negative_prompt": (None, 3, ["Low quality"], "x" * 2000, "\ud800"),
                "audio_length_in_s": (0, -1, "5", 10**6, 10**400, float("nan"), None),
            }.items()
            for value in values
        ),
    ],
    ids=lambda content: str(content)[:40],
)
def test_values_that_are_not_possible_are_refused(tmp_path, content):
    write(tmp_path, content)
    with pytest.raises(CheckpointError, match=r"audioldm2\.json") as caught:
        read_settings(tmp_path)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


def test_a_wrong_file_is_refused_when_the_checkpoint_is_loaded(checkpoint):
    write(checkpoint, {"recommended": {"guidance_scale": "high"}})
    with pytest.raises(CheckpointError, match=r"audioldm2\.json: guidance_scale must be a finite number"):
        AudioLDM2Pipeline.from_pretrained(checkpoint)
