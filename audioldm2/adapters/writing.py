"""Writing adapters: one folder that PEFT, diffusers and this package load.

    adapter_config.json, adapter_model.safetensors    PEFT's format
    pytorch_lora_weights.safetensors                  diffusers' format, its config in the file's header

Both have the same numbers. An adapter is small, so writing it twice costs less than converting it later.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from torch import Tensor

from audioldm2.adapters.state import Adapter
from audioldm2.adapters.targets import Target, described
from audioldm2.atomic import replacing
from audioldm2.checkpoints.operations import OPERATIONS

PEFT_CONFIG, PEFT_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
DIFFUSERS_WEIGHTS = "pytorch_lora_weights.safetensors"
PEFT_PREFIX, DIFFUSERS_PREFIX = "base_model.model.", "unet."
DIFFUSERS_METADATA = "lora_adapter_metadata"  # a key of the safetensors header
# How PEFT describes the class that an adapter is for.
_BASE_CLASS = {
    "base_model_class": "AudioLDM2UNet2DConditionModel",
    "parent_library": "diffusers.pipelines.audioldm2.modeling_audioldm2",
}


def tensors(adapter: Adapter, known: Mapping[str, Target]) -> dict[str, Tensor]:
    """An adapter's tensors by the names that PEFT and diffusers give them, without a prefix, on the CPU."""
    found = {}
    for name, update in adapter.updates.items():
        operation = known[name].operation
        for key, parameter in (("lora_A", update.a), ("lora_B", update.b)):
            tensor = parameter.detach().cpu()
            if operation == "squeeze":
                (tensor,) = OPERATIONS[operation].invert(tensor, 1)
            found[f"{name}.{key}.weight"] = tensor.contiguous()
    return found


def config(adapter: Adapter, known: Mapping[str, Target]) -> dict[str, Any]:
    """PEFT's LoraConfig of an adapter, as far as it says something."""
    ranks = {name: update.rank for name, update in adapter.updates.items()}
    alphas = {name: update.alpha for name, update in adapter.updates.items()}
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    return {
        "r": rank,
        "lora_alpha": alpha,
        # PEFT takes the keys for regular expressions.
        "rank_pattern": {f"^{re.escape(name)}": r for name, r in ranks.items() if r != rank},
        "alpha_pattern": {f"^{re.escape(name)}": a for name, a in alphas.items() if a != alpha},
        "target_modules": described(adapter.updates, known),
        "lora_dropout": next(iter(adapter.updates.values())).dropout,
        "use_rslora": adapter.use_rslora,
        "bias": "none",
    }


def write(
    adapter: Adapter, known: Mapping[str, Target], folder: Path, base: str, metadata: Mapping[str, str]
) -> None:
    """Write an adapter's three files; either all of them replace those of an earlier save, or none does.

    Args:
        adapter: what to write.
        known: the UNet's layers, from `targets`.
        folder: created if it does not exist.
        base: the checkpoint that the adapter is for, or "".
        metadata: entries for the headers of the weight files.
    """
    from safetensors.torch import save_file

    described_as, weights = config(adapter, known), tensors(adapter, known)
    header = {**metadata, "format": "pt"}
    in_header = {f"{DIFFUSERS_PREFIX}{key}": value for key, value in described_as.items()}
    peft = {
        "peft_type": "LORA",
        "auto_mapping": _BASE_CLASS,
        "base_model_name_or_path": base or None,
        "task_type": None,
        "inference_mode": True,
        **described_as,
    }
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        paths = {
            name: stack.enter_context(replacing(folder / name))
            for name in (PEFT_CONFIG, PEFT_WEIGHTS, DIFFUSERS_WEIGHTS)
        }
        paths[PEFT_CONFIG].write_text(json.dumps(peft, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        save_file({PEFT_PREFIX + name: x for name, x in weights.items()}, paths[PEFT_WEIGHTS], header)
        save_file(
            {DIFFUSERS_PREFIX + name: x for name, x in weights.items()},
            paths[DIFFUSERS_WEIGHTS],
            {**header, DIFFUSERS_METADATA: json.dumps(in_header, indent=2, sort_keys=True)},
        )
