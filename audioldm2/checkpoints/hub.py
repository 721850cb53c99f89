"""Finding a checkpoint: a local folder, "tiny", or a repository on the Hugging Face Hub.

"tiny" is the one that lies in the package: small, trained on synthetic sounds (its README.md tells more).

Of a repository only what is needed is downloaded: the configs, the tokenizers, and one weight format.
"""

from __future__ import annotations

import errno
import glob
import re
import warnings
from collections.abc import Callable, Collection, Sequence
from pathlib import Path, PurePosixPath

import torch

from audioldm2.checkpoints.errors import CheckpointError
from audioldm2.checkpoints.tensors import shard_names, weights_file

SHIPPED = "tiny"
SHIPPED_FOLDER = Path(__file__).resolve().parents[1] / SHIPPED

_OFFLINE = f'; "{SHIPPED}" is in the package and needs no Hub'  # at the end of what cannot be found
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_SMALL = (".json", ".txt", ".model")  # configs, tokenizers and their vocabularies
_SHARD_INDEX = re.compile(r".*\.index(\.[^.]+)?\.json")
_DISK = (errno.EACCES, errno.EPERM, errno.ENOSPC, errno.EROFS, errno.EDQUOT)  # what a download dies of here


def needed_files(names: Collection[str], folders: Sequence[str], variant: str | None = None) -> list[str]:
    """Which of a repository's files are needed: the small ones of the folders, and one weights file each.

    Args:
        names: the repository's files, as paths with forward slashes.
        folders: the subfolders that are wanted ("" is the top).
        variant: as in `WeightFiles`.
    """
    needed = []
    for folder in folders:
        inside = {p.name: str(p) for p in map(PurePosixPath, names) if p.parent == PurePosixPath(folder)}
        needed += [
            path
            for name, path in inside.items()
            if name.endswith(_SMALL) and not _SHARD_INDEX.fullmatch(name)
        ]
        weights = weights_file(inside, variant)
        if weights is not None:
            needed.append(inside[weights])
    return sorted(needed)


def checkpoint_folder(
    repo_or_folder: str | Path,
    folders: Sequence[str],
    *,
    first_file: str = "config.json",
    check: Callable[[Path], object] = lambda folder: None,
    variant: str | None = None,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
) -> Path:
    """The local folder of a checkpoint, downloaded first where `repo_or_folder` is a repository on the Hub.

    Args:
        repo_or_folder: a folder, "tiny" for the checkpoint that lies in the package, or "owner/name" on the
            Hub. A folder that exists wins; one that is called "tiny" and is meant by that name alone has to
            hold `first_file` for it.
        folders: the subfolders that are needed ("" is the top).
        first_file: what loading reads first, in the first of `folders`; by it an earlier download is found.
        check: called with the folder when only that file is there, to refuse before the rest is downloaded.
        variant: weights of a variant, such as "fp16".
        revision: branch, tag or commit on the Hub.
        cache_dir: where downloads are kept; None is the Hub client's own place.
        token: for private repositories; None uses the stored login.
        local_files_only: use what was downloaded before, without asking the Hub.

    Raises:
        CheckpointError: no such folder or repository, or the Hub is out of reach and nothing was downloaded
            before.
    """
    name = str(repo_or_folder)
    local = Path(name).expanduser()
    first = PurePosixPath(folders[0], first_file)
    if name and local.is_dir() and (name != SHIPPED or (local / first).is_file()):
        return local
    if name == SHIPPED:
        if not SHIPPED_FOLDER.is_dir():
            raise CheckpointError(
                f"this installation of audioldm2 lacks {SHIPPED_FOLDER}, its tiny checkpoint; install it anew"
            )
        return SHIPPED_FOLDER
    if name and local.exists():
        raise CheckpointError(f"{name} is a file; pass the folder that holds it")
    no_repository = f"{name!r} is neither a folder here nor a repository on the Hub (owner/name)"
    if not _REPOSITORY.fullmatch(name):
        raise CheckpointError(f"{no_repository}{_OFFLINE}")

    # The Hub's client is slow to import and not needed for a local folder.
    from huggingface_hub import HfApi, hf_hub_download, snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    cache = None if cache_dir is None else Path(cache_dir).expanduser()
    try:
        if local_files_only:
            folder = _downloaded(name, first, revision, cache)
            if folder is None:
                raise CheckpointError(
                    f"{name} was not downloaded before; run once without local_files_only{_OFFLINE}"
                )
            return folder
        info = HfApi(token=token).model_info(name, revision=revision)
        files = needed_files([entry.rfilename for entry in info.siblings or []], folders, variant)
        if str(first) in files:
            path = hf_hub_download(name, str(first), revision=info.sha, cache_dir=cache, token=token)
            check(Path(path).parents[len(first.parts) - 1])
        # An index says which shards there are, so it comes before them.
        for index in filter(_SHARD_INDEX.fullmatch, list(files)):
            path = hf_hub_download(name, index, revision=info.sha, cache_dir=cache, token=token)
            parent = PurePosixPath(index).parent
            files += sorted({str(parent / shard) for shard in shard_names(Path(path)).values()})
        # Given the branch rather than its commit, the client notes which commit the branch was at: without
        # that note it would not find the snapshot when the Hub is out of reach.
        return Path(
            snapshot_download(
                name,
                revision=revision,
                cache_dir=cache,
                token=token,
                allow_patterns=[glob.escape(file) for file in files],
            )
        )
    except HFValidationError as error:
        raise CheckpointError(f"{no_repository}{_OFFLINE}") from error
    except GatedRepoError as error:
        raise CheckpointError(
            f"{name} is gated on the Hub; ask for access there and log in (hf auth login)"
        ) from error
    except RepositoryNotFoundError as error:
        raise CheckpointError(f"{no_repository}; a private one needs a token{_OFFLINE}") from error
    except RevisionNotFoundError as error:
        raise CheckpointError(f"{name} on the Hub has no revision {revision!r}") from error
    except CheckpointError:
        raise
    except Exception as error:
        # The client's transport has changed over its releases (requests, httpx, httpx2), each with errors of
        # its own; whatever fails here, but for the disk, the Hub did not deliver.
        if isinstance(error, OSError) and error.errno in _DISK:
            raise CheckpointError(f"{name} cannot be downloaded to this disk: {error}") from error
        folder = _downloaded(name, first, revision, cache)
        if folder is not None:
            warnings.warn(
                f"the Hub is out of reach; using what was downloaded of {name} before", stacklevel=3
            )
            return folder
        raise CheckpointError(
            f"{name} is no folder here, and the Hub is out of reach ({_first_line(error)}); "
            f"pass the path of a local folder that holds the checkpoint{_OFFLINE}"
        ) from error


def default_dtype(folder: Path) -> torch.dtype | None:
    """What a checkpoint is loaded in where nobody says: its own dtype (None), or float32.

    float32 is for the one in the package, whose weights are float16 to be small, not to be run so.
    """
    return torch.float32 if folder.resolve() == SHIPPED_FOLDER else None


def _downloaded(name: str, first: PurePosixPath, revision: str | None, cache: Path | None) -> Path | None:
    """What an earlier download left of a repository, or None; found by the file that loading reads first.

    The client's own search (`snapshot_download(local_files_only=True)`) takes a snapshot that leaves out what
    is not needed for an interrupted one, and refuses it.
    """
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(name, str(first), cache_dir=cache, revision=revision)
    return Path(found).parents[len(first.parts) - 1] if isinstance(found, str) else None


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
