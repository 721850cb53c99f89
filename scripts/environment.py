"""What a script says when its Python lacks a package. Imports nothing but the standard library."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path


def require(*packages: str) -> None:
    """End the script with one line, and exit code 1, if any of these packages is not installed."""
    absent = [name for name in packages if importlib.util.find_spec(name) is None]
    if absent:
        sys.exit(
            f"{Path(sys.argv[0]).name}: error: {sys.executable} has no {', '.join(absent)}; run scripts/test "
            "once, which installs all of it in .venv, and use .venv/bin/python"
        )
