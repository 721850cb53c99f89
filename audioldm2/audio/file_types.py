"""The types of sound and image files, by suffix.

Imports only the standard library, so that the command line can refuse a name before anything is loaded.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

SAMPLE_FORMATS = ("pcm16", "float32")


@dataclass(frozen=True)
class SoundType:
    """A type of sound file.

    Attributes:
        name: libsndfile's name of the file format.
        subtypes: libsndfile's names of the sample format, by ours; None stands for a lossy codec, which has
            none.
    """

    name: str
    subtypes: dict[str | None, str]


_BOTH: dict[str | None, str] = {"pcm16": "PCM_16", "float32": "FLOAT"}
WAV = SoundType("WAV", _BOTH)  # written by this package; all others by soundfile
SOUND_TYPES = {
    "": WAV,
    ".wav": WAV,
    ".wave": WAV,
    ".flac": SoundType("FLAC", {"pcm16": "PCM_16"}),
    ".ogg": SoundType("OGG", {None: "VORBIS"}),
    ".oga": SoundType("OGG", {None: "VORBIS"}),
    ".opus": SoundType("OGG", {None: "OPUS"}),
    ".mp3": SoundType("MP3", {None: "MPEG_LAYER_III"}),
    ".aif": SoundType("AIFF", _BOTH),
    ".aiff": SoundType("AIFF", _BOTH),
    ".au": SoundType("AU", _BOTH),
    ".caf": SoundType("CAF", _BOTH),
    ".rf64": SoundType("RF64", _BOTH),
    ".w64": SoundType("W64", _BOTH),
}
FILE_FORMATS = tuple(suffix[1:] for suffix in SOUND_TYPES if suffix)
# matplotlib's names; those that need LaTeX or are raw pixels are left out.
IMAGE_TYPES = {
    "": "png",
    **{f".{name}": name for name in ("png", "jpg", "jpeg", "webp", "tif", "tiff", "pdf", "svg", "eps", "ps")},
}


def sound_type(path: str | Path, sample_format: str | None = None) -> tuple[SoundType, str | None]:
    """The type of a sound file, by the suffix of its name; WAV if it has none.

    Args:
        path: path of the file.
        sample_format: "pcm16", "float32", or None for the type's default.

    Returns:
        The type, and the sample format; None for a lossy codec.

    Raises:
        ValueError: the suffix is unknown, or the type does not have the sample format.
    """
    suffix = Path(path).suffix
    found = SOUND_TYPES.get(suffix.lower())
    if found is None:
        raise ValueError(f"unknown type of sound file {suffix!r}; use {_suffixes(SOUND_TYPES)}")
    if sample_format is None:
        return found, next(iter(found.subtypes))
    if sample_format not in SAMPLE_FORMATS:
        raise ValueError(f"format must be one of {', '.join(SAMPLE_FORMATS)}, got {sample_format!r}")
    if sample_format not in found.subtypes:
        (only,) = found.subtypes
        what = f"always has {only}" if only else "is lossy and has no sample format"
        raise ValueError(f"a {suffix} file cannot store {sample_format}: it {what}")
    return found, sample_format


def image_type(path: str | Path) -> str:
    """matplotlib's name of an image file's type, by the suffix of its name; "png" if it has none.

    Raises:
        ValueError: the suffix is unknown.
    """
    suffix = Path(path).suffix
    if suffix.lower() not in IMAGE_TYPES:
        raise ValueError(f"unknown type of image file {suffix!r}; use {_suffixes(IMAGE_TYPES)}")
    return IMAGE_TYPES[suffix.lower()]


def _suffixes(types: dict[str, SoundType] | dict[str, str]) -> str:
    return ", ".join(suffix for suffix in types if suffix)
