"""The keyword arguments of from_pretrained and save_pretrained: each works or is refused with what to do."""

from __future__ import annotations

import inspect
import re
import shutil

import diffusers
import pytest
import torch
import transformers

from audioldm2 import AudioLDM2Pipeline, HifiGan, UNet
from audioldm2.checkpoints.formats import part_classes
from audioldm2.checkpoints.options import (
    _LOADING_INSTEAD,
    _SAVING_INSTEAD,
    SaveOptions,
    load_options,
    save_options,
)
from tests.helpers import load_pipeline

PARTS = tuple(part_classes())


def refused(pattern: str, **options: object) -> None:
    with pytest.raises(ValueError, match=pattern) as caught:
        load_options("owner/name", part_names=PARTS, **options)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


# --- the checkpoint


def test_the_checkpoint_can_have_its_name_of_diffusers(random_checkpoint):
    unet = UNet.from_pretrained(pretrained_model_name_or_path=random_checkpoint, subfolder="unet")
    assert isinstance(unet, UNet)
    options = load_options(None, str(random_checkpoint))
    assert options.source.name == str(random_checkpoint)
    for of in (UNet, AudioLDM2Pipeline):
        with pytest.raises(TypeError, match="pass one of them"):
            of.from_pretrained("tiny", pretrained_model_name_or_path="tiny")
        with pytest.raises(ValueError, match="neither a local folder nor a repository"):
            of.from_pretrained()


# --- dtypes


@pytest.mark.parametrize(
    "options",
    [
        {"torch_dtype": "float16"},
        {"dtype": "torch.float16"},
        {"dtype": torch.float16},
        {"dtype": "half", "torch_dtype": torch.float16},
        {"dtype": "auto"},  # tiny is stored in float16
    ],
)
def test_a_dtype_is_given_under_either_name_and_as_text(options):
    assert UNet.from_pretrained("tiny", subfolder="unet", **options).dtype == torch.float16


def test_auto_is_the_stored_dtype_of_every_part():
    pipe = load_pipeline("tiny", torch_dtype="auto")
    assert {stage.dtype for stage in pipe.stages.values()} == {torch.float16}


def test_each_part_can_have_its_dtype_and_one_that_is_passed_keeps_its_own_as_in_diffusers(random_checkpoint):
    dtypes = {"unet": torch.float16, "vae": torch.bfloat16, "vocoder": torch.float16}
    vocoder = transformers.SpeechT5HifiGan.from_pretrained(random_checkpoint / "vocoder")
    theirs = diffusers.AudioLDM2Pipeline.from_pretrained(
        random_checkpoint, torch_dtype=dtypes, vocoder=vocoder
    )
    ours = load_pipeline(
        random_checkpoint,
        dtype={name: str(dtype) for name, dtype in dtypes.items()},
        vocoder=HifiGan.from_pretrained(random_checkpoint, "vocoder"),
    )
    found = {name: stage.dtype for name, stage in ours.stages.items()}
    assert found == {name: getattr(theirs, name).dtype for name in ours.stages}
    assert found["unet"] == torch.float16
    assert found["vae"] == torch.bfloat16
    assert found["vocoder"] == torch.float32
    options = load_options("x", dtype={"unet": "half", "default": "double"}, part_names=PARTS)
    assert options.dtype == {"unet": torch.float16, "default": torch.float64}


@pytest.mark.parametrize(
    ("pattern", "options"),
    [
        ("contradict each other", {"dtype": "float16", "torch_dtype": torch.float32}),
        ("^dtype = 'fp8' is not supported; use one of torch.float32, ", {"dtype": "fp8"}),
        ("^torch_dtype = torch.int8 is not supported", {"torch_dtype": torch.int8}),
        ("^dtype = 16 is not supported", {"dtype": 16}),
        ("^dtype = 'x.* is not supported", {"dtype": "x" * 10_000}),
        ("^dtype = 'torch.nn' is not supported", {"dtype": "torch.nn"}),
        (r"^dtype\['unet'\] = 'int8' is not supported", {"dtype": {"unet": "int8"}}),
        ("^dtype has a dtype for 'transformer', which is not one of ", {"dtype": {"transformer": "half"}}),
    ],
)
def test_a_wrong_dtype_is_refused(pattern, options):
    refused(pattern, **options)


def test_a_stage_takes_one_dtype():
    with pytest.raises(ValueError, match="dtype is a dict, which is for a whole pipeline"):
        UNet.from_pretrained("tiny", "unet", dtype={"unet": torch.float16})


# --- devices


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch):
    """Sets the number of CUDA devices that this machine seems to have."""

    def devices(count: int) -> None:
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
        monkeypatch.setattr(torch.xpu, "is_available", lambda: False)

    return devices


@pytest.mark.parametrize(
    ("options", "without", "with_two"),
    [
        ({}, "cpu", "cpu"),
        ({"device": "cpu"}, "cpu", "cpu"),
        ({"device": 0}, None, "cuda:0"),
        ({"device": 1}, None, "cuda:1"),
        ({"device": 2}, None, None),
        ({"device": -1}, None, None),
        ({"device": True}, None, None),
        ({"device": 1.0}, None, None),
        ({"device": ""}, None, None),
        ({"device": "cuda:256"}, None, None),  # PyTorch reads it as cuda:0
        ({"device_map": "cuda"}, None, "cuda"),
        ({"device_map": "cuda:1"}, None, "cuda:1"),
        ({"device_map": 1}, None, "cuda:1"),
        ({"device_map": "cpu"}, "cpu", "cpu"),
        ({"device_map": torch.device("cpu")}, "cpu", "cpu"),
        ({"device_map": "balanced"}, "cpu", "cuda"),
        ({"device_map": "auto"}, "cpu", "cuda"),
        ({"device_map": {"": "cpu"}}, "cpu", "cpu"),
        ({"device_map": {"unet": 0, "vae": 1}}, None, None),
        ({"device_map": "sequential"}, None, None),
        ({"device": "cpu", "device_map": "cpu"}, "cpu", "cpu"),
        ({"device": "cuda", "device_map": "cuda:0"}, None, "cuda"),
        ({"device": "cpu", "device_map": "cuda"}, None, None),
        ({"device": "cuda:1", "device_map": "balanced"}, None, None),
    ],
)
def test_where_the_stages_go(cuda, options, without, with_two):
    for count, expected in ((0, without), (2, with_two)):
        cuda(count)
        if expected is None:
            refused("device", **options)
        else:
            assert load_options("owner/name", **options).device == torch.device(expected)


def test_a_number_is_not_the_cpu(cuda, random_checkpoint):
    cuda(0)
    for of, where in ((UNet, {"subfolder": "unet"}), (AudioLDM2Pipeline, {})):
        with pytest.raises(ValueError, match="device cuda:0 is not available: PyTorch sees 0 CUDA devices"):
            of.from_pretrained(random_checkpoint, device=0, **where)


# --- parts


def test_parts_that_are_passed_replace_the_checkpoints_which_are_not_read(checkpoint):
    given = load_pipeline(checkpoint)
    names = ("unet", "scheduler", "tokenizer", "tokenizer_2", "feature_extractor", "vae")
    index = (checkpoint / "model_index.json").read_text()
    (checkpoint / "model_index.json").write_text(index.replace("AutoencoderKL", "Unknown"))
    for name in names:
        shutil.rmtree(checkpoint / name)
    parts = {name: getattr(given, name) for name in names}
    pipe = load_pipeline(checkpoint, **parts)
    assert all(getattr(pipe, name) is part for name, part in parts.items())
    assert pipe.vocoder is not given.vocoder


def test_no_part_can_be_left_out():
    refused("^unet is None, but the pipeline needs every part; leave unet out to load", others={"unet": None})


# --- other arguments


@pytest.mark.parametrize("name", _LOADING_INSTEAD)
def test_what_has_no_counterpart_is_refused_with_what_to_do(name):
    refused(rf"^from_pretrained\({name}=\.\.\.\) is not supported: .{{5,}}", others={name: "anything"})
    for value in (None, False):
        assert load_options("owner/name", others={name: value})


def test_every_argument_of_diffusers_is_known():
    """The other arguments of its methods are in their signatures, or taken from **kwargs by name."""
    for method in (diffusers.DiffusionPipeline.from_pretrained, diffusers.ModelMixin.from_pretrained):
        names = set(re.findall(r'kwargs\.pop\(\s*"(\w+)"', inspect.getsource(method)))
        assert len(names) > 15
        own = inspect.signature(AudioLDM2Pipeline.from_pretrained).parameters
        unknown = set()
        for name in names - own.keys() - {"subfolder"}:  # of a stage
            try:
                load_options("owner/name", others={name: None}, part_names=PARTS)
            except TypeError:
                unknown.add(name)
        assert not unknown


@pytest.mark.parametrize("of", [UNet, AudioLDM2Pipeline])
@pytest.mark.parametrize(
    ("name", "hint"), [("use_safetensor", "; did you mean use_safetensors?"), ("xyz", "$"), ("others", "$")]
)
def test_an_unknown_argument_is_named(of, name, hint):
    with pytest.raises(TypeError, match=re.escape(f"from_pretrained() has no argument '{name}'") + f"{hint}"):
        of.from_pretrained("tiny", **{name: 1})


def test_a_part_of_a_pipeline_is_not_an_argument_of_a_stage():
    with pytest.raises(TypeError, match="no argument 'scheduler'"):
        UNet.from_pretrained("tiny", "unet", scheduler=None)
    with pytest.raises(TypeError, match="no argument 'schedular'; did you mean scheduler"):
        AudioLDM2Pipeline.from_pretrained("tiny", schedular=None)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *((name, "yes") for name in ("use_safetensors", "local_files_only", "force_download")),
        ("low_cpu_mem_usage", 1),
        ("revision", 3),
        ("cache_dir", 3),
        ("token", 3),
        ("token", b"hf_secret"),
    ],
)
def test_an_argument_of_another_type_is_named(name, value):
    with pytest.raises(TypeError, match=f"^{name} must be ") as caught:
        load_options("owner/name", **{name: value})
    assert "secret" not in str(caught.value)


def test_accepted_values():
    for value in (True, False, None):
        assert load_options("x", low_cpu_mem_usage=value).source == load_options("x").source
        assert load_options("x", use_safetensors=value).source.use_safetensors is value
    assert load_options("x", local_files_only=None, force_download=None).source.local_files_only is False
    refused("contradict each other", local_files_only=True, force_download=True)
    refused("^variant must be a part of file names", variant="../fp16")
    refused("^variant must be a part of file names", variant=16)


# --- saving


@pytest.mark.parametrize(
    ("size", "number"),
    [
        (None, 10**10),
        (1, 1),
        (torch.tensor(7), 7),
        ("5GB", 5 * 10**9),
        ("5 gb", 5 * 10**9),
        ("200MB", 2 * 10**8),
        ("0.5KB", 500),
        ("1TB", 10**12),
        ("2GiB", 2**31),
        *((wrong, None) for wrong in (0, -1, True, 1.5, "5", "GB", "-5GB", "5GB5", "0MB", "5PB", "x" * 9999)),
        *((wrong, None) for wrong in (float("nan"), [], b"5GB")),
    ],
)
def test_the_size_of_a_shard(size, number):
    if number is not None:
        assert save_options("folder", max_shard_size=size)[1].max_shard_size == number
        return
    with pytest.raises(ValueError, match="max_shard_size must be a positive number of bytes or") as caught:
        save_options("folder", max_shard_size=size)
    assert len(str(caught.value)) < 200


def test_what_saving_cannot_do_is_refused_before_anything_is_written(pipe, tmp_path):
    for name in _SAVING_INSTEAD:
        for saved in (pipe, pipe.vocoder):
            with pytest.raises(ValueError, match=rf"^save_pretrained\({name}=\.\.\.\) is not supported: "):
                saved.save_pretrained(tmp_path / "saved", **{name: True})
    assert not (tmp_path / "saved").exists()


def test_how_saving_is_called(tmp_path, monkeypatch):
    assert save_options(None, tmp_path) == save_options(tmp_path) == (tmp_path, SaveOptions())
    assert save_options(tmp_path, push_to_hub=False, is_main_process=True)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert save_options("~/a")[0] == tmp_path / "a"
    for wrong in (None, "", 3):
        with pytest.raises(TypeError, match=r"save_pretrained\(\) needs one folder"):
            save_options(wrong)
    with pytest.raises(TypeError, match=r"needs one folder"):
        save_options("a", "b")
    with pytest.raises(ValueError, match="cannot find the folder '~nobody-of-that-name/x'"):
        save_options("~nobody-of-that-name/x")
    with pytest.raises(ValueError, match="call save_pretrained in the main process only"):
        save_options("a", is_main_process=False)
    for variant in ("a/b", "x" * 300):
        with pytest.raises(ValueError, match=r"variant must be a part of file names, .* of at most 100"):
            save_options("a", variant=variant)
    with pytest.raises(TypeError, match="safe_serialization must be True or False, got 'no'"):
        save_options("a", safe_serialization="no")
    with pytest.raises(TypeError, match="no argument 'varaint'; did you mean variant"):
        save_options("a", varaint="fp16")
