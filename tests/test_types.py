"""The package's types, as a type checker sees them from a user's script."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.helpers import ROOT

SCRIPT = """
from typing import Any

import torch
from typing_extensions import assert_type

from audioldm2 import (
    GPT2,
    VAE,
    AudioLDM2Pipeline,
    AudioPipelineOutput,
    DPMSolverMultistepScheduler,
    UNet,
    read_wav,
)

pipe = AudioLDM2Pipeline.from_pretrained("tiny", torch_dtype=torch.float32, device="cpu")
assert_type(pipe, AudioLDM2Pipeline)
assert_type(pipe.to("cpu"), AudioLDM2Pipeline)
pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config, use_karras_sigmas=True)
assert_type(pipe("rain"), AudioPipelineOutput)
assert_type(pipe("rain", return_dict=True), AudioPipelineOutput)
assert_type(pipe("rain", guidance_scale=2.0, return_dict=False), tuple[Any])
states, mask, vectors = pipe.encode_prompt("rain", do_classifier_free_guidance=False)
assert_type(states, torch.Tensor)

unet = UNet.from_pretrained("tiny", subfolder="unet")
assert_type(unet, UNet)
assert_type(unet.config.in_channels, int)
assert_type(unet.dtype, torch.dtype)
assert_type(VAE.from_pretrained("tiny", "vae").decode(torch.zeros(1, 8, 4, 16)), torch.Tensor)
assert_type(GPT2.from_pretrained("tiny", "language_model").generate(vectors), torch.Tensor)


class Mine(UNet):
    pass


assert_type(Mine.from_pretrained("tiny", subfolder="unet"), Mine)
"""
WRONG = {
    "pipe(prompt=3)": "arg-type|call-overload",
    'pipe("rain", guidance=2)': "call-arg|call-overload",
    'pipe("rain").audio': "attr-defined",
    'UNet.from_pretrained("tiny", subfolder=1)': "arg-type",
    'pipe("rain", return_dict=False).audios': "attr-defined",
}


def check(folder: Path, script: str) -> str:
    path = folder / "script.py"
    path.write_text(script, encoding="utf-8")
    command = [sys.executable, "-m", "mypy", "--strict", "--cache-dir", str(folder / "cache"), str(path)]
    config = ["--config-file", "", "--follow-imports", "silent", "--ignore-missing-imports"]
    done = subprocess.run(
        [*command, *config],
        cwd=folder,
        env={"MYPYPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert not done.stderr, done.stderr
    return done.stdout


def test_a_users_script(tmp_path: Path) -> None:
    assert check(tmp_path, SCRIPT).startswith("Success")
    lines = SCRIPT.count("\n")
    found = check(tmp_path, SCRIPT + "\n".join(WRONG) + "\n").splitlines()
    for number, (line, codes) in enumerate(WRONG.items(), lines + 1):
        errors = [
            e
            for e in found
            if e.startswith(f"script.py:{number}: error") or f"script.py:{number}: error" in e
        ]
        assert any(f"[{code}]" in e for e in errors for code in codes.split("|")), (line, found)
