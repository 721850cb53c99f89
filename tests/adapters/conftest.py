"""A pipeline whose UNet has every kind of layer and few of each."""

from __future__ import annotations

import copy

import pytest

from audioldm2 import AudioLDM2Pipeline
from tests.adapters.helpers import our_unet


@pytest.fixture(scope="session")
def _adapted(_pipe: AudioLDM2Pipeline) -> AudioLDM2Pipeline:
    return AudioLDM2Pipeline(**{**_pipe.components, "unet": our_unet()})


@pytest.fixture
def pipe(_adapted: AudioLDM2Pipeline) -> AudioLDM2Pipeline:
    """A pipeline of the test's own: a test may convert any of its stages."""
    pipe = copy.deepcopy(_adapted)
    pipe.set_progress_bar_config(disable=True)
    return pipe
