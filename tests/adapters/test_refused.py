"""Adapters that cannot be loaded: one clear error each, and the pipeline is as before."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from audioldm2 import AudioLDM2Pipeline
from audioldm2.adapters.config import LoraConfig
from audioldm2.checkpoints.errors import CheckpointError, MissingCheckpointError
from tests.adapters.helpers import prediction
from tests.helpers import noise

LAYER = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"  # (12, 12)
A, B = f"{LAYER}.lora_A.weight", f"{LAYER}.lora_B.weight"
GOOD = {A: noise(2, 12), B: noise(12, 2)}
CONFIG: dict[str, Any] = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["to_q"]}

STATES: dict[str, tuple[dict[str, Any], str]] = {
    "another model": (
        {
            A.replace("mid_block.", "transformer."): noise(2, 12),
            B.replace("mid_block.", "transformer."): noise(12, 2),
        },
        r"the state dict does not fit this UNet \(1 problem\): the UNet has no layer transformer\.attentions",
    ),
    "A alone": ({A: noise(2, 12)}, rf"\(1 problem\): missing: B of {re.escape(LAYER)}"),
    "wrong widths": (
        {A: noise(2, 13), B: noise(12, 3)},
        r"\(2 problems\): wrong shape: .*lora_A\.weight has \(2, 13\), the UNet needs \(2, 12\); .*\(12, 3\)",
    ),
    "a convolution": ({A: noise(2, 12, 3, 3), B: noise(12, 2, 1, 1)}, r"has \(2, 12, 3, 3\), the UNet needs"),
    "no rank": ({A: noise(0, 12), B: noise(12, 0)}, "wrong shape"),
    "scalars": ({A: torch.tensor(1.0), B: torch.tensor(1.0)}, "wrong shape"),
    "integers": ({A: noise(2, 12).int(), B: noise(12, 2)}, r"wrong type: .*lora_A.weight holds torch\.int32"),
    "NaN": ({A: noise(2, 12) / 0, B: noise(12, 2)}, r"lora_A\.weight has NaN or infinity, in float32"),
    "unexpected": ({**GOOD, "to_q.weight": noise(3)}, r"unexpected: to_q\.weight, shape \(3,\)"),
    "twice": ({**GOOD, f"unet.{A}": noise(2, 12)}, "duplicate: .* and unet"),
    "stray alpha": ({**GOOD, "conv_in.alpha": torch.tensor(1.0)}, "the alpha of a layer that is not there"),
    "long alpha": ({**GOOD, f"{LAYER}.alpha": noise(2)}, "must be one number"),
    "infinite alpha": ({**GOOD, f"{LAYER}.alpha": noise(1)[0] / 0}, "alpha is not a finite number"),
    "DoRA": (
        {**GOOD, f"{LAYER}.lora_magnitude_vector": noise(12)},
        "is a DoRA adapter, which is not supported",
    ),
    "LoHa": ({f"{LAYER}.hada_w1_a": noise(2, 12)}, "LoHa"),
    "LoKr": ({f"{LAYER}.lokr_w1": noise(2, 12)}, "LoKr"),
    "bias": ({**GOOD, f"{LAYER}.lora_B.bias": noise(12)}, "trained biases"),
    "text encoder": ({**GOOD, "text_encoder.q_proj.lora_A.weight": noise(2, 2)}, "weights of a text encoder"),
    "kohya": ({"lora_unet_mid_block_to_q.lora_down.weight": noise(2, 12)}, "kohya"),
    "not tensors": ({A: 3}, "must have tensors by name"),
    "a control character": (
        {"x\x1b[2J.lora_A.weight": noise(1, 1), "x\x1b[2J.lora_B.weight": noise(1, 1)},
        r"x\\x1b",
    ),
}


@pytest.fixture(scope="module")
def shared(_adapted: AudioLDM2Pipeline) -> AudioLDM2Pipeline:
    """A pipeline for all tests that leave it as it was."""
    return copy.deepcopy(_adapted)


def test_a_state_dict_that_does_not_fit_is_one_error(pipe: AudioLDM2Pipeline) -> None:
    before = prediction(pipe.unet)
    for state, message in STATES.values():
        with pytest.raises((CheckpointError, TypeError), match=message) as raised:
            pipe.load_lora_weights(state)
        assert "\n" not in str(raised.value)
        assert pipe.get_list_adapters() == {"unet": []}
    assert torch.equal(prediction(pipe.unet), before)


CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "another method": ({"peft_type": "LOHA"}, "peft_type = 'LOHA' is not supported; it must be 'LORA'"),
    "DoRA": ({"use_dora": True}, r"'use_dora' = True is not supported \(DoRA\)"),
    "biases": ({"bias": "lora_only"}, "bias = 'lora_only' is not supported"),
    "whole layers": ({"modules_to_save": ["conv_in"]}, "'modules_to_save' = "),
    "PiSSA": (
        {"init_lora_weights": "pissa"},
        "'pissa' is not supported, as it changes the weights of the base",
    ),
    "unknown": ({"quantum": {"entangled": True}}, "'quantum' = .* is not supported"),
    "rank": ({"r": 3}, "wrong rank: .* has 2, the config says 3"),
    "rank's type": ({"r": "2"}, "r = '2' is not supported; a rank is an integer"),
    "alpha": ({"lora_alpha": "x"}, "lora_alpha = 'x' is not supported; it must be a finite number"),
    "huge alpha": ({"lora_alpha": 10**400}, "lora_alpha = .* must be a finite number"),
    "pattern": ({"alpha_pattern": {"to_q": None}}, r"alpha_pattern\['to_q'\] = None is not supported"),
    "patterns": ({"rank_pattern": ["to_q"]}, "rank_pattern = .* must be an object"),
    "slow pattern": ({"rank_pattern": {"(a*)*b": 2}}, "the pattern .* is not supported; use names of layers"),
    "broken pattern": ({"rank_pattern": {"a[": 2}}, "the pattern 'a\\[', which is not supported"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_a_config_that_is_not_supported_is_one_error(
    shared: AudioLDM2Pipeline, tmp_path: Path, case: str
) -> None:
    changes, message = CONFIGS[case]
    save_file(
        {f"base_model.model.{name}": x for name, x in GOOD.items()}, tmp_path / "adapter_model.safetensors"
    )
    (tmp_path / "adapter_config.json").write_text(json.dumps({**CONFIG, **changes}))
    with pytest.raises(CheckpointError, match=message):
        shared.load_lora_weights(tmp_path)
    (tmp_path / "adapter_config.json").write_text(
        json.dumps({**CONFIG, "quantum": {"entangled": False, "x": []}})
    )
    shared.load_lora_weights(tmp_path, adapter_name="dog")
    assert shared.get_active_adapters() == ["dog"]
    shared.unload_lora_weights()


def write(name: str, state: dict[str, Tensor] = GOOD, **metadata: str) -> Callable[[Path], None]:
    return lambda folder: save_file(state, folder / name, metadata=metadata)


class Evil:
    def __reduce__(self) -> Any:
        return (print, ("this must not be printed",))


FILES: dict[str, tuple[list[Callable[[Path], Any]], dict[str, Any], str]] = {
    "empty folder": ([], {}, "has no adapter .looked for adapter_model.safetensors"),
    "no config": ([write("adapter_model.safetensors")], {}, "adapter_config.json is missing"),
    "several": (
        [write("a.safetensors"), write("b.safetensors")],
        {},
        "pass weight_name, one of a.saf.*b.saf",
    ),
    "no such file": (
        [write("a.safetensors")],
        {"weight_name": "c.safetensors"},
        "has no file 'c.safetensors'",
    ),
    "outside": ([write("a.safetensors")], {"weight_name": "../a.safetensors"}, "weight_name must be a"),
    "suffix": (
        [write("a.safetensors")],
        {"weight_name": "a.pt"},
        "weight_name must be a .safetensors or .bin",
    ),
    "subfolder": ([write("a.safetensors")], {"subfolder": "b"}, "has no adapter"),
    "truncated": (
        [lambda f: (f / "a.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{")],
        {},
        "a.safetensors is not",
    ),
    "code": (
        [lambda f: torch.save({A: Evil()}, f / "a.bin")],
        {},
        "contains more than tensors and could run code",
    ),
    "metadata": (
        [write("a.safetensors", lora_adapter_metadata="{")],
        {},
        "lora_adapter_metadata is not JSON",
    ),
    "metadata's type": (
        [write("a.safetensors", lora_adapter_metadata="[]")],
        {},
        "must contain a JSON object",
    ),
    "metadata's rank": ([write("a.safetensors", lora_adapter_metadata='{"unet.r": 7}')], {}, "wrong rank"),
    "nothing": (
        [write("a.safetensors", {"conv_in.alpha": noise(1)})],
        {},
        "the alpha of a layer that is not there",
    ),
    "shared memory": (
        [
            lambda f: torch.save(
                {A: torch.ones(1).expand(999, 12), B: torch.ones(1).expand(12, 999)}, f / "a.bin"
            )
        ],
        {},
        "larger than",
    ),
}


@pytest.mark.parametrize("case", FILES)
def test_files_that_cannot_be_read_are_one_error(
    shared: AudioLDM2Pipeline, tmp_path: Path, capsys: pytest.CaptureFixture[str], case: str
) -> None:
    writers, options, message = FILES[case]
    for one in writers:
        one(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        shared.load_lora_weights(tmp_path, **options)
    assert shared.get_list_adapters() == {"unet": []}
    assert "printed" not in capsys.readouterr().out


def test_arguments_that_cannot_be_used_are_named(pipe: AudioLDM2Pipeline, tmp_path: Path) -> None:
    calls: list[tuple[Any, dict[str, Any], type[Exception], str]] = [
        (3, {}, TypeError, "an adapter must be a folder, a file, a repository or a state dict, got 3"),
        ("", {}, TypeError, "an adapter must be"),
        (GOOD, {"weight_name": 3}, TypeError, "weight_name must be text"),
        (GOOD, {"hotswap": True}, TypeError, "has no argument 'hotswap'; write delete_adapters"),
        (GOOD, {"adapter_nam": "x"}, TypeError, "did you mean adapter_name"),
        (GOOD, {"adapter_name": 3}, ValueError, "name of an adapter must be text, got 3"),
        (GOOD, {"token": 3}, TypeError, "token"),
        ("not a/repository/name", {}, MissingCheckpointError, "neither a local folder nor a repository"),
        (tmp_path / "x.txt", {}, CheckpointError, "is not a .safetensors or .bin file"),
    ]
    (tmp_path / "x.txt").write_text("x")
    for given, options, kind, message in calls:
        with pytest.raises(kind, match=message):
            pipe.load_lora_weights(given, **options)
    pipe.load_lora_weights(GOOD, adapter_name="dog")
    with pytest.raises(ValueError, match="there is an adapter 'dog' already"):
        pipe.load_lora_weights(GOOD, adapter_name="dog")


def test_adapters_are_converted_to_the_unets_dtype(pipe: AudioLDM2Pipeline) -> None:
    pipe.load_lora_weights({name: x.half() for name, x in GOOD.items()})
    assert {p.dtype for p in pipe.adapter_parameters("default_0")} == {torch.float32}
    pipe.to(torch.float16)
    pipe.load_lora_weights(GOOD)
    assert {p.dtype for p in pipe.adapter_parameters("default_1")} == {torch.float16}
    with pytest.raises(CheckpointError, match="has NaN or infinity, in float16"):
        pipe.load_lora_weights({name: x * 1e6 for name, x in GOOD.items()})


def test_patterns_match_as_in_peft() -> None:
    from peft.utils.other import get_pattern_key

    patterns = ["to_q", r"^conv_in", r"attn1\.to_k", r".*\.1\.conv1", "to_out.0"]
    config = LoraConfig.from_dict({**CONFIG, "rank_pattern": {p: n + 3 for n, p in enumerate(patterns)}}, "x")
    ranks = {p: n + 3 for n, p in enumerate(patterns)}
    for name in (
        "a.to_q",
        "a.to_qq",
        "conv_in",
        "a.conv_in",
        "b.attn1.to_k",
        "attn2.to_k",
        "x.1.conv1",
        "to_out.0",
    ):
        assert config.rank_of(name) == ranks.get(get_pattern_key(patterns, name), 2)
