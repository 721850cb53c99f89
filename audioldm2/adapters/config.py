"""What PEFT's LoraConfig says about an adapter, read from JSON: ranks, alphas, and what is not supported."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from audioldm2.arguments import as_integer
from audioldm2.checkpoints.errors import CheckpointError
from audioldm2.quoting import quoted

# The layers that an adapter updates by default: the attention, as in diffusers' and PEFT's examples.
TARGET_MODULES = ("to_q", "to_k", "to_v", "to_out.0")
# Keys that do not change what an adapter with given tensors computes.
_WITHOUT_EFFECT = frozenset(
    [
        "auto_mapping",
        "base_model_name_or_path",
        "ensure_weight_tying",
        "eva_config",
        "exclude_modules",
        "fan_in_fan_out",
        "inference_mode",
        "layers_pattern",
        "layers_to_transform",
        "megatron_core",
        "peft_version",
        "qalora_group_size",
        "revision",
        "target_modules",
        "task_type",
    ]
)
_READ = frozenset(
    [
        "alpha_pattern",
        "bias",
        "init_lora_weights",
        "lora_alpha",
        "lora_dropout",
        "peft_type",
        "r",
        "rank_pattern",
        "use_rslora",
    ]
)
# How the tensors were initialized; other ways change the weights that the adapter is added to.
_INITIALIZATIONS = (None, True, False, "gaussian", "orthogonal", "eva")
_NAMES = {"use_dora": "DoRA", "lora_bias": "trained biases", "modules_to_save": "whole layers besides LoRA"}
# A pattern comes from a file and must not take long to match: no repetition of a group.
_PATTERN = re.compile(r"[\w.^$\\|()\[\]*+?-]{1,200}")
_REPEATED_GROUP = re.compile(r"\)[*+?]")
MAX_REPETITIONS = 4  # in a pattern


@dataclass(frozen=True)
class LoraConfig:
    """The ranks and alphas of an adapter.

    Attributes:
        rank: of every layer that `rank_pattern` does not name.
        alpha: the same for alphas.
        rank_pattern: ranks by the ends of layers' names, as regular expressions; the first that fits counts.
        alpha_pattern: the same for alphas.
        use_rslora: whether alpha is divided by the square root of the rank.
        dropout: in training.
    """

    rank: int
    alpha: float
    rank_pattern: Mapping[re.Pattern[str], int]
    alpha_pattern: Mapping[re.Pattern[str], float]
    use_rslora: bool
    dropout: float

    def rank_of(self, layer: str) -> int:
        """The rank of a layer, by diffusers' name."""
        return next((rank for pattern, rank in self.rank_pattern.items() if pattern.match(layer)), self.rank)

    def alpha_of(self, layer: str) -> float:
        """The alpha of a layer, by diffusers' name."""
        return next(
            (alpha for pattern, alpha in self.alpha_pattern.items() if pattern.match(layer)), self.alpha
        )

    @classmethod
    def from_dict(cls, content: Mapping[str, Any], where: str) -> LoraConfig:
        """The config from the content of an adapter_config.json.

        Args:
            content: the JSON object.
            where: names it in errors.

        Raises:
            CheckpointError: it is not LoRA's, a value is not of its type, or it asks for something that is
                not supported.
        """
        kind = content.get("peft_type", "LORA")
        if kind != "LORA":
            raise CheckpointError(f"{where}: peft_type = {quoted(kind)} is not supported; it must be 'LORA'")
        if content.get("bias", "none") != "none":
            raise CheckpointError(
                f"{where}: bias = {quoted(content['bias'])} is not supported; biases must not be trained"
            )
        initial = content.get("init_lora_weights")
        if initial not in _INITIALIZATIONS:
            raise CheckpointError(
                f"{where}: init_lora_weights = {quoted(initial)} is not supported, as it changes the weights "
                "of the base; convert the adapter to plain LoRA with PEFT"
            )
        for key, value in content.items():
            if key not in _WITHOUT_EFFECT and key not in _READ and _says_something(value):
                what = f" ({_NAMES[key]})" if key in _NAMES else ""
                raise CheckpointError(f"{where}: {quoted(key)} = {quoted(value)} is not supported{what}")
        return cls(
            _rank(content.get("r", 8), where, "r"),
            _number(content.get("lora_alpha", 8), where, "lora_alpha"),
            _patterns(content, "rank_pattern", where, _rank),
            _patterns(content, "alpha_pattern", where, _number),
            bool(content.get("use_rslora")),
            _number(content.get("lora_dropout", 0.0), where, "lora_dropout"),
        )


def scaling(alpha: float, rank: int, use_rslora: bool) -> float:
    """alpha / r, or alpha / sqrt(r) of a rank-stabilized adapter (Kalajdzievski 2023, arXiv:2312.03732)."""
    return alpha / (math.sqrt(rank) if use_rslora else rank)


def _says_something(value: Any) -> bool:
    """Whether a value is more than null, false, zero, "" or something made of those."""
    if isinstance(value, Mapping):
        return any(map(_says_something, value.values()))
    return bool(value)


def _rank(value: Any, where: str, key: str) -> int:
    rank = as_integer(value)
    if rank is None or rank < 1:
        raise CheckpointError(
            f"{where}: {key} = {quoted(value)} is not supported; a rank is an integer of at least 1"
        )
    return rank


def _number(value: Any, where: str, key: str) -> float:
    # NaN and too large integers are no floats either.
    if not isinstance(value, int | float) or isinstance(value, bool) or not -1e30 < value < 1e30:
        raise CheckpointError(
            f"{where}: {key} = {quoted(value)} is not supported; it must be a finite number"
        )
    return float(value)


def _patterns(content: Mapping[str, Any], key: str, where: str, checked: Any) -> dict[re.Pattern[str], Any]:
    patterns = content.get(key) or {}
    if not isinstance(patterns, Mapping):
        raise CheckpointError(f"{where}: {key} = {quoted(patterns)} is not supported; it must be an object")
    return {
        _compiled(p, where, key): checked(value, where, f"{key}[{quoted(p)}]")
        for p, value in patterns.items()
    }


def _compiled(pattern: str, where: str, key: str) -> re.Pattern[str]:
    try:
        if (
            _PATTERN.fullmatch(pattern)
            and not _REPEATED_GROUP.search(pattern)
            and len(re.findall(r"[*+]", pattern)) <= MAX_REPETITIONS
        ):
            return re.compile(rf"(.*\.)?({pattern})$")  # as PEFT matches it
    except re.error:
        pass
    raise CheckpointError(
        f"{where}: {key} has the pattern {quoted(pattern)}, which is not supported; use names of layers"
    )
