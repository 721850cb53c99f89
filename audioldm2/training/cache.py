"""Tensors that take minutes to compute, kept in a file until something that they depend on changes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from audioldm2.atomic import replacing

DIGEST = "digest"  # of the sources, in the file's metadata


def digest_of(sources: Iterable[bytes]) -> str:
    """The SHA-256 digest of everything that a result depends on, in this order; each part counts alone."""
    digest = hashlib.sha256()
    for source in sources:
        digest.update(len(source).to_bytes(8, "little"))
        digest.update(source)
    return digest.hexdigest()


def cached(path: Path, sources: Iterable[bytes], make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """The result of `make`, which takes minutes: kept at `path` and made again when its sources change.

    Args:
        path: the file of the cache, .safetensors.
        sources: everything that the result depends on.
        make: computes the result, tensors on the CPU.
    """
    digest = digest_of(sources)
    found = read_cached(path, digest)
    if found is None:
        found = {name: tensor.contiguous() for name, tensor in make().items()}
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            save_file(found, temporary, {DIGEST: digest})
    return found


def read_cached(path: Path, digest: str) -> dict[str, Tensor] | None:
    """The tensors of a cache, or None if it is missing, damaged or of other sources."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            if (file.metadata() or {}).get(DIGEST) != digest:
                return None
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a mapping
    except SafetensorError:
        return None
