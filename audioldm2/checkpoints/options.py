"""The keyword arguments of `from_pretrained` and `save_pretrained`, checked in one place.

`load_options` turns those of loading into a source, the dtypes, the device and the parts to use;
`save_options` turns those of saving into a folder and the format of the weight files. Arguments of diffusers
that mean nothing here are refused, with what to do instead, and unknown ones with the nearest known name.
"""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from audioldm2.arguments import check_flag, did_you_mean
from audioldm2.checkpoints.hub import Source, default_dtype
from audioldm2.quoting import quoted
from audioldm2.runtime.capability import generation_dtype
from audioldm2.runtime.device import available_device, default_accelerator
from audioldm2.runtime.precision import DTYPES

Dtype = torch.dtype | Literal["auto"]  # see `part_dtype`
Dtypes = Dtype | dict[str, Dtype] | None  # a dict has one for each part, and "default" for the others
DtypeArgument = torch.dtype | str | Mapping[str, torch.dtype | str] | None
DeviceArgument = torch.device | str | int | None

MAX_SHARD_SIZE = "10GB"

_DTYPE_NAMES: dict[str, torch.dtype] = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES}
_DTYPE_NAMES |= {"float": torch.float32, "half": torch.float16, "double": torch.float64}
MAX_VARIANT = 100  # characters; file systems allow 255 in the names of the weight files
_VARIANT = re.compile(rf"\w[\w.-]{{0,{MAX_VARIANT - 1}}}", re.ASCII)
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT])(i?)B", re.IGNORECASE)
_NO_ONNX = "this package runs PyTorch only"
_NO_SPLITTING = "load on one device, and call pipe.enable_model_cpu_offload() if memory is short"
# Arguments of diffusers that have no counterpart, and what to do instead. None and False are accepted.
_LOADING_INSTEAD = {
    "custom_pipeline": "no code of a checkpoint is run; write a subclass of AudioLDM2Pipeline",
    "custom_revision": "no code of a checkpoint is run; write a subclass of AudioLDM2Pipeline",
    "trust_remote_code": "no code of a checkpoint is run; leave it out",
    "load_connected_pipeline": "leave it out",
    "proxies": "set the environment variable HTTPS_PROXY",
    "mirror": "set the environment variable HF_ENDPOINT",
    "use_auth_token": "use token",
    "resume_download": "downloads always continue where they stopped; leave it out",
    "max_memory": _NO_SPLITTING,
    "offload_folder": _NO_SPLITTING,
    "offload_state_dict": _NO_SPLITTING,
    "provider": _NO_ONNX,
    "provider_options": _NO_ONNX,
    "sess_options": _NO_ONNX,
    "use_onnx": _NO_ONNX,
    "quantization_config": "quantize the stages after loading, pipe.unet for example",
    "use_flashpack": "convert the checkpoint to safetensors",
    "flashpack_kwargs": "convert the checkpoint to safetensors",
    "dduf_file": "unpack it into a folder",
    "parallel_config": _NO_SPLITTING,
    "disable_mmap": "copy the checkpoint to a local disk",
    "ignore_mismatched_sizes": "random weights make noise; load a checkpoint that fits",
    "output_loading_info": "loading is exact: every tensor is used, or an error names it",
}
_NO_UPLOAD = "upload the folder with huggingface_hub.upload_folder"
_SAVING_INSTEAD = {
    **dict.fromkeys(
        ("push_to_hub", "repo_id", "commit_message", "private", "create_pr", "token"), _NO_UPLOAD
    ),
    "save_function": "files are written by safetensors and torch.save",
    "use_flashpack": "weights are written as safetensors or .bin",
}


# --- loading


class LoadOptions(NamedTuple):
    """What to load, and how.

    Attributes:
        source: the checkpoint.
        dtype: the dtype of all weights, or of each part's; see `part_dtype`.
        device: where the weights are placed.
        parts: parts of a pipeline that replace the checkpoint's, by name.
    """

    source: Source
    dtype: Dtypes
    device: torch.device
    parts: dict[str, Any]


def load_options(
    repo_or_folder: str | Path | None,
    pretrained_model_name_or_path: str | Path | None = None,
    *,
    torch_dtype: DtypeArgument = None,
    dtype: DtypeArgument = None,
    device: DeviceArgument = None,
    device_map: DeviceArgument | Mapping[str, Any] = None,
    variant: str | None = None,
    use_safetensors: bool | None = None,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    token: str | bool | None = None,
    local_files_only: bool | None = False,
    force_download: bool | None = False,
    low_cpu_mem_usage: bool | None = True,
    others: Mapping[str, Any] | None = None,
    part_names: Collection[str] = (),
) -> LoadOptions:
    """Check the arguments of a `from_pretrained`, where most of them are described.

    Args:
        others: all other keyword arguments: parts, and what is refused.
        part_names: the parts that the object has; () if it is itself a part.

    Raises:
        TypeError: an argument is unknown, or of a type that it cannot have.
        ValueError: an argument has a value that is not supported, or two contradict each other.
    """
    others = dict(others or {})
    parts = {name: others.pop(name) for name in part_names if name in others}
    missing = [name for name, part in parts.items() if part is None]
    if missing:
        raise ValueError(
            f"{missing[0]} is None, but the pipeline needs every part; leave {missing[0]} out to load the "
            "checkpoint's"
        )
    _refuse(others, "from_pretrained", load_options, part_names, _LOADING_INSTEAD)
    check_flag("low_cpu_mem_usage", low_cpu_mem_usage)
    check_flag("use_safetensors", use_safetensors)
    offline = check_flag("local_files_only", local_files_only)
    again = check_flag("force_download", force_download)
    if offline and again:
        raise ValueError("local_files_only and force_download contradict each other; pass one of them")
    if not isinstance(token, str | bool | None):
        raise TypeError(f"token must be a string, True or False, got a {type(token).__name__}")
    if not isinstance(revision, str | None):
        raise TypeError(f"revision must be a string, got {quoted(revision)}")
    if not isinstance(cache_dir, str | os.PathLike | None):
        raise TypeError(f"cache_dir must be a folder, got {quoted(cache_dir)}")
    source = Source(
        _location(repo_or_folder, pretrained_model_name_or_path),
        _checked_variant(variant),
        revision,
        cache_dir,
        token,
        offline,
        use_safetensors,
        again,
    )
    return LoadOptions(
        source, _chosen_dtype(torch_dtype, dtype, part_names), _chosen_device(device, device_map), parts
    )


def part_dtype(dtype: Dtypes, folder: Path, name: str = "") -> torch.dtype | None:
    """The dtype in which a part is loaded.

    "auto" is the dtype of the stored weights, as in diffusers. But on a machine without an accelerator whose
    CPU multiplies bfloat16 in hardware it is bfloat16, also for weights that are stored in float16, which
    most of these CPUs cannot multiply. With an accelerator, the part may be moved there later.

    Args:
        dtype: from `load_options`.
        folder: the checkpoint's.
        name: the part's.

    Returns:
        None to keep the dtype of the stored weights.
    """
    if isinstance(dtype, dict):
        dtype = dtype.get(name, dtype.get("default", torch.float32))  # float32 as in diffusers
    if dtype is None:
        return default_dtype(folder)
    if not isinstance(dtype, str):
        return dtype
    best = generation_dtype(default_accelerator())
    return best if best == torch.bfloat16 else None


def _location(repo_or_folder: Any, pretrained_model_name_or_path: Any) -> Any:
    if repo_or_folder is not None and pretrained_model_name_or_path is not None:
        raise TypeError(
            "from_pretrained() got a checkpoint and pretrained_model_name_or_path; pass one of them"
        )
    location = pretrained_model_name_or_path if repo_or_folder is None else repo_or_folder
    return Path(location) if isinstance(location, os.PathLike) else location  # checked in `checkpoint_folder`


def _chosen_dtype(torch_dtype: Any, dtype: Any, part_names: Collection[str]) -> Dtypes:
    first, second = (
        None if value is None else _dtypes(name, value, part_names)
        for name, value in (("torch_dtype", torch_dtype), ("dtype", dtype))
    )
    if first is not None and second is not None and first != second:
        raise ValueError(
            f"torch_dtype = {first} and dtype = {second} contradict each other; pass one of them"
        )
    return second if first is None else first


def _dtypes(argument: str, value: Any, part_names: Collection[str]) -> Dtypes:
    if not isinstance(value, Mapping):
        return _dtype(argument, value)
    if not part_names:
        raise ValueError(f"{argument} is a dict, which is for a whole pipeline; pass one dtype")
    names = (*part_names, "default")
    for name in value:
        if name not in names:
            raise ValueError(
                f"{argument} has a dtype for {quoted(name)}, which is not one of {', '.join(names)}"
            )
    return {name: _dtype(f"{argument}[{name!r}]", one) for name, one in value.items()}


def _dtype(argument: str, value: Any) -> Dtype:
    if isinstance(value, str):
        if value == "auto":
            return "auto"
        found = _DTYPE_NAMES.get(value.removeprefix("torch."))
    else:
        found = value if isinstance(value, torch.dtype) and value in DTYPES else None
    if found is None:
        supported = ", ".join(map(str, DTYPES))
        raise ValueError(
            f"{argument} = {quoted(value)} is not supported; use one of {supported} (also as text), or "
            '"auto" for that of the stored weights (bfloat16 on a CPU that multiplies it in hardware)'
        )
    return found


def _chosen_device(device: Any, device_map: Any) -> torch.device:
    placed = None if device is None else available_device(device)
    mapped = None if device_map is None else _mapped_device(device_map)
    if placed and mapped and (placed.type, placed.index or 0) != (mapped.type, mapped.index or 0):
        raise ValueError(
            f"device = {placed} and device_map = {quoted(device_map)} contradict each other; pass one of them"
        )
    return placed or mapped or torch.device("cpu")


def _mapped_device(device_map: Any) -> torch.device:
    if isinstance(device_map, Mapping):
        if set(device_map) != {""}:
            raise ValueError(
                "a device_map with a device for each part is not supported: all stages run on one device; "
                'pass device_map="balanced", or a device'
            )
        device_map = device_map[""]
    if isinstance(device_map, str) and device_map in ("balanced", "auto"):
        return default_accelerator()
    try:
        return available_device(device_map)
    except ValueError as error:
        raise ValueError(f'device_map: {error}; or "balanced" for this machine\'s accelerator') from error


# --- saving


@dataclass(frozen=True)
class SaveOptions:
    """The format of the weight files.

    Attributes:
        safe_serialization: safetensors, or `.bin` files of `torch.save`.
        variant: a part of the files' names, such as "fp16".
        max_shard_size: bytes; larger weights are split into several files.
    """

    safe_serialization: bool = True
    variant: str | None = None
    max_shard_size: int = 10 * 10**9


def save_options(
    folder: str | Path | None,
    save_directory: str | Path | None = None,
    *,
    safe_serialization: bool = True,
    variant: str | None = None,
    max_shard_size: int | str | None = MAX_SHARD_SIZE,
    is_main_process: bool = True,
    **others: Any,
) -> tuple[Path, SaveOptions]:
    """Check the arguments of a `save_pretrained`, where most of them are described.

    Args:
        is_main_process: as in diffusers; only True is supported.
        **others: all other keyword arguments, which are refused.

    Returns:
        The folder, and the format of the weight files.

    Raises:
        TypeError: an argument is unknown, or of a type that it cannot have.
        ValueError: an argument has a value that is not supported.
    """
    _refuse(others, "save_pretrained", save_options, (), _SAVING_INSTEAD)
    given = [x for x in (folder, save_directory) if x is not None]
    if len(given) != 1 or not isinstance(given[0], str | os.PathLike) or not os.fspath(given[0]):
        raise TypeError(f"save_pretrained() needs one folder, got {', '.join(map(quoted, given)) or 'none'}")
    if not check_flag("is_main_process", is_main_process):
        raise ValueError(
            "is_main_process=False is not supported: call save_pretrained in the main process only"
        )
    if os.path.isfile(given[0]):
        raise ValueError(f"save_pretrained() needs a folder; {quoted(os.fspath(given[0]))} is a file")
    try:
        path = Path(given[0]).expanduser()
    except RuntimeError as error:  # ~somebody
        raise ValueError(
            f"save_pretrained() cannot find the folder {quoted(str(given[0]))}: {error}"
        ) from error
    safe = True if safe_serialization is None else check_flag("safe_serialization", safe_serialization)
    return path, SaveOptions(safe, _checked_variant(variant), _bytes(max_shard_size))


def _bytes(size: Any) -> int:
    """A size in bytes: a number, or text such as "5GB" (10^9 bytes) or "5GiB" (2^30 bytes)."""
    size = MAX_SHARD_SIZE if size is None else size
    number: float = 0
    if isinstance(size, str):
        match = _SIZE.fullmatch(size.strip())
        if match is not None:
            number = float(match[1]) * (1024 if match[3] else 1000) ** ("KMGT".index(match[2].upper()) + 1)
    elif not isinstance(size, bool) and hasattr(size, "__index__"):
        number = int(size)
    if not number >= 1:
        raise ValueError(
            f'max_shard_size must be a positive number of bytes or text such as "5GB" or "200MB", got '
            f"{quoted(size)}"
        )
    return int(number)


# --- both


def _checked_variant(variant: Any) -> str | None:
    if variant is None or variant == "":
        return None
    if not isinstance(variant, str) or not _VARIANT.fullmatch(variant):
        raise ValueError(
            f'variant must be a part of file names, such as "fp16", of at most {MAX_VARIANT} characters, got '
            f"{quoted(variant)}"
        )
    return variant


def _refuse(
    others: Mapping[str, Any],
    function: str,
    options: Callable[..., Any],
    part_names: Collection[str],
    instead: Mapping[str, str],
) -> None:
    """Refuse keyword arguments that are not known.

    Args:
        others: the arguments.
        function: their function's name.
        options: has the known arguments as parameters.
        part_names: other known arguments.
        instead: what to do in place of each argument of diffusers that is not supported.
    """
    for name, value in others.items():
        if name in instead:
            if value is not None and value is not False:
                raise ValueError(f"{function}({name}=...) is not supported: {instead[name]}")
            continue
        known = [*inspect.signature(options).parameters, *part_names]
        hint = did_you_mean(name, [one for one in known if one not in ("others", "part_names")])
        raise TypeError(f"{function}() has no argument {quoted(name)}{hint}")
