"""The Hub: which files are requested, what happens when it does not answer, and the real checkpoints."""

from __future__ import annotations

import re
import socket
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import torch

from audioldm2 import AudioLDM2Pipeline
from audioldm2.checkpoints import hub
from audioldm2.checkpoints.folder import load_stage
from audioldm2.checkpoints.formats import PARTS
from audioldm2.checkpoints.hub import needed_files
from tests.checkpoints.local_hub import (
    BINARY,
    NEEDED,
    SHARDED,
    WHOLE,
    LocalHub,
    Outcome,
    digest,
    publish,
)

TINY_HINT = '"tiny" is included in the package and needs no download'

GIVEN = ["unet", "vocoder", "tokenizer", "scheduler"]
# What is loaded while the Hub can be reached, and after it was stopped. Later steps find the downloads of
# earlier ones in the cache.
REACHED: dict[str, dict[str, Any]] = {
    "before any download": {"load": WHOLE, "options": {"local_files_only": True}},
    "first": {"load": WHOLE},
    "second": {"load": WHOLE},
    "from the cache": {"load": WHOLE, "options": {"local_files_only": True}},
    "variant": {"load": WHOLE, "part": "vae", "options": {"variant": "fp16"}},
    "no such variant": {"load": WHOLE, "part": "vae", "options": {"variant": "int8"}},
    "bin only": {"load": WHOLE, "part": "vae", "options": {"use_safetensors": False}},
    "again": {"load": WHOLE, "part": "vae", "options": {"force_download": True}},
    "other parts": {"load": WHOLE, "parts": GIVEN},
    "sharded": {"load": WHOLE, "part": "unet", "options": {"revision": "sharded"}},
    "commit": {"load": WHOLE, "part": "unet", "options": {"revision": SHARDED}},
    "evil": {"load": WHOLE, "part": "unet", "options": {"revision": "evil"}},
    "binary": {"load": BINARY, "part": "vocoder"},
    "safetensors only": {"load": BINARY, "part": "vocoder", "options": {"use_safetensors": True}},
    "no such part": {"load": BINARY, "part": "unet"},
    "no such repository": {"load": "owner/unknown"},
    "no such revision": {"load": WHOLE, "options": {"revision": "unknown"}},
    "gated": {"load": "owner/gated"},
    "another pipeline": {"load": "owner/foreign"},
    "broken": {"load": "owner/broken"},
    "adapter before": {"load": "owner/adapter", "adapter": True, "options": {"local_files_only": True}},
    "adapter": {"load": "owner/adapter", "adapter": True, "options": {"revision": "v1"}},
    "other adapter": {"load": "owner/adapter", "adapter": True, "options": {"subfolder": "other"}},
    "no adapter": {"load": BINARY, "adapter": True},
    "no such adapter": {"load": "owner/unknown", "adapter": True},
}
UNREACHED: dict[str, dict[str, Any]] = {
    "pipeline": {"load": WHOLE},
    "sharded": {"load": WHOLE, "part": "unet", "options": {"revision": "sharded"}},
    "commit": {"load": WHOLE, "part": "unet", "options": {"revision": SHARDED}},
    "binary": {"load": BINARY, "part": "vocoder"},
    "local_files_only": {"load": WHOLE, "options": {"local_files_only": True}},
    "again": {"load": WHOLE, "options": {"force_download": True}},
    "never downloaded": {"load": "owner/unknown"},
    "only in part downloaded": {"load": BINARY},
    "adapter": {"load": "owner/adapter", "adapter": True, "options": {"revision": "v1"}},
}


@pytest.fixture(scope="module")
def outcomes(
    random_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[dict[str, Outcome], dict[str, Outcome]]]:
    """The outcomes while the Hub could be reached, and after it was stopped."""
    root = tmp_path_factory.mktemp("hub")
    hub = LocalHub(publish(random_checkpoint, root))
    try:
        steps = {name: {**step, "parts_of": str(random_checkpoint)} for name, step in REACHED.items()}
        steps["other parts"]["options"] = {"cache_dir": str(root / "another cache")}
        reached = hub.outcomes(steps, root / "home")
    finally:
        hub.stop()
    steps = {name: {**step, "parts_of": str(random_checkpoint)} for name, step in UNREACHED.items()}
    return reached, hub.outcomes(steps, root / "home")


@pytest.fixture
def reached(outcomes) -> dict[str, Outcome]:
    return outcomes[0]


@pytest.fixture
def unreached(outcomes) -> dict[str, Outcome]:
    return outcomes[1]


@pytest.fixture(scope="module")
def digests(random_checkpoint: Path) -> dict[str, str]:
    return {part: digest(load_stage(random_checkpoint / part, PARTS[part][0])) for part in PARTS}


def test_only_needed_files_are_downloaded_and_once(reached, digests):
    first = reached["first"]
    assert first.downloads == NEEDED
    assert first.stages == digests
    assert not first.warnings


def test_loading_again_downloads_nothing(reached, digests):
    assert reached["second"].downloads == []
    assert reached["second"].requests  # it asks whether there is a newer version
    assert reached["second"].stages == digests


def test_local_files_only_makes_no_requests(reached, digests):
    outcome = reached["from the cache"]
    assert outcome.requests == []
    assert outcome.stages == digests
    assert not outcome.warnings
    outcome = reached["before any download"]
    assert outcome.error == (
        f"{WHOLE} has not been downloaded; run once without local_files_only; {TINY_HINT}"
    )
    assert outcome.requests == []


def test_a_variant_is_downloaded_instead(reached, random_checkpoint):
    outcome = reached["variant"]
    assert outcome.downloads == ["vae/diffusion_pytorch_model.fp16.safetensors"]
    half = load_stage(random_checkpoint / "vae", PARTS["vae"][0], torch.float16)
    assert outcome.stages == {"vae": digest(half)}
    assert "has no weights of the variant 'int8'" in reached["no such variant"].error
    assert reached["no such variant"].downloads == []


def test_bin_files_alone_or_safetensors_alone(reached, digests):
    assert reached["bin only"].downloads == ["vae/diffusion_pytorch_model.bin"]
    assert reached["bin only"].stages == {"vae": digests["vae"]}
    assert "has no weights in safetensors files; leave out use_safetensors=True" in (
        reached["safetensors only"].error
    )
    assert reached["safetensors only"].downloads == []  # it has the config already


def test_a_forced_download_downloads_again(reached, unreached, digests):
    assert reached["again"].downloads.count("vae/diffusion_pytorch_model.safetensors") == 1
    assert "vae/config.json" in reached["again"].downloads
    assert reached["again"].stages == {"vae": digests["vae"]}
    # An earlier download does not do.
    assert "the Hub cannot be reached" in unreached["again"].error


def test_the_files_of_parts_that_are_passed_are_not_downloaded(reached, digests):
    outcome = reached["other parts"]
    assert outcome.stages == digests
    assert outcome.downloads == [file for file in NEEDED if file.split("/")[0] not in GIVEN]


def test_shards_are_downloaded_as_their_index_says(reached, digests):
    outcome = reached["sharded"]
    shards = [f"unet/diffusion_pytorch_model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]
    index = "unet/diffusion_pytorch_model.safetensors.index.json"
    assert outcome.downloads == [*shards, index]  # the config is the same in both revisions
    assert outcome.stages == {"unet": digests["unet"]}
    assert reached["commit"].downloads == []  # the branch is at this commit
    assert reached["commit"].stages == outcome.stages


def test_an_index_that_refers_outside_its_folder_is_refused_before_the_download(reached):
    outcome = reached["evil"]
    assert outcome.error.endswith(
        "refers to a file outside its folder ('../model_index.json'), which is not allowed"
    )
    assert outcome.downloads == ["unet/diffusion_pytorch_model.safetensors.index.json"]


def test_bin_is_downloaded_if_there_is_no_safetensors(reached, digests):
    assert reached["binary"].downloads == ["vocoder/config.json", "vocoder/pytorch_model.bin"]
    assert reached["binary"].stages == {"vocoder": digests["vocoder"]}


def test_errors_about_what_the_hub_does_not_have(reached):
    assert reached["no such repository"].error == (
        "'owner/unknown' is neither a local folder nor a repository on the Hub (owner/name); "
        f"private ones need a token; {TINY_HINT}"
    )
    assert reached["no such revision"].error == f"{WHOLE} has no revision 'unknown' on the Hub"
    assert reached["gated"].error.startswith("owner/gated is gated on the Hub; request access there")
    assert re.search(r"unet.config\.json is missing$", reached["no such part"].error)
    for name in ("no such repository", "no such revision", "gated", "no such part"):
        assert reached[name].downloads == [] or name == "gated"
        assert "\n" not in reached[name].error


@pytest.mark.parametrize("name", ["reached", "unreached"])
def test_no_hub_and_no_earlier_download(request, name):
    step, repository = {
        "reached": ("broken", "owner/broken"),
        "unreached": ("never downloaded", "owner/unknown"),
    }[name]
    error = request.getfixturevalue(name)[step].error
    assert error.startswith(f"{repository} is not a local folder, and the Hub cannot be reached (")
    assert error.endswith(f"); pass the path of a folder with the checkpoint; {TINY_HINT}")
    assert "\n" not in error


def test_another_pipeline_is_refused_before_its_weights_are_downloaded(reached):
    outcome = reached["another pipeline"]
    assert "is for a StableDiffusionPipeline" in (outcome.error or "")
    assert outcome.downloads == ["model_index.json"]


def test_an_error_of_this_package_is_not_taken_for_the_hubs(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: Any) -> list[str]:
        raise TypeError("a mistake")

    info = SimpleNamespace(siblings=[], sha="0" * 40)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda self, name, revision: info)
    monkeypatch.setattr(hub, "needed_files", broken)
    with pytest.raises(TypeError, match="a mistake"):
        hub.checkpoint_folder(hub.Source("owner/name"), [""])


def test_no_hub_but_an_earlier_download(unreached, digests):
    warning = f"the Hub cannot be reached; using an earlier download of {WHOLE}"
    assert unreached["pipeline"].warnings == [warning]
    assert unreached["pipeline"].stages == digests
    for step in ("sharded", "commit"):
        assert unreached[step].warnings == [warning]
        assert unreached[step].stages == {"unet": digests["unet"]}
    assert unreached["binary"].stages == {"vocoder": digests["vocoder"]}
    assert unreached["local_files_only"].warnings == []
    assert unreached["local_files_only"].stages == digests


def test_no_hub_and_only_one_part_downloaded(unreached):
    """A cache with one stage of a repository does not make a pipeline."""
    assert "the Hub cannot be reached" in unreached["only in part downloaded"].error


@pytest.mark.parametrize(
    ("names", "folders", "variant", "needed"),
    [
        (
            ["config.json", "model.safetensors", "sub/config.json"],
            [""],
            None,
            ["config.json", "model.safetensors"],
        ),
        (["unet/config.json", "unet/model.bin", "a.json"], ["unet"], None, ["unet/config.json"]),
        (["unet/config.json", "unet/deep/config.json"], ["unet/"], None, ["unet/config.json"]),
        (["a/b/config.json", "a/config.json"], ["a/b"], None, ["a/b/config.json"]),
        (
            ["t/spiece.model", "t/merges.txt", "t/x.py", "t/x.h5"],
            ["t"],
            None,
            ["t/merges.txt", "t/spiece.model"],
        ),
        (
            ["m.json", "model.safetensors.index.json", "model.safetensors"],
            [""],
            None,
            ["m.json", "model.safetensors"],
        ),
        (["model.safetensors.index.fp16.json", "pytorch_model.bin"], [""], None, ["pytorch_model.bin"]),
        (
            ["model.safetensors.index.fp16.json", "model.bin"],
            [""],
            "fp16",
            ["model.safetensors.index.fp16.json"],
        ),
        (
            ["pytorch_model.bin.index.json", "flax_model.msgpack"],
            [""],
            None,
            ["pytorch_model.bin.index.json"],
        ),
        ([], ["", "unet"], None, []),
    ],
)
def test_which_files_are_needed(names, folders, variant, needed):
    assert needed_files(names, folders, variant) == needed


def test_weights_can_be_left_out():
    names = [
        "model_index.json",
        "vocoder/config.json",
        "vocoder/model.safetensors",
        "vocoder/pytorch_model.bin",
    ]
    assert needed_files(names, ["", "vocoder"], weights=False) == names[:2]
    assert (
        needed_files([*names, "vocoder/model.safetensors.index.json"], ["vocoder"], weights=False)
        == names[1:2]
    )


# --- the real checkpoints, with samples from diffusers' nightly tests


@pytest.mark.hub
@pytest.mark.parametrize(
    ("name", "steps", "start", "samples"),
    [
        (
            "cvssp/audioldm2",
            25,
            17275,
            [0.0791, 0.0666, 0.1158, 0.1227, 0.1171, -0.2880, -0.1940, -0.0283, -0.0126, 0.1127],
        ),
        (
            "cvssp/audioldm2-large",
            3,
            8825,
            [-0.1829, -0.1461, 0.0759, -0.1493, -0.1396, 0.5783, 0.3001, -0.3038, -0.0639, -0.2244],
        ),
    ],
)
def test_real_checkpoints(name, steps, start, samples):
    try:
        socket.create_connection(("huggingface.co", 443), timeout=10).close()
    except OSError as error:
        pytest.skip(f"no network: {error}")
    pipe = AudioLDM2Pipeline.from_pretrained(name, torch_dtype=torch.float32)
    latents = np.random.RandomState(0).standard_normal((1, 8, 128, 16))
    audio = pipe(
        "A hammer hitting a wooden surface",
        latents=torch.from_numpy(latents).to(torch.float32),
        num_inference_steps=steps,
        guidance_scale=2.5,
    ).audios[0]
    assert np.abs(audio[start : start + 10] - np.array(samples)).max() < 1e-3


def test_adapters_are_found_downloaded_and_found_again(
    outcomes: tuple[dict[str, Outcome], dict[str, Outcome]],
) -> None:
    reached, unreached = outcomes
    assert reached["adapter"].stages == {"a": "0.0"}
    assert {*reached["adapter"].downloads} == {"adapter_config.json", "adapter_model.safetensors"}
    assert reached["other adapter"].stages == {"a": "1.0"}
    assert {*reached["other adapter"].downloads} == {"other/pytorch_lora_weights.safetensors"}
    assert unreached["adapter"].stages == {"a": "0.0"}
    assert unreached["adapter"].warnings
    for name, message in (
        ("adapter before", "owner/adapter has not been downloaded; run once without local_files_only"),
        ("no adapter", "owner/binary has no adapter (looked for adapter_model.safetensors, pytorch_lora"),
        ("no such adapter", "'owner/unknown' is neither a local folder nor a repository"),
    ):
        error = reached[name].error
        assert error is not None
        assert error.startswith(message)
        assert "tiny" not in error
