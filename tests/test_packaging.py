"""The distribution: its name, its files, its pinned tools, and the releases of its dependencies."""

from __future__ import annotations

import ctypes
import importlib.util
import json
import re
import shutil
import subprocess
import sys
import zipfile
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import transformers
from transformers import PreTrainedTokenizerFast

import audioldm2
from audioldm2 import AudioLDM2Pipeline
from scripts.cpu_torch import NO_DEVICE, remove_cuda
from scripts.random_tokenizers import write_roberta_tokenizer
from tests.helpers import ROOT

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

TINY = ROOT / "audioldm2" / "tiny"


@pytest.fixture(scope="module")
def pyproject() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def matrix() -> ModuleType:
    """scripts/test_matrix as a module."""
    loader = SourceFileLoader("test_matrix", str(ROOT / "scripts" / "test_matrix"))
    spec = importlib.util.spec_from_loader("test_matrix", loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["test_matrix"] = module  # its dataclass looks itself up there
    loader.exec_module(module)
    return module


# the distribution


def test_the_distribution_is_named_alike_everywhere(pyproject: dict[str, Any]) -> None:
    project = pyproject["project"]
    assert project["name"] == audioldm2.DISTRIBUTION
    assert project["version"] == audioldm2.__version__
    assert project["scripts"] == {"audioldm2": "audioldm2.cli:main"}  # the command is called like the import
    extras = project["optional-dependencies"]
    own = [name for names in extras.values() for name in names if name.startswith("audioldm2")]
    assert own
    assert all(name.startswith(f"{audioldm2.DISTRIBUTION}[") for name in own)


def test_no_hint_installs_the_original_authors_package() -> None:
    """PyPI's audioldm2 is another program; `pip install audioldm2` in a message would install that."""
    sources = [path for folder in ("audioldm2", "scripts") for path in (ROOT / folder).rglob("*")]
    sources = [path for path in sources if path.suffix in (".py", ".sh", ".md", "") and path.is_file()]
    wrong = re.compile(r"""pip install ["']?audioldm2(?!-torch)|audioldm2\[""")
    assert [
        f"{path}: {match[0]}" for path in sources if (match := wrong.search(path.read_text("utf-8")))
    ] == []


def test_type_checkers_and_the_source_distribution_find_their_files(pyproject: dict[str, Any]) -> None:
    assert (ROOT / "audioldm2" / "py.typed").read_bytes() == b""
    included = pyproject["tool"]["hatch"]["build"]["targets"]["sdist"]["include"]
    assert {"docs", "CHANGELOG.md", "CONTRIBUTING.md", "README.md", "LICENSE"} <= set(included)
    assert [name for name in included if not (ROOT / name).exists()] == []


def test_linters_are_pinned(pyproject: dict[str, Any]) -> None:
    test = pyproject["project"]["optional-dependencies"]["test"]
    for tool in ("ruff", "mypy"):
        (requirement,) = (name for name in test if re.match(rf"{tool}\b", name))
        assert re.fullmatch(rf"{tool}==[\d.]+", requirement)


def test_every_dependency_has_a_lowest_version(pyproject: dict[str, Any], matrix: ModuleType) -> None:
    names = {re.split(r">=", requirement)[0] for requirement in pyproject["project"]["dependencies"]}
    assert names == {*matrix.ALL_LOWEST} - {"diffusers"}, "scripts/test_matrix pins other dependencies"


# tokenizers, whose files and classes differ between releases


def test_merges_are_strings_which_every_release_of_tokenizers_reads(tmp_path: Path) -> None:
    write_roberta_tokenizer(tmp_path)
    for folder in (TINY / "tokenizer", tmp_path):
        merges = json.loads((folder / "tokenizer.json").read_text("utf-8"))["model"]["merges"]
        assert all(isinstance(merge, str) for merge in merges)
        assert merges == (folder / "merges.txt").read_text("utf-8").splitlines()[1:]  # after its version


class PlainTokenizer(PreTrainedTokenizerFast):
    pass


class BrokenTokenizer(PreTrainedTokenizerFast):
    """As RobertaTokenizerFast of transformers 5.0 to 5.15: loads without an error and encodes wrongly."""


class SlowTokenizer:
    """As RobertaTokenizer of transformers 4."""


@pytest.mark.parametrize(
    ("plain", "fast", "expected"),
    [(PlainTokenizer, BrokenTokenizer, PlainTokenizer), (SlowTokenizer, PlainTokenizer, PlainTokenizer)],
    ids=["transformers 5", "transformers 4"],
)
def test_the_fast_tokenizer_is_loaded_under_the_name_of_the_release(
    monkeypatch: pytest.MonkeyPatch, plain: type, fast: type, expected: type
) -> None:
    monkeypatch.setattr(transformers, "RobertaTokenizer", plain)
    monkeypatch.setattr(transformers, "RobertaTokenizerFast", fast)
    assert type(AudioLDM2Pipeline.from_pretrained("tiny").tokenizer) is expected


# scripts/test_matrix


def test_the_matrix_has_the_lowest_and_the_newest_versions_on_each_python(matrix: ModuleType) -> None:
    assert len({row.name for row in matrix.ROWS}) == len(matrix.ROWS)
    assert {row.python for row in matrix.ROWS if not row.pins} == {"3.10", "3.11", "3.12", "3.13"}
    assert any(row.pins == matrix.ALL_LOWEST for row in matrix.ROWS)


def test_lowest_versions_are_read_from_the_wheel(matrix: ModuleType, tmp_path: Path) -> None:
    metadata = (
        "Metadata-Version: 2.4\nName: x\nVersion: 1\n"
        "Requires-Dist: torch>=2.5\nRequires-Dist: huggingface-hub>=0.25\n"
        "Requires-Dist: diffusers>=0.31; extra == 'test'\nRequires-Dist: ruff==1.0; extra == 'test'\n\n"
        "Requires-Dist: a-line-of-the-readme>=1\n"
    )
    with zipfile.ZipFile(tmp_path / "x-1-py3-none-any.whl", "w") as wheel:
        wheel.writestr("x-1.dist-info/METADATA", metadata)
    lowest = matrix.floors(tmp_path / "x-1-py3-none-any.whl")
    assert lowest == {"torch": "2.5", "huggingface-hub": "0.25", "diffusers": "0.31"}
    row = matrix.Row("x", "3.10", {"torch": matrix.LOWEST, "numpy": "1.26.0"})
    assert matrix.requirements(row, lowest) == ["torch==2.5", "numpy==1.26.0", "diffusers"]


def test_a_python_that_fails_is_passed_over_for_pyenvs(
    matrix: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    shim = tmp_path / "shims" / f"python{version}"  # as pyenv's where the version is not selected
    shim.parent.mkdir()
    shim.write_text("#!/bin/sh\nexit 127\n")
    shim.chmod(0o755)
    monkeypatch.setenv("PATH", str(shim.parent))
    monkeypatch.setenv("PYENV_ROOT", str(tmp_path))
    assert matrix.find_python(version) is None
    installed = tmp_path / "versions" / f"{version}.99" / "bin" / "python3"
    installed.parent.mkdir(parents=True)
    installed.symlink_to(sys.executable)
    assert matrix.find_python(version) == installed


def test_a_row_without_its_python_is_skipped(
    matrix: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(matrix, "build_wheel", lambda folder: folder / "x.whl")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("PYENV_ROOT", str(tmp_path))
    monkeypatch.setattr(
        sys, "argv", ["scripts/test_matrix", "newest-3.10", "--output", str(tmp_path / "table.md")]
    )
    with pytest.raises(SystemExit, match="1"):  # nothing was tested
        matrix.main()
    table = (tmp_path / "table.md").read_text("utf-8").splitlines()
    assert len({line.count("|") for line in table}) == 1
    assert table[2].startswith("| newest-3.10 | 3.10 |")
    assert table[2].endswith("| skipped: no Python 3.10 |")


@pytest.mark.skipif(
    sys.platform != "linux" or not all(map(shutil.which, ("cc", "nm", "readelf"))),
    reason="needs cc and binutils",
)
def test_a_cuda_build_loads_without_cuda(tmp_path: Path) -> None:
    """A library that needs two others, one of them with symbol versions, loads when these are stubs."""
    lib = tmp_path / "torch" / "lib"
    lib.mkdir(parents=True)

    def compile_library(name: str, source: str, *options: str) -> None:
        (tmp_path / "x.c").write_text(source)
        command = [
            "cc",
            "-shared",
            "-fPIC",
            "-o",
            lib / name,
            f"-Wl,-soname,{name}",
            tmp_path / "x.c",
            *options,
        ]
        subprocess.run(command, check=True)

    (tmp_path / "versions").write_text("libcudart.so.13 { cudaGetDeviceCount; cudaGetErrorString; };")
    script = f"-Wl,--version-script={tmp_path / 'versions'}"
    cudart = "int cudaGetDeviceCount(void) { return 0; }\nconst char *cudaGetErrorString(int e) { return 0; }"
    compile_library("libcudart.so.13", cudart, script)
    compile_library("libnccl.so.2", "int ncclInit(void) { return 0; }")
    compile_library(
        "libtorch_cuda.so",
        "int cudaGetDeviceCount(void), ncclInit(void);\nconst char *cudaGetErrorString(int error);\n"
        "const char *text(void) { return cudaGetErrorString(1); }\n"
        "int devices(void) { return cudaGetDeviceCount(); }\nint peers(void) { return ncclInit(); }\n",
        *(f"-L{lib}", "-l:libcudart.so.13", "-l:libnccl.so.2", "-Wl,-rpath,$ORIGIN"),
    )
    (lib / "libcudart.so.13").unlink()
    (lib / "libnccl.so.2").unlink()
    with pytest.raises(OSError, match="cannot open shared object"):
        ctypes.CDLL(str(lib / "libtorch_cuda.so"))

    info = tmp_path / "torch-2.13.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        "Name: torch\nRequires-Dist: sympy\nRequires-Dist: nvidia-cudnn-cu13==9\nRequires-Dist: triton==3\n"
    )
    assert remove_cuda(tmp_path) == ["libcudart.so.13", "libnccl.so.2"]
    library = ctypes.CDLL(str(lib / "libtorch_cuda.so"))
    assert (library.devices(), library.peers()) == (NO_DEVICE, NO_DEVICE)
    library.text.restype = ctypes.c_char_p
    assert b"stub" in library.text()
    assert (info / "METADATA").read_text() == "Name: torch\nRequires-Dist: sympy\n"
    assert remove_cuda(tmp_path) == []
