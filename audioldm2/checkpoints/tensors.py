"""Reading tensors from a folder's weight files: safetensors or PyTorch's `.bin`, in one file or in shards.

File names are those that diffusers and transformers write. safetensors is preferred to `.bin`, and one file
to shards. Reading is safe: only tensors are unpickled (`torch.load(weights_only=True)`), and a shard index
may refer only to files in its own folder.
"""

from __future__ import annotations

import json
import pickle
import zipfile
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from audioldm2.checkpoints.errors import CheckpointError

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
    content = read_json(index)
    weight_map = content.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} is not a shard index: it has no 'weight_map'")
    for name in weight_map.values():
        if not isinstance(name, str) or Path(name).name != name or name in ("", ".", "..") or "\\" in name:
            raise CheckpointError(
                f"{index} refers to a file outside its folder ({name!r}), which is not allowed"
            )
    return weight_map


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file; CheckpointError if it is missing or holds something else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing") from None
    except (OSError, ValueError, RecursionError) as error:  # ValueError: not UTF-8 or not JSON
        raise CheckpointError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} must contain a JSON object")
    return content


class WeightFiles:
    """The tensors in a folder's weight files. Names, shapes and dtypes are known before a tensor is read.

    Args:
        folder: folder with the weight files.
        variant: weights of a variant: "fp16" selects `model.fp16.safetensors` and such.
        use_safetensors: True for safetensors only, False for `.bin` only.

    Attributes:
        shapes: from each tensor's name to its shape.
        types: from each tensor's name to its dtype, or to safetensors' name of it if it is not one of FLOATS.

    Raises:
        CheckpointError: there are no weights, a file is truncated or not a weight file, a `.bin` file
            contains more than tensors, or a shard is missing or outside the folder.
    """

    def __init__(self, folder: Path, variant: str | None = None, use_safetensors: bool | None = None):
        names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
        name = weights_file(names, variant, use_safetensors)
        if name is None:
            kind = f"weights of the variant '{variant}'" if variant else "weights"
            if use_safetensors is not None:
                form = "safetensors" if use_safetensors else ".bin"
                raise CheckpointError(
                    f"{folder} has no {kind} in {form} files; leave out use_safetensors={use_safetensors} to "
                    "read others"
                )
            raise CheckpointError(
                f"{folder} has no {kind} (looked for model.safetensors and "
                "diffusion_pytorch_model.safetensors, their shards, and .bin files)"
            )
        if name.endswith(".json"):
            shards = shard_names(folder / name)
            missing = sorted({shard for shard in shards.values() if not (folder / shard).is_file()})
            if missing:
                raise CheckpointError(f"{folder / name} refers to missing shards: {', '.join(missing)}")
            files = sorted(set(shards.values()))
        else:
            files = [name]
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.types: dict[str, torch.dtype | str] = {}
        self._file_of: dict[str, Path] = {}
        self._tensors: dict[str, Tensor] = {}  # from .bin files
        self._mapped: dict[Path, Any] = {}  # safetensors files that stay open, for `map`
        self._window: dict[Path, Any] = {}  # safetensors files that are closed again, for `read`
        self._window_read = 0
        for path in (folder / file for file in files):
            if path.suffix == ".safetensors":
                with _naming_file(path):
                    handle = self._mapped[path] = _safe_open(path)
                    for key in handle.keys():  # noqa: SIM118 - not a dict
                        part = handle.get_slice(key)
                        self._add(path, key, part.get_shape(), FLOATS.get(part.get_dtype(), part.get_dtype()))
            else:
                for key, tensor in _read_bin(path).items():
                    self._tensors[key] = tensor
                    self._add(path, key, tensor.shape, tensor.dtype)

    def _add(self, path: Path, name: str, shape: Sequence[int], dtype: torch.dtype | str) -> None:
        if name in self.shapes:
            raise CheckpointError(f"{path} contains {name}, which another shard contains, too")
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
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} is not a complete safetensors file ({error}); download or copy it again"
        ) from error


def _read_bin(path: Path) -> dict[str, Tensor]:
    try:
        # Files from before PyTorch 1.6 are not zip archives and cannot be memory-mapped.
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} is damaged, or contains more than tensors and could run code; "
            "it was not read. Use safetensors"
        ) from error
    except Exception as error:
        # torch.load raises many kinds of errors for damaged files: RuntimeError, IndexError, BadZipFile, ...
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise CheckpointError(
            f"{path} is not a complete PyTorch weight file ({reason}); download or copy it again"
        ) from error
    if not isinstance(content, dict) or not all(map(_is_named_tensor, content.items())):
        raise CheckpointError(f"{path} is not a state dict: it must contain tensors by name")
    return content


def _is_named_tensor(item: tuple[Any, Any]) -> bool:
    name, tensor = item
    return isinstance(name, str) and isinstance(tensor, Tensor) and tensor.layout == torch.strided
