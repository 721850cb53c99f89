"""The package's types, as a type checker sees them from a user's script."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from tests.helpers import ROOT, run_python

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
assert_type(pipe("rain", guidance_scale=2.0, return_dict=False)[0], Any)
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
WRONG = {  # lines with a mistake, and mypy's codes for it
    "pipe(prompt=3)": "arg-type|call-overload",
    'pipe("rain", guidance=2)': "call-arg|call-overload",
    'pipe("rain").audio': "attr-defined",
    'UNet.from_pretrained("tiny", subfolder=1)': "arg-type",
    'pipe("rain", callback=3)': "arg-type",
}


def test_a_type_checker_accepts_a_users_script_and_finds_each_mistake(tmp_path: Path) -> None:
    text = SCRIPT + "\n".join(WRONG) + "\n"
    (tmp_path / "script.py").write_text(text, encoding="utf-8")
    if (ROOT / ".mypy_cache").is_dir():  # of scripts/test: PyTorch's types take half a minute to read
        shutil.copytree(ROOT / ".mypy_cache", tmp_path / "cache")
    options = ["--config-file", ROOT / "pyproject.toml", "--cache-dir", tmp_path / "cache"]
    done = run_python(*("-m", "mypy", *options, "script.py"), cwd=tmp_path, check=False, MYPYPATH=str(ROOT))
    assert not done.stderr
    found: dict[str, list[str]] = {}
    for number, code in re.findall(r"^script\.py:(\d+): error: .*\[([\w-]+)\]$", done.stdout, re.MULTILINE):
        found.setdefault(text.splitlines()[int(number) - 1], []).append(code)
    assert found.keys() == WRONG.keys(), done.stdout
    for line, codes in WRONG.items():
        assert all(re.fullmatch(codes, code) for code in found[line]), done.stdout
    # Nothing else is wrong, in the script or in the package.
    errors = [line for line in done.stdout.splitlines() if ": error: " in line]
    assert len(errors) == sum(map(len, found.values())), done.stdout
