"""Finding a checkpoint: a local folder, "tiny", or a repository on the Hugging Face Hub.

"tiny" is a small checkpoint inside this package, trained on synthetic sounds (see its README.md).

Only the files that are needed are downloaded: configs, tokenizers and weights in one format.
"""

from __future__ import annotations

import errno
import glob
import hashlib
import os
import re
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import torch

from audioldm2 import DISTRIBUTION, __version__
from audioldm2.checkpoints.errors import (
    ORIGINAL_SUFFIXES,
    CheckpointError,
    MissingCheckpointError,
    original_format,
)
from audioldm2.checkpoints.tensors import shard_names, weights_file
from audioldm2.quoting import one_line, printable, quoted

TINY = "tiny"
TINY_FOLDER = Path(__file__).resolve().parents[1] / TINY

_TINY_HINT = f'; "{TINY}" is included in the package and needs no download'
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_SMALL = (".json", ".txt", ".model")  # configs, tokenizers and their vocabularies
_SHARD_INDEX = re.compile(r".*\.index(\.[^.]+)?\.json")
_DISK_ERRORS = (errno.EACCES, errno.EPERM, errno.ENOSPC, errno.EROFS, errno.EDQUOT)


@dataclass(frozen=True)
class Source:
    """Where a checkpoint comes from.

    Attributes:
        repo_or_folder: a local folder, "tiny" for the checkpoint in this package, or "owner/name" on the Hub.
        variant: weights of a variant, such as "fp16".
        revision: branch, tag or commit on the Hub.
        cache_dir: folder for downloads; None is the Hub client's default.
        token: access token for private repositories; None uses the stored login.
        local_files_only: use an earlier download, without asking the Hub.
        use_safetensors: True for weights in safetensors files only, False for `.bin` files only.
        force_download: download again what was downloaded earlier.
        hint: the end of an error about a checkpoint that is not there.
    """

    repo_or_folder: str | Path
    variant: str | None = None
    revision: str | None = None
    cache_dir: str | Path | None = None
    token: str | bool | None = field(default=None, repr=False)
    local_files_only: bool = False
    use_safetensors: bool | None = None
    force_download: bool = False
    hint: str = _TINY_HINT

    @property
    def name(self) -> str:
        """The folder or repository as text."""
        return str(self.repo_or_folder)

    @property
    def cache(self) -> Path | None:
        """`cache_dir`, with ~ expanded."""
        return None if self.cache_dir is None else Path(self.cache_dir).expanduser()

    @property
    def access(self) -> str | bool | None:
        """`token` without the white space around it, which a file or a paste may have.

        Raises:
            CheckpointError: it cannot be a token; the message does not contain it.
        """
        token = self.token.strip() if isinstance(self.token, str) else self.token
        if isinstance(token, str) and not re.fullmatch(r"[!-~]+", token):
            raise CheckpointError(
                "token is not an access token: it is empty, or has a space or another character "
                "that a token cannot have"
            )
        return token


def needed_files(
    names: Collection[str],
    folders: Sequence[str],
    variant: str | None = None,
    use_safetensors: bool | None = None,
    weights: bool = True,
) -> list[str]:
    """Select the files that have to be downloaded: each folder's configs and tokenizers and one weight file.

    Args:
        names: paths of all files in the repository, with forward slashes.
        folders: the subfolders that are needed; "" is the top level.
        variant: weights of a variant, such as "fp16".
        use_safetensors: True for safetensors only, False for `.bin` only.
        weights: False leaves the weight files out.

    Returns:
        The sorted paths of the files. Where weights are sharded, only the shard index is among them.
    """
    needed = []
    for folder in folders:
        inside = {p.name: str(p) for p in map(PurePosixPath, names) if p.parent == PurePosixPath(folder)}
        needed += [
            path
            for name, path in inside.items()
            if name.endswith(_SMALL) and not _SHARD_INDEX.fullmatch(name)
        ]
        file = weights_file(inside, variant, use_safetensors) if weights else None
        if file is not None:
            needed.append(inside[file])
    return sorted(needed)


def check_subfolder(subfolder: Any) -> str:
    """A part's folder in a checkpoint as text, "" for None.

    Raises:
        TypeError: it is not text or a path.
        ValueError: it leaves the checkpoint.
    """
    if not isinstance(subfolder, str | os.PathLike | None):
        raise TypeError(f'subfolder must be text, such as "unet", got {quoted(subfolder)}')
    text = os.fspath(subfolder or "")
    if os.path.isabs(text) or ".." in re.split(r"[/\\]", text) or "\0" in text:
        raise ValueError(f"subfolder must be a folder in the checkpoint, got {quoted(text)}")
    return text


def checkpoint_folder(
    source: Source,
    folders: Sequence[str],
    *,
    first_file: str = "config.json",
    check: Callable[[Path], object] = lambda folder: None,
    weights: bool = True,
) -> Path:
    """The local folder of a checkpoint. If it is a repository on the Hub, it is downloaded first.

    If the Hub cannot be reached, an earlier download is used, with a warning, unless `force_download` is set.

    Args:
        source: the checkpoint. An existing folder takes precedence; one with the name "tiny" only if it
            contains `first_file`.
        folders: the subfolders that are needed; "" is the top level.
        first_file: the file in the first of `folders` that loading reads first. It identifies an earlier
            download.
        check: called with the folder once only `first_file` is there. It may raise an error to prevent the
            download of the other files.
        weights: False downloads no weight files.

    Raises:
        CheckpointError: there is no such folder or repository, access is denied, or the Hub cannot be reached
            and there is no earlier download.
    """
    name = source.name
    if not isinstance(source.repo_or_folder, str | os.PathLike):
        raise CheckpointError(f"{_not_found(source.repo_or_folder)}{_TINY_HINT}")
    first = PurePosixPath(folders[0], first_file)
    local = _existing(name)
    if local is not None and local.is_dir() and (name != TINY or (local / first).is_file()):
        return local
    if name == TINY:
        if not TINY_FOLDER.is_dir():
            raise MissingCheckpointError(
                f"{TINY_FOLDER} is missing from this installation; reinstall {DISTRIBUTION}"
            )
        return TINY_FOLDER
    if local is not None and local.suffix in ORIGINAL_SUFFIXES:
        raise CheckpointError(original_format(name))
    if local is not None:
        raise CheckpointError(f"{name} is a file; pass the folder that contains it")
    if not _REPOSITORY.fullmatch(name):
        raise MissingCheckpointError(f"{_not_found(name)}{_TINY_HINT}")
    return _from_hub(
        source,
        lambda: _download(source, folders, first, check, weights),
        lambda: _downloaded(source, first),
    )


def repository_folder(
    source: Source, choose: Callable[[Collection[str]], list[str]], candidates: Sequence[str]
) -> Path:
    """The local folder of a repository that is not a checkpoint, of which only some files are downloaded.

    If the Hub cannot be reached, an earlier download is used, with a warning, unless `force_download` is set.

    Args:
        source: a repository on the Hub.
        choose: from the paths of all its files to those that are needed; it may raise an error.
        candidates: files of which an earlier download has at least one.

    Raises:
        CheckpointError: as from `checkpoint_folder`.
    """
    if not isinstance(source.repo_or_folder, str) or not _REPOSITORY.fullmatch(source.name):
        raise MissingCheckpointError(f"{_not_found(source.repo_or_folder)}{source.hint}")

    def earlier() -> Path | None:
        found = (_downloaded(source, PurePosixPath(file)) for file in candidates)
        return next((folder for folder in found if folder is not None), None)

    return _from_hub(source, lambda: _snapshot(source, choose(_listing(source)[1])), earlier)


def _from_hub(source: Source, download: Callable[[], Path], earlier: Callable[[], Path | None]) -> Path:
    """The folder of a download, or of an earlier one where that has to do."""
    name = source.name
    if source.local_files_only:
        with _client_errors(source):
            folder = earlier()
        if folder is None:
            raise MissingCheckpointError(
                f"{name} has not been downloaded; run once without local_files_only{source.hint}"
            )
        return folder
    try:
        return download()
    except _HubError as error:
        folder = None if source.force_download else earlier()
        if folder is not None:
            warnings.warn(f"the Hub cannot be reached; using an earlier download of {name}", stacklevel=4)
            return folder
        raise MissingCheckpointError(
            f"{name} is not a local folder, and the Hub cannot be reached ({error}); "
            f"pass the path of a folder with the checkpoint{source.hint}"
        ) from error.__cause__


def _listing(source: Source) -> tuple[Any, list[str]]:
    """What the Hub says about a repository, and the paths of its files."""
    # The Hub's client is slow to import, and local folders do not need it.
    from huggingface_hub import HfApi

    with _client_errors(source):
        info = HfApi(token=source.access).model_info(source.name, revision=source.revision)
    return info, [entry.rfilename for entry in info.siblings or []]


def _snapshot(source: Source, files: Sequence[str]) -> Path:
    """Download files of a repository; returns their folder."""
    from huggingface_hub import snapshot_download

    with _client_errors(source):
        # Pass the branch and not its commit: the client then records which commit the branch was at, and
        # finds the snapshot again when the Hub cannot be reached.
        folder = snapshot_download(
            source.name,
            revision=source.revision,
            cache_dir=source.cache,
            token=source.access,
            allow_patterns=[glob.escape(file) for file in files],
            force_download=source.force_download,
        )
    return Path(folder)


def _download(
    source: Source,
    folders: Sequence[str],
    first: PurePosixPath,
    check: Callable[[Path], object],
    weights: bool,
) -> Path:
    """Download what is needed of a repository, its `first` file before all others; see `checkpoint_folder`.

    Raises:
        CheckpointError: the Hub does not give access to the checkpoint, or it cannot be saved to the disk.
        _HubError: the Hub did not answer as it should.
    """
    from huggingface_hub import hf_hub_download

    name, cache, token = source.name, source.cache, source.access
    info, names = _listing(source)

    def fetch(file: str) -> Path:
        with _client_errors(source):
            path = hf_hub_download(
                name,
                file,
                revision=info.sha,
                cache_dir=cache,
                token=token,
                force_download=source.force_download,
            )
            return Path(path)

    if str(first) not in names and (original := [n for n in names if n.endswith(ORIGINAL_SUFFIXES)]):
        raise MissingCheckpointError(original_format(f"{name}/{printable(original[0])}"))
    files = needed_files(names, folders, source.variant, source.use_safetensors, weights)
    if str(first) in files:
        check(fetch(str(first)).parents[len(first.parts) - 1])
    # The shard index lists the shards, so it is downloaded before them.
    for index in filter(_SHARD_INDEX.fullmatch, list(files)):
        parent = PurePosixPath(index).parent
        files += sorted({str(parent / shard) for shard in shard_names(fetch(index)).values()})
    return _snapshot(source, files)


class _HubError(Exception):
    """The Hub did not answer as it should. The cause is the error of its client."""


@contextmanager
def _client_errors(source: Source) -> Iterator[None]:
    """Turn errors of the Hub's client into CheckpointErrors, or into `_HubError` if the Hub did not answer.

    The block should contain nothing but calls of the client: any error in it is taken for the client's.
    """
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    name = source.name
    try:
        yield
    except HFValidationError as error:
        raise MissingCheckpointError(f"{_not_found(name)}{source.hint}") from error
    except GatedRepoError as error:
        raise MissingCheckpointError(
            f"{name} is gated on the Hub; request access there and log in (hf auth login)"
        ) from error
    except RepositoryNotFoundError as error:
        raise MissingCheckpointError(f"{_not_found(name)}; private ones need a token{source.hint}") from error
    except RevisionNotFoundError as error:
        raise MissingCheckpointError(
            f"{name} has no revision {quoted(source.revision)} on the Hub"
        ) from error
    except Exception as error:
        # The client's HTTP library depends on its release (requests, httpx), and so do the errors. Whatever
        # else fails, except for the disk, means that the Hub did not answer as it should.
        if isinstance(error, OSError) and error.errno in _DISK_ERRORS:
            raise CheckpointError(f"{name} cannot be saved to this disk: {one_line(error)}") from error
        reason = one_line(error)
        if isinstance(source.token, str) and source.token.strip():
            reason = reason.replace(source.token.strip(), "(the token)")
        raise _HubError(reason) from error


def _not_found(name: object) -> str:
    shown = repr(name) if len(str(name)) < 1000 else quoted(name)
    return f"{shown} is neither a local folder nor a repository on the Hub (owner/name)"


def _existing(name: str) -> Path | None:
    """The file or folder of that name, ~ expanded; None if there is none, or no file can have the name."""
    try:
        local = Path(name).expanduser()
        return local if name and local.exists() else None
    except (OSError, RuntimeError, ValueError):
        return None  # the name is too long, of a user that does not exist, or has a null character


def default_dtype(folder: Path) -> torch.dtype | None:
    """The dtype in which a checkpoint is loaded by default.

    Returns:
        None, which keeps the dtype of the checkpoint's weights; float32 for the tiny checkpoint, which is
        stored in float16 only to make the package smaller.
    """
    return torch.float32 if folder.resolve() == TINY_FOLDER else None


def revision_of(folder: Path, subfolders: Iterable[str]) -> str:
    """Which version of a checkpoint a folder holds.

    Args:
        folder: the checkpoint's.
        subfolders: of its parts.

    Returns:
        The commit of a download from the Hub; this package and its version for the tiny checkpoint; for
        another folder, a digest of its files' names, sizes and times, which changes when they are rewritten.
    """
    if folder.resolve() == TINY_FOLDER:
        return f"{DISTRIBUTION} {__version__}"
    if folder.parent.name == "snapshots" and folder.parent.parent.name.startswith("models--"):
        return folder.name
    digest = hashlib.sha256()
    for subfolder in ("", *sorted(subfolders)):
        for path in sorted((folder / subfolder).glob("*")):
            if path.is_file():
                status = path.stat()
                digest.update(f"{subfolder}/{path.name} {status.st_size} {status.st_mtime_ns}\n".encode())
    return f"files {digest.hexdigest()[:16]}"


def _downloaded(source: Source, first: PurePosixPath) -> Path | None:
    """The folder of an earlier download that has the file which loading reads first, or None.

    The client's own search, `snapshot_download(local_files_only=True)`, cannot be used: it takes a snapshot
    that lacks files of the repository, even ones that are not needed, for an interrupted download.
    """
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(source.name, str(first), cache_dir=source.cache, revision=source.revision)
    return Path(found).parents[len(first.parts) - 1] if isinstance(found, str) else None
