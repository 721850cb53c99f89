"""What several test modules share: seeded noise, short sounds, and processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from audioldm2 import AudioLDM2Pipeline

ROOT = Path(__file__).resolve().parent.parent  # of the checkout
HAMMER = "A hammer hitting a wooden surface."
RAIN = "Rain falls on a tin roof"
# Seconds after which a process is taken to hang. It is no measure of speed: a busy machine may need minutes.
HANGS_AFTER = 540


def seeded(seed: int = 0) -> torch.Generator:
    """A generator of random numbers on the CPU."""
    return torch.Generator().manual_seed(seed)


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normally distributed numbers."""
    return torch.randn(shape, generator=seeded(seed), dtype=dtype)


def load_pipeline(folder: str | Path, **options: Any) -> AudioLDM2Pipeline:
    """A pipeline that shows no progress bars."""
    pipe = AudioLDM2Pipeline.from_pretrained(folder, **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sound(
    pipe: AudioLDM2Pipeline, prompt: str | list[str] | None = HAMMER, *, seed: int = 0, **arguments: Any
) -> Any:
    """The result of a short generation: two steps and 0.32 s, unless the arguments say otherwise."""
    arguments = {"num_inference_steps": 2, "audio_length_in_s": 0.32, **arguments}
    return pipe(prompt, generator=seeded(seed), **arguments).audios


def assert_same_sound(actual: np.ndarray, expected: np.ndarray, tolerance: float = 1e-3) -> None:
    """Waveforms in [-1, 1] of the same shape and dtype, audible, and at most `tolerance` apart."""
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype
    assert np.isfinite(actual).all()
    assert expected.std() > 0.02, "comparing silence proves nothing"
    assert np.abs(actual - expected).max() <= tolerance


def run_python(
    *arguments: str | Path, cwd: Path = ROOT, path: Path = ROOT, check: bool = True, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run Python in a process of its own, with the packages of a checkout, on one thread.

    Args:
        arguments: of the interpreter, such as "-c" and a script.
        cwd: the working directory.
        path: the checkout.
        check: fail if the exit code is not 0.
        environment: additional environment variables.
    """
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(path), "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=HANGS_AFTER,
        check=False,
    )
    if check:
        assert done.returncode == 0, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done
