"""Saving inverts loading: what is saved loads here and in the reference, files are replaced as a whole."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from audioldm2 import AudioLDM2Pipeline
from audioldm2.atomic import replacing
from audioldm2.checkpoints.formats import PARTS
from audioldm2.models.vits import VitsTextEncoder
from tests.checkpoints.files import COMPUTED, REFERENCES, State, load, same_state, waveform, weights
from tests.reference import SMALL_SPEECH, assert_close, randomize


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
    initialized = (
        {"wte.weight"} if part == "language_model" else set()
    )  # the word embeddings, which are not used
    computed = {name for name in report["missing_keys"] if name.endswith(COMPUTED) and part == "text_encoder"}
    assert set(report["missing_keys"]) - computed == initialized
    assert not report["unexpected_keys"]
    expected, found = original.state_dict(), model.state_dict()
    assert expected.keys() == found.keys()
    for name in expected.keys() - initialized:
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


@pytest.mark.parametrize(
    "fixture", ["random_checkpoint", pytest.param("random_large_checkpoint", marks=pytest.mark.slow)]
)
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


def parametrize(pipe):
    weight_norm(pipe.vae.decoder.conv_out)


def adapt(pipe):
    block = pipe.unet.down[1].transformers[0].blocks[0].self_attention
    block.qkv = nn.Sequential(block.qkv, nn.Linear(48, 48))


def quantize(pipe):
    pipe.vae.decoder.conv_out.weight = nn.Parameter(
        pipe.vae.decoder.conv_out.weight.to(torch.int8), requires_grad=False
    )


@pytest.mark.parametrize("change", [parametrize, adapt, quantize])
def test_weights_that_are_not_those_of_the_class_are_refused_before_anything_is_written(
    random_checkpoint, tmp_path, change
):
    pipe = AudioLDM2Pipeline.from_pretrained(random_checkpoint)
    change(pipe)
    stage = pipe.unet if change is adapt else pipe.vae
    for saved in (pipe, stage):
        with pytest.raises(TypeError, match="cannot be saved: its weights are not those of its class, '"):
            saved.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_parameters_that_share_memory_are_saved_each(random_checkpoint, tmp_path):
    pipe = AudioLDM2Pipeline.from_pretrained(random_checkpoint)
    resnet = pipe.unet.middle.resnets[0]
    resnet.conv_2.weight = resnet.conv_1.weight
    resnet.norm_2.weight.data = resnet.norm_1.bias.data
    pipe.save_pretrained(tmp_path)
    loaded = AudioLDM2Pipeline.from_pretrained(tmp_path).unet
    same_state(loaded, pipe.unet)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_weights_are_saved_in_half_precision(random_checkpoint, tmp_path, dtype):
    pipe = AudioLDM2Pipeline.from_pretrained(random_checkpoint, torch_dtype=dtype)
    pipe.save_pretrained(tmp_path)
    again = AudioLDM2Pipeline.from_pretrained(tmp_path)
    for part, stage in pipe.stages.items():
        same_state(again.stages[part], stage)


def test_saving_over_the_folder_that_was_loaded_changes_nothing(checkpoint, stages):
    """The tensors are memory-mapped from the very files that are replaced."""
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
