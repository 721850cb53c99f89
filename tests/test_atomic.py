"""Files are replaced as a whole, keep their permissions, and what cannot be replaced is written in place."""

from __future__ import annotations

import os
import stat
import threading
from pathlib import Path

import pytest

from audioldm2 import atomic
from audioldm2.atomic import check_writable, replacing


def write(path: str | Path, content: str = "new") -> None:
    with replacing(path) as temporary:
        temporary.write_text(content)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture
def umask() -> None:
    old = os.umask(0o027)
    yield
    os.umask(old)


def test_a_new_file_follows_the_umask_and_an_old_one_keeps_its_permissions(tmp_path: Path, umask: None):
    write(tmp_path / "new")
    assert mode(tmp_path / "new") == 0o640
    for permissions in (0o600, 0o400, 0o755):
        path = tmp_path / f"{permissions:o}"
        path.write_text("old")
        path.chmod(permissions)
        with replacing(path) as temporary:
            assert mode(temporary) == 0o600, "it is private until it is complete"
            temporary.write_text("new")
        assert (path.read_text(), mode(path)) == ("new", permissions)


def test_the_owner_is_kept_where_that_is_allowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "file"
    path.write_text("old")
    path.chmod(0o664)
    status = path.stat()
    someone = os.stat_result((*status[:4], status.st_uid + 1, status.st_gid + 1, *status[6:]))
    calls: list[tuple[int, int]] = []

    def refused(file: Path, user: int, group: int) -> None:
        calls.append((user, group))
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "chown", lambda file, user, group: calls.append((user, group)))
    monkeypatch.setattr(atomic, "_status", lambda path: someone)
    write(path)
    assert calls == [(status.st_uid + 1, status.st_gid + 1)]
    assert mode(path) == 0o664
    monkeypatch.setattr(os, "chown", refused)
    write(path)
    assert calls[1:] == [(status.st_uid + 1, status.st_gid + 1), (-1, status.st_gid + 1)]
    assert mode(path) == 0o604, "another group must not get access"


def test_links_stay_and_their_targets_are_replaced(tmp_path: Path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("folder/target")
    (tmp_path / "second").symlink_to("link")
    write(tmp_path / "second", "one")  # a link to nothing yet
    assert (tmp_path / "folder" / "target").read_text() == "one"
    write(tmp_path / "link", "two")
    assert (tmp_path / "folder" / "target").read_text() == "two"
    assert (tmp_path / "link").is_symlink()
    assert os.listdir(tmp_path / "folder") == ["target"]
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(OSError, match=r"(?i)symbolic links"):
        write(tmp_path / "loop")


def test_long_names_and_names_that_are_too_long(tmp_path: Path):
    write(tmp_path / ("ü" * 120 + ".flac"))
    assert (tmp_path / ("ü" * 120 + ".flac")).read_text() == "new"
    with pytest.raises(OSError, match=r"(?i)too long"):
        write(tmp_path / ("a" * 256))


def test_devices_pipes_and_open_files_are_written_in_place(tmp_path: Path):
    write(os.devnull)
    assert stat.S_ISCHR(Path(os.devnull).stat().st_mode)
    os.mkfifo(tmp_path / "pipe")
    check_writable(tmp_path / "pipe")  # does not wait for a reader
    seen: list[str] = []
    reader = threading.Thread(target=lambda: seen.append((tmp_path / "pipe").read_text()))
    reader.start()
    write(tmp_path / "pipe", "sound")
    reader.join(60)
    assert seen == ["sound"]
    with open(tmp_path / "open", "w+") as file:
        file.write("before ")
        file.flush()
        write(f"/dev/fd/{file.fileno()}", "and after")
        check_writable(f"/dev/fd/{file.fileno()}")
    assert (tmp_path / "open").read_text() == "before and after"
    assert sorted(os.listdir(tmp_path)) == ["open", "pipe"]


@pytest.mark.parametrize(
    "error", [KeyboardInterrupt, SystemExit(143), OSError(28, "No space left on device")]
)
@pytest.mark.parametrize("target", ["file", os.devnull])
def test_a_failure_leaves_no_temporary_file(
    tmp_path: Path, error: BaseException, target: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))  # where the content for a device waits
    (tmp_path / "file").write_text("old")

    def fail() -> None:
        with replacing(tmp_path / target) as temporary:
            temporary.write_text("half")
            assert len(os.listdir(tmp_path)) == 2
            raise error

    with pytest.raises(error if isinstance(error, type) else type(error)):
        fail()
    assert os.listdir(tmp_path) == ["file"]
    assert (tmp_path / "file").read_text() == "old"
