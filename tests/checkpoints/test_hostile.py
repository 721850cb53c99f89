"""Checkpoints that are made to take memory or time, or that would fail in the first generation."""

from __future__ import annotations

import io
import json
import math
import os
import pickle
import struct
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
import transformers
from safetensors.torch import load_file

from audioldm2 import AudioLDM2Pipeline, ClapFeatureExtractor, DDIMScheduler, UNet
from audioldm2.checkpoints import pickled, tensors
from audioldm2.checkpoints.agreement import check_tokenizer
from audioldm2.checkpoints.errors import CheckpointError, MissingCheckpointError
from audioldm2.checkpoints.folder import load_tokenizer
from audioldm2.checkpoints.formats import INDEX, PARTS, TOKENIZERS
from audioldm2.checkpoints.hub import Source, checkpoint_folder
from audioldm2.quoting import listed, one_line, quoted
from tests.checkpoints.files import edit_json, load, stem, weights
from tests.checkpoints.test_bad_checkpoints import pipeline_refusal, refusal

LARGEST = 2**31 - 1


# --- sizes in configs


@pytest.mark.parametrize(
    ("part", "changes"),
    [
        ("unet", {"layers_per_block": LARGEST}),
        ("unet", {"transformer_layers_per_block": LARGEST}),
        ("unet", {"layers_per_block": 1000, "transformer_layers_per_block": 1000}),
        ("unet", {"cross_attention_dim": [[16] * 100_000] * 3}),
        ("unet", {"block_out_channels": [8] * 100_000}),
        ("unet", {"freq_shift": 4}),
        ("unet", {"conv_in_kernel": 2}),
        ("unet", {"norm_eps": 0.0}),
        ("unet", {"attention_head_dim": 32}),
        ("unet", {"in_channels": 0}),
        ("vae", {"layers_per_block": LARGEST}),
        ("vae", {"scaling_factor": 0}),
        ("vae", {"scaling_factor": 1e-300}),
        ("vae", {"scaling_factor": -1}),
        ("text_encoder_2", {"num_layers": LARGEST}),
        ("text_encoder_2", {"layer_norm_epsilon": -1.0}),
        ("text_encoder_2", {"d_ff": LARGEST}),
        ("language_model", {"n_layer": LARGEST}),
        ("language_model", {"n_layer": 1024}),
        ("language_model", {"max_new_tokens": 0}),
        ("vocoder", {"sampling_rate": 0}),
        ("vocoder", {"sampling_rate": LARGEST}),
        ("vocoder", {"upsample_rates": [0, 4, 4, 2]}),
        ("vocoder", {"resblock_dilation_sizes": [[1, 3], [1, LARGEST]]}),
        ("vocoder", {"leaky_relu_slope": 1e30}),
        ("projection_model", {"text_encoder_dim": LARGEST}),
    ],
)
def test_a_size_is_not_believed(checkpoint: Path, part: str, changes: dict[str, Any]) -> None:
    """The message names the file, and loading takes no more time and memory than it takes to say so."""
    edit_json(checkpoint / part / "config.json", **changes)
    assert str(checkpoint / part) in refusal(lambda: load(checkpoint, part))


@pytest.mark.parametrize(
    ("config", "changes"),
    [
        ("text_config", {"num_hidden_layers": LARGEST}),
        ("text_config", {"pad_token_id": 10**6}),
        ("text_config", {"max_position_embeddings": 2}),
        ("audio_config", {"depths": [LARGEST, 2]}),
        ("audio_config", {"depths": [1] * 50_000, "num_attention_heads": [1] * 50_000}),
        ("audio_config", {"spec_size": 2**30}),
        ("audio_config", {"mlp_ratio": 1e-9}),
        ("audio_config", {"patch_size": [16, 16, 16]}),
    ],
)
def test_a_size_of_clap_is_not_believed(checkpoint: Path, config: str, changes: dict[str, Any]) -> None:
    path = checkpoint / "text_encoder" / "config.json"
    content = json.loads(path.read_text())
    edit_json(path, **{config: {**content[config], **changes}})
    assert str(path) in refusal(lambda: load(checkpoint, "text_encoder"))


@pytest.mark.parametrize(
    ("part", "key", "value"),
    [
        ("scheduler", "num_train_timesteps", 10**8),
        ("scheduler", "trained_betas", [2.0] * 10),
        ("scheduler", "beta_end", math.inf),
        ("scheduler", "steps_offset", 50),
        ("feature_extractor", "fft_window_size", LARGEST),
        ("feature_extractor", "hop_length", 1),
        ("feature_extractor", "frequency_min", 13999.999999999998),
    ],
)
def test_a_size_of_the_other_configs_is_not_believed(
    checkpoint: Path, part: str, key: str, value: Any
) -> None:
    name = {"feature_extractor": "preprocessor_config.json", "scheduler": "scheduler_config.json"}[part]
    path = checkpoint / part / name
    edit_json(path, **{key: value})
    assert pipeline_refusal(checkpoint).startswith(f"{path}: ")


def test_features_that_do_not_fit_clap_are_told_at_load(checkpoint: Path) -> None:
    """Everything but the ranking of candidates works, which refuses them by name."""
    edit_json(checkpoint / "feature_extractor" / "preprocessor_config.json", feature_size=32)
    with pytest.warns(UserWarning, match=r"CLAP cannot rank sounds: .*\.json has feature_size = 32, not"):
        pipe = AudioLDM2Pipeline.from_pretrained(checkpoint)
    with pytest.raises(ValueError, match="input_features must be"):
        pipe.rank(torch.zeros(2, 1000), torch.zeros(1, 12))


def test_what_diffusers_writes_for_dpm_solver_is_read(checkpoint: Path) -> None:
    edit_json(checkpoint / INDEX, scheduler=["diffusers", "DPMSolverMultistepScheduler"])
    edit_json(checkpoint / "scheduler" / "scheduler_config.json", lambda_min_clipped=-math.inf)
    assert "-Infinity" in (checkpoint / "scheduler" / "scheduler_config.json").read_text()
    AudioLDM2Pipeline.from_pretrained(checkpoint)


def test_trying_a_scheduler_draws_no_random_numbers(checkpoint: Path) -> None:
    edit_json(checkpoint / INDEX, scheduler=["diffusers", "DPMSolverMultistepScheduler"])
    edit_json(checkpoint / "scheduler" / "scheduler_config.json", algorithm_type="sde-dpmsolver++")
    state = torch.get_rng_state()
    AudioLDM2Pipeline.from_pretrained(checkpoint)
    assert torch.equal(state, torch.get_rng_state())


def test_a_tensor_of_another_dtype_is_converted(checkpoint: Path) -> None:
    path = weights(checkpoint, "language_model")
    state = load_file(path)
    state["h.0.mlp.c_fc.weight"] = state["h.0.mlp.c_fc.weight"].double()
    path.unlink()
    torch.save(state, path.with_name("pytorch_model.bin"))
    assert {p.dtype for p in load(checkpoint, "language_model").parameters()} == {torch.float32}


# --- JSON files


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ('{"a": 1, "\\u001b[31m": 2, "\\u001b[31m": 3}', r"the key '\\x1b\[31m' is there twice"),
        ('{"a": ' + "[" * 40 + "]" * 40 + "}", "is nested more than 32 levels deep"),
        (" " * (2**20 + 1), "at most 1048576 are read"),
    ],
)
def test_json_that_is_not_read(checkpoint: Path, content: str, reason: str) -> None:
    path = checkpoint / "vae" / "config.json"
    path.write_text(content)
    with pytest.raises(CheckpointError, match=reason):
        load(checkpoint, "vae")


@pytest.mark.parametrize(
    "value", ["\x1b[31mred\n", "x" * 10**5, ["y"] * 10**4, {"a": {"b": {"c": {"d": {"e": 1}}}}}]
)
@pytest.mark.parametrize(
    ("part", "key"), [("unet", "act_fn"), ("unet", "_class_name"), ("vocoder", "upsample_rates")]
)
def test_a_foreign_value_is_quoted_and_shortened(checkpoint: Path, part: str, key: str, value: Any) -> None:
    path = checkpoint / part / "config.json"
    edit_json(path, **{key: value})
    message = refusal(lambda: load(checkpoint, part))  # which is printable
    assert message.startswith(str(path))
    assert len(message) < len(str(path)) + 410


def test_quoting() -> None:
    assert quoted("a\x1b[0m\u202e") == "'a\\x1b[0m\\u202e'"
    assert len(quoted("x" * 1000)) <= 80
    assert len(quoted(list(range(10**6)))) <= 80
    assert len(quoted(10**1000)) <= 80
    assert one_line("first\x07\nsecond") == "first\\x07"
    assert one_line(KeyError()) == "KeyError"
    assert listed("abc") == "a, b, c"
    assert listed(["x"] * 20).endswith("x, and 4 more")


# --- files that are no regular files, and names that are no names


@pytest.mark.parametrize(
    ("file", "kind"),
    [
        (INDEX, "pipe"),
        (INDEX, "device"),
        ("text_encoder/config.json", "pipe"),
        ("text_encoder/config.json", "folder"),
        ("text_encoder/model.safetensors", "pipe"),
        ("text_encoder/model.safetensors", "device"),
        ("text_encoder/model.safetensors", "folder"),
        ("tokenizer/tokenizer.json", "pipe"),
        ("tokenizer/another", "device"),
    ],
)
def test_only_regular_files_are_read(checkpoint: Path, file: str, kind: str) -> None:
    path = checkpoint / file
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path.mkdir()
    part = path.parent.name
    expected = f"{path} is not a regular file"
    if part in PARTS:
        assert refusal(lambda: load(checkpoint, part)) == expected
    elif part in TOKENIZERS:
        assert refusal(lambda: load_tokenizer(path.parent, "RobertaTokenizer")) == expected
    else:
        assert pipeline_refusal(checkpoint) == expected


@pytest.mark.parametrize(
    "name", ["x" * 255, "x/" + "y" * 255, "z" * 5000, "~nosuchuser/x", "a\0b", "\x1b[31m", None, 3]
)
def test_names_that_no_folder_can_have(name: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    message = refusal(lambda: AudioLDM2Pipeline.from_pretrained(name, local_files_only=True))
    assert "neither a local folder nor a repository" in message or "has not been downloaded" in message


# --- .bin


def as_bin(checkpoint: Path, part: str = "vae") -> tuple[Path, dict[str, torch.Tensor]]:
    """The path of a `.bin` to be written in place of a part's weights, and their tensors."""
    state = load_file(weights(checkpoint, part))
    weights(checkpoint, part).unlink()
    return checkpoint / part / f"{stem(part, 'bin')}.bin", state


def records(state: dict[str, torch.Tensor]) -> dict[str, bytes]:
    saved = io.BytesIO()
    torch.save(state, saved)
    with zipfile.ZipFile(saved) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def write_zip(path: Path, files: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in files.items():
            archive.writestr(name, data)


@pytest.mark.parametrize("bomb", [False, True])
def test_compressed_records_are_refused(checkpoint: Path, bomb: bool) -> None:
    path, state = as_bin(checkpoint)
    write_zip(path, {**records(state), "archive/data/99": bytes(10**8 if bomb else 0)}, zipfile.ZIP_DEFLATED)
    message = refusal(lambda: load(checkpoint, "vae"))
    assert message.startswith(
        f"{path} is not a PyTorch weight file that can be read safely: its records are comp"
    )


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("meta", "tensors on the meta device"),
        ("expanded", "is larger than its memory"),
        ("shared", "share memory"),
    ],
)
def test_tensors_without_memory_of_their_own(checkpoint: Path, kind: str, reason: str, legacy: bool) -> None:
    path, state = as_bin(checkpoint)
    if kind == "shared":
        memory = torch.zeros(max(t.numel() for t in state.values()))
        state = {name: memory[: t.numel()].view(t.shape) for name, t in state.items()}
    else:
        tensor = state["conv_in.weight" if "conv_in.weight" in state else "encoder.conv_in.weight"]
        odd = (
            torch.empty_like(tensor, device="meta")
            if kind == "meta"
            else torch.zeros(()).expand(tensor.shape)
        )
        state["encoder.conv_in.weight"] = odd
    torch.save(state, path, _use_new_zipfile_serialization=not legacy)
    message = refusal(lambda: load(checkpoint, "vae"))
    assert message.startswith((f"{path} ", f"{path.parent}: "))
    assert reason in message


ORDERED = b"ccollections\nOrderedDict\nq\x00"
PICKLES = {
    "a bytearray of 2 GB": b"\x80\x02cbuiltins\nbytearray\nJ\xff\xff\xff\x7f\x85R.",
    "an instruction that takes 2 GB": b"\x80\x05\x96" + struct.pack("<Q", 2**31) + b".",
    "a memo of 8 GB": b"\x80\x02Nr" + struct.pack("<I", 2**30) + b".",
    "a list for each byte": b"\x80\x02" + b"]" * 2**18 + b".",
    "copies of a dictionary": b"\x80\x02" + ORDERED + b"(K\x01K\x01dq\x01" + b"h\x00h\x01\x85R0" * 9 + b"N.",
    "state for a function": b"\x80\x02" + ORDERED + b"}X\x01\x00\x00\x00aK\x01sb.",
    "a function's result": b"\x80\x02ctorch\nzeros\nJ\xff\xff\xff\x7f\x85R.",
}


@pytest.mark.parametrize("name", PICKLES)
def test_a_pickle_that_takes_memory_is_refused(checkpoint: Path, name: str) -> None:
    path, state = as_bin(checkpoint)
    found = records(state)
    entry = next(record for record in found if record.endswith("/data.pkl"))
    write_zip(path, {**found, entry: PICKLES[name]})
    assert refusal(lambda: load(checkpoint, "vae")).startswith(f"{path} is ")
    path.write_bytes(PICKLES[name])
    assert refusal(lambda: load(checkpoint, "vae")).startswith(f"{path} is ")


def test_a_tar_archive_is_not_extracted(checkpoint: Path) -> None:
    path, _ = as_bin(checkpoint)
    with tarfile.open(path, "w") as archive:
        for name in ("storages", "tensors", "pickle"):
            archive.addfile(tarfile.TarInfo(name))
    assert "it is a tar archive" in refusal(lambda: load(checkpoint, "vae"))


@pytest.mark.parametrize("legacy", [False, True])
def test_a_storage_that_claims_more_than_there_is(checkpoint: Path, legacy: bool) -> None:
    path, _ = as_bin(checkpoint)
    saved = io.BytesIO()
    torch.save({"a": torch.zeros(7)}, saved, _use_new_zipfile_serialization=not legacy)
    data = saved.getvalue()
    old, new = (b"K\x07N", b"J\xff\xff\xff\x0fN") if legacy else (b"K\x07t", b"J\xff\xff\xff\x0ft")
    if legacy:
        assert old in data
        path.write_bytes(data.replace(old, new, 1))
    else:
        with zipfile.ZipFile(saved) as archive:
            found = {name: archive.read(name) for name in archive.namelist()}
        entry = next(name for name in found if name.endswith("/data.pkl"))
        assert old in found[entry]
        write_zip(path, {**found, entry: found[entry].replace(old, new, 1)})
    reason = "it is shorter than its tensors" if legacy else "a storage is larger than its record"
    assert reason in refusal(lambda: load(checkpoint, "vae"))


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("kind", ["dict", "OrderedDict with metadata", "parameters", "mixed dtypes"])
def test_state_dicts_as_pytorch_saves_them_are_read(checkpoint: Path, kind: str, legacy: bool) -> None:
    expected = load(checkpoint, "vae")
    path, state = as_bin(checkpoint)
    content: Any = dict(state)
    if kind == "OrderedDict with metadata":
        module = torch.nn.Module()
        content = module.state_dict()  # with an attribute _metadata
        content.update(state)
    elif kind == "parameters":
        content = {name: torch.nn.Parameter(tensor) for name, tensor in state.items()}
    elif kind == "mixed dtypes":
        content["encoder.conv_in.bias"] = state["encoder.conv_in.bias"].double()
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    found = load(checkpoint, "vae")
    for name, tensor in expected.state_dict().items():
        assert torch.equal(found.state_dict()[name], tensor), name


def test_control_characters_in_file_names_are_escaped(checkpoint: Path) -> None:
    os.mkfifo(checkpoint / "tokenizer" / "\x1b[31m\n")
    message = pipeline_refusal(checkpoint)  # which is printable
    assert message == f"{checkpoint / 'tokenizer'}/\\x1b[31m\\n is not a regular file"
    error = pickle.loads(pickle.dumps(MissingCheckpointError("a\x07")))
    assert (str(error), error.args, error.filename, error.errno) == ("a\\x07", ("a\\x07",), None, None)


def test_limits_of_weight_files(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = weights(checkpoint, "vae")
    monkeypatch.setattr(tensors, "MAX_TENSORS", 10)
    assert "tensors; at most 10 are read" in refusal(lambda: load(checkpoint, "vae"))
    monkeypatch.setattr(tensors, "MAX_HEADER_BYTES", 100)
    assert "is larger than 100" in refusal(lambda: load(checkpoint, "vae"))
    path, state = as_bin(checkpoint)
    torch.save(state, path)
    monkeypatch.setattr(pickled, "MAX_PICKLE_BYTES", 100)
    assert "its pickle is larger than 100 bytes" in refusal(lambda: load(checkpoint, "vae"))
    monkeypatch.setattr(pickled, "MAX_ZIP_BYTES", 100)
    assert "its directory is larger than 100 bytes" in refusal(lambda: load(checkpoint, "vae"))
    path.write_bytes(pickle.dumps({}))
    assert str(path) in refusal(lambda: load(checkpoint, "vae"))


# --- tokenizers


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("model_max_length", [64], "model_max_length"),
        ("model_max_length", 0, "model_max_length"),
        ("model_max_length", 1e400, "model_max_length"),
        ("model_max_length", True, "model_max_length"),
        ("extra_ids", LARGEST, "extra_ids"),
        ("tokenizer_file", "/etc/passwd", "names files"),
        ("fast_tokenizer_files", ["../x.json"], "names files"),
        ("tokenizer_class", "\x1b[31m", "tokenizer_class"),
    ],
)
def test_values_in_a_tokenizers_config(checkpoint: Path, key: str, value: Any, reason: str) -> None:
    folder = checkpoint / "tokenizer_2"
    edit_json(folder / "tokenizer_config.json", **{key: value})
    message = refusal(lambda: load_tokenizer(folder, "T5Tokenizer"))
    assert message.startswith(str(folder))
    assert reason in message


def test_a_tokenizer_that_is_too_large(checkpoint: Path) -> None:
    with (checkpoint / "tokenizer" / "merges.txt").open("w") as file:
        file.truncate(11 * 2**20)
    assert "at most 10485760 are read" in pipeline_refusal(checkpoint)


def test_a_token_without_an_embedding(checkpoint: Path) -> None:
    path = checkpoint / "tokenizer" / "tokenizer.json"
    content = json.loads(path.read_text())
    content["added_tokens"].append({**content["added_tokens"][0], "id": 5000, "content": "<another>"})
    path.write_text(json.dumps(content))
    message = pipeline_refusal(checkpoint)
    assert message == f"{path.parent}: the tokenizer has token 400, but there are embeddings for 400 only"


def test_a_special_token_without_an_embedding(tmp_path: Path) -> None:
    """The end of a text is added by its id, which need not be in the vocabulary."""
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<unk>": 0, "<pad>": 1}, unk_token="<unk>"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()

    def check(end: int, limit: int = 8) -> None:
        words.post_processor = tokenizers.processors.TemplateProcessing("$A </s>", None, [("</s>", end)])
        tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>")
        check_tokenizer(tmp_path, tokenizer, 10, limit)

    check(9)
    for end, limit in ((10, 8), (9, 0)):
        assert refusal(lambda end=end, limit=limit: check(end, limit)).startswith(
            f"{tmp_path}: the tokenizer "
        )


def test_a_tokenizer_that_cannot_pad(checkpoint: Path) -> None:
    path = checkpoint / "tokenizer_2" / "tokenizer_config.json"
    content = json.loads(path.read_text())
    for key in ("pad_token", "extra_special_tokens"):
        content.pop(key, None)
    path.write_text(json.dumps({**content, "pad_token": None}))
    message = pipeline_refusal(checkpoint)
    assert message.startswith(f"{path.parent}: the tokenizer ")


# --- parts that do not fit together, although each fits its own weights


def test_parts_that_do_not_fit_together(
    checkpoint: Path, random_large_checkpoint: Path, tmp_path: Path
) -> None:
    from scripts.random_checkpoint import write_random_checkpoint

    other = tmp_path / "other"
    write_random_checkpoint(other)  # of other widths everywhere
    for part, reason in {
        "text_encoder": "projection_model/config.json: text_encoder_dim = 12 does not fit .*_dim = 32",
        "text_encoder_2": "projection_model/config.json: text_encoder_1_dim = 20 does not fit .*d_model = 32",
        "projection_model": "projection_model/config.json: text_encoder_dim = 32 does not fit .*text_encoder",
        "language_model": "projection_model/config.json: langauge_model_dim = 16 does not fit .*n_embd = 24",
        "unet": r"unet/config.json: cross_attention_dim\[1\]\[1\] = 24 does not fit .*n_embd = 16",
        "vae": "unet/config.json: in_channels = 4 does not fit .*vae.*latent_channels = 8",
    }.items():
        ours = checkpoint / part
        ours.rename(tmp_path / "aside")
        ours.symlink_to(other / part)
        with pytest.raises(CheckpointError, match=reason):
            AudioLDM2Pipeline.from_pretrained(checkpoint)
        ours.unlink()
        (tmp_path / "aside").rename(ours)


@pytest.mark.parametrize(
    ("part", "key", "value", "reason"),
    [
        ("unet", "sample_size", 10**6, "stands for a sound of"),
        ("language_model", "max_new_tokens", 100, "n_positions leaves no position besides max_new_tokens"),
    ],
)
def test_values_that_only_another_part_bounds(
    checkpoint: Path, part: str, key: str, value: int, reason: str
) -> None:
    path = checkpoint / part / "config.json"
    edit_json(path, **{key: value})
    message = pipeline_refusal(checkpoint)
    assert message.startswith(f"{path}: ")
    assert reason in message


def test_a_speech_checkpoint_with_another_number_of_tokens(
    random_speech_checkpoint: Path, tmp_path: Path
) -> None:
    import shutil

    folder = Path(shutil.copytree(random_speech_checkpoint, tmp_path / "speech"))
    # As in real ones, the token for unknown letters has no embedding; no text is turned into it.
    edit_json(folder / "tokenizer_2" / "vocab.json", **{"<unk>": 200})
    edit_json(folder / "tokenizer_2" / "tokenizer_config.json", unk_token="<unk>")
    AudioLDM2Pipeline.from_pretrained(folder)
    edit_json(folder / "tokenizer_2" / "vocab.json", a=201)
    assert "has token 201, but there are embeddings for 200 only" in pipeline_refusal(folder)
    edit_json(folder / "tokenizer_2" / "tokenizer_config.json", model_max_length=10**30)
    assert "max_seq_length = 24 must be the model_max_length" in pipeline_refusal(folder)


# --- what is not there


def missing(call: Any) -> str:
    """The message of a MissingCheckpointError, which scripts expect as one of these."""
    with pytest.raises(FileNotFoundError) as caught:
        call()
    assert isinstance(caught.value, MissingCheckpointError)
    assert isinstance(caught.value, ValueError)
    assert caught.value.filename is None  # so that the message is not taken for the system's
    return str(caught.value)


@pytest.mark.parametrize(
    "file",
    [
        INDEX,
        "unet/config.json",
        "unet",
        "vae/*.safetensors",
    ],
)
def test_what_is_missing_is_also_a_file_that_is_not_found(checkpoint: Path, file: str) -> None:
    import shutil

    for path in list(checkpoint.glob(file)):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert str(checkpoint) in missing(lambda: AudioLDM2Pipeline.from_pretrained(checkpoint))


def test_a_missing_folder_repository_or_download(tmp_path: Path) -> None:
    missing(lambda: AudioLDM2Pipeline.from_pretrained(tmp_path / "nothing"))
    missing(lambda: checkpoint_folder(Source("owner/name", local_files_only=True, cache_dir=tmp_path), [""]))


@pytest.mark.parametrize("suffix", [".pth", ".ckpt"])
def test_a_checkpoint_of_the_original_repository_is_named_as_such(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"audioldm2-full{suffix}"
    path.write_bytes(b"x")
    for name in (path, tmp_path):
        message = refusal(lambda name=name: AudioLDM2Pipeline.from_pretrained(name))
        assert message.startswith(f"{path} is a checkpoint of the original AudioLDM 2 repository")
        assert "cvssp/audioldm2" in message
    assert "original" in missing(lambda: UNet.from_pretrained(tmp_path))


def test_a_forgotten_subfolder_and_one_too_many(checkpoint: Path) -> None:
    message = missing(lambda: UNet.from_pretrained(checkpoint))
    assert message == f'{checkpoint / "config.json"} is missing; pass the part\'s folder, subfolder="unet"'
    message = missing(lambda: AudioLDM2Pipeline.from_pretrained(checkpoint / "unet"))
    assert message == f"{checkpoint / 'unet' / INDEX} is missing; pass {checkpoint}, which contains all parts"


@pytest.mark.parametrize("part", [UNet, DDIMScheduler, ClapFeatureExtractor])
def test_a_subfolder_is_in_the_checkpoint(part: Any) -> None:
    with pytest.raises(TypeError, match=r'^subfolder must be text, such as "unet", got 3$'):
        part.from_pretrained("tiny", subfolder=3)
    for subfolder in ("../unet", "unet/../../x", "..\\x", "/unet", "a\0"):
        with pytest.raises(ValueError, match=r"^subfolder must be a folder in the checkpoint, got '"):
            part.from_pretrained("tiny", subfolder=subfolder)


# --- tokens


def test_a_token_is_never_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def failing(self: Any, *_: object, **__: object) -> None:
        raise RuntimeError(f"illegal header: Bearer {self.token}")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", failing)
    for token in ("hf_secret", "hf_secret\n", "hf_ secret", "hf_secret\x00", "hf_sécret"):
        source = Source("owner/name", token=token, cache_dir=tmp_path)
        assert "secret" not in repr(source)
        message = refusal(lambda source=source: checkpoint_folder(source, [""]))
        assert "secret" not in message.replace("(the token)", "")
        assert "cret" not in message
