"""Scripts that are run with a Python that lacks PyTorch say which one has it."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.helpers import HANGS_AFTER, ROOT


@pytest.mark.parametrize(
    "script", ["bench", "finetune", "train_tiny", "evaluate_tiny", "evaluate_editing", "teach_tiny"]
)
def test_missing_packages_are_named_in_one_line(script: str) -> None:
    # -S leaves out site-packages.
    command = [sys.executable, "-S", str(ROOT / "scripts" / script)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=HANGS_AFTER, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith(f"{script}: error: {sys.executable} has no torch, transformers")
    assert done.stderr.count("\n") == 1
