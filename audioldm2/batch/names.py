"""File names for sounds: readable, valid on every system, and different for different jobs.

Imports only the standard library.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from pathlib import PurePath

from audioldm2.audio.file_types import SOUND_TYPES

MAX_BYTES = 120  # of a name without its suffix; file systems allow 255 for all of it
# Names that Windows reserves for devices, with any suffix.
_RESERVED = re.compile(r"(con|prn|aux|nul|com[0-9¹²³]|lpt[0-9¹²³])(\..*)?", re.IGNORECASE)


def split_name(name: str) -> tuple[str, str]:
    """A job's name without the suffix of a sound file, and the suffix: ("dog", ".wav") for "dog.wav"."""
    suffix = PurePath(name).suffix
    if suffix and suffix.lower() in SOUND_TYPES:
        return name.removesuffix(suffix), suffix.lower()
    return name, ""


def file_name(text: str, spaces: str = " ") -> str:
    """A file name for a text, without a suffix: letters and digits of any language, spaces, and - _ .

    Args:
        text: a prompt or a name.
        spaces: what takes the place of spaces.

    Returns:
        A name of 1 to `MAX_BYTES` bytes of UTF-8. Different texts can have the same name.

    Example:
        >>> file_name("A dog/cat fight?", spaces="-")
        'A-dog-cat-fight'
    """
    text = unicodedata.normalize("NFC", text)
    kept = "".join(c if c.isalnum() or unicodedata.combining(c) or c in "-_. " else " " for c in text)
    # No leading or trailing dots: the first are hidden files, and Windows removes the others.
    name = spaces.join(kept.split()).strip(" .-")
    while len(name.encode()) > MAX_BYTES:
        name = name[:-1].rstrip(" .-")
    if _RESERVED.fullmatch(name):
        name = f"_{name}"
    return name or "sound"


def distinct(names: Iterable[str]) -> list[str]:
    """Make names unique, also where case does not count: -2, -3 and so on are appended to repeated ones."""
    taken: set[str] = set()
    counts: dict[str, int] = {}
    result = []
    for name in names:
        count = counts.get(_folded(name), 1)
        candidate = name if count == 1 else f"{name}-{count}"
        while _folded(candidate) in taken:
            count += 1
            candidate = f"{name}-{count}"
        counts[_folded(name)] = count + 1
        taken.add(_folded(candidate))
        result.append(candidate)
    return result


def _folded(name: str) -> str:
    return unicodedata.normalize("NFKC", name).casefold()
