"""Untrusted text in error messages: printable, on one line, and short.

What a checkpoint or another library says can be megabytes long, or contain control characters that a terminal
obeys. An error message shows it through these functions only. Imports only the standard library.
"""

from __future__ import annotations

import reprlib
from collections.abc import Iterable

MAX_QUOTED = 80  # characters of a quoted value
MAX_REASON = 400  # characters of another error's message
MAX_LISTED = 16  # entries of a list


def quoted(value: object) -> str:
    """`repr(value)` for an error message: one printable line of at most about `MAX_QUOTED` characters."""
    return printable(_REPR.repr(value))


def one_line(text: object, limit: int | None = MAX_REASON) -> str:
    """The first line of a text, such as another library's error, printable and shortened.

    Args:
        text: anything with a `str`; an error without a text is represented by its class.
        limit: the largest number of characters; None for all.
    """
    lines = str(text).strip().splitlines() or [type(text).__name__]
    return printable(lines[0], limit)


def printable(text: str, limit: int | None = MAX_QUOTED) -> str:
    """A text with what is not printable escaped: control characters, bidirectional marks, lone surrogates."""
    if not text.isprintable():
        text = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
    return text if limit is None else shortened(text, limit)


def shortened(text: str, limit: int) -> str:
    """A text of at most `limit` characters, its middle left out if it is longer."""
    half = (limit - 3) // 2
    return text if len(text) <= limit else f"{text[:half]}...{text[-half:]}"


def either(names: Iterable[str]) -> str:
    """Names to choose from: "a", "a or b", "a, b or c"."""
    *others, last = names
    return f"{', '.join(others)} or {last}" if others else last


def listed(entries: Iterable[str], separator: str = ", ") -> str:
    """Entries on one line: at most `MAX_LISTED` of them, and how many more there are."""
    shown = list(entries)
    more = [f"and {len(shown) - MAX_LISTED} more"] if len(shown) > MAX_LISTED else []
    return separator.join(shown[:MAX_LISTED] + more)


class _Repr(reprlib.Repr):
    """A repr that looks no further into nested and long values than a message shows."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel = 4
        self.maxlist = self.maxtuple = self.maxdict = self.maxset = 8
        self.maxstring = self.maxlong = self.maxother = MAX_QUOTED


_REPR = _Repr()
