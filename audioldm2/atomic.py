"""Writing files atomically: into a temporary file in the same folder, which is then renamed.

Imports only the standard library, so that the command line can check a path before anything else.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
import stat
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

# Links to what a process has open, such as standard output.
_OPEN_FILE = re.compile(r"/dev/(stdin|stdout|stderr)|/dev/fd/(\d+)|/proc/self/fd/(\d+)|/proc/\d+/fd/\d+")
_STREAMS = {"stdin": 0, "stdout": 1, "stderr": 2}
# The names of temporary files, as `replacing` makes them.
_TEMPORARY = re.compile(r"\..{0,32}-[0-9a-f]{16}(\..{0,15})?", re.DOTALL)


class _DryRun(Exception):
    """Ends the dry run in `check_writable`."""


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A context manager for writing a file so that it is either complete or not there.

    If the block ends normally, the temporary file replaces `path` and takes over its permissions and, where
    the system allows it, its owner. If the block raises (Ctrl-C, too), the temporary file is removed and
    `path` is unchanged.

    The target of a symbolic link is replaced, and the link stays. What is not a regular file (a device, a
    pipe, /dev/stdout) is not replaced: the content is written into it when the block has ended.

    Args:
        path: path of the file to write.

    Yields:
        The path of an empty temporary file in the same folder, to be written in the block.

    Raises:
        OSError: the file cannot be written.

    Example:
        >>> with replacing("config.json") as temporary:
        ...     temporary.write_text("{}")
    """
    path = _without_links(Path(path))
    old = _status(path)
    if old is not None and stat.S_ISDIR(old.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    in_place = _is_written_in_place(path)
    folder = Path(tempfile.gettempdir()) if in_place else path.parent
    # Names of at most 255 bytes: the start of the file's name says whose the temporary file is.
    temporary = folder / f".{path.stem[:32]}-{secrets.token_hex(8)}{path.suffix[:16]}"
    private = in_place or old is not None
    try:
        # The system applies the umask to a new file. One that replaces another is private at first.
        os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600 if private else 0o666))
        yield temporary
        if in_place:
            with open(temporary, "rb") as source, _opened(path) as target:
                shutil.copyfileobj(source, target)
            temporary.unlink()
        else:
            if old is not None:
                _take_over(temporary, old)
            os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def remove_abandoned(folder: Path, suffixes: Collection[str]) -> None:
    """Remove the temporary files of processes that were killed while writing.

    Args:
        folder: where they wrote. No process may be writing into it now.
        suffixes: of the files that are written there, such as ".wav"; others are left alone.
    """
    for path in folder.iterdir():
        if path.suffix in suffixes and _TEMPORARY.fullmatch(path.name) and path.is_file():
            path.unlink()


def check_writable(path: str | Path) -> None:
    """Check that a file can be written, before the long computation of its content.

    An existing file is not changed, and no new one is left behind.

    Args:
        path: path of the file. A device or a pipe is fine, too; it is not opened.

    Raises:
        OSError: it cannot be written. The message says why, and the subclass fits the reason:
            FileNotFoundError, IsADirectoryError, PermissionError, ...
    """
    text, path = str(path), Path(path)
    try:
        old = _status(path)
    except NotADirectoryError:
        old = None  # the next lines say more
    except OSError as error:
        raise _unwritable(error, text) from error
    if not text or text.endswith(("/", os.sep)) or (old is not None and stat.S_ISDIR(old.st_mode)):
        raise IsADirectoryError(errno.EISDIR, "the output path is a folder; add a file name", text)
    if old is not None and not os.access(path, os.W_OK):
        raise PermissionError(errno.EACCES, "the output file exists and is not writable", text)
    if old is not None and _is_written_in_place(path):
        if stat.S_ISSOCK(old.st_mode):
            raise OSError(errno.EINVAL, "the output path is a socket", text)
        return
    folder = _without_links(path).parent
    if not folder.exists():
        raise FileNotFoundError(errno.ENOENT, "the folder of the output path does not exist", str(folder))
    if not folder.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, "the parent of the output path is not a folder", str(folder))
    try:
        with suppress(_DryRun), replacing(path):
            raise _DryRun
    except OSError as error:
        raise _unwritable(error, text) from error


def check_folder_writable(path: str | Path) -> None:
    """Check that files can be written into a folder, which may have to be created, before a long computation.

    Raises:
        OSError: they cannot. The message says why.
    """
    path = Path(path)
    existing = next(each for each in (path, *path.absolute().parents) if each.exists() or each.is_symlink())
    if not existing.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, "the output path is not a folder", str(existing))
    if not os.access(existing, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, "the folder of the output path is not writable", str(existing))


def _unwritable(error: OSError, path: str) -> OSError:
    # errno selects the subclass.
    return OSError(error.errno, f"the output file cannot be written ({error.strerror})", path)


def _status(path: Path) -> os.stat_result | None:
    """What the system says about a file, or None if it does not exist; links are followed."""
    try:
        return path.stat()
    except FileNotFoundError:
        return None


def _is_written_in_place(path: Path) -> bool:
    """Whether a path is a device, a pipe or an open file, which cannot be replaced."""
    path = _without_links(path)
    status = _status(path)
    return status is not None and (not stat.S_ISREG(status.st_mode) or _is_open_file(path))


def _is_open_file(path: Path) -> bool:
    return _OPEN_FILE.fullmatch(os.path.abspath(path)) is not None


def _opened(path: Path) -> BinaryIO:
    """A device, a pipe or an open file, for writing."""
    match = _OPEN_FILE.fullmatch(os.path.abspath(path))
    stream, *numbers = match.groups() if match else (None,)
    number = next((int(number) for number in numbers if number), _STREAMS.get(stream or ""))
    # Opening /dev/stdout anew would truncate the file that standard output is redirected to.
    return open(path if number is None else os.dup(number), "wb")


def _without_links(path: Path) -> Path:
    """The file that a symbolic link points to; the path itself if it is not a link.

    The links in /dev and /proc to open files are not followed: they may point to no path at all.

    Raises:
        OSError: the links form a loop.
    """
    for _ in range(40):  # the system's own limit
        if _is_open_file(path) or not path.is_symlink():
            return path
        path = path.parent / os.readlink(path)
    raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))


def _take_over(temporary: Path, old: os.stat_result) -> None:
    """Give a file the permissions and the owner of the file that it replaces."""
    mode = stat.S_IMODE(old.st_mode) & 0o777
    new = temporary.stat()
    if hasattr(os, "chown") and (new.st_uid, new.st_gid) != (old.st_uid, old.st_gid):
        try:
            os.chown(temporary, old.st_uid, old.st_gid)
        except OSError:
            try:
                os.chown(temporary, -1, old.st_gid)
            except OSError:
                mode &= ~stat.S_IRWXG  # the group is another one, which was given no access
    temporary.chmod(mode)
