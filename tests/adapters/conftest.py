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
    """A pipeline whose UNet is the test's own; the other parts are shared."""
    pipe = AudioLDM2Pipeline(**{**_adapted.components, "unet": copy.deepcopy(_adapted.unet)})
    pipe.set_progress_bar_config(disable=True)
    return pipe
