"""The package is light: which modules its imports load in a fresh process, and what its source imports."""

from __future__ import annotations

import ast
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from scripts.random_checkpoint import write_random_checkpoint
from tests.helpers import ROOT, load_pipeline, run_python, sound

PACKAGE = ROOT / "audioldm2"
# tqdm comes with huggingface_hub and with transformers.
RUNTIME = ("torch", "transformers", "safetensors", "huggingface_hub", "numpy", "einops", "tqdm")
# Packages that are installed in development, and by many users, but that this one does not need.
FOREIGN = (
    *("diffusers", "accelerate", "librosa", "scipy", "soundfile", "soxr", "matplotlib", "torchaudio"),
    *("torchvision", "sentencepiece", "audioread", "numba", "sklearn", "pandas", "PIL", "onnx", "peft"),
    *("ray", "pyarrow"),
)
MODULES = sorted(PACKAGE.rglob("*.py"))


def loaded_by(code: str) -> set[str]:
    """All modules that a fresh process has loaded after running some code."""
    report = "\nimport json, sys\nprint('\\n' + json.dumps(sorted(sys.modules)))"
    return set(json.loads(run_python("-c", code + report).stdout.splitlines()[-1]))


def tops(modules: set[str]) -> set[str]:
    """The packages that modules belong to."""
    return {name.partition(".")[0] for name in modules}


# --- modules loaded


def test_importing_the_package_loads_no_third_party_package():
    before, after = loaded_by("pass"), loaded_by("import audioldm2")
    third_party = tops(after) - tops(before) - set(sys.stdlib_module_names) - {"audioldm2"}
    assert third_party == set()


def test_importing_the_pipeline_loads_only_the_packages_it_needs():
    light = [name for name in RUNTIME if name != "transformers"]
    # With the submodules that the package imports, so that what these load is part of the baseline.
    baseline = loaded_by(f"import {', '.join(light)}, safetensors.torch, tqdm.auto")
    loaded = loaded_by("from audioldm2 import AudioLDM2Pipeline; assert AudioLDM2Pipeline.from_pretrained")
    extra = tops(loaded) - tops(baseline) - set(sys.stdlib_module_names) - {"audioldm2"}
    assert extra == set()
    assert "torch" in loaded, "the pipeline was not imported"
    assert "transformers" not in loaded, "transformers takes seconds and is needed for tokenizers only"
    assert not tops(loaded) & set(FOREIGN)


def test_every_public_name_is_loaded_without_transformers():
    loaded = loaded_by("import audioldm2\nfor name in audioldm2.__all__: getattr(audioldm2, name)")
    assert "audioldm2.models.unet" in loaded
    assert not tops(loaded) & {"transformers", *FOREIGN}


@pytest.mark.parametrize("argument", ["--help", "--version"])
def test_help_and_version_load_no_third_party_package(argument: str):
    code = f"""
import contextlib, io, runpy, sys
before = {{name.partition(".")[0] for name in sys.modules}}  # loaded by site-packages' .pth files
sys.argv = ["audioldm2", {argument!r}]
out = io.StringIO()
try:
    with contextlib.redirect_stdout(out):
        runpy.run_module("audioldm2", run_name="__main__", alter_sys=True)
except SystemExit as stopped:
    assert stopped.code in (0, None), stopped.code
else:
    raise AssertionError("the command line did not end with an exit code")
assert "audioldm2" in out.getvalue(), out.getvalue()
after = {{name.partition(".")[0] for name in sys.modules}}
extra = after - before - set(sys.stdlib_module_names) - {{"audioldm2"}}
assert not extra, extra
"""
    run_python("-c", code)


def test_a_wrong_argument_is_refused_without_loading_torch():
    code = """
import sys
from audioldm2.cli import main
try:
    main(["a dog", "--steps", "none"])
except SystemExit as stopped:
    assert stopped.code == 2, stopped.code
assert "torch" not in sys.modules and "numpy" not in sys.modules
"""
    run_python("-c", code)


# --- a generation with only the packages that are needed

BLOCK = """
import sys
from importlib.machinery import PathFinder
FOREIGN = set(sys.argv[1].split(","))
class Without(PathFinder):
    # As if FOREIGN were not installed, also for packages that only look whether they could import it.
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in FOREIGN else PathFinder.find_spec(name, path, target)
sys.meta_path[:] = [Without if finder is PathFinder else finder for finder in sys.meta_path]
"""
GENERATE = """
import torch
from audioldm2 import AudioLDM2Pipeline, DPMSolverMultistepScheduler, write_wav

pipe = AudioLDM2Pipeline.from_pretrained(sys.argv[2])
assert "sympy" not in sys.modules, "loading imports PyTorch's compiler, which takes half a second"
pipe.set_progress_bar_config(disable=True)
pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
out = pipe("A dog barks", negative_prompt="Low quality", num_inference_steps=2, audio_length_in_s=1.0,
           num_waveforms_per_prompt=2, generator=torch.Generator().manual_seed(0))
assert out.audios.shape == (2, 16000), out.audios.shape
write_wav("dog.wav", torch.as_tensor(out.audios[0]), 16000)
pipe.save_pretrained("saved")
assert AudioLDM2Pipeline.from_pretrained("saved").unet.config == pipe.unet.config

assert not FOREIGN & {name.partition(".")[0] for name in sys.modules}
models = [name for name in sys.modules if name.startswith("transformers.") and
          (".modeling_" in name or name == "transformers.generation.utils")]
print("models:" + ",".join(sorted(models)))
"""


@pytest.fixture(scope="module")
def own_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that is made without diffusers and transformers' models."""
    folder = tmp_path_factory.mktemp("own") / "random checkpoint"
    write_random_checkpoint(folder)
    return folder


def test_a_generation_needs_no_other_package_and_no_models_of_transformers(
    own_checkpoint: Path, tmp_path: Path
):
    shown = run_python("-c", BLOCK + GENERATE, ",".join(FOREIGN), own_checkpoint, cwd=tmp_path).stdout
    (line,) = [line for line in shown.splitlines() if line.startswith("models:")]
    assert line == "models:", f"transformers' model code is loaded: {line}"
    assert (tmp_path / "dog.wav").stat().st_size > 2 * 16000


def test_a_blocked_package_cannot_be_imported():
    code = BLOCK + "\ntry:\n    import scipy.linalg\nexcept ModuleNotFoundError as e:\n    print(e.name)"
    assert run_python("-c", code, "scipy").stdout.strip() == "scipy"
    assert "scipy" in loaded_by("import scipy.linalg"), "it is not installed, so blocking it proves nothing"


# --- the script that makes a random checkpoint


def test_the_random_checkpoint_is_audible_and_its_seed_decides(own_checkpoint: Path, tmp_path: Path):
    sounds = []
    for seed in (0, 1):
        write_random_checkpoint(tmp_path / str(seed), seed=seed)
        pipe = load_pipeline(tmp_path / str(seed))
        sounds.append(sound(pipe, "Rain", num_inference_steps=3, audio_length_in_s=1.0))
        assert 0.02 < sounds[-1].std() < 0.4
        assert abs(sounds[-1]).max() < 0.99, "the sound clips"
    assert abs(sounds[0] - sounds[1]).max() > 0.02
    unet = "unet/diffusion_pytorch_model.safetensors"
    assert (tmp_path / "0" / unet).read_bytes() == (own_checkpoint / unet).read_bytes()


@pytest.mark.slow
def test_the_random_checkpoint_script_runs_from_a_checkout_and_is_honest(tmp_path: Path):
    done = run_python("-I", ROOT / "scripts" / "random_checkpoint.py", "made here", cwd=tmp_path)
    assert "random" in done.stdout
    assert (tmp_path / "made here" / "model_index.json").exists()


# --- what the source imports


def imports(path: Path, top_only: bool) -> Iterator[str]:
    """Full names of the modules that a file imports, at its top level or anywhere in it."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in tree.body if top_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports inside the package should be absolute"
            yield str(node.module)


def test_modules_are_found():
    assert len(MODULES) > 20


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_module_imports_only_the_runtime_packages(path: Path):
    allowed = {*sys.stdlib_module_names, *RUNTIME, "audioldm2"}
    at_the_top, anywhere = set(imports(path, True)), set(imports(path, False))
    assert tops(at_the_top) <= allowed
    assert "transformers" not in tops(at_the_top), "only where a tokenizer is read"
    # Plotting is an optional extra.
    assert tops(anywhere) <= allowed | {"matplotlib"}
    assert not {name for name in anywhere if name.startswith("transformers.models")}


@pytest.mark.parametrize(
    "path",
    [path for path in MODULES if path.parent.name == "models" and path.stem != "__init__"],
    ids=lambda path: path.stem,
)
def test_a_stage_imports_no_other_stage(path: Path):
    imported = set(imports(path, False))
    assert tops(imported) <= {*sys.stdlib_module_names, "torch", "einops", "audioldm2"}
    helpers = {f"audioldm2.models.{name}" for name in ("config", "layers", "stage")}
    if path.stem == "clap":
        helpers.add("audioldm2.models.htsat")  # its audio tower
    if path.stem == "config":
        helpers.add("audioldm2.quoting")  # what a checkpoint says, in error messages
    if path.stem == "vae":
        helpers.add("audioldm2.noise")  # to draw latents
    if path.stem == "stage":
        # When something is loaded or saved, or asked for its device or dtype.
        helpers |= {
            f"audioldm2.{name}" for name in ("checkpoints.folder", "checkpoints.options", "runtime.precision")
        }
        assert {name for name in imports(path, True) if name.startswith("audioldm2")} == {
            "audioldm2.models.config"
        }
    assert {name for name in imported if name.startswith("audioldm2")} <= helpers


@pytest.mark.parametrize(
    "path",
    [path for path in MODULES if path.parent.name == "schedulers"],
    ids=lambda path: path.stem,
)
def test_a_sampler_imports_only_torch_and_numpy(path: Path):
    imported = set(imports(path, False))
    assert tops(imported) <= {*sys.stdlib_module_names, "torch", "numpy", "audioldm2"}
    allowed = ("audioldm2.schedulers", "audioldm2.arguments", "audioldm2.noise", "audioldm2.quoting")
    assert all(name.startswith(allowed) for name in imports(path, True) if name.startswith("audioldm2"))
    if path.stem == "config":
        allowed += ("audioldm2.checkpoints", "audioldm2.atomic")  # when something is loaded or saved
    assert all(name.startswith(allowed) for name in imported if name.startswith("audioldm2"))
