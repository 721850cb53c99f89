"""What the tests of the scripts share."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from scripts.tiny.run import Run
from tests.helpers import HANGS_AFTER, ROOT

SHIPPED = ROOT / "audioldm2" / "tiny"


def run_script(name: str, *arguments: str | Path, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Run a Python script of scripts/ as a user does: in a process of its own, from a plain checkout."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONPATH", None)
    command = [sys.executable, str(ROOT / "scripts" / name), *map(str, arguments)]
    return subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=HANGS_AFTER
    )


def load_script(name: str) -> Any:
    """A Python script of scripts/ as a module."""
    loader = SourceFileLoader(name, str(ROOT / "scripts" / name))
    spec = spec_from_loader(name, loader)
    assert spec is not None
    module = module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, name, module)  # its dataclasses look themselves up there
        loader.exec_module(module)
    return module


def call_main(
    main: Callable[[Sequence[str]], None], *arguments: str | Path
) -> subprocess.CompletedProcess[str]:
    """Call a script's `main` in this process, which saves the script's start-up."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    words = [str(word) for word in arguments]
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main(words)
        except SystemExit as stop:
            # As the interpreter does: a message goes to the standard error, and the exit code is 1.
            code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
            if isinstance(stop.code, str):
                print(stop.code, file=err)
    return subprocess.CompletedProcess(words, code, out.getvalue(), err.getvalue())


def run_without(parts: Path, folder: Path, *missing: str) -> Run:
    """A run of two steps whose checkpoint has all parts in `parts` but the missing ones."""
    run = Run(folder, steps=2, batch=2)
    shutil.copytree(parts, run.checkpoint, ignore=shutil.ignore_patterns(*missing))
    return run


def all_moved(before: nn.Module, after: nn.Module) -> bool:
    """Whether every parameter differs and is finite."""
    pairs = zip(before.parameters(), after.parameters(), strict=True)
    return all(bool(b.isfinite().all()) and not a.equal(b) for a, b in pairs)


def same_files(one: Path, other: Path) -> bool:
    """Whether two folders hold the same files."""
    return {p.name: p.read_bytes() for p in one.iterdir()} == {
        p.name: p.read_bytes() for p in other.iterdir()
    }
