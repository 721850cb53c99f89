"""Corrupted checkpoints, and how loading one has to end. `scripts/fuzz` and the tests run them.

A case is a checkpoint with one thing wrong, drawn by a seed and a number: `corrupt(...)` writes it, and
`run_case` loads it and judges what happens. Loading has to end in a working pipeline or in one
`CheckpointError`, whose message is a single printable line that names the file; a pipeline that loads has to
give a finite sound, or a `ValueError` of one line. Nothing may run code, write a file, or take more time or
memory than allowed.
"""

from __future__ import annotations

import io
import json
import math
import os
import pickle
import random
import shutil
import signal
import socket
import struct
import tarfile
import time
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from audioldm2 import AudioLDM2Pipeline
from audioldm2.checkpoints.errors import CheckpointError
from audioldm2.checkpoints.folder import load_stage, load_tokenizer
from audioldm2.checkpoints.formats import CONFIG_FILES, INDEX, PARTS, TOKENIZERS
from scripts.random_checkpoint import SMALL_RANDOM, changed, write_random_checkpoint

SECONDS = 10.0  # that loading may take
MEMORY = 300 * 2**20  # bytes that loading may take in addition to twice the size of the files
LONGEST_MESSAGE = 3000
PROMPT = "Rain falls on a tin roof"
MARKER = "code-was-run"  # the file that a hostile pickle would write, in the working directory

# With as few tensors as possible, so that loading is quick: two levels of everything, one layer of each.
SIZES = changed(
    SMALL_RANDOM,
    text_encoder={
        "text_config": {**SMALL_RANDOM["text_encoder"]["text_config"], "num_hidden_layers": 1},
        "audio_config": {
            "patch_embeds_hidden_size": 8,
            "hidden_size": 16,
            "depths": [1, 1],
            "num_attention_heads": [1, 2],
            "patch_size": 16,
            "patch_stride": [16, 16],
        },
    },
    text_encoder_2={"num_layers": 1},
    language_model={"n_layer": 1},
    unet={
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
        "block_out_channels": [16, 32],
        "cross_attention_dim": [[None, 24, 32]] * 2,
        "attention_head_dim": [2, 4],
    },
    vae={
        "down_block_types": ["DownEncoderBlock2D"] * 2,
        "up_block_types": ["UpDecoderBlock2D"] * 2,
        "block_out_channels": [8, 16],
    },
    vocoder={
        "model_in_dim": 16,
        "upsample_initial_channel": 16,
        "upsample_rates": [16, 10],
        "upsample_kernel_sizes": [32, 20],
        "resblock_kernel_sizes": [3],
        "resblock_dilation_sizes": [[1, 3]],
    },
)
JSON_FILES = (
    INDEX,
    *(f"{part}/config.json" for part in PARTS),
    *(f"{part}/{file}" for part, file in CONFIG_FILES.items()),
    *(f"{part}/tokenizer_config.json" for part in TOKENIZERS),
)
# What stands in place of a value in a JSON file.
NUMBERS: tuple[Any, ...] = (
    *(0, 1, -1, 2, 3, 7, 64, 1000, 10**5, 10**8, 2**31 - 1, 2**31, 2**63, 10**30, 10**400),
    *(0.0, 0.5, -0.5, 1e-300, 1e300, math.nan, math.inf, -math.inf),
)
VALUES: tuple[Any, ...] = (
    *NUMBERS,
    *(None, True, False, "", "x", "1", "gelu", "\x1b[31mred\x1b[0m\n", "../../x", "\ud800", "y" * 100_000),
    *([], [0], [1, 2, 3], [[]], [None, "x"], [2**31 - 1] * 4, [1] * 5000, {}, {"a": 1}, [[[[[[1]]]]]]),
)


@dataclass
class Case:
    """One corrupted checkpoint.

    Attributes:
        number: its number in a run of one seed.
        kind: a key of `KINDS`.
        folder: of the checkpoint.
        part: the part that was corrupted; "" if it is none, or several.
        what: how it was corrupted, for the report.
        name: what is passed to `from_pretrained` instead of the folder, if that is what is corrupted.
    """

    number: int
    kind: str
    folder: Path
    part: str = ""
    what: str = ""
    name: Any = None


class Result(NamedTuple):
    """How a case ended."""

    number: int
    kind: str
    what: str
    outcome: str  # "refused", "loaded", "sound" or "refused at the call"
    wrong: str  # "" if nothing is
    seconds: float  # of CPU time that loading took
    memory: int  # bytes that loading took


class Draw(random.Random):
    """Random numbers for one case, and what the kinds need from them."""

    def json_path(self, content: Any) -> list[Any]:
        """Keys that lead to a value in a JSON object, however deep."""
        path: list[Any] = []
        while True:
            keys = list(content) if isinstance(content, dict) else list(range(len(content)))
            path.append(self.choice(keys))
            content = content[path[-1]]
            if not isinstance(content, dict | list) or not content or self.random() < 0.3:
                return path


# --- what the kinds have in common


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def write(path: Path, content: bytes | str) -> None:
    """Replace a file; others may be links to the same content."""
    path.unlink(missing_ok=True)
    data = content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content
    path.write_bytes(data)


def write_json(path: Path, content: Any) -> None:
    write(path, json.dumps(content).replace(f"{10**400}", "1e400"))


def put(content: Any, path: list[Any], value: Any) -> None:
    for key in path[:-1]:
        content = content[key]
    content[path[-1]] = value


def get(content: Any, path: list[Any]) -> Any:
    for key in path:
        content = content[key]
    return content


def part_of(file: str) -> str:
    return file.split("/")[0] if "/" in file else ""


def weights_of(folder: Path, part: str) -> Path:
    return next((folder / part).glob("*.safetensors"))


def flipped(draw: Draw, data: bytes, start: int, end: int) -> bytes:
    """A copy with 1 to 8 bits flipped between two positions."""
    changed = bytearray(data)
    for _ in range(draw.choice((1, 1, 2, 8))):
        changed[draw.randrange(start, end)] ^= 1 << draw.randrange(8)
    return bytes(changed)


def cut(draw: Draw, data: bytes) -> bytes:
    """The beginning of a file: nothing, a few bytes, a part, or nearly all."""
    end = draw.choice(
        (0, draw.randrange(1, 64), draw.randrange(len(data)), len(data) - draw.randrange(1, 64))
    )
    return data[: max(0, end)]


# --- the kinds; each corrupts a checkpoint's folder and says how


def json_value(draw: Draw, case: Case, files: tuple[str, ...] = JSON_FILES) -> str:
    """Another type or size in place of a value."""
    file = draw.choice(files)
    case.part = part_of(file)
    content = read(case.folder / file)
    path = draw.json_path(content)
    value = draw.choice(VALUES)
    put(content, path, value)
    write_json(case.folder / file, content)
    return f"{file}: {path} = {str(value)[:60]!r}"


def json_number(draw: Draw, case: Case) -> str:
    """A number that is near the right one, or much larger."""
    file = draw.choice(JSON_FILES[1:])
    case.part = part_of(file)
    content = read(case.folder / file)
    for _ in range(50):
        path = draw.json_path(content)
        old = get(content, path)
        if isinstance(old, int | float) and not isinstance(old, bool):
            new = draw.choice((old + 1, old - 1, 2 * old, old // 2, -old, 10 * old, old + 0.5, old * 10**6))
            put(content, path, new)
            write_json(case.folder / file, content)
            return f"{file}: {path} = {new}"
    return json_value(draw, case)


def json_key(draw: Draw, case: Case) -> str:
    """A key that is missing, or a list that is longer or shorter."""
    file = draw.choice(JSON_FILES)
    case.part = part_of(file)
    content = read(case.folder / file)
    path = draw.json_path(content)
    value = get(content, path)
    if isinstance(value, list) and value and draw.random() < 0.7:
        put(content, path, draw.choice((value[:-1], value + value[-1:], value[::-1], value * 300)))
    else:
        outer = get(content, path[:-1])
        del outer[path[-1]]
    write_json(case.folder / file, content)
    return f"{file}: {path} is missing or of another length"


def json_text(draw: Draw, case: Case) -> str:
    """A JSON file that is damaged, deep, huge, ambiguous or something else."""
    file = draw.choice(JSON_FILES)
    case.part = part_of(file)
    path = case.folder / file
    data = path.read_bytes()
    kinds: dict[str, Callable[[], bytes]] = {
        "bits": lambda: flipped(draw, data, 0, len(data)),
        "cut": lambda: cut(draw, data),
        "deep list": lambda: b'{"a": ' + b"[" * 5000 + b"]" * 5000 + b"}",
        "deep object": lambda: b'{"a": ' * 900 + b"1" + b"}" * 900,
        "two keys": lambda: data.rstrip()[:-1] + b', "_class_name": "X", "_class_name": "\\u001b[31m"}',
        "many keys": lambda: json.dumps({f"k{i}": i for i in range(60_000)}).encode() + data,
        "large": lambda: data.rstrip()[:-1] + b', "x": "' + b"y" * (3 * 2**20) + b'"}',
        "many lists": lambda: b'{"x": [' + b"[]," * 300_000 + b"1]}",
        "long number": lambda: b'{"x": ' + b"9" * 100_000 + b"}",
        "not UTF-8": lambda: data + b"\xff\xfe",
        "byte order mark": lambda: b"\xef\xbb\xbf" + data,
        "UTF-16": lambda: data.decode().encode("utf-16"),
        "null characters": lambda: b"\0" * len(data),
        "list": lambda: b"[1, 2]",
        "number": lambda: b"1",
        "empty object": lambda: b"{}",
        "HTML": lambda: b"<!doctype html><html>Not found</html>",
    }
    name = draw.choice(list(kinds))
    write(path, kinds[name]())
    return f"{file}: {name}"


def scheduler(draw: Draw, case: Case) -> str:
    """Settings of a scheduler of either class: one or two of another type, size or name."""
    file = f"scheduler/{CONFIG_FILES['scheduler']}"
    case.part = "scheduler"
    content = read(case.folder / file)
    index = read(case.folder / INDEX)
    name = draw.choice(("DDIMScheduler", "DPMSolverMultistepScheduler"))
    index["scheduler"][1] = name
    if name.startswith("DPM"):
        content |= {"solver_order": 2, "algorithm_type": "dpmsolver++", "lambda_min_clipped": -math.inf}
        content |= {"use_karras_sigmas": draw.random() < 0.5, "solver_type": "midpoint"}
        content |= {"final_sigmas_type": draw.choice(("zero", "sigma_min"))}
    done = []
    for _ in range(draw.choice((1, 1, 2))):
        key = draw.choice(list(content))
        close = (
            1,
            2,
            3,
            5,
            0.5,
            0.999,
            1.5,
            5000,
            True,
            "sde-dpmsolver++",
            "trailing",
            "linspace",
            "v_prediction",
        )
        words = (
            "linear",
            "squaredcos_cap_v2",
            "sample",
            "heun",
            "sigma_min",
            [0.1, 0.2],
            [0.1] * 1000,
            [2.0] * 9,
        )
        content[key] = draw.choice((*close, *words, *VALUES))
        done.append(f"{key} = {str(content[key])[:40]!r}")
    write_json(case.folder / INDEX, index)
    write_json(case.folder / file, content)
    return f"{name}: {', '.join(done)}"


def model_index(draw: Draw, case: Case) -> str:
    """Classes and names in model_index.json."""
    path = case.folder / INDEX
    content = read(path)
    key = draw.choice(list(content))
    classes = [entry[1] for entry in content.values() if isinstance(entry, list)]
    classes += ["os.system", "VitsModel", "VitsTokenizer", "\x1b[2J", "x" * 10_000, None, 3, [], {}]
    content[key] = draw.choice((["transformers", draw.choice(classes)], draw.choice(VALUES)))
    write_json(path, content)
    return f"{INDEX}: {key} = {str(content[key])[:60]!r}"


def tokenizer(draw: Draw, case: Case) -> str:
    """A tokenizer's files: values, ids, damage, what its config says."""
    case.part = draw.choice(list(TOKENIZERS))
    folder = case.folder / case.part
    how = draw.choice(("config", "config", "value", "value", "ids", "bits", "cut", "remove", "add"))
    path = folder / ("tokenizer_config.json" if how == "config" else "tokenizer.json")
    if how == "config":
        content = read(path)
        more = ("vocab_file", "tokenizer_file", "fast_tokenizer_files", "auto_map", "added_tokens_decoder")
        key = draw.choice((*content, "model_max_length", "model_max_length", "model_input_names", *more))
        known = ("/etc/passwd", "<s>", "<new token>", ["input_ids"], ["<extra>"], {"AutoTokenizer": "x.Y"})
        content[key] = draw.choice(
            (*known, {"900": {"content": "<z>", "special": True}}, 512.0, 1, 2, 3, *VALUES)
        )
        write_json(path, content)
        return f"{case.part}/{path.name}: {key} = {str(content[key])[:60]!r}"
    if how in ("value", "ids"):
        content = read(path)
        keys = draw.json_path(content)
        if how == "ids":
            for _ in range(100):
                keys = draw.json_path(content)
                if isinstance(get(content, keys), int | float):
                    break
            put(content, keys, draw.choice(NUMBERS))
        else:
            put(content, keys, draw.choice(VALUES))
        write_json(path, content)
        return f"{case.part}/{path.name}: {keys} = {str(get(content, keys))[:60]!r}"
    if how in ("remove", "add"):
        path = draw.choice(sorted(folder.iterdir()))
        if how == "remove":
            path.unlink()
            return f"{case.part}/{path.name} is missing"
        name = draw.choice(
            ("special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "spiece.model")
        )
        write(folder / name, draw.choice(('{"pad_token": 3}', '{"<new>": 5000}', "{{ x", "\0", "[]")))
        return f"{case.part}/{name} is there"
    path = draw.choice(sorted(folder.iterdir()))
    data = path.read_bytes()
    write(path, flipped(draw, data, 0, len(data)) if how == "bits" else cut(draw, data))
    return f"{case.part}/{path.name}: {how}"


def safetensors_bytes(draw: Draw, case: Case) -> str:
    """Bits, lengths and the size of the header of a safetensors file."""
    case.part = draw.choice(list(PARTS))
    path = weights_of(case.folder, case.part)
    data = path.read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")
    sizes = (0, 1, header - 9, header - 7, 2**16, 2**31, 2**62, 2**64 - 1, len(data))
    kinds: dict[str, Callable[[], bytes]] = {
        "bits in the header": lambda: flipped(draw, data, 8, header),
        "bits": lambda: flipped(draw, data, 0, min(len(data), header + 64)),
        "cut": lambda: cut(draw, data),
        "longer": lambda: data + b"x" * draw.choice((1, 8, 1000)),
        "header size": lambda: struct.pack("<Q", draw.choice(sizes)) + data[8:],
        "header of spaces": lambda: struct.pack("<Q", 9 * 2**20) + b" " * (9 * 2**20) + data[header:],
        "noise": lambda: draw.randbytes(draw.choice((1, 7, 8, 64, 5000))),
        "pointer file": lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
        "zeros": lambda: b"\0" * len(data),
    }
    name = draw.choice(list(kinds))
    write(path, kinds[name]())
    return f"{path.name} of {case.part}: {name}"


def safetensors_header(draw: Draw, case: Case) -> str:
    """Names, dtypes, shapes and offsets in the header of a safetensors file."""
    case.part = draw.choice(list(PARTS))
    path = weights_of(case.folder, case.part)
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    names = [name for name in header if name != "__metadata__"]
    name = draw.choice(names)
    entry = header[name]
    how = draw.choice(
        ("dtype", "shape", "offsets", "name", "remove", "add", "value", "empty", "many", "metadata")
    )
    if how == "dtype":
        entry["dtype"] = draw.choice(
            ("F16", "F64", "I32", "U8", "BOOL", "F8_E4M3", "F4", "X", "\x1b[31m", 3, None)
        )
    elif how == "shape":
        shape = entry["shape"]
        shapes: tuple[Any, ...] = (
            shape[::-1],
            shape + [1],
            [1] + shape,
            [],
            [0],
            [2**31, 2**31],
            [2**63, 0],
            [-1],
            [1] * 4000,
            "x",
        )
        entry["shape"] = draw.choice(shapes)
    elif how == "offsets":
        begin, end = entry["data_offsets"]
        other = header[draw.choice(names)]["data_offsets"]
        entry["data_offsets"] = draw.choice(
            (
                [end, begin],
                [begin, end + 4],
                [begin + 4, end],
                [0, 0],
                other,
                [0, 2**63],
                [-4, 0],
                [begin],
                None,
            )
        )
    elif how == "name":
        header[draw.choice((f"{name}x", "", "\x1b[2J\n", "y" * 100_000, f"module.{name}"))] = header.pop(name)
    elif how == "remove":
        del header[name]
    elif how == "add":
        header["another.weight"] = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    elif how == "value":
        header[name] = draw.choice(VALUES)
    elif how == "empty":
        header = {}
    elif how == "many":
        tensor = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
        header |= {f"t{i}": tensor for i in range(draw.choice((500, 40_000)))}
    else:
        header["__metadata__"] = draw.choice(({"format": "tf"}, {"a": 1}, [], "x", {"x": "y" * 10**6}))
    text = json.dumps(header).encode()
    write(path, struct.pack("<Q", len(text)) + text + data[8 + size :])
    return f"{path.name} of {case.part}: {how} of {name}"


def tensors(draw: Draw, case: Case) -> str:
    """Another set of tensors than the config's: missing, more, of other shapes and types."""
    case.part = draw.choice(list(PARTS))
    path = weights_of(case.folder, case.part)
    state = load_file(path)
    name = draw.choice(sorted(state))
    tensor = state[name]
    how = draw.choice(("missing", "more", "transposed", "longer", "int", "half", "double", "swapped", "none"))
    if how == "missing":
        del state[name]
    elif how == "more":
        state[f"{name}.more"] = torch.zeros(3)
    elif how == "transposed":
        state[name] = tensor.permute(*reversed(range(tensor.dim()))).contiguous()
    elif how == "longer":
        state[name] = torch.cat([tensor.flatten(), tensor.flatten()])
    elif how == "int":
        state[name] = tensor.to(draw.choice((torch.int64, torch.uint8, torch.bool)))
    elif how == "half":
        state = {n: t.half() if t.is_floating_point() else t for n, t in state.items()}
    elif how == "double":
        state[name] = tensor.double()
    elif how == "swapped":
        other = draw.choice(sorted(state))
        state[name], state[other] = state[other], state[name]
    else:
        state = {}
    path.unlink()
    save_file(state, path, metadata={"format": "pt"})
    return f"{path.name} of {case.part}: {how}, {name}"


def values(draw: Draw, case: Case) -> str:
    """Weights that are not finite, or large."""
    case.part = draw.choice(list(PARTS))
    path = weights_of(case.folder, case.part)
    state = load_file(path)
    name = draw.choice(sorted(state))
    value = draw.choice((math.nan, math.inf, -math.inf, 1e30, -1e38, 0.0))
    if state[name].is_floating_point():
        state[name] = torch.full_like(state[name], value)
    path.unlink()
    save_file(state, path, metadata={"format": "pt"})
    return f"{path.name} of {case.part}: {name} is {value}"


def shards(draw: Draw, case: Case) -> str:
    """Shards: where the index points, and what is in them."""
    case.part = draw.choice(list(PARTS))
    safe = draw.random() < 0.7
    path = weights_of(case.folder, case.part)
    state = load_file(path)
    stem = path.stem if safe else {"model": "pytorch_model"}.get(path.stem, path.stem)
    suffix = "safetensors" if safe else "bin"
    path.unlink()
    places: dict[str, Any] = {}
    files = []
    for number in (1, 2):
        file = path.parent / f"{stem}-0000{number}-of-00002.{suffix}"
        held = {name: state[name] for name in sorted(state)[number - 1 :: 2]}
        (save_file if safe else torch.save)(held, file)
        places |= dict.fromkeys(held, file.name)
        files.append(file)
    index: dict[str, Any] = {"metadata": {}, "weight_map": places}
    how = draw.choice(
        ("none", "outside", "outside", "value", "index", "missing", "twice", "cut", "bits", "pipe")
    )
    if how == "outside":
        names = (
            "../x.bin",
            "../model_index.json",
            "/etc/passwd",
            "",
            ".",
            "..",
            "a\\b",
            "a/b",
            3,
            None,
            ["x"],
        )
        extra = (
            "config.json",
            "\x1b[31m",
            "x" * 300,
            "x\0y",
            "\ud800.safetensors",
            "no.safetensors",
            "x" * 10**5,
        )
        places[draw.choice(sorted(places))] = draw.choice((*names, *extra))
    elif how == "value":
        index["weight_map"] = draw.choice(VALUES)
    elif how == "missing":
        files[1].unlink()
    elif how == "twice":
        shutil.copy(files[0], files[1])
    elif how in ("cut", "bits"):
        data = files[1].read_bytes()
        write(files[1], cut(draw, data) if how == "cut" else flipped(draw, data, 0, min(len(data), 3000)))
    elif how == "pipe":
        files[1].unlink()
        os.mkfifo(files[1])
    path = path.parent / f"{stem}.{suffix}.index.json"
    write_json(path, index)
    if how == "index":
        data = path.read_bytes()
        write(path, draw.choice((cut(draw, data), flipped(draw, data, 0, len(data)), b"[" * 10_000, b"{}")))
    return f"{case.part}, {suffix} in shards: {how}"


class _RunsCode:
    def __reduce__(self) -> Any:
        return os.system, (f"touch {MARKER}",)


class _Calls:
    """Pickled as a call of a function."""

    def __init__(self, function: Any, *arguments: Any):
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


def _zip(files: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w", method) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return target.getvalue()


def _saved(content: Any, legacy: bool = False) -> bytes:
    target = io.BytesIO()
    torch.save(content, target, _use_new_zipfile_serialization=not legacy)
    return target.getvalue()


def pickled(draw: Draw, case: Case) -> str:
    """A `.bin` that is damaged, compressed, a bomb, or contains more than tensors."""
    case.part = draw.choice(list(PARTS))
    path = weights_of(case.folder, case.part)
    state: dict[str, Any] = load_file(path)
    path.unlink()
    path = path.with_name(f"{ {'model': 'pytorch_model'}.get(path.stem, path.stem) }.bin")
    name = draw.choice(sorted(state))
    legacy = draw.random() < 0.4

    def records(content: Any = None) -> dict[str, bytes]:
        with zipfile.ZipFile(io.BytesIO(_saved(state if content is None else content))) as archive:
            return {n: archive.read(n) for n in archive.namelist()}

    def with_pickle(data: bytes) -> bytes:
        return _zip({n: data if n.endswith("/data.pkl") else d for n, d in records().items()})

    def one(value: Any) -> bytes:
        return _saved({**state, name: value}, legacy)

    def larger_pickle(claim: int) -> bytes:
        found = records()
        entry = next(n for n in found if n.endswith("/data.pkl"))
        large = _saved({name: torch.zeros(1)})
        with zipfile.ZipFile(io.BytesIO(large)) as archive:
            data = archive.read(next(n for n in archive.namelist() if n.endswith("/data.pkl")))
        # The last number before the storage's tuple is closed is how many elements it has.
        return _zip({**found, entry: data.replace(b"K\x01tQ", b"J" + struct.pack("<i", claim) + b"tQ")})

    def archive_with(extra: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> bytes:
        return _zip({**records(), **{f"archive/{n}": d for n, d in extra.items()}}, method)

    def tar() -> bytes:
        target = io.BytesIO()
        with tarfile.open(fileobj=target, mode="w") as archive:
            for member in ("storages", "tensors", "pickle", f"../{MARKER}"):
                entry = tarfile.TarInfo(member)
                entry.size = 4
                archive.addfile(entry, io.BytesIO(b"\x80\x02N."))
        return target.getvalue()

    data = _saved(state, legacy)
    # A dictionary of 100 entries, copied by one instruction after another.
    many = b"(" + b"".join(b"K%c" % i + b"K\x01" for i in range(100)) + b"d"
    copies = (
        b"\x80\x02ccollections\nOrderedDict\nq\x00" + many + b"q\x01" + b"h\x00h\x01\x85R0" * 50_000 + b"N."
    )
    kinds: dict[str, Callable[[], bytes]] = {
        "whole": lambda: data,
        "bits": lambda: flipped(draw, data, 0, len(data)),
        "bits at the start": lambda: flipped(draw, data, 0, min(len(data), 2000)),
        "bits at the end": lambda: flipped(draw, data, max(0, len(data) - 4000), len(data)),
        "cut": lambda: cut(draw, data),
        "longer": lambda: data + b"x" * 100,
        "before": lambda: b"x" * 100 + data,
        "noise": lambda: draw.randbytes(draw.choice((1, 8, 1000))),
        "runs code": lambda: one(_RunsCode()),
        "pickle that runs code": lambda: pickle.dumps(_RunsCode(), protocol=draw.choice((0, 2, 4))),
        "pickle in the archive that runs code": lambda: with_pickle(pickle.dumps({name: _RunsCode()}, 2)),
        "compressed": lambda: _zip(records(), zipfile.ZIP_DEFLATED),
        "compressed with another method": lambda: _zip(records(), zipfile.ZIP_BZIP2),
        "zip bomb": lambda: archive_with({"data/99": b"\0" * (50 * 2**20)}, zipfile.ZIP_DEFLATED),
        "many records": lambda: _zip({**records(), **{f"archive/x/{i}": b"" for i in range(20_000)}}),
        "bytearray": lambda: with_pickle(b"\x80\x02cbuiltins\nbytearray\nJ\x00\x00\x00\x70\x85R."),
        "bytearray instruction": lambda: with_pickle(b"\x80\x05\x96\x00\x00\x00\x00\x08\x00\x00\x00."),
        "memo": lambda: with_pickle(b"\x80\x02Nr\x00\x00\x00\x40."),
        "many lists": lambda: with_pickle(b"\x80\x02" + b"]" * (3 * 2**20) + b"."),
        "more lists": lambda: with_pickle(b"\x80\x02" + b"]" * (20 * 2**20) + b"."),
        "copies": lambda: with_pickle(copies),
        "deep": lambda: with_pickle(b"\x80\x02" + b"]" * 5000 + b"a" * 4999 + b"."),
        "protocol 4": lambda: with_pickle(pickle.dumps({name: 1}, 4)),
        "scripted": lambda: archive_with({"constants.pkl": b"\x80\x02)."}),
        "comment": lambda: data[:-2] + b"\x04\x00abcd",
        "large claim": lambda: larger_pickle(draw.choice((10**9, 2**31 - 1, -1, 0))),
        "meta": lambda: one(torch.empty(state[name].shape, device="meta")),
        "sparse": lambda: one(torch.eye(4).to_sparse()),
        "expanded": lambda: one(torch.zeros(1).expand(state[name].numel()).view(state[name].shape)),
        "same memory": lambda: _saved(_shared(state), legacy),
        "parameters": lambda: _saved({n: torch.nn.Parameter(t, False) for n, t in state.items()}, legacy),
        "ordered": lambda: _saved(OrderedDict(state), legacy),
        "number": lambda: one(3),
        "text": lambda: one("x" * 1000),
        "list": lambda: _saved(list(state.values()), legacy),
        "nested": lambda: _saved({"state_dict": state}, legacy),
        "numbered": lambda: _saved(dict(enumerate(state.values())), legacy),
        "size": lambda: one(state[name].shape),
        "dtype": lambda: one(torch.float32),
        "integers": lambda: one(torch.zeros(state[name].shape, dtype=torch.int64)),
        "complex": lambda: one(torch.zeros(state[name].shape, dtype=torch.complex64)),
        "calls a class": lambda: one(_Calls(torch.Size, (1, 2))),
        "calls torch": lambda: one(_Calls(torch.zeros, 10**12)),
        "tar": tar,
        "tar with the content of a pickle": lambda: tar() + data,
    }
    how = draw.choice(list(kinds))
    write(path, kinds[how]())
    return f"{path.name} of {case.part}: {how}{', legacy' if legacy else ''}"


def _shared(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same names and shapes, all in the memory of the largest tensor."""
    memory = torch.zeros(max(t.numel() for t in state.values()))
    return {n: memory[: t.numel()].view(t.shape) for n, t in state.items()}


def special_file(draw: Draw, case: Case) -> str:
    """Something other than a regular file, or one of an unusual size, in place of any file."""
    files = sorted(p for p in case.folder.rglob("*") if p.is_file())
    path = draw.choice(files)
    file = path.relative_to(case.folder)
    case.part = part_of(str(file))
    path.unlink()

    def large() -> None:
        with path.open("wb") as target:
            target.truncate(draw.choice((12 * 2**20, 2**36)))

    def listening() -> None:
        with socket.socket(socket.AF_UNIX) as server:
            os.chdir(path.parent)  # the name of a socket may not be long
            server.bind(path.name)
            os.chdir(case.folder)

    kinds: dict[str, Callable[[], Any]] = {
        "missing": lambda: None,
        "empty": path.touch,
        "pipe": lambda: os.mkfifo(path),
        "folder": path.mkdir,
        "zeros without end": lambda: path.symlink_to("/dev/zero"),
        "nothing": lambda: path.symlink_to("/dev/null"),
        "noise without end": lambda: path.symlink_to("/dev/urandom"),
        "link to nothing": lambda: path.symlink_to("nowhere"),
        "link to itself": lambda: path.symlink_to(path.name),
        "link to a folder": lambda: path.symlink_to("/tmp"),
        "large": large,
        "socket": listening,
    }
    how = draw.choice(list(kinds))
    directory = Path.cwd()
    kinds[how]()
    os.chdir(directory)
    return f"{file}: {how}"


def folders(draw: Draw, case: Case) -> str:
    """Folders that are missing, exchanged, files or links; and files of one part in another."""
    names = sorted(p.name for p in case.folder.iterdir() if p.is_dir())
    one, other = draw.sample(names, 2)
    first, second = case.folder / one, case.folder / other
    how = draw.choice(
        ("missing", "empty", "file", "pipe", "link", "exchanged", "config", "weights", "variant")
    )
    if how in ("missing", "empty", "file", "pipe"):
        shutil.rmtree(first)
        if how == "empty":
            first.mkdir()
        elif how == "file":
            first.touch()
        elif how == "pipe":
            os.mkfifo(first)
    elif how == "link":
        shutil.rmtree(first)
        first.symlink_to(draw.choice((other, one, "/proc", ".")))
    elif how == "exchanged":
        first.rename(case.folder / "x")
        second.rename(first)
        (case.folder / "x").rename(second)
    else:
        pattern = {"config": "*config*.json", "weights": "*.safetensors", "variant": "*"}[how]
        for path in second.glob(pattern):
            (first / path.name).unlink(missing_ok=True)
            shutil.copy(path, first / path.name)
        if how == "variant":
            (first / "model.safetensors.index.json").write_text("{}")
    return f"{one}: {how} ({other})"


def names(draw: Draw, case: Case) -> str:
    """What is passed in place of a folder."""
    inside = ("model_index.json", "unet", "unet/config.json", "nothing", "\0", "x" * 300, "vae/../..")
    choices: tuple[Any, ...] = (
        None,
        3,
        b"x",
        [],
        "",
        "x" * 255,
        "x" * 5000,
        "~nosuchuser/x",
        "~",
        "\0",
        "a\nb",
        "\x1b[31m",
        "a/b/c",
    )
    if draw.random() < 0.5:
        case.name = f"{case.folder}/{draw.choice(inside)}"
    else:
        case.name = draw.choice(choices)
    if draw.random() < 0.2:
        (case.folder / "audioldm2-full.pth").write_bytes(b"x")
        case.name = case.folder / "audioldm2-full.pth"
    return f"from_pretrained({str(case.name)[-60:]!r})"


def several(draw: Draw, case: Case) -> str:
    """Two or three things wrong at once."""
    done = []
    for _ in range(draw.choice((2, 2, 3))):
        kind = draw.choice((json_value, json_number, json_key, scheduler, safetensors_header))
        try:
            done.append(kind(draw, case))
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            break  # what was corrupted first cannot be read any more
    case.part = ""
    return "; ".join(done)


KINDS: dict[str, Callable[[Draw, Case], str]] = {
    "json-value": json_value,
    "json-number": json_number,
    "json-key": json_key,
    "json-text": json_text,
    "scheduler": scheduler,
    "model-index": model_index,
    "tokenizer": tokenizer,
    "safetensors-bytes": safetensors_bytes,
    "safetensors-header": safetensors_header,
    "tensors": tensors,
    "values": values,
    "shards": shards,
    "bin": pickled,
    "special-file": special_file,
    "folders": folders,
    "names": names,
    "several": several,
}


# --- running cases


def write_base(folder: Path) -> Path:
    """Write the checkpoint that the cases corrupt: small and random, in the Hub's layout."""
    write_random_checkpoint(folder, SIZES)
    return folder


def corrupt(base: Path, folder: Path, seed: int, number: int, kinds: tuple[str, ...] = tuple(KINDS)) -> Case:
    """Write a case.

    Args:
        base: the checkpoint to corrupt.
        folder: where to write the case; it must not exist. Unchanged files are links to those of `base`.
        seed: of the run.
        number: of the case; the kinds take turns.
        kinds: the kinds of the run.
    """
    shutil.copytree(base, folder, copy_function=os.link)
    case = Case(number, kinds[number % len(kinds)], folder)
    case.what = KINDS[case.kind](Draw(f"{seed}/{case.kind}/{number}"), case)
    return case


def size_of(folder: Path) -> int:
    """The size of a case's regular files on the disk, without their holes."""
    found = (p.lstat() for p in folder.rglob("*") if p.is_file() and not p.is_symlink())
    return sum(min(entry.st_size, 512 * entry.st_blocks) for entry in found)


def load(case: Case, whole: bool = True) -> Any:
    """Load a case: the pipeline, or only the part that was corrupted."""
    if whole or case.part not in (*PARTS, *TOKENIZERS):
        name = case.folder if case.name is None else case.name
        return AudioLDM2Pipeline.from_pretrained(name, local_files_only=True)
    if case.part in PARTS:
        return load_stage(case.folder / case.part, PARTS[case.part][0])
    return load_tokenizer(case.folder / case.part, TOKENIZERS[case.part][0])


def call(pipe: AudioLDM2Pipeline, candidates: int) -> None:
    """Generate a short sound; AssertionError if it is not finite."""
    pipe.set_progress_bar_config(disable=True)
    frame = pipe.vocoder.hop_length * pipe.vae.downsampling / pipe.vocoder.config.sampling_rate
    audio = pipe(
        PROMPT,
        num_inference_steps=2,
        audio_length_in_s=8 * frame,
        num_waveforms_per_prompt=candidates,
        generator=torch.Generator().manual_seed(0),
        output_type="pt",
    ).audios
    assert audio.numel() > 0, "the sound has no samples"
    assert bool(audio.isfinite().all()), "the sound is not finite"


def judge(error: BaseException, case: Case, loading: bool) -> str:
    """What is wrong with an error; "" if it is one that a corrupted checkpoint may cause."""
    text = str(error)
    if not isinstance(error, CheckpointError if loading else ValueError):
        return f"{type(error).__name__}: {text[:300]!r}"
    if not text.isprintable() or not text:
        return f"the message is not one printable line: {text[:300]!r}"
    if len(text) > LONGEST_MESSAGE + 20 * len(str(case.folder)):
        return f"the message has {len(text)} characters: {text[:300]!r}"
    if loading and case.name is None and str(case.folder) not in text:
        return f"the message names no file: {text[:300]!r}"
    return ""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in the block after this many seconds; only in the main thread."""

    def stop(*_: Any) -> None:
        raise TimeoutError(f"it took more than {seconds:.0f} s")

    handler = signal.signal(signal.SIGALRM, stop)
    left, _ = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, left)
        signal.signal(signal.SIGALRM, handler)


def memory(peak: bool) -> int:
    """Bytes of memory that this process has, or had at most since `forget_peak`; 0 if Linux does not say."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return 0
    key = "VmHWM:" if peak else "VmRSS:"
    return next((1024 * int(line.split()[1]) for line in status.splitlines() if line.startswith(key)), 0)


def forget_peak() -> None:
    """Start measuring the peak of the memory anew."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def run_case(case: Case, whole: bool = True, patience: float = SECONDS) -> Result:
    """Load a case, and generate with a pipeline that loads.

    Args:
        case: the case.
        whole: load the whole pipeline; otherwise only the corrupted part, which is not run.
        patience: seconds of wall time after which loading is stopped. It may take `SECONDS` of CPU time.
    """
    before = sorted(str(p) for p in case.folder.rglob("*"))
    allowed = 2 * size_of(case.folder) + MEMORY
    outcome, wrong, loaded = "loaded", "", None
    forget_peak()
    used, start = memory(peak=False), time.process_time()
    try:
        with time_limit(patience):
            loaded = load(case, whole)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        outcome, wrong = "refused", judge(error, case, loading=True)
    seconds, taken = time.process_time() - start, memory(peak=True) - used
    if seconds > SECONDS and not wrong:
        wrong = f"loading took {seconds:.0f} s"
    if taken > allowed and not wrong:
        wrong = f"loading took {taken / 2**20:.0f} MB; {allowed / 2**20:.0f} are allowed"
    if whole and loaded is not None:
        ranked = case.part in ("text_encoder", "feature_extractor", "") or case.number % 4 == 0
        try:
            with time_limit(6 * patience):
                call(loaded, candidates=2 if ranked else 1)
            outcome = "sound"
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            outcome = "refused at the call"
            wrong = wrong or judge(error, case, loading=False)
    if Path(MARKER).exists() or (case.folder / MARKER).exists():
        Path(MARKER).unlink(missing_ok=True)
        wrong = "code was run"
    if not wrong and before != sorted(str(p) for p in case.folder.rglob("*")):
        wrong = "files were written"
    return Result(case.number, case.kind, case.what, outcome, wrong, seconds, taken)
