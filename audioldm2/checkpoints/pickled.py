"""Checking a PyTorch weight file (`.bin`) before PyTorch reads it.

`torch.load(weights_only=True)` runs no code, but it trusts the file: it allocates what the file claims to
need, reads compressed records as if they were not, and may extract archives. `check_bin` reads only the
pickle in the file, into descriptions of its tensors, and refuses everything but a state dict whose tensors
lie inside the file.

The pickle is read by the interpreter that is written in Python, because the one in C allocates whatever a
single instruction claims. Only the instructions and names that a state dict needs are known here.
"""

from __future__ import annotations

import io
import math
import pickle
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, NamedTuple

import torch

from audioldm2.checkpoints.errors import CheckpointError

MAX_PICKLE_BYTES = 2**20  # of everything but the tensors' values; 2,000 tensors take 0.3 MB
MAX_ZIP_BYTES = 4 * 2**20  # of a zip archive's directory and pickle together
ZIP_MAGIC = b"PK\x03\x04"
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # the first pickle of a file from before PyTorch 1.6

# The instructions that torch.save writes; the same that torch.load(weights_only=True) knows.
_INSTRUCTIONS = (
    pickle.APPEND, pickle.APPENDS, pickle.BINFLOAT, pickle.BINGET, pickle.BININT, pickle.BININT1,
    pickle.BININT2, pickle.BINPERSID, pickle.BINPUT, pickle.BINUNICODE, pickle.BUILD, pickle.EMPTY_DICT,
    pickle.EMPTY_LIST, pickle.EMPTY_SET, pickle.EMPTY_TUPLE, pickle.GLOBAL, pickle.LONG1, pickle.LONG_BINGET,
    pickle.LONG_BINPUT, pickle.MARK, pickle.NEWFALSE, pickle.NEWTRUE, pickle.NONE, pickle.PROTO,
    pickle.REDUCE, pickle.SETITEM, pickle.SETITEMS, pickle.SHORT_BINSTRING, pickle.STOP, pickle.TUPLE,
    pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3,
)  # fmt: skip
_STORAGES = {
    **{f"{name}Storage": 1 for name in ("Bool", "Byte", "Char", "Untyped")},
    **{f"{name}Storage": 2 for name in ("Half", "BFloat16", "Short")},
    **{f"{name}Storage": 4 for name in ("Float", "Int")},
    **{f"{name}Storage": 8 for name in ("Double", "Long", "ComplexFloat")},
    "ComplexDoubleStorage": 16,
}


def check_bin(path: Path) -> None:
    """Check that a file is a state dict whose tensors need no more memory than the file has bytes.

    Args:
        path: a regular file.

    Raises:
        CheckpointError: it is damaged, contains more than tensors, or claims more than it contains.
    """
    try:
        with path.open("rb") as file:
            is_zip = file.read(len(ZIP_MAGIC)) == ZIP_MAGIC
            file.seek(0)
            content = _read_zip(file) if is_zip else _read_legacy(file, path)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} is damaged, or contains more than tensors and could run code; "
            "it was not read. Use safetensors"
        ) from error
    except _RefusedError as error:
        raise CheckpointError(
            f"{path} is not a PyTorch weight file that can be read safely: {error}; download or copy it again"
        ) from error
    except Exception as error:
        # A damaged pickle or archive raises many kinds of errors: EOFError, KeyError, BadZipFile, ...
        raise CheckpointError(
            f"{path} is not a complete PyTorch weight file ({type(error).__name__}); "
            "download or copy it again"
        ) from error
    # A subclass of dict can have attributes in place of methods.
    if not isinstance(content, dict) or not all(
        isinstance(name, str) and isinstance(tensor, _Tensor) for name, tensor in dict.items(content)
    ):
        raise CheckpointError(f"{path} is not a state dict: it must contain tensors by name")


class _RefusedError(Exception):
    """The file is refused; the message says why."""


class _Storage(NamedTuple):
    """The memory of tensors: a record of a zip archive, or a part of a file."""

    size: int  # in bytes
    itemsize: int  # of its numbers, in bytes; 1 if they have no type


class _Tensor(NamedTuple):
    """What a tensor is made from; its values are not read."""

    size: tuple[int, ...]


class _Dict(dict[Any, Any]):
    """Stands for an OrderedDict, which can have attributes, such as a state dict's `_metadata`."""


class _Other(NamedTuple):
    """Something that PyTorch can save but that is not a tensor with its values in memory."""

    name: str


def _rebuild_tensor(storage: Any, offset: int, size: tuple[int, ...], *more: Any) -> _Tensor:
    """Check that a tensor takes no more memory than its storage; PyTorch checks its bounds."""
    numbers = (offset, *size)
    if not isinstance(storage, _Storage) or not all(isinstance(n, int) and n >= 0 for n in numbers):
        raise pickle.UnpicklingError("a tensor without memory or size")
    types = [entry.name for entry in more if isinstance(entry, _Global)]  # of _rebuild_tensor_v3
    itemsize = getattr(torch, types[0]).itemsize if types else storage.itemsize
    if math.prod(size) * itemsize > storage.size:
        raise _RefusedError("a tensor is larger than its memory")
    return _Tensor(size)


def _rebuild_meta_tensor(*_: Any) -> _Tensor:
    raise _RefusedError("it contains tensors on the meta device, which have no values")


def _empty_dict(*arguments: Any) -> _Dict:
    if arguments:
        raise pickle.UnpicklingError("a dictionary that is not empty at first")
    return _Dict()


_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": _empty_dict,
    "torch._utils._rebuild_tensor": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v3": _rebuild_tensor,
    "torch._utils._rebuild_parameter": lambda tensor, *_: tensor,
    "torch._utils._rebuild_meta_tensor_no_storage": _rebuild_meta_tensor,
    "torch._utils._rebuild_sparse_tensor": lambda *_: _Other("sparse"),
    "torch._utils._rebuild_nested_tensor": lambda *_: _Other("nested"),
    "torch._utils._rebuild_qtensor": lambda *_: _Other("quantized"),
    "torch.serialization._get_layout": lambda *_: _Other("layout"),
    "torch.Size": lambda *_: _Other("size"),
    "torch.device": lambda *_: _Other("device"),
}


class _Global:
    """A name in a pickle: one of `_FUNCTIONS`, a type of storage or a dtype. Calling it is all it can do."""

    __slots__ = ("name",)

    def __init__(self, name: str):
        self.name = name

    def __call__(self, *arguments: Any) -> Any:
        if self.name not in _FUNCTIONS:
            raise pickle.UnpicklingError(f"{self.name} cannot be called")
        return _FUNCTIONS[self.name](*arguments)

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError(f"{self.name} has no state")


class _Unpickler(pickle._Unpickler):
    """Reads a pickle into `_Tensor`s by name. `storages` collects the sizes of their storages by key."""

    dispatch: ClassVar[dict[int, Any]] = {
        code[0]: pickle._Unpickler.dispatch[code[0]] for code in _INSTRUCTIONS
    }

    def __init__(self, file: io.BytesIO):
        super().__init__(file, encoding="utf-8")
        self.storages: dict[str, int] = {}

    def find_class(self, module: str, name: str) -> Any:
        full = f"{module}.{name}"
        if full in _FUNCTIONS:
            return _Global(full)
        if module in ("torch", "torch.storage") and name in _STORAGES:
            return _Global(name)
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return _Global(name)
        raise pickle.UnpicklingError("a name that a state dict does not need")

    def persistent_load(self, pid: Any) -> _Storage:
        kind, storage_type, key, _, count, *view = pid
        if kind != "storage" or not isinstance(key, str) or not isinstance(count, int) or count < 0:
            raise pickle.UnpicklingError("not a storage")
        if any(view):
            raise _RefusedError("a storage is a view of another one")
        itemsize = _STORAGES[storage_type.name]
        size = count * itemsize
        if self.storages.setdefault(key, size) != size:
            raise _RefusedError("a storage has two sizes")
        return _Storage(size, itemsize)


class _LimitedReader:
    """A binary file of which zipfile can read only so many bytes."""

    def __init__(self, file: BinaryIO, limit: int):
        self._file, self._left = file, limit

    def read(self, size: int = -1) -> bytes:
        data = self._file.read(self._left + 1 if size < 0 else min(size, self._left + 1))
        self._left -= len(data)
        if self._left < 0:
            raise _RefusedError(f"its directory is larger than {MAX_ZIP_BYTES} bytes")
        return data

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def seekable(self) -> bool:
        return True


def _too_large() -> str:
    return f"its pickle is larger than {MAX_PICKLE_BYTES} bytes"


def _size_of(file: BinaryIO) -> int:
    size = file.seek(0, 2)
    file.seek(0)
    return size


def _read_zip(file: BinaryIO) -> Any:
    """The descriptions in a zip archive, as torch.save has written it since PyTorch 1.6."""
    size = _size_of(file)
    limited = _LimitedReader(file, MAX_ZIP_BYTES)
    with zipfile.ZipFile(limited) as archive:
        if archive.comment:  # with one, readers can disagree on where the directory begins
            raise _RefusedError("it has a comment, which torch.save does not write")
        records = archive.infolist()
        sizes = {record.filename: record.file_size for record in records}
        if any(r.compress_type != zipfile.ZIP_STORED or r.file_size != r.compress_size for r in records):
            raise _RefusedError("its records are compressed, which PyTorch reads as if they were not")
        if len(sizes) != len(records) or sum(sizes.values()) > size:
            raise _RefusedError("its records overlap")
        pickles = [name for name in sizes if name.endswith(".pkl")]
        if len(pickles) != 1 or not pickles[0].endswith("/data.pkl"):
            raise _RefusedError("it is not one state dict")  # TorchScript archives have several pickles
        if sizes[pickles[0]] > MAX_PICKLE_BYTES:
            raise _RefusedError(_too_large())
        reader = _Unpickler(io.BytesIO(archive.read(pickles[0])))
        content = reader.load()
    folder = pickles[0].removesuffix(".pkl")
    for key, needed in reader.storages.items():
        if sizes[f"{folder}/{key}"] < needed:
            raise _RefusedError("a storage is larger than its record")
    return content


def _read_legacy(file: BinaryIO, path: Path) -> Any:
    """The descriptions in a file from before PyTorch 1.6: several pickles, then the storages."""
    try:
        tarfile.open(path, "r:").close()
    except tarfile.TarError:
        pass
    else:  # the format before that one, which PyTorch extracts into a temporary folder
        raise _RefusedError("it is a tar archive")
    size = _size_of(file)
    start = io.BytesIO(file.read(MAX_PICKLE_BYTES))
    if _Unpickler(start).load() != LEGACY_MAGIC:
        raise _RefusedError("it does not begin as one")
    for _ in ("protocol", "sizes of integers"):
        _Unpickler(start).load()
    reader = _Unpickler(start)
    try:
        content = reader.load()
    except EOFError:
        raise _RefusedError(_too_large() if size > MAX_PICKLE_BYTES else "it is cut off") from None
    if sum(reader.storages.values()) > size:
        raise _RefusedError("it is shorter than its tensors")
    return content
