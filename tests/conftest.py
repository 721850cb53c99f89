"""Checkpoints and pipelines that several test modules use."""

from __future__ import annotations

import copy
from collections import Counter
from pathlib import Path

import pytest
import torch

from audioldm2 import AudioLDM2Pipeline
from audioldm2.runtime import capability
from tests.helpers import load_pipeline
from tests.reference import SMALL, SMALL_LARGE, SMALL_SPEECH, Both, make_checkpoint

# The suite's stages are so small that a second thread costs more than it gives.
torch.set_num_threads(1)

# The files that take longest, about half a minute and more, without having most tests. A file runs in one
# process, so these run first: begun last, one of them would keep the whole run waiting for a single process.
LONG = (
    "test_pipeline.py",
    "test_ray.py",
    "test_readme.py",
    "test_walkthrough.py",
    "test_weights_that_change.py",
    "test_web_browser.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run long files first, and of the others those with many tests."""
    sizes = Counter(item.path for item in items)
    items.sort(key=lambda item: (item.path.name not in LONG, -sizes[item.path], item.path))


@pytest.fixture(autouse=True)
def _float32_on_any_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the default dtypes of a CPU that does not multiply bfloat16 in hardware."""
    monkeypatch.setattr(capability, "multiplies_bfloat16", lambda: False)


def _quietly_made(folder: Path, sizes: dict[str, dict]) -> Path:
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return make_checkpoint(folder, sizes)


@pytest.fixture(scope="session")
def random_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small checkpoint in the base layout; copy it before writing to it."""
    return _quietly_made(tmp_path_factory.mktemp("checkpoints") / "random", SMALL)


@pytest.fixture(scope="session")
def random_large_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small checkpoint in -large's layout; copy it before writing to it."""
    return _quietly_made(tmp_path_factory.mktemp("checkpoints") / "random-large", SMALL_LARGE)


@pytest.fixture(scope="session")
def random_speech_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small checkpoint in the speech checkpoints' layout; copy it before writing to it."""
    return _quietly_made(tmp_path_factory.mktemp("checkpoints") / "random-speech", SMALL_SPEECH)


@pytest.fixture(scope="session")
def _pipe(random_checkpoint: Path) -> AudioLDM2Pipeline:
    return load_pipeline(random_checkpoint)


@pytest.fixture
def pipe(_pipe: AudioLDM2Pipeline) -> AudioLDM2Pipeline:
    """A pipeline of the test's own, in the base layout. A copy takes half as long as loading."""
    return copy.deepcopy(_pipe)


# --- diffusers' pipeline and ours side by side; tests replace their schedulers, but no other parts


@pytest.fixture(scope="session")
def _base(random_checkpoint: Path) -> Both:
    return Both(random_checkpoint)


@pytest.fixture(scope="session")
def _large(random_large_checkpoint: Path) -> Both:
    return Both(random_large_checkpoint)


@pytest.fixture
def base(_base: Both) -> Both:
    """Both pipelines in the base layout, with DDIM."""
    _base.use("DDIMScheduler")
    return _base


@pytest.fixture
def large(_large: Both) -> Both:
    """Both pipelines in -large's layout, with DDIM."""
    _large.use("DDIMScheduler")
    return _large


@pytest.fixture(params=["base", "large"])
def both(request: pytest.FixtureRequest) -> Both:
    """Both pipelines in one layout after the other, with DDIM."""
    pair: Both = request.getfixturevalue(request.param)
    return pair


@pytest.fixture(scope="session")
def speech(random_speech_checkpoint: Path) -> Both:
    """Both pipelines in the speech checkpoints' layout."""
    return Both(random_speech_checkpoint)
