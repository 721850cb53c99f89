"""Memory that is freed stays with the process of a command, unless the user says otherwise."""

from __future__ import annotations

import json
import platform

import pytest

from audioldm2.cli import batch, generate, memory, serve
from tests.helpers import run_python

# A copy of 64 MiB touches 16384 pages. Only the first one may need new ones, also in a thread.
COPIES = """
import json, resource, threading
from audioldm2.cli.memory import keep_freed_memory
kept, block, found = keep_freed_memory(), bytes(2**26), []
def copy():
    bytearray(block)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        bytearray(block)
    found.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
copy()
thread = threading.Thread(target=copy)
thread.start()
thread.join()
print(json.dumps([kept, found]))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc")
@pytest.mark.parametrize("own", [{}, {"MALLOC_TOP_PAD_": "0"}, {"GLIBC_TUNABLES": "glibc.malloc.top_pad=0"}])
def test_freed_memory_is_used_again_unless_the_user_says_otherwise(own: dict[str, str]) -> None:
    kept, faults = json.loads(run_python("-c", COPIES, **own).stdout)
    assert kept is (not own)
    if kept:
        assert max(faults) < 1000
    else:
        assert min(faults) > 4 * 16000


def test_another_c_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    assert not memory.keep_freed_memory()


@pytest.mark.parametrize("command", [generate, batch, serve])
def test_commands_that_generate_keep_freed_memory(command, monkeypatch: pytest.MonkeyPatch) -> None:
    class Called(Exception):
        pass

    def keep() -> None:
        raise Called

    monkeypatch.setattr(command, "keep_freed_memory", keep)
    parser = command.parser()
    words = {generate: ["rain"], batch: ["table.csv", "-o", "out"], serve: []}[command]
    with pytest.raises(Called):
        command.run(parser, command.parse(parser, words))
