"""Checkpoints: all formats and spellings load to the same numbers, saving inverts it, bad ones are named."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import diffusers
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.utils import parametrize

from audioldm2 import AudioLDM2Pipeline
from audioldm2.atomic import replacing
from audioldm2.checkpoints.errors import CheckpointError
from audioldm2.checkpoints.folder import load_stage
from audioldm2.checkpoints.formats import PARTS
from audioldm2.checkpoints.tensors import _WINDOW_BYTES, weights_file
from audioldm2.models.vits import VitsTextEncoder
from tests.helpers import ROOT
from tests.reference import SMALL_SPEECH, assert_close, randomize

State = dict[str, Tensor]
REFERENCES = {
    "text_encoder": transformers.ClapModel,
    "text_encoder_2": transformers.T5EncoderModel,
    "projection_model": diffusers.AudioLDM2ProjectionModel,
    "language_model": transformers.GPT2Model,
    "unet": diffusers.AudioLDM2UNet2DConditionModel,
    "vae": diffusers.AutoencoderKL,
    "vocoder": transformers.SpeechT5HifiGan,
}
MIXED_WEIGHTS = {  # one part in each library's file names
    "unet": ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin"),
    "vocoder": ("model.safetensors", "pytorch_model.bin"),
}


def stem(part: str, suffix: str) -> str:
    if part in ("projection_model", "unet", "vae"):
        return "diffusion_pytorch_model"
    return "model" if suffix == "safetensors" else "pytorch_model"


def weights(folder: Path, part: str) -> Path:
    return folder / part / f"{stem(part, 'safetensors')}.safetensors"


def load(folder: Path, part: str, **options) -> nn.Module:
    return load_stage(folder / part, PARTS[part][0], **options)


def same_state(first: nn.Module, second: nn.Module) -> None:
    a, b = first.state_dict(), second.state_dict()
    assert a.keys() == b.keys()
    assert len(a) > 0
    for name, tensor in a.items():
        assert tensor.dtype == b[name].dtype, name
        assert torch.equal(tensor, b[name]), name


def edit_json(path: Path, **changes: object) -> None:
    content = json.loads(path.read_text())
    content.update(changes)
    path.write_text(json.dumps(content))


@pytest.fixture
def checkpoint(random_checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of the tiny checkpoint, to be changed."""
    return Path(shutil.copytree(random_checkpoint, tmp_path / "checkpoint"))


@pytest.fixture(scope="module")
def stages(random_checkpoint: Path) -> dict[str, nn.Module]:
    """Every stage from the plain safetensors."""
    return {part: load(random_checkpoint, part) for part in PARTS}


def rewrite(checkpoint: Path, part: str, write: Callable[[Path, str, State], None]) -> None:
    """Take a part's weights away and have `write` put them back in another form."""
    path = weights(checkpoint, part)
    state = {name: tensor.clone() for name, tensor in load_file(path).items()}
    path.unlink()
    write(path.parent, part, state)


# --- formats


def write_safetensors(folder: Path, part: str, state: State) -> None:
    save_file(state, folder / f"{stem(part, 'safetensors')}.safetensors", metadata={"format": "pt"})


def write_bin(folder: Path, part: str, state: State) -> None:
    torch.save(state, folder / f"{stem(part, 'bin')}.bin")


def write_legacy_bin(folder: Path, part: str, state: State) -> None:
    torch.save(state, folder / f"{stem(part, 'bin')}.bin", _use_new_zipfile_serialization=False)


def write_sharded_bin(folder: Path, part: str, state: State) -> None:
    names = sorted(state)
    places = {}
    for number in (1, 2, 3):
        shard = f"{stem(part, 'bin')}-0000{number}-of-00003.bin"
        held = names[number - 1 :: 3]
        torch.save({name: state[name] for name in held}, folder / shard)
        places |= dict.fromkeys(held, shard)
    index = {"metadata": {"total_size": 0}, "weight_map": places}
    (folder / f"{stem(part, 'bin')}.bin.index.json").write_text(json.dumps(index))


def write_transposed_bin(folder: Path, part: str, state: State) -> None:
    """Tensors that do not lie in their own order, as torch.save keeps them."""
    write_bin(folder, part, {name: t.mT.contiguous().mT if t.dim() > 1 else t for name, t in state.items()})


@pytest.mark.parametrize("write", [write_bin, write_legacy_bin, write_sharded_bin, write_transposed_bin])
def test_bin_files_load_to_the_same_tensors(checkpoint, stages, write):
    for part in PARTS:
        rewrite(checkpoint, part, write)
        loaded = load(checkpoint, part)
        same_state(loaded, stages[part])
        assert all(tensor.is_contiguous() for tensor in loaded.state_dict().values())


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_shards_of_the_libraries_load_to_the_same_tensors(random_checkpoint, stages, tmp_path, variant):
    for part, reference in REFERENCES.items():
        model = reference.from_pretrained(random_checkpoint / part)
        limit = weights(random_checkpoint, part).stat().st_size // 3
        model.save_pretrained(tmp_path / part, max_shard_size=limit, variant=variant)
        names = {path.name for path in (tmp_path / part).iterdir()}
        assert weights_file(names, variant).endswith(f".index.{variant}.json" if variant else ".index.json")
        assert len([name for name in names if name.endswith(".safetensors")]) >= 2
        same_state(load(tmp_path, part, variant=variant), stages[part])
        if variant:
            with pytest.raises(CheckpointError, match="has no weights"):
                load(tmp_path, part)


def test_shards_in_bin_of_diffusers_load_to_the_same_tensors(random_checkpoint, stages, tmp_path):
    model = diffusers.AutoencoderKL.from_pretrained(random_checkpoint / "vae")
    model.save_pretrained(tmp_path / "vae", max_shard_size="80KB", safe_serialization=False)
    assert len(list((tmp_path / "vae").glob("*.bin"))) >= 2
    same_state(load(tmp_path, "vae"), stages["vae"])


@pytest.mark.parametrize("part", MIXED_WEIGHTS)
def test_the_variant_is_read_and_only_the_variant(checkpoint, part):
    safe, binary = MIXED_WEIGHTS[part]
    with pytest.raises(CheckpointError, match=r"has no weights of the variant 'fp16' \(looked for "):
        load(checkpoint, part, variant="fp16")
    state = load_file(checkpoint / part / safe)
    halves = {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in state.items()}
    torch.save(halves, checkpoint / part / binary.replace(".bin", ".fp16.bin"))
    from_bin = load(checkpoint, part, variant="fp16")
    save_file(halves, checkpoint / part / safe.replace(".safetensors", ".fp16.safetensors"))
    from_safetensors = load(checkpoint, part, variant="fp16")
    assert {p.dtype for p in from_safetensors.parameters()} == {torch.float16}
    same_state(from_bin, from_safetensors)
    assert {p.dtype for p in load(checkpoint, part).parameters()} == {torch.float32}


@pytest.mark.parametrize("part", MIXED_WEIGHTS)
def test_safetensors_are_preferred_to_bin(checkpoint, stages, part):
    _, binary = MIXED_WEIGHTS[part]
    (checkpoint / part / binary).write_bytes(b"never read")
    same_state(load(checkpoint, part), stages[part])


@pytest.mark.parametrize(
    ("names", "variant", "chosen"),
    [
        ({"model.safetensors", "pytorch_model.bin"}, None, "model.safetensors"),
        ({"model.safetensors", "model.safetensors.index.json"}, None, "model.safetensors"),
        ({"model.safetensors.index.json", "pytorch_model.bin"}, None, "model.safetensors.index.json"),
        ({"pytorch_model.bin.index.json"}, None, "pytorch_model.bin.index.json"),
        ({"model.fp16.safetensors"}, None, None),
        ({"model.safetensors"}, "fp16", None),
        ({"model.safetensors.index.fp16.json"}, "fp16", "model.safetensors.index.fp16.json"),
        ({"diffusion_pytorch_model.fp16.bin"}, "fp16", "diffusion_pytorch_model.fp16.bin"),
        ({"flax_model.msgpack", "config.json"}, None, None),
    ],
)
def test_which_file_is_read(names, variant, chosen):
    assert weights_file(names, variant) == chosen


# --- spellings of older and newer releases


def old_vae(state: State) -> State:
    spelling = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}

    def old(name: str) -> str:
        return re.sub(r"\.to_(q|k|v|out\.0)\.", lambda m: spelling[m.group()], name)

    return {old(name): tensor for name, tensor in state.items()}


def t5_with(*names: str) -> Callable[[State], State]:
    def rename(state: State) -> State:
        words = {"shared.weight", "encoder.embed_tokens.weight"}
        (embedding,) = {name: t for name, t in state.items() if name in words}.values()
        others = {name: t for name, t in state.items() if name not in words}
        return others | {name: embedding.clone() for name in names}

    return rename


def t5_whole(state: State) -> State:
    extra = {
        "decoder.embed_tokens.weight": torch.zeros(160, 20),
        "decoder.block.0.layer.1.EncDecAttention.q.weight": torch.zeros(24, 20),
        "decoder.final_layer_norm.weight": torch.zeros(20),
        "lm_head.weight": torch.zeros(160, 20),
    }
    return state | extra


def gpt2_head(state: State) -> State:
    """As GPT2LMHeadModel's older releases saved it."""
    masks = {}
    for layer in range(2):
        masks[f"transformer.h.{layer}.attn.bias"] = torch.ones(1, 1, 80, 80).tril()
        masks[f"transformer.h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    named = {f"transformer.{name}": tensor for name, tensor in state.items()}
    return named | masks | {"lm_head.weight": state["wte.weight"].clone()}


def gpt2_masks(state: State) -> State:
    return state | {"h.0.attn.bias": torch.ones(1, 1, 80, 80).tril().to(torch.uint8)}


def gpt2_without_words(state: State) -> State:
    return {name: tensor for name, tensor in state.items() if name != "wte.weight"}


COMPUTED = ("position_ids", "token_type_ids", "relative_position_index", "num_batches_tracked")
CLAP_BUFFERS = {
    "text_model.embeddings.position_ids": torch.arange(66)[None],
    "text_model.embeddings.token_type_ids": torch.zeros(1, 66, dtype=torch.int64),
    "audio_model.audio_encoder.layers.0.blocks.0.attention.self.relative_position_index": torch.zeros(
        64, 64, dtype=torch.int64
    ),
    "audio_model.audio_encoder.batch_norm.num_batches_tracked": torch.tensor(7),
}


def clap_with_buffers(state: State) -> State:
    return state | CLAP_BUFFERS


def clap_without_buffers(state: State) -> State:
    return {name: tensor for name, tensor in state.items() if not name.endswith(COMPUTED)}


SPELLINGS: list[tuple[str, Callable[[State], State]]] = [
    ("vae", old_vae),
    ("text_encoder_2", t5_with("shared.weight")),
    ("text_encoder_2", t5_with("encoder.embed_tokens.weight")),
    ("text_encoder_2", t5_with("shared.weight", "encoder.embed_tokens.weight")),
    ("text_encoder_2", t5_whole),
    ("language_model", gpt2_head),
    ("language_model", gpt2_masks),
    ("language_model", gpt2_without_words),
    ("text_encoder", clap_with_buffers),
    ("text_encoder", clap_without_buffers),
]


@pytest.mark.parametrize(("part", "respell"), SPELLINGS)
@pytest.mark.parametrize("write", [write_safetensors, write_bin])
def test_spellings_load_to_the_same_tensors(checkpoint, stages, part, respell, write):
    before = set(load_file(weights(checkpoint, part)))

    def respelled(folder: Path, name: str, state: State) -> None:
        new = respell(state)
        assert set(new) != before or respell in (SPELLINGS[1][1], clap_with_buffers, clap_without_buffers)
        write(folder, name, new)

    rewrite(checkpoint, part, respelled)
    same_state(load(checkpoint, part), stages[part])


def weight_normed(checkpoint: Path, old_names: bool) -> State:
    """The vocoder's weights under weight norm with gains of its own, and plain ones into the checkpoint."""
    model = transformers.SpeechT5HifiGan.from_pretrained(checkpoint / "vocoder")
    model.apply_weight_norm()
    randomize(model, seed=5)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert any(name.endswith("weight.original0") for name in state)
    for module in model.modules():
        if parametrize.is_parametrized(module):
            parametrize.remove_parametrizations(module, "weight")
    write_safetensors(checkpoint / "vocoder", "vocoder", dict(model.state_dict()))
    if old_names:
        renamed = {
            "parametrizations.weight.original0": "weight_g",
            "parametrizations.weight.original1": "weight_v",
        }
        state = {re.sub("|".join(renamed), lambda m: renamed[m.group()], n): t for n, t in state.items()}
    return state


@pytest.mark.parametrize("old_names", [False, True])
def test_weight_norm_of_either_naming_is_folded(checkpoint, old_names):
    normed = weight_normed(checkpoint, old_names)
    plain = load(checkpoint, "vocoder")
    write_safetensors(checkpoint / "vocoder", "vocoder", normed)
    folded = load(checkpoint, "vocoder")
    for name, tensor in plain.state_dict().items():
        assert_close(folded.state_dict()[name], tensor, 1e-6)


def waveform(folder: Path, **options) -> Tensor:
    pipe = AudioLDM2Pipeline.from_pretrained(folder, **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe(
        "A hammer hitting a wooden surface",
        negative_prompt="Low quality",
        num_inference_steps=2,
        audio_length_in_s=0.64,
        generator=torch.Generator().manual_seed(0),
        output_type="pt",
    ).audios


def test_an_old_checkpoint_sounds_the_same(checkpoint):
    """Everything that can be spelled otherwise is, at once."""
    expected = waveform(checkpoint)
    for part, respell in (
        ("vae", old_vae),
        ("text_encoder_2", t5_with("encoder.embed_tokens.weight")),
        ("language_model", gpt2_head),
        ("text_encoder", clap_with_buffers),
    ):
        rewrite(checkpoint, part, lambda folder, name, state, r=respell: write_bin(folder, name, r(state)))
    edit_json(checkpoint / "language_model" / "config.json", architectures=["GPT2LMHeadModel"])
    rewrite(checkpoint, "unet", write_sharded_bin)
    rewrite(checkpoint, "projection_model", write_legacy_bin)
    # Not to the last bit: where tensors lie in memory decides which kernels a CPU uses.
    assert_close(waveform(checkpoint), expected, 1e-5)
    assert expected.abs().max() > 0.01


# --- dtype


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_stages_load_in_the_dtype_asked_for(random_checkpoint, stages, dtype):
    for part in PARTS:
        loaded = load(random_checkpoint, part, dtype=dtype)
        kept = set()
        for name, parameter in loaded.named_parameters():
            exact = stages[part].get_parameter(name)
            assert torch.equal(parameter, exact.to(parameter.dtype)), name
            if parameter.dtype != dtype:
                assert parameter.dtype == torch.float32
                kept.add(name)
        if part == "text_encoder_2" and dtype == torch.float16:
            assert kept == {f"blocks.{layer}.feed_forward.down.weight" for layer in range(2)}
        else:
            assert not kept
        floats = [buffer for buffer in loaded.buffers() if buffer.is_floating_point()]
        assert {buffer.dtype for buffer in floats} <= {dtype}


def test_no_dtype_keeps_that_of_the_file(checkpoint):
    for part, dtype in (("unet", torch.bfloat16), ("vae", torch.float16), ("vocoder", torch.float64)):
        rewrite(
            checkpoint,
            part,
            lambda folder, name, state, d=dtype: write_safetensors(
                folder, name, {n: t.to(d) for n, t in state.items()}
            ),
        )
        assert {p.dtype for p in load(checkpoint, part).parameters()} == {dtype}
        assert {p.dtype for p in load(checkpoint, part, dtype=torch.float32).parameters()} == {torch.float32}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_pipeline_turned_is_as_one_loaded_in_the_dtype(random_checkpoint, dtype):
    loaded = AudioLDM2Pipeline.from_pretrained(random_checkpoint, torch_dtype=dtype)
    turned = AudioLDM2Pipeline.from_pretrained(random_checkpoint).to(dtype)
    moved = AudioLDM2Pipeline.from_pretrained(random_checkpoint).to("cpu", dtype)
    assert loaded.dtype == turned.dtype == moved.dtype == dtype
    for part, stage in loaded.stages.items():
        same_state(turned.stages[part], stage)
        same_state(moved.stages[part], stage)


@pytest.mark.parametrize("dtype", ["float16", torch.int8, torch.float8_e4m3fn])
def test_a_dtype_that_no_stage_runs_in_is_refused(random_checkpoint, dtype):
    with pytest.raises(ValueError, match=r"torch_dtype = .* is not supported; use one of torch\.float32, "):
        AudioLDM2Pipeline.from_pretrained(random_checkpoint, torch_dtype=dtype)


@pytest.mark.parametrize("device", ["gpu", "cuda:99"])
def test_a_device_that_is_not_there_is_refused(random_checkpoint, device):
    with pytest.raises(ValueError, match=f"device '?{device}") as caught:
        AudioLDM2Pipeline.from_pretrained(random_checkpoint, device=device)
    assert "\n" not in str(caught.value)


# --- saving


@pytest.mark.parametrize("part", PARTS)
def test_a_saved_stage_loads_here_and_in_the_reference(random_checkpoint, stages, tmp_path, part):
    stage_class = PARTS[part][0].stage
    stage = stage_class.from_pretrained(random_checkpoint, subfolder=part)
    same_state(stage, stages[part])
    assert not stage.training
    stage.save_pretrained(tmp_path / "saved" / part)
    again = stage_class.from_pretrained(tmp_path / "saved" / part)
    same_state(again, stage)
    assert again.config == stage.config

    original = REFERENCES[part].from_pretrained(random_checkpoint / part)
    model, report = REFERENCES[part].from_pretrained(tmp_path / "saved" / part, output_loading_info=True)
    made_up = {"wte.weight"} if part == "language_model" else set()  # the words, which nothing reads
    computed = {name for name in report["missing_keys"] if name.endswith(COMPUTED) and part == "text_encoder"}
    assert set(report["missing_keys"]) - computed == made_up
    assert not report["unexpected_keys"]
    expected, found = original.state_dict(), model.state_dict()
    assert expected.keys() == found.keys()
    for name in expected.keys() - made_up:
        assert torch.equal(found[name], expected[name]), name


def test_a_saved_vits_encoder_loads_here_and_in_the_reference(tmp_path):
    config = {key: value for key, value in SMALL_SPEECH["text_encoder_2"].items() if key != "model_type"}
    original = randomize(transformers.VitsModel(transformers.VitsConfig(**config)), seed=3)
    original.save_pretrained(tmp_path / "theirs")
    stage = VitsTextEncoder.from_pretrained(tmp_path / "theirs")
    stage.save_pretrained(tmp_path / "ours")
    same_state(VitsTextEncoder.from_pretrained(tmp_path / "ours"), stage)
    saved = load_file(tmp_path / "ours" / "model.safetensors")
    expected = {
        name: tensor
        for name, tensor in original.state_dict().items()
        if name.startswith("text_encoder.") and ".project." not in name
    }
    assert saved.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(saved[name], tensor), name


@pytest.mark.parametrize("fixture", ["random_checkpoint", "random_large_checkpoint"])
def test_a_saved_pipeline_is_the_same_pipeline(request, tmp_path, fixture):
    folder = request.getfixturevalue(fixture)
    pipe = AudioLDM2Pipeline.from_pretrained(folder)
    pipe.save_pretrained(tmp_path / "saved")
    again = AudioLDM2Pipeline.from_pretrained(tmp_path / "saved")
    for part, stage in pipe.stages.items():
        same_state(again.stages[part], stage)
        assert again.stages[part].config == stage.config
    assert again.feature_extractor.config == pipe.feature_extractor.config
    assert type(again.scheduler) is type(pipe.scheduler)
    assert again.scheduler.config_dict() == pipe.scheduler.config_dict()
    for text in ("A hammer hits wood", "techno, 120 bpm!"):
        assert again.tokenizer(text).input_ids == pipe.tokenizer(text).input_ids
        assert again.tokenizer_2(text).input_ids == pipe.tokenizer_2(text).input_ids
    index = json.loads((folder / "model_index.json").read_text())
    saved = json.loads((tmp_path / "saved" / "model_index.json").read_text())
    assert {key: value for key, value in saved.items() if key[0] != "_"} == {
        key: value for key, value in index.items() if key[0] != "_"
    }
    assert_close(waveform(tmp_path / "saved"), waveform(folder), 1e-5)


@pytest.mark.parametrize(
    ("part", "kind"),
    [
        ("unet", nn.Linear(2, 2)),
        ("vocoder", torch.nn.Identity()),
        ("vae", None),
        ("scheduler", object()),
        ("feature_extractor", object()),
        ("tokenizer_2", object()),
    ],
)
def test_a_part_that_cannot_be_saved_is_refused_before_anything_is_written(
    random_checkpoint, tmp_path, part, kind
):
    pipe = AudioLDM2Pipeline.from_pretrained(random_checkpoint)
    setattr(pipe, part, kind)
    with pytest.raises(TypeError, match=f"{part} is a {type(kind).__name__}, which "):
        pipe.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_a_stage_in_the_place_of_another_cannot_be_saved(random_checkpoint, tmp_path):
    pipe = AudioLDM2Pipeline.from_pretrained(random_checkpoint)
    pipe.vae = pipe.vocoder
    with pytest.raises(TypeError, match="vae is a HifiGan, which this package cannot save as a vae"):
        pipe.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_halves_are_saved_as_they_are(random_checkpoint, tmp_path, dtype):
    pipe = AudioLDM2Pipeline.from_pretrained(random_checkpoint, torch_dtype=dtype)
    pipe.save_pretrained(tmp_path)
    again = AudioLDM2Pipeline.from_pretrained(tmp_path)
    for part, stage in pipe.stages.items():
        same_state(again.stages[part], stage)


def test_saving_over_the_folder_that_was_loaded_changes_nothing(checkpoint, stages):
    """The tensors lie in a mapping of the very files that are replaced."""
    pipe = AudioLDM2Pipeline.from_pretrained(checkpoint)
    before = waveform(checkpoint)
    pipe.save_pretrained(checkpoint)
    for part, stage in pipe.stages.items():
        same_state(stage, stages[part])
        same_state(load(checkpoint, part), stages[part])
    assert_close(waveform(checkpoint), before, 1e-5)
    with torch.no_grad():
        pipe.unet.conv_in.bias.add_(1.0)
    pipe.unet.save_pretrained(checkpoint / "unet")
    assert torch.equal(load(checkpoint, "unet").conv_in.bias, stages["unet"].conv_in.bias + 1.0)
    assert not list(checkpoint.rglob(".*"))


def test_changing_a_loaded_stage_leaves_the_file_alone(checkpoint):
    content = weights(checkpoint, "unet").read_bytes()
    unet = load(checkpoint, "unet")
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.zero_()
    assert weights(checkpoint, "unet").read_bytes() == content


def test_a_failed_save_leaves_the_old_file_whole(checkpoint, stages, monkeypatch):
    import safetensors.torch

    def fail(tensors: State, path: Path, metadata: dict) -> None:
        Path(path).write_bytes(b"half a file")
        raise OSError(28, "No space left on device")

    stage = load(checkpoint, "vae")
    monkeypatch.setattr(safetensors.torch, "save_file", fail)
    with pytest.raises(OSError, match="No space left"):
        stage.save_pretrained(checkpoint / "vae")
    monkeypatch.undo()
    same_state(load(checkpoint, "vae"), stages["vae"])
    assert sorted(path.name for path in (checkpoint / "vae").iterdir()) == [
        "config.json",
        "diffusion_pytorch_model.safetensors",
    ]


def test_an_interrupted_write_leaves_nothing_behind(tmp_path):
    def write() -> None:
        with replacing(tmp_path / "file") as temporary:
            temporary.write_text("new")
            raise KeyboardInterrupt

    (tmp_path / "file").write_text("old")
    with pytest.raises(KeyboardInterrupt):
        write()
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "old"


# --- bad input


def refusal(call: Callable[[], object]) -> str:
    """The message of the CheckpointError, which is one line unless it lists what does not fit."""
    with pytest.raises(CheckpointError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message or "do not fit:\n" in message, message
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
    assert f"{path} cannot be read as JSON: " in pipeline_refusal(checkpoint)


@pytest.mark.parametrize("entry", [None, [None, None], "AutoencoderKL", ["diffusers"], [["x"], ["y"]], 3])
def test_a_part_that_model_index_does_not_name(checkpoint, entry):
    edit_json(checkpoint / "model_index.json", vae=entry)
    message = pipeline_refusal(checkpoint)
    assert message.startswith(f"{checkpoint / 'model_index.json'}: vae is ")


def test_parts_of_other_classes_are_all_named(checkpoint):
    edit_json(
        checkpoint / "model_index.json",
        unet=["diffusers", "UNet2DConditionModel"],
        scheduler=["diffusers", "EulerDiscreteScheduler"],
        tokenizer=["transformers", "CLIPTokenizer"],
    )
    message = pipeline_refusal(checkpoint)
    assert "unet is a UNet2DConditionModel, not a AudioLDM2UNet2DConditionModel" in message
    assert (
        "scheduler is a EulerDiscreteScheduler, not a DDIMScheduler or DPMSolverMultistepScheduler" in message
    )
    assert "tokenizer is a CLIPTokenizer, not a RobertaTokenizer" in message


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
    expected = (
        f"{checkpoint / 'unet' / 'config.json'} is for a AutoencoderKL; a AudioLDM2UNet2DConditionModel"
    )
    assert pipeline_refusal(checkpoint).startswith(expected)


@pytest.mark.parametrize("value", ["T5EncoderModel", "x", 3, {"a": 1}, ["CLIPTextModel"], [[]]])
def test_a_config_whose_class_is_garbage(checkpoint, value):
    path = checkpoint / "text_encoder_2" / "config.json"
    edit_json(path, architectures=value)
    if value == "T5EncoderModel":
        load(checkpoint, "text_encoder_2")
    else:
        assert f"{path} is for a " in refusal(lambda: load(checkpoint, "text_encoder_2"))


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
@pytest.mark.parametrize("value", ["many", 0, [], [0, 0, 0], 1])
def test_no_config_value_breaks_out(checkpoint, part, value):
    """Each key in turn holds garbage: it loads regardless or the error names the config or the misfits."""
    path = checkpoint / part / "config.json"
    whole = json.loads(path.read_text())

    def spoiled(config: dict) -> list[dict]:
        changed = [{**config, key: value} for key in config]
        nested = [key for key in config if isinstance(config[key], dict)]
        return changed + [{**config, key: inner} for key in nested for inner in spoiled(config[key])]

    messages = []
    for config in spoiled(whole):
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
    edit_json(path, n_head=0)
    message = refusal(lambda: load(checkpoint, "language_model"))
    assert message.startswith(f"{path}: a GPT2Model cannot have these sizes (ZeroDivisionError: ")


# Weight files


class RunsCode:
    def __init__(self, command: str):
        self.command = command

    def __reduce__(self) -> tuple:
        return os.system, (self.command,)


def in_form(form: str, state: State, path: Path) -> tuple[bytes, str]:
    """A whole file in one of the formats, and the name it goes by."""
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
    path.write_bytes(pickle.dumps(evil["conv_in.bias"]))
    assert "was not read" in refusal(lambda: load(checkpoint, "unet"))
    assert not marker.exists()


@pytest.mark.parametrize(
    "content",
    [[torch.zeros(2)], {"a": 3}, {1: torch.zeros(2)}, torch.zeros(2), {"state_dict": {"a": torch.zeros(2)}}],
)
def test_a_bin_that_holds_no_state_dict(checkpoint, content):
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
    def spoil(folder: Path, part: str, state: State) -> None:
        del state["conv_in.weight"], state["mid_block.resnets.0.norm1.bias"]
        state["extra.weight"] = torch.zeros(3)
        state["conv_out.bias"] = torch.zeros(5)
        write(folder, part, state)

    rewrite(checkpoint, "unet", spoil)
    head, *lines = pipeline_refusal(checkpoint).splitlines()
    assert head == f"{checkpoint / 'unet'}: 4 of the checkpoint's tensors do not fit:"
    assert len(lines) == 4
    text = "\n".join(lines)
    for name in ("conv_in.weight", "mid_block.resnets.0.norm1.bias", "extra.weight", "conv_out.bias"):
        assert name in text


@pytest.mark.parametrize("write", [write_safetensors, write_bin])
def test_tensors_that_are_no_floats_are_listed(checkpoint, write):
    def spoil(folder: Path, part: str, state: State) -> None:
        attention = "encoder.mid_block.attentions.0.to_k.weight"
        state[attention] = state[attention].to(torch.int64)
        state["decoder.conv_in.bias"] = state["decoder.conv_in.bias"].to(torch.float8_e4m3fn)
        write(folder, part, state)

    rewrite(checkpoint, "vae", spoil)
    head, *lines = refusal(lambda: load(checkpoint, "vae", dtype=torch.float32)).splitlines()
    assert head == f"{checkpoint / 'vae'}: 2 of the checkpoint's tensors do not fit:"
    assert [line.split(" holds ")[0].strip() for line in lines] == [
        "wrong type: decoder.conv_in.bias",
        "wrong type: encoder.mid_block.attentions.0.to_k.weight",
    ]


def test_numbers_that_are_none_are_let_through(checkpoint):
    """Whether weights are any good is not for loading to judge."""

    def spoil(folder: Path, part: str, state: State) -> None:
        state["conv_out.bias"].fill_(float("nan"))
        write_safetensors(folder, part, state)

    rewrite(checkpoint, "unet", spoil)
    assert load(checkpoint, "unet").conv_out.bias.isnan().all()


# Shards


def shard(checkpoint: Path, part: str = "vae", safe: bool = True) -> Path:
    """Weights in two shards; the path of the index."""
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


def test_a_shard_that_is_missing_truncated_or_double(checkpoint):
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


# Tokenizers, front end, scheduler


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
        ("feature_extractor", "truncation", "fusion"),
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


# --- memory

MEASURE = """
import sys
from pathlib import Path
import torch
from audioldm2.checkpoints.folder import load_stage
from audioldm2.checkpoints.formats import PARTS

def kilobytes(field):
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1])

folder, small, dtype = Path(sys.argv[1]), Path(sys.argv[2]), getattr(torch, sys.argv[3])
load_stage(small, PARTS["unet"][0], dtype)  # what the first loading imports and allocates is no weights
Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
before = kilobytes("VmRSS")
stage = load_stage(folder, PARTS["unet"][0], dtype)
loading = kilobytes("VmHWM") - before
touched = sum(parameter.float().sum() if parameter.numel() < 2**20 else parameter.sum(dtype=torch.float32)
              for parameter in stage.parameters())
assert torch.isfinite(touched)
print(loading, kilobytes("VmHWM") - before, sum(p.nbytes for p in stage.parameters()) // 1024)
"""


@pytest.fixture(scope="module")
def big_unet(random_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A UNet of some 300 MB."""
    folder = tmp_path_factory.mktemp("big")
    config = json.loads((random_checkpoint / "unet" / "config.json").read_text())
    config.update(
        block_out_channels=[128, 256, 384], norm_num_groups=32, cross_attention_dim=[[None, 256, 512]] * 3
    )
    (folder / "config.json").write_text(json.dumps(config))
    form = PARTS["unet"][0]
    with torch.device("meta"):
        stage = form.stage(form.config.from_dict(config))
    stage.to_empty(device="cpu")
    with torch.no_grad():
        for number, parameter in enumerate(stage.parameters()):
            parameter.fill_(0.001 * (number % 7))
    stage.save_pretrained(folder)
    return folder


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's /proc to measure")
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_loading_peaks_at_the_size_of_the_stage(big_unet, random_checkpoint, dtype):
    result = subprocess.run(
        [sys.executable, "-c", MEASURE, str(big_unet), str(random_checkpoint / "unet"), dtype],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=ROOT,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    loading, peak, size = map(int, result.stdout.split())
    file = (big_unet / "diffusion_pytorch_model.safetensors").stat().st_size // 1024
    assert file > 150 * 1024, "too small to say anything"
    if dtype == "float32":
        assert abs(size - file) < 0.01 * file
        assert loading <= 1.1 * size
        assert size <= peak <= 1.1 * size
    else:
        # Beside what was made there is the window of the file that is being read.
        assert 0.99 * size <= loading <= 1.1 * (size + _WINDOW_BYTES // 1024)
        assert peak < file
