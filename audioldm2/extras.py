"""Optional dependencies: what to install for a feature that needs one."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

from audioldm2 import DISTRIBUTION


def install_hint(extra: str) -> str:
    """The command that installs an extra of this package.

    Example:
        >>> install_hint("plot")
        'pip install "audioldm2-torch[plot]"'
    """
    return f'pip install "{DISTRIBUTION}[{extra}]"'


def import_extra(module: str, extra: str, purpose: str) -> ModuleType:
    """Import an optional dependency.

    Args:
        module: name of the module.
        extra: the extra of this package that installs it.
        purpose: what needs it, such as "drawing a spectrogram".

    Raises:
        ImportError: it is not installed, or it is broken; the message says how to install it.
    """
    package = module.partition(".")[0]
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] == package:
            raise ImportError(f"{purpose} requires {package}: {install_hint(extra)}") from error
        raise _broken(package, extra, purpose, error) from error
    except Exception as error:  # a library that it needs is missing, for example
        raise _broken(package, extra, purpose, error) from error


def _broken(package: str, extra: str, purpose: str, error: Exception) -> ImportError:
    reason = f"{type(error).__name__}: {error}".splitlines()[0]
    return ImportError(
        f"{purpose} requires {package}, which is broken ({reason}); reinstall it: {install_hint(extra)}"
    )
