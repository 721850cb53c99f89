"""JSON files with values of any kind load, or are refused in one line that names the file."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from audioldm2 import ClapFeatureExtractor, DDIMScheduler, LogMel
from audioldm2.checkpoints.errors import CheckpointError
from audioldm2.checkpoints.formats import INDEX, PARTS, read_index
from audioldm2.checkpoints.recommended import SETTINGS_FILE, read_settings
from tests.checkpoints.files import load

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([0, 1, -1, 2**31 - 1, 2**63, 10**400, 1e308]),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(["\x1b[31m", "null", "../../etc/passwd", "x" * 5000]),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
# Each JSON file, and what reads it.
READERS: dict[str, Callable[[Path], Any]] = {
    **{f"{part}/config.json": lambda folder, part=part: load(folder, part) for part in PARTS},
    "scheduler/scheduler_config.json": lambda folder: DDIMScheduler.from_pretrained(folder / "scheduler"),
    "feature_extractor/preprocessor_config.json": lambda folder: ClapFeatureExtractor.from_pretrained(
        folder / "feature_extractor"
    ),
    INDEX: read_index,
    SETTINGS_FILE: lambda folder: (read_settings(folder), LogMel.from_pretrained(folder)),
}


@pytest.fixture(scope="module")
def checkpoint(random_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("properties") / "checkpoint"
    shutil.copytree(random_checkpoint, folder)
    recommended = {"num_inference_steps": 20, "guidance_scale": 2.0}
    (folder / SETTINGS_FILE).write_text(json.dumps({"recommended": recommended, "log_mel": {"n_fft": 1024}}))
    return folder


@pytest.mark.parametrize("file", READERS)
@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=[*HealthCheck])
@given(data=st.data())
def test_values_of_any_kind_load_or_are_refused(checkpoint: Path, file: str, data: st.DataObject) -> None:
    path = checkpoint / file
    original = path.read_text()
    content = json.loads(original)
    inside = content
    # Into an object in the file, as often as not.
    nested = [key for key, value in content.items() if isinstance(value, dict) and value]
    if nested and data.draw(st.booleans()):
        inside = content[data.draw(st.sampled_from(nested))]
    key = data.draw(st.sampled_from([*inside, "unknown"]))
    inside[key] = data.draw(VALUES)
    whole = data.draw(st.sampled_from([content] * 9 + [inside[key]]))
    try:
        path.write_text(json.dumps(whole))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            READERS[file](checkpoint)
    except CheckpointError as error:
        message = str(error)
    else:
        message = None
    finally:
        path.write_text(original)
    if message is not None:
        assert file in message or path.parent.name in message, message
        assert message.isprintable(), message
        assert len(message) < 4000  # all misfits of a stage, of which 16 are listed
