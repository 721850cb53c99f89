"""manifest.jsonl: a line for each finished sound of a folder.

    {"file": "rain.wav", "prompt": "Rain", "seed": 7, ..., "score": null, "seconds": 5.12, "sha256": "...",
     "key": "..."}

A sound is finished when its file is complete and its line is written, in this order. A process that is killed
in between leaves a file without a line, or half a line; the next run makes these sounds again. It tells such
files from those of the user, which are never replaced, by `.unfinished`: the names of the files that the
process was about to write.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from audioldm2.atomic import remove_abandoned, replacing
from audioldm2.audio.file_types import SOUND_TYPES
from audioldm2.audio.sound_file import write_sound
from audioldm2.batch.generating import Sound
from audioldm2.batch.jobs import Failure
from audioldm2.batch.planning import FileOptions, Request
from audioldm2.batch.sources import sha256
from audioldm2.quoting import one_line

MANIFEST = "manifest.jsonl"
UNFINISHED = ".unfinished"
_NO_FILE_CAN_BE_WRITTEN = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ENOENT)
Record = dict[str, Any]


class Manifest:
    """The finished sounds of a folder, to which one process at a time can add.

    Args:
        folder: created if it does not exist.

    Raises:
        OSError: the folder cannot be written, or another process is writing into it.
        ValueError: the folder has a manifest.jsonl of another kind.

    Example:
        >>> with Manifest("sounds") as manifest:
        ...     finished = manifest.finished(request)
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.path = self.folder / MANIFEST
        self._records: dict[str, Record] = {}
        self._unfinished: set[str] = set()  # files without a line that this run or an earlier one wrote
        self._outdated = False
        self._lock: int | None = None

    def __enter__(self) -> Manifest:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = _locked(self.folder)
        try:
            if self._lock is not None:  # otherwise another process may be writing them
                remove_abandoned(self.folder, [*filter(None, SOUND_TYPES), self.path.suffix])
            self.read()
            self._rewrite()
            self._file = open(self.path, "ab", buffering=0)
        except BaseException:
            self._unlock()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._file.close()
            self._rewrite()
            if kind is None:
                (self.folder / UNFINISHED).unlink(missing_ok=True)
        finally:
            self._unlock()

    def read(self) -> Manifest:
        """Read the file, if it exists, without changing anything. Returns the manifest itself.

        Raises:
            OSError: it cannot be read.
            ValueError: it is not a manifest.
        """
        self._records, self._outdated = read_manifest(self.path)
        names = self.folder / UNFINISHED
        self._unfinished = {*names.read_text("utf-8").splitlines()} if names.is_file() else set()
        return self

    def foreign(self, request: Request) -> str | None:
        """A file in the place of one of a request's that is not of this batch; None if there is none."""
        for file in request.files:
            path = self.folder / file
            if file not in self._records and file not in self._unfinished and os.path.lexists(path):
                return str(path)
        return None

    def finished(self, request: Request) -> list[Record] | None:
        """The lines of a request's sounds; None unless all files are there, unchanged."""
        records = [self._records.get(file) for file in request.files]
        for record in records:
            if record is None or record["key"] != request.key or not self._is_whole(record):
                return None
        return [record for record in records if record is not None]

    def add(
        self, sounds: Iterable[tuple[Request, Sound]], files: FileOptions
    ) -> tuple[list[tuple[Request, list[Record]]], list[Failure]]:
        """Write the files of sounds, then their lines.

        Args:
            sounds: each with its request.
            files: how they are stored.

        Returns:
            The requests with the lines of each as mappings, and those whose file cannot be written: it is a
            folder, for example.

        Raises:
            OSError: no file can be written: the disk is full, for example. Files of `sounds` may be there
                without a line.
        """
        added, failures, sounds = [], [], [*sounds]
        self._unfinished |= {file for request, _ in sounds for file in request.files}
        with replacing(self.folder / UNFINISHED) as temporary:
            temporary.write_text("".join(f"{file}\n" for file in self._unfinished), "utf-8")
        for request, sound in sounds:
            try:
                added.append((request, self._written(request, sound, files)))
            except OSError as error:
                if error.errno in _NO_FILE_CAN_BE_WRITTEN:
                    raise
                failures.append(Failure(request.job.where, f"{error.filename}: {error.strerror}"))
            except ValueError as error:  # NaN from an engine, for example
                failures.append(Failure(request.job.where, one_line(error)))
        records = [record for _, each in added for record in each]
        outdated = self._outdated
        # After an interrupt or an error of the disk, closing rewrites the manifest, with these lines.
        self._outdated = True
        for record in records:
            outdated |= self._records.pop(record["file"], None) is not None
            self._records[record["file"]] = record
        # All at once: if only some lines of a group were left, the next run would generate a smaller group,
        # whose sounds differ in rounding.
        lines = "".join(map(_line, records)).encode()
        while lines:  # a disk that is nearly full takes a part, and raises at the next one
            lines = lines[self._file.write(lines) :]
        self._outdated = outdated
        self._unfinished -= {record["file"] for record in records}  # so that it stays short
        return added, failures

    def arrange(self, files: Sequence[str]) -> None:
        """Put the lines of some files first, in their order. The file is rewritten when it is closed."""
        order = {file: i for i, file in enumerate(files)}
        arranged = sorted(self._records, key=lambda file: order.get(file, len(order)))
        self._outdated |= arranged != [*self._records]
        self._records = {file: self._records[file] for file in arranged}

    def _written(self, request: Request, sound: Sound, files: FileOptions) -> list[Record]:
        records = []
        rate = request.stored["sampling_rate"]
        for candidate, (file, waveform) in enumerate(zip(request.files, sound.waveforms, strict=True)):
            path = self.folder / file
            write_sound(path, waveform, rate, sample_format=files.sample_format)
            records.append(
                {
                    "file": file,
                    **request.stored,
                    "candidate": candidate,
                    "score": None if sound.scores is None else sound.scores[candidate],
                    "seconds": len(waveform) / rate,
                    "generated_in_s": round(sound.generated_in_s, 3),
                    "sha256": sha256(path),
                    "key": request.key,
                }
            )
        return records

    def _is_whole(self, record: Record) -> bool:
        path = self.folder / record["file"]
        return path.is_file() and sha256(path) == str(record["sha256"])

    def _rewrite(self) -> None:
        """Rewrite the manifest if it has outdated lines, half a line at its end, or another order."""
        if self._outdated:
            with replacing(self.path) as temporary:
                temporary.write_bytes("".join(map(_line, self._records.values())).encode())
            self._outdated = False

    def _unlock(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def read_manifest(path: str | Path) -> tuple[dict[str, Record], bool]:
    """Read a manifest.

    Args:
        path: the file; it need not exist.

    Returns:
        The last line of each file, by file, and whether there are others, such as half a line at the end.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not a manifest.
    """
    records: dict[str, Record] = {}
    if not Path(path).exists():
        return records, False
    *lines, rest = Path(path).read_bytes().split(b"\n")
    for number, line in enumerate(lines, 1):
        record = _record(line)
        if record is None:
            raise ValueError(
                f"{path}:{number} is not a line of a batch's manifest; delete it or choose another folder"
            )
        records.pop(record["file"], None)
        records[record["file"]] = record
    return records, bool(rest) or len(records) < len(lines)


def _line(record: Record) -> str:
    return f"{json.dumps(record, ensure_ascii=False)}\n"


def _record(line: bytes) -> Record | None:
    try:
        record = json.loads(line)
        _line(record).encode()  # which lone surrogates prevent
    except (ValueError, RecursionError):
        return None
    needed = ("file", "key", "sha256")
    if not isinstance(record, Mapping) or not all(isinstance(record.get(name), str) for name in needed):
        return None
    is_name = Path(record["file"]).name == record["file"]
    return dict(record) if is_name else None


def _locked(folder: Path) -> int | None:
    """Lock a folder until the descriptor is closed, or the process ends.

    Returns:
        The descriptor; None where folders cannot be locked: on Windows, and on some network file systems.

    Raises:
        OSError: another process has the lock.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        return None
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise OSError(
            error.errno, "another process is writing sounds into this folder", str(folder)
        ) from error
    except OSError:  # NFS locks only what is open for writing, which a folder cannot be
        os.close(descriptor)
        return None
    return descriptor
