"""The garbage collector is paused while a checkpoint is loaded, and only then."""

from __future__ import annotations

import gc
import weakref

import pytest

from audioldm2 import AudioLDM2Pipeline
from audioldm2.checkpoints import folder
from audioldm2.checkpoints.errors import CheckpointError
from audioldm2.checkpoints.folder import checkpoint_folder, load_stage
from audioldm2.checkpoints.formats import PARTS
from audioldm2.runtime.garbage import without_garbage_collection


@pytest.fixture(autouse=True)
def collector():
    """Whatever a test does, the collector runs after it."""
    yield
    gc.enable()


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("error", [None, ValueError])
def test_the_collector_is_as_before_afterwards(enabled, error):
    if not enabled:
        gc.disable()
    try:
        with without_garbage_collection():
            assert not gc.isenabled()
            if error:
                raise error
    except ValueError:
        pass
    assert gc.isenabled() is enabled


def test_blocks_that_overlap_leave_the_collector_on():
    first, second = without_garbage_collection(), without_garbage_collection()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    second.__exit__(None, None, None)
    assert gc.isenabled()


def test_loading_does_not_collect(random_checkpoint, tmp_path, monkeypatch):
    enabled = []

    def recorded(*arguments):
        enabled.append(gc.isenabled())
        return load_stage(*arguments)

    def found(*arguments, **more):
        assert gc.isenabled()  # a download takes minutes
        return checkpoint_folder(*arguments, **more)

    monkeypatch.setattr(folder, "load_stage", recorded)
    monkeypatch.setattr(folder, "checkpoint_folder", found)
    pipe = AudioLDM2Pipeline.from_pretrained(random_checkpoint)
    assert len(enabled) == len(PARTS)
    assert not any(enabled)
    assert gc.isenabled()
    with pytest.raises(CheckpointError):
        AudioLDM2Pipeline.from_pretrained(tmp_path)
    assert gc.isenabled()

    # Otherwise the memory of one pipeline would not be free for the next.
    gc.disable()
    unet = weakref.ref(pipe.unet)
    del pipe
    assert unet() is None
