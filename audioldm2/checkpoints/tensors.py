"""Reading tensors from a folder's weight files: safetensors or PyTorch's `.bin`, in one file or in shards.

File names are those that diffusers and transformers write. safetensors is preferred to `.bin`, and one file
to shards. Reading is safe: a `.bin` is checked before its tensors are unpickled
(`torch.load(weights_only=True)`), a shard index may refer only to files in its own folder, and every file has
to be a regular one that is not larger than its kind needs.
"""

from __future__ import annotations

import json
import re
import stat
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from audioldm2.checkpoints.errors import CheckpointError, MissingCheckpointError
from audioldm2.checkpoints.pickled import ZIP_MAGIC, check_bin
from audioldm2.quoting import listed, one_line, printable, quoted

# diffusers writes diffusion_pytorch_model.*, transformers model.safetensors and pytorch_model.bin.
STEMS = {
    "safetensors": ("diffusion_pytorch_model", "model"),
    "bin": ("diffusion_pytorch_model", "pytorch_model"),
}
# The dtypes of parameters, by their names in safetensors files.
FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}
# Tensors that are converted (to another dtype, device or shape) are read through a memory mapping that is
# closed and reopened after this many bytes. Otherwise the pages of the file would stay in memory next to the
# converted tensors.
_WINDOW_BYTES = 32 * 2**20
# Far beyond any real checkpoint: AudioLDM 2's configs have 10 kB, and its UNet 2,000 tensors.
MAX_CONFIG_BYTES = 2**20
MAX_INDEX_BYTES = 8 * 2**20  # of a shard index
MAX_HEADER_BYTES = 8 * 2**20  # of a safetensors file
MAX_TENSORS = 16384  # of a stage
MAX_NESTING = 32  # of the lists and objects in a JSON file


def weights_file(
    names: Collection[str], variant: str | None = None, use_safetensors: bool | None = None
) -> str | None:
    """Select the file to read weights from.

    Args:
        names: the names of all files in a folder.
        variant: weights of a variant, such as "fp16".
        use_safetensors: True for safetensors only, False for `.bin` only.

    Returns:
        The name of a weight file or of a shard index; None if there is neither.
    """
    dot = f".{variant}" if variant else ""
    for suffix, stems in STEMS.items():
        if use_safetensors is not None and use_safetensors != (suffix == "safetensors"):
            continue
        for stem in stems:
            for name in (f"{stem}{dot}.{suffix}", f"{stem}.{suffix}.index{dot}.json"):
                if name in names:
                    return name
    return None


def shard_names(index: Path) -> dict[str, str]:
    """Read a shard index.

    Args:
        index: path of the index, such as `model.safetensors.index.json`.

    Returns:
        From each tensor's name to the name of its shard, a file in the folder of the index.

    Raises:
        CheckpointError: the file is not a shard index, or refers to a file outside its folder.
    """
    content = read_json(index, MAX_INDEX_BYTES)
    weight_map = content.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} is not a shard index: it has no 'weight_map'")
    for name in weight_map.values():
        if not isinstance(name, str) or Path(name).name != name or name in ("", ".", "..") or "\\" in name:
            raise CheckpointError(
                f"{index} refers to a file outside its folder ({quoted(name)}), which is not allowed"
            )
    return weight_map


def check_file(path: Path, most: int | None = None) -> int:
    """Check that a file can be read without surprises: reading a pipe or a device might never end.

    Args:
        path: the file; a link is followed, as in the Hub client's cache.
        most: the largest size in bytes.

    Returns:
        Its size in bytes.

    Raises:
        CheckpointError: it is missing, not a regular file, or too large.
    """
    try:
        found = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        raise MissingCheckpointError(f"{path} is missing") from None
    except (OSError, ValueError) as error:  # ValueError: a null character in the name
        raise CheckpointError(f"{path} cannot be read: {one_line(error)}") from error
    if not stat.S_ISREG(found.st_mode):
        raise CheckpointError(f"{path} is not a regular file")
    if most is not None and found.st_size > most:
        raise CheckpointError(f"{path} has {found.st_size} bytes; at most {most} are read")
    return found.st_size


def read_json(path: Path, most: int = MAX_CONFIG_BYTES) -> dict[str, Any]:
    """Read a JSON object from a file.

    Args:
        path: the file.
        most: the largest size in bytes.

    Raises:
        CheckpointError: the file is missing, not a regular file, too large, or does not contain a JSON
            object, or the object has a key twice or is nested too deeply.
    """
    check_file(path, most)
    try:
        content = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_object)
    except (OSError, ValueError, RecursionError) as error:  # ValueError: not UTF-8 or not JSON
        raise CheckpointError(f"{path} cannot be read as JSON: {one_line(error)}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} must contain a JSON object")
    level: list[Any] = [content]
    for _ in range(MAX_NESTING):
        level = [inner for outer in level for inner in (outer.values() if isinstance(outer, dict) else outer)]
        level = [inner for inner in level if isinstance(inner, dict | list)]
    if level:
        raise CheckpointError(f"{path} is nested more than {MAX_NESTING} levels deep")
    return content


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, in which no key may be twice: readers differ in which one counts."""
    content = dict(pairs)
    if len(content) < len(pairs):
        twice, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise ValueError(f"the key {quoted(twice)} is there twice")
    return content


def _variants(names: Collection[str]) -> list[str]:
    """The variants of which there are weights among the names of a folder's files."""
    stems = "|".join(stem for stems in STEMS.values() for stem in stems)
    found = (re.match(rf"(?:{stems})\.(\w+)(?:-\d+-of-\d+)?\.(?:safetensors|bin)$", name) for name in names)
    return sorted({match[1] for match in found if match})


class WeightFiles:
    """The tensors in a folder's weight files. Names, shapes and dtypes are known before a tensor is read.

    Args:
        folder: folder with the weight files.
        variant: weights of a variant: "fp16" selects `model.fp16.safetensors` and such.
        use_safetensors: True for safetensors only, False for `.bin` only.

    Attributes:
        shapes: from each tensor's name to its shape.
        types: from each tensor's name to its dtype, or to safetensors' name of it if it is not one of FLOATS.
        nbytes: the size of the files.
        metadata: the texts in the headers of safetensors files.

    Raises:
        CheckpointError: there are no weights, a file is truncated or not a weight file, a `.bin` file
            contains more than tensors, or a shard is missing or outside the folder.
    """

    def __init__(self, folder: Path, variant: str | None = None, use_safetensors: bool | None = None):
        names: set[str] = set()
        try:
            names |= {path.name for path in folder.iterdir()}
        except (FileNotFoundError, NotADirectoryError):
            pass
        except OSError as error:
            raise CheckpointError(f"{folder} cannot be read: {one_line(error)}") from error
        name = weights_file(names, variant, use_safetensors)
        if name is None:
            others = _variants(names)
            if variant and weights_file(names, None, use_safetensors):
                raise MissingCheckpointError(
                    f"{folder} has no weights of the variant {quoted(variant)}; leave out variant "
                    "(torch_dtype converts the weights)"
                )
            if others and variant not in others:
                raise MissingCheckpointError(
                    f"{folder} has weights of the variant {' or '.join(map(quoted, others))} only; pass "
                    f"variant={quoted(others[0])}"
                )
            kind = f"weights of the variant {quoted(variant)}" if variant else "weights"
            if use_safetensors is not None:
                form = "safetensors" if use_safetensors else ".bin"
                raise MissingCheckpointError(
                    f"{folder} has no {kind} in {form} files; leave out use_safetensors={use_safetensors} to "
                    "read others"
                )
            raise MissingCheckpointError(
                f"{folder} has no {kind} (looked for model.safetensors and "
                "diffusion_pytorch_model.safetensors, their shards, and .bin files)"
            )
        if name.endswith(".json"):
            shards = shard_names(folder / name)
            files = sorted(set(shards.values()))
            missing = [shard for shard in files if not _exists(folder / shard)]
            if missing:
                raise MissingCheckpointError(
                    f"{folder / name} refers to missing shards: {listed(map(printable, missing))}"
                )
        else:
            files = [name]
        self._open([folder / file for file in files])

    @classmethod
    def of(cls, path: Path) -> WeightFiles:
        """The tensors in one file, whatever its name; it is a `.bin` file unless it ends in .safetensors."""
        files = cls.__new__(cls)
        files._open([path])
        return files

    def _open(self, paths: Sequence[Path]) -> None:
        self.metadata: dict[str, str] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.types: dict[str, torch.dtype | str] = {}
        self.nbytes = 0
        self._file_of: dict[str, Path] = {}
        self._tensors: dict[str, Tensor] = {}  # from .bin files
        self._mapped: dict[Path, Any] = {}  # safetensors files that stay open, for `map`
        self._window: dict[Path, Any] = {}  # safetensors files that are closed again, for `read`
        self._window_read = 0
        for path in paths:
            self.nbytes += check_file(path)
            if path.suffix == ".safetensors":
                _check_header(path)
                with _naming_file(path):
                    handle = self._mapped[path] = _safe_open(path)
                    self.metadata |= handle.metadata() or {}
                    for key in _at_most(path, handle.keys()):
                        part = handle.get_slice(key)
                        self._add(path, key, part.get_shape(), FLOATS.get(part.get_dtype(), part.get_dtype()))
            else:
                tensors = _read_bin(path)
                for key in _at_most(path, tensors):
                    self._tensors[key] = tensors[key]
                    self._add(path, key, tensors[key].shape, tensors[key].dtype)

    def _add(self, path: Path, name: str, shape: Sequence[int], dtype: torch.dtype | str) -> None:
        if name in self.shapes:
            raise CheckpointError(f"{path} contains {printable(name)}, which another shard contains, too")
        self.shapes[name] = tuple(shape)
        self.types[name] = dtype
        self._file_of[name] = path

    def read(self, name: str) -> Tensor:
        """Read one tensor that is used only for a short time, such as one that is converted."""
        if name in self._tensors:
            return self._tensors[name]
        path = self._file_of[name]
        if self._window_read > _WINDOW_BYTES:
            self._window.clear()
            self._window_read = 0
        with _naming_file(path):
            if path not in self._window:
                self._window[path] = _safe_open(path)
            tensor: Tensor = self._window[path].get_tensor(name)
        self._window_read += tensor.nbytes
        return tensor

    def map(self, name: str) -> Tensor:
        """Map one tensor into memory without reading it. Writing to it does not change the file."""
        if name in self._tensors:
            return self._tensors[name]
        path = self._file_of[name]
        with _naming_file(path):
            tensor: Tensor = self._mapped[path].get_tensor(name)
        return tensor


def _safe_open(path: Path) -> Any:
    from safetensors import safe_open

    return safe_open(path, framework="pt", device="cpu")


@contextmanager
def _naming_file(path: Path) -> Iterator[None]:
    """Turn safetensors' error about a broken file into one that names the file."""
    from safetensors import SafetensorError

    try:
        yield
    except (SafetensorError, OSError, MemoryError) as error:
        raise CheckpointError(
            f"{path} is not a complete safetensors file ({one_line(error)}); download or copy it again"
        ) from error


def _exists(path: Path) -> bool:
    """Whether there is something by that name, which may be too long for the file system."""
    try:
        return path.exists()
    except OSError:
        return False


def _at_most(path: Path, names: Collection[str]) -> Collection[str]:
    if len(names) > MAX_TENSORS:
        raise CheckpointError(f"{path} has {len(names)} tensors; at most {MAX_TENSORS} are read")
    return names


def _check_header(path: Path) -> None:
    """Check the size of a safetensors file's header, which is parsed as a whole before anything is known."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
    if size > MAX_HEADER_BYTES:
        raise CheckpointError(
            f"{path} is not a safetensors file, or its header of {size} bytes is larger than "
            f"{MAX_HEADER_BYTES}; download or copy it again"
        )


def _read_bin(path: Path) -> dict[str, Tensor]:
    check_bin(path)
    try:
        with path.open("rb") as file:
            # Files from before PyTorch 1.6 are not zip archives and cannot be memory-mapped.
            is_zip = file.read(len(ZIP_MAGIC)) == ZIP_MAGIC
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except Exception as error:
        # torch.load raises many kinds of errors for damaged files: RuntimeError, IndexError, BadZipFile, ...
        reason = f"{type(error).__name__}: {one_line(error)}"
        raise CheckpointError(
            f"{path} is not a complete PyTorch weight file ({reason}); download or copy it again"
        ) from error
    if not isinstance(content, dict) or not all(map(_is_named_tensor, content.items())):
        raise CheckpointError(f"{path} is not a state dict: it must contain tensors by name")
    return content


def _is_named_tensor(item: tuple[Any, Any]) -> bool:
    name, tensor = item
    return isinstance(name, str) and isinstance(tensor, Tensor) and tensor.layout == torch.strided
