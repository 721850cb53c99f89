"""The data that the tests of training share, made once per run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from scripts.random_checkpoint import write_random_checkpoint
from scripts.tiny.data.library import Library, make_library
from scripts.tiny.sizes import MAX_TOKENS, TINY
from scripts.tiny.stages import clap, language, ranking, vocoder


@pytest.fixture(scope="session", autouse=True)
def _few_validation_sounds() -> Iterator[None]:
    """Stages print what they learned, measured on few sounds here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(clap, "RETRIEVAL_ROUNDS", 1)
        patch.setattr(language, "UNSEEN_SOUNDS", 2)
        patch.setattr(ranking, "RETRIEVAL_ROUNDS", 1)
        patch.setattr(ranking, "UNSEEN_SOUNDS", 2)
        patch.setattr(ranking, "SAMPLER_STEPS", 2)
        patch.setattr(vocoder, "UNSEEN_SOUNDS", 2)
        yield


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
