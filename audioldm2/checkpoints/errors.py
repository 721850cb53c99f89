"""The errors that loading a checkpoint raises."""

from __future__ import annotations

from audioldm2.quoting import printable


class CheckpointError(ValueError):
    """A checkpoint cannot be found or read, is not safe to read, or does not fit the stage it is for.

    The message is one line that names the checkpoint or file and says what to do. Control characters in it,
    which a checkpoint's file names can contain too, are escaped.
    """

    def __init__(self, message: str):
        super().__init__(printable(message, limit=None))


class MissingCheckpointError(CheckpointError, FileNotFoundError):
    """A checkpoint, or a file or part of it, is not there.

    It is also a FileNotFoundError, so that a script can try a local folder first and then the Hub:

    >>> try:
    ...     pipe = AudioLDM2Pipeline.from_pretrained("my-folder")
    ... except FileNotFoundError:
    ...     pipe = AudioLDM2Pipeline.from_pretrained("cvssp/audioldm2")
    """


ORIGINAL_SUFFIXES = (".pth", ".ckpt")


def original_format(name: object) -> str:
    """What to say about a checkpoint of the original repository."""
    return (
        f"{name} is a checkpoint of the original AudioLDM 2 repository, which is not supported; use the same "
        'model in the format of diffusers, such as "cvssp/audioldm2"'
    )
