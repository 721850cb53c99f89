"""Writing weight files: safetensors or `.bin`, in one file or in shards, under the names that the Hub uses.

    model.safetensors                       model.fp16.safetensors
    model-00001-of-00003.safetensors        model.fp16-00001-of-00003.safetensors
    model.safetensors.index.json            model.safetensors.index.fp16.json

All files of a save are written before the first replaces one of an earlier save. Files of an earlier save
that the new one does not replace (of other shards, of the other format) are removed, because they could be
read in place of the new ones.
"""

from __future__ import annotations

import inspect
import json
import os
import re
import tempfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from audioldm2.atomic import replacing
from audioldm2.checkpoints.options import SaveOptions
from audioldm2.checkpoints.tensors import STEMS

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "spiece.model",
)


def write_weights(folder: Path, name: str, weights: Mapping[str, Tensor], options: SaveOptions) -> None:
    """Write tensors into one weight file, or into shards and their index.

    Args:
        folder: an existing folder.
        name: the name of the file if there is only one, such as "model.safetensors".
        weights: the tensors by name, contiguous, no two in the same memory.
        options: the format of the files, which the suffix of `name` has to fit.
    """
    stem, suffix = name.split(".")
    dot = "" if options.variant is None else f".{options.variant}"
    shards = split(weights, options.max_shard_size)
    if len(shards) == 1:
        files = {f"{stem}{dot}.{suffix}": shards[0]}
    else:
        count = len(shards)
        files = {f"{stem}{dot}-{i:05}-of-{count:05}.{suffix}": shard for i, shard in enumerate(shards, 1)}
    written = {*files}
    with ExitStack() as stack:  # it exits in reverse order, so the index is replaced last
        if len(files) > 1:
            index = f"{stem}.{suffix}.index{dot}.json"
            written.add(index)
            content = {
                "metadata": {"total_size": sum(tensor.nbytes for tensor in weights.values())},
                "weight_map": {tensor: file for file, shard in files.items() for tensor in shard},
            }
            temporary = stack.enter_context(replacing(folder / index))
            temporary.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        for file, shard in files.items():
            _write(shard, stack.enter_context(replacing(folder / file)), options.safe_serialization)
    remove_stale_weights(folder, written, options.variant)


def _write(weights: dict[str, Tensor], path: Path, safe_serialization: bool) -> None:
    from safetensors.torch import save_file

    if safe_serialization:
        save_file(weights, path, metadata={"format": "pt"})
    else:
        # torch.save writes the whole memory behind a tensor, such as all of a matrix for one of its rows.
        own = {
            name: t if t.untyped_storage().nbytes() == t.nbytes else t.clone() for name, t in weights.items()
        }
        torch.save(own, path)


def split(weights: Mapping[str, Tensor], limit: int) -> list[dict[str, Tensor]]:
    """Split tensors into shards of at most `limit` bytes, in their order; a larger tensor is on its own."""
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in weights.items():
        if shards[-1] and size + tensor.nbytes > limit:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    return shards


def remove_stale_weights(folder: Path, written: Collection[str], variant: str | None) -> None:
    """Remove the weight files of an earlier save of the same variant.

    Args:
        folder: holds the files.
        written: the names of the new files, which stay.
        variant: of the new files; those of other variants stay.
    """
    dot = "" if variant is None else re.escape(f".{variant}")
    shard = r"-\d{5}-of-\d{5}"
    weights = re.compile(
        "|".join(
            # Older releases of diffusers wrote the variant after the number of the shard.
            rf"{stem}(?:{dot}|{dot}{shard}|{shard}{dot})\.{suffix}|{stem}\.{suffix}\.index{dot}\.json"
            for suffix, stems in STEMS.items()
            for stem in stems
        )
    )
    for path in folder.iterdir():
        if weights.fullmatch(path.name) and path.name not in written:
            path.unlink()


# --- parts that write themselves


@contextmanager
def staging(folder: Path) -> Iterator[Path]:
    """A context manager for a temporary folder inside `folder`, for files that others write.

    Files that are written there take effect only when `take` moves them. Until then the files of an earlier
    save, from which tensors may be memory-mapped, are unchanged.

    Args:
        folder: created if it does not exist, and removed again if the block raises before it has a file.
    """
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(dir=folder, prefix=".saving-") as name:
            yield Path(name)
    except BaseException:
        if is_new and not any(folder.iterdir()):
            folder.rmdir()
        raise


def save_itself(part: Any, folder: Path, options: SaveOptions) -> None:
    """Call a part's own `save_pretrained` with those options that it has.

    transformers 5 writes safetensors only; if `.bin` is wanted, they are read again and written as such.
    """
    known = inspect.signature(part.save_pretrained).parameters
    part.save_pretrained(folder, **{name: value for name, value in vars(options).items() if name in known})
    if options.safe_serialization or "safe_serialization" in known:
        return
    from safetensors.torch import load_file

    weights: dict[str, Tensor] = {}
    for path in sorted(folder.glob("model*.safetensors")):
        weights |= load_file(path)
    if weights:
        write_weights(folder, "pytorch_model.bin", weights, options)


def take(staged: Path, folder: Path) -> set[str]:
    """Move all files from a folder inside `staging` to where they belong; returns their names."""
    folder.mkdir(parents=True, exist_ok=True)
    names = {path.name for path in staged.iterdir()}
    for name in sorted(names):
        os.replace(staged / name, folder / name)
    return names


def remove_stale_tokenizer(folder: Path, written: Collection[str]) -> None:
    """Remove the files of another tokenizer that was saved in the folder earlier."""
    for name in {*_TOKENIZER_FILES} - {*written}:
        (folder / name).unlink(missing_ok=True)
