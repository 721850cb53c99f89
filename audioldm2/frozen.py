"""A read-only mapping whose entries can also be read as attributes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any


class FrozenMapping(Mapping[str, Any]):
    """A mapping that cannot be changed: `settings["name"]`, `settings.name` or `f(**settings)`.

    Args:
        entries: the entries, which are copied.

    Example:
        >>> settings = FrozenMapping({"guidance_scale": 2.0})
        >>> settings.guidance_scale, dict(settings)
        (2.0, {'guidance_scale': 2.0})
        >>> settings | {"eta": 0.5}
        {'guidance_scale': 2.0, 'eta': 0.5}
    """

    def __init__(self, entries: Mapping[str, Any]):
        self._entries = dict(entries)

    def __getitem__(self, name: str) -> Any:
        return self._entries[name]

    def __getattr__(self, name: str) -> Any:
        # While an object is being unpickled, "_entries" itself does not exist yet.
        if name != "_entries" and name in self._entries:
            return self._entries[name]
        raise AttributeError(f"there is no entry {name!r}")

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __or__(self, other: Mapping[str, Any]) -> dict[str, Any]:
        """The entries with those of another mapping in place of or beside them, as a dict."""
        return {**self._entries, **other}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._entries!r})"
