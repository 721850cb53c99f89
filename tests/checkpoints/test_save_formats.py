"""What save_pretrained writes: variants, shards and .bin, other libraries' parts, and over earlier saves."""

from __future__ import annotations

import inspect
import re
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from audioldm2 import AudioLDM2Pipeline
from audioldm2.checkpoints.formats import PARTS
from audioldm2.checkpoints.options import SaveOptions
from audioldm2.checkpoints.writing import split
from tests.checkpoints.files import REFERENCES, load, same_state
from tests.helpers import load_pipeline
from tests.reference import reference_pipeline

LIMIT = 7_000  # bytes
FORMATS = [
    {"variant": "fp16"},
    {"max_shard_size": LIMIT},
    {"variant": "fp16", "max_shard_size": "7KB"},
    {"safe_serialization": False},
    {"safe_serialization": False, "variant": "fp16", "max_shard_size": LIMIT},
]


@pytest.fixture(scope="module")
def loaded(random_checkpoint: Path) -> AudioLDM2Pipeline:
    return load_pipeline(random_checkpoint)


def weight_files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if ".safetensors" in path.name or ".bin" in path.name}


@pytest.mark.parametrize("part", ["vae", "text_encoder_2"])
@pytest.mark.parametrize("options", FORMATS, ids=str)
def test_a_stage_is_saved_as_the_reference_saves_it(loaded, base, tmp_path, part, options):
    safe, variant = options.get("safe_serialization", True), options.get("variant")
    stage, reference = loaded.stages[part], getattr(base.theirs, part)
    stage.save_pretrained(tmp_path, **options)
    same_state(type(stage).from_pretrained(tmp_path, variant=variant, use_safetensors=safe), stage)
    for wrong in ({"variant": "ema"}, {"variant": variant, "use_safetensors": not safe}):
        with pytest.raises(ValueError, match=r"has (no )?weights"):
            type(stage).from_pretrained(tmp_path, **wrong)

    model = REFERENCES[part].from_pretrained(tmp_path, variant=variant, use_safetensors=safe)
    expected, found = reference.state_dict(), model.state_dict()
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())

    ours = weight_files(tmp_path)
    assert len(ours) >= 3 if "max_shard_size" in options else len(ours) == 1
    if options.keys() <= inspect.signature(reference.save_pretrained).parameters.keys():
        reference.save_pretrained(tmp_path / "theirs", **options)
        assert numberless(ours) == numberless(weight_files(tmp_path / "theirs"))
    else:
        assert not safe, "transformers 5 writes no .bin, and nothing else is lacking"


def numberless(names: set[str]) -> set[str]:
    """Names without the numbers of shards: the order of the tensors, and so the split, is each one's own."""
    return {re.sub(r"-\d{5}-of-\d{5}\.", "-shard.", name) for name in names}


def test_a_pipeline_is_saved_in_each_format(loaded, tmp_path):
    loaded.save_pretrained(tmp_path, False, "fp16", 10 * LIMIT)
    again = load_pipeline(tmp_path, variant="fp16", use_safetensors=False)
    for name, stage in loaded.stages.items():
        same_state(again.stages[name], stage)
        assert all(".fp16" in file and ".bin" in file for file in weight_files(tmp_path / name))


def test_shards_hold_each_tensor_once_within_the_limit():
    weights = {name: torch.zeros(size) for name, size in zip("abcdef", (3, 3, 9, 1, 1, 1), strict=True)}
    assert [list(shard) for shard in split(weights, 24)] == [["a", "b"], ["c"], ["d", "e", "f"]]
    assert [list(shard) for shard in split(weights, 1)] == [[name] for name in "abcdef"]
    assert len(split(weights, 10**9)) == len(split({}, 1)) == 1


# --- files of an earlier save


def changed(stage: nn.Module) -> None:
    with torch.no_grad():
        for parameter in stage.parameters():
            parameter.add_(0.25)


def test_no_file_of_an_earlier_save_is_read_in_place_of_a_new_one(pipe, tmp_path):
    vocoder, variant = pipe.vocoder, {"variant": "fp16"}
    vocoder.save_pretrained(tmp_path, **variant, max_shard_size=10 * LIMIT)
    of_variant = weight_files(tmp_path)
    (tmp_path / "diffusion_pytorch_model.safetensors").write_bytes(b"of another part")
    (tmp_path / "model-00001-of-00002.md").write_text("not a weight file")
    sequence = [
        {},
        {"max_shard_size": 10 * LIMIT},
        {"max_shard_size": 20 * LIMIT},
        {"safe_serialization": False},
        {},
        {"safe_serialization": False, "max_shard_size": 10 * LIMIT},
        {"max_shard_size": 10 * LIMIT},
        {},
    ]
    for options in sequence:
        changed(vocoder)
        vocoder.save_pretrained(tmp_path, **options)
        for use_safetensors in (None, options.get("safe_serialization", True)):
            same_state(type(vocoder).from_pretrained(tmp_path, use_safetensors=use_safetensors), vocoder)
    assert weight_files(tmp_path) == {*of_variant, "model.safetensors"}
    assert (tmp_path / "model-00001-of-00002.md").exists()
    changed(vocoder)
    vocoder.save_pretrained(tmp_path, **variant)
    assert weight_files(tmp_path) == {"model.fp16.safetensors", "model.safetensors"}
    same_state(type(vocoder).from_pretrained(tmp_path, **variant), vocoder)


def test_the_files_of_another_tokenizer_are_removed(pipe, tmp_path):
    (tmp_path / "tokenizer_2").mkdir()
    for name in ("vocab.json", "added_tokens.json", "spiece.model", "notes.txt"):
        (tmp_path / "tokenizer_2" / name).write_text("of another tokenizer")
    pipe.save_pretrained(tmp_path)
    assert {path.name for path in (tmp_path / "tokenizer_2").iterdir()} == {
        "tokenizer.json",
        "tokenizer_config.json",
        "notes.txt",
    }


@pytest.mark.parametrize("safe", [True, False])
def test_a_failed_save_of_shards_leaves_the_old_ones(checkpoint, stages, monkeypatch, safe):
    import safetensors.torch

    stage = load(checkpoint, "vae")
    options = {"max_shard_size": 60_000, "safe_serialization": safe}
    stage.save_pretrained(checkpoint / "vae", **options)
    before = {path.name: path.read_bytes() for path in (checkpoint / "vae").iterdir()}
    assert len(before) > 3
    module, name = (safetensors.torch, "save_file") if safe else (torch, "save")
    write, calls = getattr(module, name), []

    def fail(*arguments, **keywords):
        calls.append(arguments)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        write(*arguments, **keywords)

    changed(stage)
    monkeypatch.setattr(module, name, fail)
    with pytest.raises(OSError, match="No space left"):
        stage.save_pretrained(checkpoint / "vae", **options)
    assert {path.name: path.read_bytes() for path in (checkpoint / "vae").iterdir()} == before
    same_state(load(checkpoint, "vae"), stages["vae"])


def test_a_bin_holds_only_its_own_tensors(loaded, tmp_path):
    """And not the memory behind a view, such as the matrix of q, k and v of which it has q."""
    loaded.unet.save_pretrained(tmp_path, safe_serialization=False)
    (file,) = tmp_path.glob("*.bin")
    size = sum(p.nbytes for p in loaded.unet.parameters())
    tensors = torch.load(file, weights_only=True)
    assert sum(tensor.untyped_storage().nbytes() for tensor in tensors.values()) == size


# --- parts that are not this package's, or in wrappers


def test_stages_in_wrappers_are_saved_without_them(pipe, base, tmp_path):
    expected = dict(pipe.stages)
    pipe.unet = torch.compile(nn.DataParallel(pipe.unet))
    pipe.vae = nn.DataParallel(torch.compile(pipe.vae))
    pipe.text_encoder_2 = torch.compile(pipe.text_encoder_2)
    pipe.vocoder = nn.DataParallel(base.theirs.vocoder)
    pipe.save_pretrained(tmp_path)
    for name, stage in expected.items():
        same_state(load(tmp_path, name), stage)


def test_models_of_diffusers_and_transformers_are_saved_by_themselves(pipe, base, tmp_path):
    options = {"variant": "fp16", "max_shard_size": "100KB"}
    expected = dict(pipe.stages)
    names = [*PARTS, "tokenizer", "tokenizer_2", "feature_extractor", "scheduler"]
    (tmp_path / "unet").mkdir()
    for stale in ("diffusion_pytorch_model.fp16.bin", "diffusion_pytorch_model.bin"):
        (tmp_path / "unet" / stale).write_bytes(b"of an earlier save")
    for name in names:
        setattr(pipe, name, getattr(base.theirs, name))
    pipe.save_pretrained(tmp_path, **options)
    again = load_pipeline(tmp_path, variant="fp16")
    for name, stage in expected.items():
        same_state(again.stages[name], stage)
    assert type(again.scheduler).__module__.startswith("audioldm2.")
    assert not [path for path in tmp_path.rglob("*") if path.name.startswith(".")]
    assert {path.name for path in (tmp_path / "unet").glob("*.bin")} == {"diffusion_pytorch_model.bin"}
    reference_pipeline(tmp_path, variant="fp16")


def test_a_model_that_saves_something_else_is_refused_before_anything_is_written(pipe, base, tmp_path):
    """With an adapter, transformers' models save the adapter alone."""

    class Adapted:
        def save_pretrained(self, folder: Path, variant: str | None = None) -> None:
            base.theirs.text_encoder_2.save_pretrained(
                folder, state_dict={"lora.weight": torch.zeros(2)}, variant=variant
            )

    Adapted.__name__, Adapted.__module__ = "T5EncoderModel", "transformers.models"
    pipe.text_encoder_2 = Adapted()
    with pytest.raises(TypeError, match=r"^text_encoder_2 is a T5EncoderModel that cannot be loaded again"):
        pipe.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_a_model_of_a_class_that_no_checkpoint_holds_is_refused(pipe, base, tmp_path):
    class Mine(type(base.theirs.vocoder)):
        pass

    for name, part in (
        ("vae", base.theirs.vocoder),
        ("vocoder", Mine(base.theirs.vocoder.config)),
        ("tokenizer", base.theirs.tokenizer_2),
        ("text_encoder_2", nn.Sequential(pipe.text_encoder_2)),
    ):
        original = getattr(pipe, name)
        setattr(pipe, name, part)
        with pytest.raises(TypeError, match=f"^{name} is a {type(part).__name__}, which this package cannot"):
            pipe.save_pretrained(tmp_path / "saved")
        setattr(pipe, name, original)
    assert not (tmp_path / "saved").exists()


def test_saving_over_a_folder_keeps_its_other_files(pipe, tmp_path):
    shutil.copytree(pipe._name_or_path, tmp_path / "saved")
    (tmp_path / "saved" / "README.md").write_text("a model card")
    (tmp_path / "saved" / "unet" / "notes.txt").write_text("mine")
    pipe.unet = nn.Identity()
    with pytest.raises(TypeError):
        pipe.save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / "README.md").exists()
    assert (tmp_path / "saved" / "unet" / "notes.txt").exists()


def test_the_default_format():
    assert SaveOptions() == SaveOptions(True, None, 10**10)
