"""Optional dependencies: what to install for a feature that needs one."""

from __future__ import annotations

from audioldm2 import DISTRIBUTION


def install_hint(extra: str) -> str:
    """The command that installs an extra of this package.

    Example:
        >>> install_hint("plot")
        'pip install "audioldm2-torch[plot]"'
    """
    return f'pip install "{DISTRIBUTION}[{extra}]"'
