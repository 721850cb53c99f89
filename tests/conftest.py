"""Checkpoints that several test modules load, made once a run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.reference import SMALL, SMALL_LARGE, make_checkpoint

# The suite's stages are so small that a second thread costs more than it gives.
torch.set_num_threads(1)


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
