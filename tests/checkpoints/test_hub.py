"""The Hub: what is asked of it and when it does not answer (a stand-in on 127.0.0.1), and real checkpoints.

The Hub's client reads its address from the environment when it is imported, so loading goes on in a process
of its own: this very module, run with the steps to take as its argument.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import urllib.request
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from audioldm2 import AudioLDM2Pipeline
from audioldm2.checkpoints.folder import load_stage
from audioldm2.checkpoints.formats import PARTS
from audioldm2.checkpoints.hub import needed_files
from tests.helpers import ROOT

WHOLE = "owner/tiny"  # every part, safetensors and .bin and a variant, and what nobody needs
BINARY = "owner/binary"  # .bin only
OFFLINE = '"tiny" is in the package and needs no Hub'
MAIN, SHARDED, EVIL = "a" * 40, "b" * 40, "c" * 40  # commits
TOKENIZERS = (
    "tokenizer/merges.txt",
    "tokenizer/tokenizer.json",
    "tokenizer/tokenizer_config.json",
    "tokenizer/vocab.json",
    "tokenizer_2/tokenizer.json",
    "tokenizer_2/tokenizer_config.json",
)


def weights_name(part: str) -> str:
    stem = "diffusion_pytorch_model" if part in ("projection_model", "unet", "vae") else "model"
    return f"{part}/{stem}.safetensors"


NEEDED = sorted(
    [
        "model_index.json",
        "feature_extractor/preprocessor_config.json",
        "scheduler/scheduler_config.json",
        *TOKENIZERS,
        *(f"{part}/config.json" for part in PARTS),
        *(weights_name(part) for part in PARTS),
    ]
)


def digest(stage: nn.Module) -> str:
    """A stage's weights in a few letters."""
    state = hashlib.sha256()
    for name, tensor in sorted(stage.state_dict().items()):
        state.update(
            name.encode() + str(tensor.dtype).encode() + tensor.contiguous().view(-1).numpy().tobytes()
        )
    return state.hexdigest()


def take(steps: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Load one thing after another; what came of each. Runs in the process of its own."""
    results = []
    for step in steps:
        result: dict[str, Any] = {}
        part, name, options = step.get("part"), step["load"], step.get("options", {})
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                if part is None:
                    pipe = AudioLDM2Pipeline.from_pretrained(name, **options)
                    result["stages"] = {name: digest(stage) for name, stage in pipe.stages.items()}
                else:
                    stage = PARTS[part][0].stage.from_pretrained(name, subfolder=part, **options)
                    result["stages"] = {part: digest(stage)}
            except ValueError as error:
                result["error"] = str(error)
        result["warnings"] = [str(warning.message) for warning in caught if "Hub" in str(warning.message)]
        with contextlib.suppress(OSError):  # the stand-in may be gone, which is one of the things to test
            urllib.request.urlopen(f"{os.environ['HF_ENDPOINT']}/next", timeout=5).close()
        results.append(result)
    return results


@dataclass
class Outcome:
    """What came of one step, and the files that were downloaded for it."""

    stages: dict[str, str]
    error: str | None
    warnings: list[str]
    asked: list[str]  # the paths of all requests

    @property
    def downloads(self) -> list[str]:
        return sorted(
            match[1] for path in self.asked if (match := re.match(r"GET .*/resolve/[^/]+/(.*)", path))
        )


class StandIn:
    """The few routes of the Hub that its client uses, over folders."""

    def __init__(self, folders: dict[tuple[str, str], Path]):
        revisions = {"main": MAIN, "sharded": SHARDED, "evil": EVIL, "v1": MAIN}
        self.asked: list[list[str]] = [[]]
        asked = self.asked

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: object) -> None:
                """No lines on stderr."""

            def answer(self, status: int, content: bytes, **headers: str) -> None:
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name.replace("_", "-"), value)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(content)

            def do_GET(self) -> None:
                path = unquote(urlsplit(self.path).path)
                if path == "/next":
                    asked.append([])
                    return self.answer(200, b"")
                asked[-1].append(f"{self.command} {path}")
                match = re.fullmatch(
                    r"/(?:api/models/)?(\w+/\w+)(?:/(revision|tree|resolve)/(\w+)(?:/(.*))?)?", path
                )
                repo, route, revision, name = match.groups() if match else (None,) * 4
                if repo == "owner/broken":
                    return self.answer(500, b"out of order")
                if not any(key[0] == repo for key in folders):
                    # As the Hub does, which does not tell strangers what is private.
                    return self.answer(401, b"", X_Error_Code="RepoNotFound")
                commit = revisions.get(revision or "main", revision)
                folder = folders.get((repo, commit))
                if folder is None:
                    return self.answer(404, b"", X_Error_Code="RevisionNotFound")
                files = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
                if route == "resolve":
                    if repo == "owner/gated":
                        return self.answer(403, b"", X_Error_Code="GatedRepo")
                    if name not in files:
                        return self.answer(404, b"", X_Error_Code="EntryNotFound")
                    content = (folder / name).read_bytes()
                    tag = hashlib.sha1(content).hexdigest()
                    return self.answer(200, content, ETag=f'"{tag}"', X_Repo_Commit=commit)
                if route == "tree":
                    entries = [
                        {"type": "file", "path": f, "size": (folder / f).stat().st_size, "oid": "0" * 40}
                        for f in files
                    ]
                    return self.answer(200, json.dumps(entries).encode(), Content_Type="application/json")
                info = {"id": repo, "sha": commit, "siblings": [{"rfilename": f} for f in files]}
                return self.answer(200, json.dumps(info).encode(), Content_Type="application/json")

            do_HEAD = do_GET

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.address = f"http://127.0.0.1:{self.server.server_address[1]}"
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05})
        self.thread.start()

    def stop(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join(timeout=10)

    def outcomes(self, steps: dict[str, dict[str, Any]], home: Path) -> dict[str, Outcome]:
        """Take the steps in a process whose Hub is this one; by the steps' names."""
        environment = {name: v for name, v in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
        environment |= {
            "HF_ENDPOINT": self.address,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "NO_PROXY": "127.0.0.1",
        }
        self.asked[:] = [[]]
        result = subprocess.run(
            [sys.executable, "-m", "tests.test_hub", json.dumps(list(steps.values()))],
            capture_output=True,
            text=True,
            timeout=180,
            cwd=ROOT,
            env=environment,
            check=False,
        )
        assert result.returncode == 0, result.stderr
        asked = self.asked + [[]] * len(steps)
        return {
            name: Outcome(found.get("stages", {}), found.get("error"), found["warnings"], asked[number])
            for number, (name, found) in enumerate(
                zip(steps, json.loads(result.stdout.splitlines()[-1]), strict=True)
            )
        }


def publish(tiny: Path, root: Path) -> dict[tuple[str, str], Path]:
    """Repositories made of the tiny checkpoint: by name and commit, their folders."""
    whole = Path(shutil.copytree(tiny, root / "whole"))
    binary = root / "binary" / "vocoder"
    for part in PARTS:
        safe = whole / weights_name(part)
        state = load_file(safe)
        bin_name = "diffusion_pytorch_model.bin" if "diffusion" in safe.name else "pytorch_model.bin"
        torch.save(state, safe.with_name(bin_name))
        halves = {
            name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in state.items()
        }
        save_file(halves, safe.with_name(safe.name.replace(".safetensors", ".fp16.safetensors")))
        (safe.parent / "flax_model.msgpack").write_bytes(b"not needed")
        (safe.parent / "model.onnx").write_bytes(b"not needed")
        (safe.parent / f"{safe.stem}.safetensors.index.fp16.json").write_text("{}")
    for name in (
        "README.md",
        ".gitattributes",
        "image.png",
        "sample.wav",
        "other/model.safetensors",
        "unet/a.md",
    ):
        path = whole / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"not needed")
    (whole / "other" / "config.json").write_text("{}")

    binary.mkdir(parents=True)
    for name in ("config.json", "pytorch_model.bin"):
        shutil.copy(whole / "vocoder" / name, binary / name)

    sharded = Path(shutil.copytree(whole, root / "sharded"))
    safe = sharded / weights_name("unet")
    state = load_file(safe)
    safe.unlink()
    places = {}
    for number in (1, 2, 3):
        shard = f"diffusion_pytorch_model-0000{number}-of-00003.safetensors"
        held = {name: state[name] for name in sorted(state)[number - 1 :: 3]}
        save_file(held, safe.parent / shard)
        places |= dict.fromkeys(held, shard)
    index = safe.parent / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))

    evil = Path(shutil.copytree(sharded, root / "evil"))
    spoiled = {**places, "conv_in.bias": "../model_index.json"}
    (evil / index.relative_to(sharded)).write_text(json.dumps({"weight_map": spoiled}))

    foreign = Path(shutil.copytree(tiny, root / "foreign"))
    entries = json.loads((foreign / "model_index.json").read_text())
    entries["_class_name"] = "StableDiffusionPipeline"
    (foreign / "model_index.json").write_text(json.dumps(entries))
    return {
        (WHOLE, MAIN): whole,
        (WHOLE, SHARDED): sharded,
        (WHOLE, EVIL): evil,
        (BINARY, MAIN): binary.parent,
        ("owner/gated", MAIN): whole,
        ("owner/foreign", MAIN): foreign,
    }


REACHED: dict[str, dict[str, Any]] = {
    "before any download": {"load": WHOLE, "options": {"local_files_only": True}},
    "first": {"load": WHOLE},
    "second": {"load": WHOLE},
    "from the cache": {"load": WHOLE, "options": {"local_files_only": True}},
    "variant": {"load": WHOLE, "part": "vae", "options": {"variant": "fp16"}},
    "no such variant": {"load": WHOLE, "part": "vae", "options": {"variant": "int8"}},
    "sharded": {"load": WHOLE, "part": "unet", "options": {"revision": "sharded"}},
    "commit": {"load": WHOLE, "part": "unet", "options": {"revision": SHARDED}},
    "evil": {"load": WHOLE, "part": "unet", "options": {"revision": "evil"}},
    "binary": {"load": BINARY, "part": "vocoder"},
    "no such part": {"load": BINARY, "part": "unet"},
    "no such repository": {"load": "owner/unknown"},
    "no such revision": {"load": WHOLE, "options": {"revision": "unknown"}},
    "gated": {"load": "owner/gated"},
    "another pipeline": {"load": "owner/foreign"},
    "broken": {"load": "owner/broken"},
}
UNREACHED: dict[str, dict[str, Any]] = {
    "pipeline": {"load": WHOLE},
    "sharded": {"load": WHOLE, "part": "unet", "options": {"revision": "sharded"}},
    "commit": {"load": WHOLE, "part": "unet", "options": {"revision": SHARDED}},
    "binary": {"load": BINARY, "part": "vocoder"},
    "local_files_only": {"load": WHOLE, "options": {"local_files_only": True}},
    "never downloaded": {"load": "owner/unknown"},
    "only in part downloaded": {"load": BINARY},
}


@pytest.fixture(scope="module")
def outcomes(
    random_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[dict[str, Outcome], dict[str, Outcome]]]:
    """What came of the steps while the Hub was in reach, and when it was gone."""
    root = tmp_path_factory.mktemp("hub")
    hub = StandIn(publish(random_checkpoint, root))
    try:
        reached = hub.outcomes(REACHED, root / "home")
    finally:
        hub.stop()
    return reached, hub.outcomes(UNREACHED, root / "home")


@pytest.fixture
def reached(outcomes) -> dict[str, Outcome]:
    return outcomes[0]


@pytest.fixture
def unreached(outcomes) -> dict[str, Outcome]:
    return outcomes[1]


@pytest.fixture(scope="module")
def digests(random_checkpoint: Path) -> dict[str, str]:
    return {part: digest(load_stage(random_checkpoint / part, PARTS[part][0])) for part in PARTS}


def test_only_what_is_needed_is_downloaded_and_once(reached, digests):
    first = reached["first"]
    assert first.downloads == NEEDED
    assert first.stages == digests
    assert not first.warnings


def test_a_second_loading_downloads_nothing(reached, digests):
    assert reached["second"].downloads == []
    assert reached["second"].asked  # whether there is a newer one
    assert reached["second"].stages == digests


def test_local_files_only_asks_nothing(reached, digests):
    outcome = reached["from the cache"]
    assert outcome.asked == []
    assert outcome.stages == digests
    assert not outcome.warnings
    outcome = reached["before any download"]
    assert outcome.error == (
        f"{WHOLE} was not downloaded before; run once without local_files_only; {OFFLINE}"
    )
    assert outcome.asked == []


def test_a_variant_is_downloaded_instead(reached, random_checkpoint):
    outcome = reached["variant"]
    assert outcome.downloads == ["vae/diffusion_pytorch_model.fp16.safetensors"]
    half = load_stage(random_checkpoint / "vae", PARTS["vae"][0], torch.float16)
    assert outcome.stages == {"vae": digest(half)}
    assert "holds no weights of the variant 'int8'" in reached["no such variant"].error
    assert reached["no such variant"].downloads == []


def test_shards_are_downloaded_as_their_index_says(reached, digests):
    outcome = reached["sharded"]
    shards = [f"unet/diffusion_pytorch_model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]
    index = "unet/diffusion_pytorch_model.safetensors.index.json"
    assert outcome.downloads == [*shards, index]  # the config is the same file as at the other revision
    assert outcome.stages == {"unet": digests["unet"]}
    assert reached["commit"].downloads == []  # the branch stands at this commit
    assert reached["commit"].stages == outcome.stages


def test_an_index_that_points_outside_is_refused_before_anything_is_downloaded(reached):
    outcome = reached["evil"]
    assert outcome.error.endswith("points outside its folder ('../model_index.json'); refused")
    assert outcome.downloads == ["unet/diffusion_pytorch_model.safetensors.index.json"]


def test_bin_is_downloaded_where_there_is_nothing_else(reached, digests):
    assert reached["binary"].downloads == ["vocoder/config.json", "vocoder/pytorch_model.bin"]
    assert reached["binary"].stages == {"vocoder": digests["vocoder"]}


def test_what_the_hub_does_not_have_is_a_clear_error(reached):
    assert reached["no such repository"].error == (
        "'owner/unknown' is neither a folder here nor a repository on the Hub (owner/name); "
        f"a private one needs a token; {OFFLINE}"
    )
    assert reached["no such revision"].error == f"{WHOLE} on the Hub has no revision 'unknown'"
    assert reached["gated"].error.startswith("owner/gated is gated on the Hub; ask for access there")
    assert re.search(r"unet.config\.json is missing$", reached["no such part"].error)
    for name in ("no such repository", "no such revision", "gated", "no such part"):
        assert reached[name].downloads == [] or name == "gated"
        assert "\n" not in reached[name].error


@pytest.mark.parametrize("name", ["reached", "unreached"])
def test_the_hub_out_of_reach_and_nothing_downloaded(request, name):
    step, repository = {
        "reached": ("broken", "owner/broken"),
        "unreached": ("never downloaded", "owner/unknown"),
    }[name]
    error = request.getfixturevalue(name)[step].error
    assert error.startswith(f"{repository} is no folder here, and the Hub is out of reach (")
    assert error.endswith(f"); pass the path of a local folder that holds the checkpoint; {OFFLINE}")
    assert "\n" not in error


def test_another_pipeline_is_refused_before_its_weights_are_downloaded(reached):
    outcome = reached["another pipeline"]
    assert "is for a StableDiffusionPipeline" in (outcome.error or "")
    assert outcome.downloads == ["model_index.json"]


def test_the_hub_out_of_reach_and_all_downloaded_before(unreached, digests):
    warning = f"the Hub is out of reach; using what was downloaded of {WHOLE} before"
    assert unreached["pipeline"].warnings == [warning]
    assert unreached["pipeline"].stages == digests
    for step in ("sharded", "commit"):
        assert unreached[step].warnings == [warning]
        assert unreached[step].stages == {"unet": digests["unet"]}
    assert unreached["binary"].stages == {"vocoder": digests["vocoder"]}
    assert unreached["local_files_only"].warnings == []
    assert unreached["local_files_only"].stages == digests


def test_the_hub_out_of_reach_and_another_part_downloaded_before(unreached):
    """One stage of a repository is in the cache; that is no pipeline."""
    assert "the Hub is out of reach" in unreached["only in part downloaded"].error


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


# --- the real checkpoints, with figures from diffusers' own nightly tests


@pytest.mark.hub
@pytest.mark.parametrize(
    ("name", "steps", "start", "figures"),
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
def test_golden_figures(name, steps, start, figures):
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
    assert np.abs(audio[start : start + 10] - np.array(figures)).max() < 1e-3


if __name__ == "__main__":
    print(json.dumps(take(json.loads(sys.argv[1]))))
