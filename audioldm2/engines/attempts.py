"""How often something was begun on a cluster and not finished, because a worker was lost.

Imports only the standard library: the process that counts needs no PyTorch.
"""

from __future__ import annotations

from collections import Counter


class Attempts:
    """Counts attempts; one actor for all workers of a batch."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()

    def begin(self, name: str) -> int:
        """Count an attempt. Returns its number, from 1."""
        self._counts[name] += 1
        return self._counts[name]

    def end(self, name: str) -> None:
        """Forget the attempts: the last one succeeded."""
        del self._counts[name]
