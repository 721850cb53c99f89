"""The data that the tests of training share, made once per run."""

from __future__ import annotations

from pathlib import Path

import pytest

from scripts.random_checkpoint import write_random_checkpoint
from scripts.tiny.data.library import Library, make_library
from scripts.tiny.sizes import MAX_TOKENS, TINY


@pytest.fixture(scope="session")
def library() -> Library:
    """Eight sounds."""
    return make_library(8, seed=0)


@pytest.fixture(scope="session")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of the tiny one's sizes with random weights; copy it before writing to it."""
    folder = tmp_path_factory.mktemp("parts")
    write_random_checkpoint(folder, TINY, limits=MAX_TOKENS)
    return folder
