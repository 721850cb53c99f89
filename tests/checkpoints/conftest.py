from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from torch import nn

from audioldm2.checkpoints.formats import PARTS
from tests.checkpoints.files import load


@pytest.fixture
def checkpoint(random_checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of the small random checkpoint, to be changed."""
    return Path(shutil.copytree(random_checkpoint, tmp_path / "checkpoint"))


@pytest.fixture(scope="module")
def stages(random_checkpoint: Path) -> dict[str, nn.Module]:
    """All stages, from safetensors."""
    return {part: load(random_checkpoint, part) for part in PARTS}
