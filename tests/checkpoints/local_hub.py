"""A server on 127.0.0.1 that stands in for the Hub, and loading from it.

The Hub's client reads the server's address from the environment when it is imported, so loading runs in a
process of its own: this module, with the steps as its argument.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import urllib.request
import warnings
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from audioldm2 import AudioLDM2Pipeline
from audioldm2.checkpoints.formats import PARTS
from tests.helpers import HANGS_AFTER, ROOT

WHOLE = "owner/tiny"  # every part, as safetensors, as .bin and as a variant; and files that are not needed
BINARY = "owner/binary"  # .bin only
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
        "audioldm2.json",
        "feature_extractor/preprocessor_config.json",
        "scheduler/scheduler_config.json",
        *TOKENIZERS,
        *(f"{part}/config.json" for part in PARTS),
        *(weights_name(part) for part in PARTS),
    ]
)


def digest(stage: nn.Module) -> str:
    """A hash of a stage's weights."""
    state = hashlib.sha256()
    for name, tensor in sorted(stage.state_dict().items()):
        state.update(
            name.encode() + str(tensor.dtype).encode() + tensor.contiguous().view(-1).numpy().tobytes()
        )
    return state.hexdigest()


def load_all(steps: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Load one checkpoint after another and describe the results. Runs in a process of its own."""
    results = []
    for step in steps:
        result: dict[str, Any] = {}
        part, name, options = step.get("part"), step["load"], dict(step.get("options", {}))
        if "parts" in step:  # of a local folder, in place of the repository's
            local = AudioLDM2Pipeline.from_pretrained(step["parts_of"])
            options |= {name: getattr(local, name) for name in step["parts"]}
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                if step.get("adapter"):
                    pipe = AudioLDM2Pipeline.from_pretrained(step["parts_of"])
                    pipe.load_lora_weights(name, adapter_name="a", **options)
                    result["stages"] = {"a": f"{pipe.adapter_parameters('a')[0].mean():.1f}"}
                elif part is None:
                    pipe = AudioLDM2Pipeline.from_pretrained(name, **options)
                    result["stages"] = {name: digest(stage) for name, stage in pipe.stages.items()}
                else:
                    stage = PARTS[part][0].stage.from_pretrained(name, subfolder=part, **options)
                    result["stages"] = {part: digest(stage)}
            except ValueError as error:
                result["error"] = str(error)
        result["warnings"] = [str(warning.message) for warning in caught if "Hub" in str(warning.message)]
        with contextlib.suppress(OSError):  # the server is stopped in some tests
            urllib.request.urlopen(f"{os.environ['HF_ENDPOINT']}/next", timeout=HANGS_AFTER).close()
        results.append(result)
    return results


@dataclass
class Outcome:
    """The result of one step, and the requests that it made."""

    stages: dict[str, str]
    error: str | None
    warnings: list[str]
    requests: list[str]  # method and path of each

    @property
    def downloads(self) -> list[str]:
        return sorted(
            match[1] for path in self.requests if (match := re.match(r"GET .*/resolve/[^/]+/(.*)", path))
        )


class LocalHub:
    """A server with those routes of the Hub that its client uses; each repository is a folder."""

    def __init__(self, folders: dict[tuple[str, str], Path]):
        revisions = {"main": MAIN, "sharded": SHARDED, "evil": EVIL, "v1": MAIN}
        self.requests: list[list[str]] = [[]]  # by step
        requests = self.requests

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: object) -> None:
                """Print nothing to stderr."""

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
                    requests.append([])
                    return self.answer(200, b"")
                requests[-1].append(f"{self.command} {path}")
                match = re.fullmatch(
                    r"/(?:api/models/)?(\w+/\w+)(?:/(revision|tree|resolve)/(\w+)(?:/(.*))?)?", path
                )
                repo, route, revision, name = match.groups() if match else (None,) * 4
                if repo == "owner/broken":
                    return self.answer(500, b"out of order")
                if not any(key[0] == repo for key in folders):
                    # As on the Hub, private repositories look like missing ones.
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
        self.thread.join()

    def outcomes(self, steps: dict[str, dict[str, Any]], home: Path) -> dict[str, Outcome]:
        """Run the steps in a process that uses this server as the Hub; returns the outcomes by step."""
        environment = {name: v for name, v in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
        environment |= {
            "HF_ENDPOINT": self.address,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            # The client's own 10 s can be too short on a busy machine.
            "HF_HUB_ETAG_TIMEOUT": str(HANGS_AFTER),
            "HF_HUB_DOWNLOAD_TIMEOUT": str(HANGS_AFTER),
            "NO_PROXY": "127.0.0.1",
        }
        self.requests[:] = [[]]
        result = subprocess.run(
            [sys.executable, "-m", __name__, json.dumps(list(steps.values()))],
            capture_output=True,
            text=True,
            timeout=HANGS_AFTER,
            cwd=ROOT,
            env=environment,
            check=False,
        )
        assert result.returncode == 0, result.stderr
        requests = self.requests + [[]] * len(steps)
        return {
            name: Outcome(found.get("stages", {}), found.get("error"), found["warnings"], requests[number])
            for number, (name, found) in enumerate(
                zip(steps, json.loads(result.stdout.splitlines()[-1]), strict=True)
            )
        }


def publish(checkpoint: Path, root: Path) -> dict[tuple[str, str], Path]:
    """Make repositories from a checkpoint; returns their folders by name and commit."""
    whole = Path(shutil.copytree(checkpoint, root / "whole"))
    (whole / "audioldm2.json").write_text('{"recommended": {"guidance_scale": 2.0}}')
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
    shard_of = {}
    for number in (1, 2, 3):
        shard = f"diffusion_pytorch_model-0000{number}-of-00003.safetensors"
        held = {name: state[name] for name in sorted(state)[number - 1 :: 3]}
        save_file(held, safe.parent / shard)
        shard_of |= dict.fromkeys(held, shard)
    index = safe.parent / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": shard_of}))

    evil = Path(shutil.copytree(sharded, root / "evil"))
    outside = {**shard_of, "conv_in.bias": "../model_index.json"}
    (evil / index.relative_to(sharded)).write_text(json.dumps({"weight_map": outside}))

    adapter = root / "adapter"
    for number, (subfolder, prefix, stem) in enumerate(
        (("", "base_model.model.", "adapter_model"), ("other", "unet.", "pytorch_lora_weights"))
    ):
        a, b = torch.full((1, 4, 3, 3), float(number)), torch.ones(8, 1, 1, 1)
        tensors = {f"{prefix}conv_in.lora_A.weight": a, f"{prefix}conv_in.lora_B.weight": b}
        (adapter / subfolder).mkdir(exist_ok=True)
        save_file(tensors, adapter / subfolder / f"{stem}.safetensors")
    (adapter / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 1, "lora_alpha": 1}')
    (adapter / "optimizer.bin").write_bytes(b"not needed")

    foreign = Path(shutil.copytree(checkpoint, root / "foreign"))
    entries = json.loads((foreign / "model_index.json").read_text())
    entries["_class_name"] = "StableDiffusionPipeline"
    (foreign / "model_index.json").write_text(json.dumps(entries))
    return {
        (WHOLE, MAIN): whole,
        (WHOLE, SHARDED): sharded,
        (WHOLE, EVIL): evil,
        (BINARY, MAIN): binary.parent,
        ("owner/gated", MAIN): whole,
        ("owner/adapter", MAIN): adapter,
        ("owner/foreign", MAIN): foreign,
    }


if __name__ == "__main__":
    print(json.dumps(load_all(json.loads(sys.argv[1]))))
