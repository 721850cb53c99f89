"""Make PyPI's CUDA build of PyTorch run on a CPU without the CUDA packages, for tests of versions.

For Linux, PyPI has CUDA builds only, which bring several GB of NVIDIA libraries that a CPU never calls.
PyTorch's own index has CPU builds. Where it cannot be reached, `remove_cuda` makes a CUDA build importable
that was installed with `pip install --no-deps torch`: each missing library is replaced by a stub, whose
functions return cudaErrorNoDevice, and the requirements on NVIDIA's packages and Triton are removed from the
metadata. What PyTorch computes on the CPU is unchanged. Needs a C compiler and binutils; Linux only.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import defaultdict
from pathlib import Path

NO_DEVICE = 100  # cudaErrorNoDevice: torch.cuda.is_available() is False
CUDA_LIBRARY = re.compile(r"lib(cu|nv|nccl)")
CUDA_FUNCTION = re.compile(r"cu|nv|nccl|__cuda")
CUDA_REQUIREMENT = re.compile(r"Requires-Dist: (nvidia|cuda|triton)")


def remove_cuda(site_packages: Path) -> list[str]:
    """Make the torch installed in `site_packages` independent of the CUDA libraries.

    Returns:
        The names of the libraries that were replaced; empty for a CPU build.
    """
    replaced = write_stubs(site_packages / "torch" / "lib")
    for metadata in site_packages.glob("torch-*.dist-info/METADATA"):
        lines = metadata.read_text(encoding="utf-8").splitlines(keepends=True)
        kept = [line for line in lines if not CUDA_REQUIREMENT.match(line)]
        metadata.write_text("".join(kept), encoding="utf-8")
    return replaced


def write_stubs(folder: Path) -> list[str]:
    """Write a stub into `folder` for each CUDA library that the libraries there need and lack.

    Each stub has the functions, and the symbol versions, under which they are looked up. Functions without a
    version are found in any loaded library; the stub of CUDA's runtime defines them.
    """
    libraries = sorted(folder.glob("*.so*"))
    needed: set[str] = set()
    library_of: dict[str, str] = {}  # symbol version -> library
    functions: defaultdict[str, set[str]] = defaultdict(set)  # symbol version -> undefined functions
    for library in libraries:
        needed |= set(re.findall(r"NEEDED.*\[(.*)\]", _output("readelf", "--dynamic", "--wide", library)))
        name = ""
        for line in _output("readelf", "--version-info", "--wide", library).splitlines():
            if match := re.search(r"Version: \d+  File: (\S+)", line):
                name = match[1]
            elif name and (match := re.search(r"Name: (\S+)  Flags", line)):
                library_of[match[1]] = name
        for line in _output("nm", "--dynamic", "--undefined-only", library).splitlines():
            function, _, version = line.split()[-1].partition("@")
            functions[version.lstrip("@")].add(function)
    present = {library.name for library in libraries}
    missing = sorted(name for name in needed - present if CUDA_LIBRARY.match(name))
    for name in missing:
        versions = {version: functions[version] for version, owner in library_of.items() if owner == name}
        unversioned = {f for f in functions[""] if CUDA_FUNCTION.match(f)} if "cudart" in name else set()
        _compile(folder / name, versions, unversioned)
    return missing


def _compile(library: Path, versions: dict[str, set[str]], unversioned: set[str]) -> None:
    """Compile a library whose functions return an error and do nothing."""
    names = sorted(unversioned.union(*versions.values()))
    nodes = [f"{version} {{ {' '.join(f'{f};' for f in sorted(fs))} }};" for version, fs in versions.items()]
    with tempfile.TemporaryDirectory() as folder:
        source, script = Path(folder, "stub.c"), Path(folder, "versions")
        source.write_text("".join(f"{_stub(name)}\n" for name in names))
        script.write_text("\n".join(nodes) or "{ *; };")
        flags = ["-shared", "-fPIC", "-w", "-fno-builtin", f"-Wl,-soname,{library.name}"]
        _output("cc", *flags, f"-Wl,--version-script={script}", "-o", library, source)


def _stub(name: str) -> str:
    """The C definition of a function that returns an error or, for texts, says that it is a stub."""
    if name.endswith(("ErrorString", "ErrorName")):
        return f'const char *{name}(void) {{ return "no CUDA: this function is a stub"; }}'
    return f"int {name}(void) {{ return {NO_DEVICE}; }}"


def _output(*command: str | Path) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
