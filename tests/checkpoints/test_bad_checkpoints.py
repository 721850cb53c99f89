"""Checkpoints that are broken, hostile or not supported: one clear error, which names the file."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from audioldm2 import AudioLDM2Pipeline
from audioldm2.checkpoints.errors import CheckpointError
from audioldm2.checkpoints.formats import PARTS
from tests.checkpoints.files import (
    State,
    edit_json,
    load,
    rewrite,
    stem,
    weights,
    write_bin,
    write_safetensors,
)


def refusal(call: Callable[[], object]) -> str:
    """The message of the CheckpointError, which is one line that any terminal can show."""
    with pytest.raises(CheckpointError) as caught:
        call()
    message = str(caught.value)
    assert message.isprintable(), message
    return message


def pipeline_refusal(folder: Path | str) -> str:
    return refusal(lambda: AudioLDM2Pipeline.from_pretrained(folder))


@pytest.mark.parametrize(
    "name", ["./nothing", "/no/such", "a/b/c", "~/nothing/here", "", "no spaces/here", "-x/y"]
)
def test_a_name_that_is_neither_folder_nor_repository(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert pipeline_refusal(name) == (
        f"{name!r} is neither a local folder nor a repository on the Hub (owner/name); "
        '"tiny" is included in the package and needs no download'
    )


@pytest.mark.parametrize("name", ["a--b/c", "owner/name.git", "owner/na..me"])
def test_a_name_that_the_hub_cannot_have(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "neither a local folder nor a repository" in pipeline_refusal(name)
    only_local = refusal(lambda: AudioLDM2Pipeline.from_pretrained(name, local_files_only=True))
    assert "neither a local folder nor a repository" in only_local


def test_a_file_in_place_of_a_folder(checkpoint):
    path = checkpoint / "model_index.json"
    assert pipeline_refusal(path) == f"{path} is a file; pass the folder that contains it"


def test_a_folder_that_holds_no_checkpoint(tmp_path):
    assert pipeline_refusal(tmp_path) == f"{tmp_path / 'model_index.json'} is missing"


JSON_FILES = [
    "model_index.json",
    "text_encoder/config.json",
    "scheduler/scheduler_config.json",
    "feature_extractor/preprocessor_config.json",
]


@pytest.mark.parametrize("name", JSON_FILES)
def test_garbage_in_place_of_json(checkpoint, name):
    path = checkpoint / name
    for content in (b"", b"{", b"garbage", b"\xff\xfe", b"[" * 100_000, b"1" * 5000, b'{"a": 1} x'):
        path.write_bytes(content)
        assert f"{path} cannot be read as JSON: " in pipeline_refusal(checkpoint)
    path.write_text("[1, 2]")
    assert f"{path} must contain a JSON object" in pipeline_refusal(checkpoint)
    path.unlink()
    assert f"{path} is missing" in pipeline_refusal(checkpoint)
    path.mkdir()
    assert pipeline_refusal(checkpoint) == f"{path} is not a regular file"


@pytest.mark.parametrize("entry", [None, [None, None], "AutoencoderKL", ["diffusers"], [["x"], ["y"]], 3])
def test_a_part_that_model_index_does_not_name(checkpoint, entry):
    edit_json(checkpoint / "model_index.json", vae=entry)
    message = pipeline_refusal(checkpoint)
    assert message.startswith(f"{checkpoint / 'model_index.json'}: vae is ")


def test_parts_of_other_classes_are_all_named(checkpoint):
    edit_json(
        checkpoint / "model_index.json",
        unet=["diffusers", "UNet2DConditionModel"],
        scheduler=["diffusers", "EulerScheduler"],
        tokenizer=["transformers", "CLIPTokenizer"],
    )
    message = pipeline_refusal(checkpoint)
    assert "unet is of class UNet2DConditionModel, not AudioLDM2UNet2DConditionModel" in message
    assert "scheduler is of class EulerScheduler, not DDIMScheduler, DPMSolverMultistepScheduler, " in message
    assert "tokenizer is of class CLIPTokenizer, not RobertaTokenizer" in message


def test_missing_folders_are_all_named(checkpoint):
    for name in ("vocoder", "tokenizer"):
        shutil.rmtree(checkpoint / name)
    assert "lacks the folders of its parts: vocoder, tokenizer" in pipeline_refusal(checkpoint)


@pytest.mark.parametrize("name", ["StableDiffusionPipeline", "AudioLDMPipeline", None, ["AudioLDM2Pipeline"]])
def test_another_pipeline_is_refused(checkpoint, name):
    edit_json(checkpoint / "model_index.json", _class_name=name)
    message = pipeline_refusal(checkpoint)
    assert "AudioLDM2Pipeline only" in message
    assert str(name) in message


def test_a_config_of_another_class(checkpoint):
    shutil.copy(checkpoint / "vae" / "config.json", checkpoint / "unet" / "config.json")
    path = checkpoint / "unet" / "config.json"
    expected = f"{path} is for class AutoencoderKL; class AudioLDM2UNet2DConditionModel is needed here"
    assert pipeline_refusal(checkpoint) == expected


@pytest.mark.parametrize("value", ["T5EncoderModel", "x", 3, {"a": 1}, ["CLIPTextModel"], [[]]])
def test_a_config_whose_class_is_garbage(checkpoint, value):
    path = checkpoint / "text_encoder_2" / "config.json"
    edit_json(path, architectures=value)
    if value == "T5EncoderModel":
        load(checkpoint, "text_encoder_2")
    else:
        assert f"{path} is for class " in refusal(lambda: load(checkpoint, "text_encoder_2"))


@pytest.mark.parametrize(
    ("part", "key", "value"),
    [
        ("unet", "act_fn", "swishy"),
        ("unet", "down_block_types", ["DownBlock2D", "KDownBlock2D", "DownBlock2D"]),
        ("unet", "block_out_channels", "many"),
        ("unet", "block_out_channels", [8, -16, 24]),
        ("unet", "block_out_channels", 8),
        ("unet", "layers_per_block", 1.5),
        ("unet", "layers_per_block", True),
        ("unet", "in_channels", None),
        ("unet", "in_channels", 10**30),
        ("unet", "cross_attention_dim", [[None, "x"]] * 3),
        ("vae", "latent_channels", -4),
        ("vae", "scaling_factor", float("nan")),
        ("vae", "block_out_channels", {}),
        ("vae", "act_fn", 7),
        ("vae", "use_quant_conv", "yes"),
        ("text_encoder", "text_config", []),
        ("text_encoder", "audio_config", "x"),
        ("text_encoder", "projection_dim", "x"),
        ("text_encoder_2", "d_model", [20]),
        ("text_encoder_2", "feed_forward_proj", "gated-swish"),
        ("text_encoder_2", "layer_norm_epsilon", "small"),
        ("projection_model", "langauge_model_dim", -16),
        ("projection_model", "text_encoder_dim", None),
        ("language_model", "activation_function", "gelu_slow"),
        ("language_model", "n_head", 3),
        ("language_model", "n_embd", "16"),
        ("vocoder", "upsample_rates", [5, "4", 4, 2]),
        ("vocoder", "resblock_dilation_sizes", [1, 3]),
        ("vocoder", "upsample_rates", []),
    ],
)
def test_a_config_value_that_is_not_supported_is_named(checkpoint, part, key, value):
    path = checkpoint / part / "config.json"
    edit_json(path, **{key: value})
    message = refusal(lambda: load(checkpoint, part))
    assert message.startswith(f"{path}: ")
    assert key in message


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("value", ["many", 0, [0, 0, 0]])
def test_garbage_in_a_config_never_causes_another_error(checkpoint, part, value):
    """One key at a time: the stage loads regardless, or the error names config.json or what does not fit."""
    path = checkpoint / part / "config.json"
    whole = json.loads(path.read_text())

    def garbled(config: dict) -> list[dict]:
        changed = [{**config, key: value} for key in config]
        nested = [key for key in config if isinstance(config[key], dict)]
        return changed + [{**config, key: inner} for key in nested for inner in garbled(config[key])]

    messages = []
    for config in garbled(whole):
        path.write_text(json.dumps(config))
        try:
            load(checkpoint, part)
        except CheckpointError as error:
            messages.append(str(error))
    assert messages
    for message in messages:
        assert message.startswith((f"{path}", f"{path.parent}: "))


def test_sizes_that_a_layer_refuses_name_the_file(checkpoint):
    path = checkpoint / "language_model" / "config.json"
    edit_json(path, n_embd=2**31 - 2, n_head=2)
    message = refusal(lambda: load(checkpoint, "language_model"))
    assert message.startswith(f"{path}: the sizes are not valid for class GPT2Model (RuntimeError: ")


# --- weights files


class RunsCode:
    def __init__(self, command: str):
        self.command = command

    def __reduce__(self) -> tuple:
        return os.system, (self.command,)


def in_form(form: str, state: State, path: Path) -> tuple[bytes, str]:
    """The content of a weights file in one of the formats, and its name."""
    if form == "safetensors":
        save_file(state, path, metadata={"format": "pt"})
    else:
        torch.save(state, path, _use_new_zipfile_serialization=form == "bin")
    content = path.read_bytes()
    path.unlink()
    return content, f"diffusion_pytorch_model.{'safetensors' if form == 'safetensors' else 'bin'}"


@pytest.mark.parametrize("form", ["safetensors", "bin", "legacy bin"])
def test_a_broken_weight_file_is_named(checkpoint, form):
    folder = checkpoint / "projection_model"
    state = load_file(weights(checkpoint, "projection_model"))
    weights(checkpoint, "projection_model").unlink()
    content, name = in_form(form, state, checkpoint / "file")
    generator = torch.Generator().manual_seed(0)

    def noise(count: int) -> bytes:
        return bytes(torch.randint(0, 256, (count,), generator=generator, dtype=torch.uint8).tolist())

    cuts = [*range(48), len(content) // 3, len(content) // 2, len(content) - 64, len(content) - 1]
    broken = [content[:cut] for cut in cuts]
    broken += [noise(size) for size in (1, 7, 8, 9, 64, 1000, 5000) for _ in range(8)]
    broken += [noise(64) + content[64:], content[:30] + noise(200) + content[230:], b"\0" * len(content)]
    broken += [b"<!doctype html><html>Not found</html>", b"version https://git-lfs.github.com/spec/v1\n"]
    for data in broken:
        (folder / name).write_bytes(data)
        message = refusal(lambda: load(checkpoint, "projection_model"))
        assert message.startswith(f"{folder / name} is ")
        assert message.endswith(("download or copy it again", "Use safetensors", "tensors by name"))
    (folder / name).write_bytes(content)
    load(checkpoint, "projection_model")


@pytest.mark.parametrize("legacy", [False, True])
def test_a_bin_that_would_run_code_is_refused_and_does_not_run(checkpoint, tmp_path, legacy):
    path = weights(checkpoint, "unet").with_suffix(".bin")
    state = load_file(weights(checkpoint, "unet"))
    weights(checkpoint, "unet").unlink()
    marker = tmp_path / "ran"
    evil = {**state, "conv_in.bias": RunsCode(f"touch {marker}")}
    torch.save(evil, path, _use_new_zipfile_serialization=not legacy)
    message = refusal(lambda: load(checkpoint, "unet"))
    assert message.startswith(f"{path} is damaged, or contains more than tensors and could run code")
    path.write_bytes(pickle.dumps(evil["conv_in.bias"], protocol=2))
    assert "was not read" in refusal(lambda: load(checkpoint, "unet"))
    assert not marker.exists()


@pytest.mark.parametrize(
    "content",
    [[torch.zeros(2)], {"a": 3}, {1: torch.zeros(2)}, torch.zeros(2), {"state_dict": {"a": torch.zeros(2)}}],
)
def test_a_bin_that_is_not_a_state_dict(checkpoint, content):
    path = weights(checkpoint, "vae").with_suffix(".bin")
    weights(checkpoint, "vae").unlink()
    torch.save(content, path)
    expected = f"{path} is not a state dict: it must contain tensors by name"
    assert refusal(lambda: load(checkpoint, "vae")) == expected


def test_no_weights_at_all(checkpoint):
    weights(checkpoint, "vae").unlink()
    assert f"{checkpoint / 'vae'} has no weights (looked for " in pipeline_refusal(checkpoint)


@pytest.mark.parametrize("write", [write_safetensors, write_bin])
def test_all_tensors_that_do_not_fit_are_listed(checkpoint, write):
    def corrupt(folder: Path, part: str, state: State) -> None:
        del state["conv_in.weight"], state["mid_block.resnets.0.norm1.bias"]
        state["extra.weight"] = torch.zeros(3)
        state["conv_out.bias"] = torch.zeros(5)
        write(folder, part, state)

    rewrite(checkpoint, "unet", corrupt)
    head, text = pipeline_refusal(checkpoint).split(" do not fit: ")
    assert head == f"{checkpoint / 'unet'}: 4 of the checkpoint's tensors"
    assert len(text.split("; ")) == 4
    for name in ("conv_in.weight", "mid_block.resnets.0.norm1.bias", "extra.weight", "conv_out.bias"):
        assert name in text


@pytest.mark.parametrize("write", [write_safetensors, write_bin])
def test_tensors_that_are_not_floating_point_are_listed(checkpoint, write):
    def corrupt(folder: Path, part: str, state: State) -> None:
        attention = "encoder.mid_block.attentions.0.to_k.weight"
        state[attention] = state[attention].to(torch.int64)
        state["decoder.conv_in.bias"] = state["decoder.conv_in.bias"].to(torch.float8_e4m3fn)
        write(folder, part, state)

    rewrite(checkpoint, "vae", corrupt)
    head, text = refusal(lambda: load(checkpoint, "vae", dtype=torch.float32)).split(" do not fit: ")
    assert head == f"{checkpoint / 'vae'}: 2 of the checkpoint's tensors"
    assert [entry.split(" holds ")[0] for entry in text.split("; ")] == [
        "wrong type: decoder.conv_in.bias",
        "wrong type: encoder.mid_block.attentions.0.to_k.weight",
    ]


def test_nan_weights_are_loaded(checkpoint):
    """Loading does not judge the values of the weights."""

    def corrupt(folder: Path, part: str, state: State) -> None:
        state["conv_out.bias"].fill_(float("nan"))
        write_safetensors(folder, part, state)

    rewrite(checkpoint, "unet", corrupt)
    assert load(checkpoint, "unet").conv_out.bias.isnan().all()


# --- shards


def shard(checkpoint: Path, part: str = "vae", safe: bool = True) -> Path:
    """Split a part's weights into two shards. Returns the path of the index."""
    state = load_file(weights(checkpoint, part))
    weights(checkpoint, part).unlink()
    suffix = "safetensors" if safe else "bin"
    places = {}
    for number in (1, 2):
        name = f"{stem(part, suffix)}-0000{number}-of-00002.{suffix}"
        held = {key: state[key] for key in sorted(state)[number - 1 :: 2]}
        (save_file if safe else torch.save)(held, checkpoint / part / name)
        places |= dict.fromkeys(held, name)
    index = checkpoint / part / f"{stem(part, suffix)}.{suffix}.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return index


@pytest.mark.parametrize("safe", [True, False])
@pytest.mark.parametrize(
    "name",
    ["../x.safetensors", "/etc/passwd", "sub/x", "..", ".", "", "sub\\x", "../vae/x.bin", 3, None, ["x"]],
)
def test_an_index_that_points_outside_its_folder_is_refused(checkpoint, name, safe):
    index = shard(checkpoint, safe=safe)
    places = json.loads(index.read_text())["weight_map"]
    edit_json(index, weight_map={**places, "decoder.conv_in.bias": name})
    message = refusal(lambda: load(checkpoint, "vae"))
    assert message == f"{index} refers to a file outside its folder ({name!r}), which is not allowed"


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {}}'])
def test_an_index_that_is_garbage(checkpoint, content):
    index = shard(checkpoint)
    index.write_text(content)
    assert refusal(lambda: load(checkpoint, "vae")).startswith(str(index))


def test_missing_truncated_and_duplicate_shards(checkpoint):
    index = shard(checkpoint)
    first, second = sorted(index.parent.glob("*.safetensors"))
    content = second.read_bytes()
    second.write_bytes(content[:-1])
    assert refusal(lambda: load(checkpoint, "vae")).startswith(f"{second} is not a complete safetensors file")
    second.unlink()
    expected = f"{index} refers to missing shards: {second.name}"
    assert refusal(lambda: load(checkpoint, "vae")) == expected
    shutil.copy(first, second)
    message = refusal(lambda: load(checkpoint, "vae"))
    assert re.fullmatch(rf"{re.escape(str(second))} contains \S+, which another shard contains, too", message)


# --- tokenizer, feature extractor, scheduler


@pytest.mark.parametrize("name", ["tokenizer", "tokenizer_2"])
@pytest.mark.parametrize("content", ["", "garbage", "{}", "[]", '{"model": {"type": "BPE"}}', None])
def test_a_broken_tokenizer_is_named(checkpoint, name, content):
    for path in (checkpoint / name).iterdir():
        if path.name != "tokenizer_config.json":
            path.unlink()
    if content is not None:
        (checkpoint / name / "tokenizer.json").write_text(content)
    message = pipeline_refusal(checkpoint)
    assert message.startswith(f"{checkpoint / name}: the tokenizer cannot be read: ")


@pytest.mark.parametrize(
    ("part", "key", "value"),
    [
        ("feature_extractor", "truncation", "random"),
        ("feature_extractor", "padding", "mirror"),
        ("feature_extractor", "sampling_rate", "high"),
        ("feature_extractor", "hop_length", 0),
        ("feature_extractor", "max_length_s", None),
        ("feature_extractor", "feature_size", -64),
        ("feature_extractor", "frequency_max", []),
        ("scheduler", "beta_start", "low"),
        ("scheduler", "trained_betas", "x"),
        ("scheduler", "trained_betas", {}),
        ("scheduler", "steps_offset", "x"),
        ("scheduler", "_use_default_values", 3),
        ("scheduler", "beta_schedule", "wavy"),
        ("scheduler", "prediction_type", "flow"),
        ("scheduler", "num_train_timesteps", "many"),
        ("scheduler", "num_train_timesteps", -1),
        ("scheduler", "num_train_timesteps", None),
        ("scheduler", "timestep_spacing", []),
    ],
)
def test_a_value_of_the_other_configs_that_is_not_supported(checkpoint, part, key, value):
    name = {"feature_extractor": "preprocessor_config.json", "scheduler": "scheduler_config.json"}[part]
    path = checkpoint / part / name
    edit_json(path, **{key: value})
    message = pipeline_refusal(checkpoint)
    assert message.startswith(f"{path}: ")
    assert key in message
