"""Reading tensors from a folder's weight files: safetensors, sharded safetensors, or PyTorch's `.bin`.

Which file: safetensors before `.bin`, one file before shards, the names that diffusers and transformers
write. Nothing is unpickled but tensors (`torch.load(weights_only=True)`), and a shard index may name only
files beside it.
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
# What parameters may be held in, by safetensors' names.
FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}
# Tensors that need work (another dtype, device or form) are read through a mapping of the file that is
# dropped after this many bytes, so that the pages that were read do not pile up beside the tensors that were
# made.
_WINDOW_BYTES = 32 * 2**20


def weights_file(names: Collection[str], variant: str | None = None) -> str | None:
    """The file among a folder's `names` to read weights from: a shard index or the weights; or None."""
    dot = f".{variant}" if variant else ""
    for suffix, stems in STEMS.items():
        for stem in stems:
            for name in (f"{stem}{dot}.{suffix}", f"{stem}.{suffix}.index{dot}.json"):
                if name in names:
                    return name
    return None


def shard_names(index: Path) -> dict[str, str]:
    """From tensor names to shard files, as a shard index says.

    Raises:
        CheckpointError: the index is not JSON of the known form, or names a file that is not beside it.
    """
    content = read_json(index)
    weight_map = content.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} is no shard index: it has no 'weight_map'")
    for name in weight_map.values():
        if not isinstance(name, str) or Path(name).name != name or name in ("", ".", "..") or "\\" in name:
            raise CheckpointError(f"{index} points outside its folder ({name!r}); refused")
    return weight_map


def read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing") from None
    except (OSError, ValueError, RecursionError) as error:  # ValueError: no UTF-8, no JSON
        raise CheckpointError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} should hold a JSON object")
    return content


class WeightFiles:
    """The tensors in a folder's weight files, by name; shapes and types are known before anything is read.

    Args:
        folder: where the weight files are.
        variant: "fp16" reads `model.fp16.safetensors` and such.

    Raises:
        CheckpointError: no weights, a truncated or garbage file, a `.bin` that holds more than tensors, a
            shard that is missing or outside the folder.
    """

    def __init__(self, folder: Path, variant: str | None = None):
        name = weights_file({path.name for path in folder.iterdir()}, variant) if folder.is_dir() else None
        if name is None:
            kind = f"weights of the variant '{variant}'" if variant else "weights"
            raise CheckpointError(
                f"{folder} holds no {kind} (looked for model.safetensors, "
                "diffusion_pytorch_model.safetensors, their shards and their .bin)"
            )
        if name.endswith(".json"):
            places = shard_names(folder / name)
            missing = sorted({shard for shard in places.values() if not (folder / shard).is_file()})
            if missing:
                raise CheckpointError(f"{folder / name} names shards that are missing: {', '.join(missing)}")
            files = sorted(set(places.values()))
        else:
            files = [name]
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.types: dict[str, torch.dtype | str] = {}
        self._file_of: dict[str, Path] = {}
        self._tensors: dict[str, Tensor] = {}  # what a .bin held
        self._mapped: dict[Path, Any] = {}  # open safetensors files whose tensors are used where they lie
        self._window: dict[Path, Any] = {}  # open safetensors files that are soon closed again
        self._window_read = 0
        for path in (folder / file for file in files):
            if path.suffix == ".safetensors":
                with _naming(path):
                    handle = self._mapped[path] = _safe_open(path)
                    for key in handle.keys():  # noqa: SIM118 - not a dict
                        part = handle.get_slice(key)
                        self._found(
                            path, key, part.get_shape(), FLOATS.get(part.get_dtype(), part.get_dtype())
                        )
            else:
                for key, tensor in _read_bin(path).items():
                    self._tensors[key] = tensor
                    self._found(path, key, tensor.shape, tensor.dtype)

    def _found(self, path: Path, name: str, shape: Sequence[int], held: torch.dtype | str) -> None:
        if name in self.shapes:
            raise CheckpointError(f"{path} holds {name}, and so does another shard")
        self.shapes[name] = tuple(shape)
        self.types[name] = held
        self._file_of[name] = path

    def read(self, name: str) -> Tensor:
        """One tensor, to be worked on and let go."""
        if name in self._tensors:
            return self._tensors[name]
        path = self._file_of[name]
        if self._window_read > _WINDOW_BYTES:
            self._window.clear()
            self._window_read = 0
        with _naming(path):
            if path not in self._window:
                self._window[path] = _safe_open(path)
            tensor = self._window[path].get_tensor(name)
        self._window_read += tensor.nbytes
        return tensor

    def map(self, name: str) -> Tensor:
        """One tensor where it lies: backed by the file's memory mapping (private: the file never changes)."""
        if name in self._tensors:
            return self._tensors[name]
        path = self._file_of[name]
        with _naming(path):
            return self._mapped[path].get_tensor(name)


def _safe_open(path: Path) -> Any:
    from safetensors import safe_open

    return safe_open(path, framework="pt", device="cpu")


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Turn what safetensors says of a broken file into an error that names the file."""
    from safetensors import SafetensorError

    try:
        yield
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} is not a whole safetensors file ({error}); download or copy it again"
        ) from error


def _read_bin(path: Path) -> dict[str, Tensor]:
    try:
        # Files from before PyTorch 1.6 are no zip archives and cannot be memory-mapped.
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} is garbage, or holds more than tensors and would have to run code to be read; refused. "
            "Use safetensors"
        ) from error
    except Exception as error:
        # Garbage makes torch.load raise nearly anything: RuntimeError, IndexError, struct.error, BadZipFile.
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise CheckpointError(
            f"{path} is not a whole PyTorch weights file ({reason}); download or copy it again"
        ) from error
    if not isinstance(content, dict) or not all(map(_is_named_tensor, content.items())):
        raise CheckpointError(f"{path} is no state dict: it should hold tensors by name")
    return content


def _is_named_tensor(item: tuple[Any, Any]) -> bool:
    name, tensor = item
    return isinstance(name, str) and isinstance(tensor, Tensor) and tensor.layout == torch.strided
