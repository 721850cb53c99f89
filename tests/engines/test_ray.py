"""Batches on a Ray cluster of two workers on this machine: the local engine's sounds, and lost workers."""

from __future__ import annotations

import json
import os
import pickle
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from audioldm2 import AudioLDM2Pipeline, batch
from audioldm2.batch.manifest import MANIFEST
from audioldm2.batch.planning import FileOptions, Group, in_groups, plan
from audioldm2.cli import batch as command_parser, main
from audioldm2.engines.attempts import Attempts
from audioldm2.engines.cluster import Cluster, Node, Placement, check_address, connected, placement
from audioldm2.engines.ray import MAX_ATTEMPTS, RayEngine, Worker, one_line_errors, received
from tests.helpers import HANGS_AFTER, ROOT, load_pipeline, run_python

ray = pytest.importorskip("ray", reason="needs Ray: pip install '.[ray]'")

SHORT = {"num_inference_steps": 2, "audio_length_in_s": 0.64}
LONG_PROMPT = "rain " * 300
JOBS = [
    *({"prompt": prompt, **SHORT} for prompt in ("Rain", "A bell", "A rising sweep", "A slow drum beat") * 3),
    {"prompt": LONG_PROMPT, "name": "long", **SHORT},
    {"prompt": "Wind", "quality": "draft", "cache": "0,1", "guidance_interval": "0-0.5", **SHORT},
]


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """A Ray of this process with two CPUs, whatever the machine has."""
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def tiny() -> AudioLDM2Pipeline:
    return load_pipeline("tiny")


def load_tiny(folder: Path) -> AudioLDM2Pipeline:
    """Load tiny, and leave a file with the number of the process."""
    (folder / str(os.getpid())).touch()
    return load_pipeline("tiny")


def load_and_die_once(folder: Path) -> AudioLDM2Pipeline:
    """Load tiny. The first worker that comes to its third step is killed, in the middle of a group."""
    pipe = load_tiny(folder)
    steps = 0

    def kill(*_: Any) -> None:
        nonlocal steps
        steps += 1
        if steps == 3 and not (folder / "killed").exists():
            (folder / "killed").write_text(str(os.getpid()))
            os.kill(os.getpid(), signal.SIGKILL)

    pipe.unet.register_forward_hook(kill)
    return pipe


def files_of(folder: Path) -> dict[str, tuple[str, str]]:
    """The checksum and the key of each sound, by its file; each has one line."""
    lines = [json.loads(line) for line in (folder / MANIFEST).read_text(encoding="utf-8").splitlines()]
    assert len({line["file"] for line in lines}) == len(lines)
    assert {line["file"] for line in lines} == {path.name for path in folder.iterdir()} - {MANIFEST}
    return {line["file"]: (line["sha256"], line["key"]) for line in lines}


def groups_of(pipe: AudioLDM2Pipeline, jobs: list[dict[str, Any]]) -> list[Group]:
    planned = plan([batch.Job.of(job) for job in jobs], pipe, FileOptions())
    return in_groups(planned, 2)


def test_a_worker_makes_the_sounds_of_this_process(cluster: None, tiny: AudioLDM2Pipeline, tmp_path: Path):
    how = {"batch_size": 2, "sample_format": "float32"}  # floats show every bit
    jobs = [*JOBS[:3], JOBS[-1]]
    processes = tmp_path / "processes"
    processes.mkdir()
    engine = RayEngine(partial(load_tiny, processes), workers=1, threads=1)
    report = batch.run(jobs, tiny, tmp_path / "ray", engine=engine, **how)
    batch.run(jobs, tiny, tmp_path / "local", **how)
    assert report.generated == len(jobs)
    assert files_of(tmp_path / "ray") == files_of(tmp_path / "local")
    assert str(os.getpid()) not in {path.name for path in processes.iterdir()}


@pytest.mark.slow
def test_a_killed_worker_changes_nothing_about_the_sounds(
    cluster: None, tiny: AudioLDM2Pipeline, tmp_path: Path
):
    how = {"batch_size": 2, "sample_format": "float32"}  # floats show every bit
    processes = tmp_path / "processes"
    processes.mkdir()
    engine = RayEngine(partial(load_and_die_once, processes), workers=2, threads=1)
    # The workers' warnings arrive here.
    with pytest.warns(UserWarning, match="tokens"), pytest.warns(UserWarning, match="a worker was lost"):
        report = batch.run(JOBS, tiny, tmp_path / "ray", engine=engine, **how)
    with pytest.warns(UserWarning, match="tokens"):
        batch.run(JOBS, tiny, tmp_path / "local", **how)

    assert report.failures == []
    assert report.generated == len(JOBS)
    assert files_of(tmp_path / "ray") == files_of(tmp_path / "local")
    pids = {path.name for path in processes.iterdir()} - {"killed"}
    assert len(pids) == 3, "two workers, and one in the place of the one that was killed"
    assert (processes / "killed").read_text() in pids
    assert ray.is_initialized(), "the connection was not the engine's"

    # The other engine finds everything finished, so either can go on with what the other began.
    again = batch.run(JOBS, tiny, tmp_path / "ray", engine=None, **how)
    assert again.generated == 0
    assert len(again.sounds) == len(JOBS)


def test_a_worker_gives_up_what_was_lost_too_often(cluster: None, tiny: AudioLDM2Pipeline):
    attempts = ray.remote(num_cpus=0)(Attempts).remote()
    worker = Worker(lambda: tiny, 1, attempts)
    group, other = groups_of(tiny, [{"prompt": "Rain", **SHORT}, {"prompt": "Rain", **SHORT}, JOBS[3]])
    for _ in range(MAX_ATTEMPTS):
        ray.get(attempts.begin.remote("group 0"))
    result = received(worker({"number": 0, "group": pickle.dumps(group)})["payload"])
    assert result.sounds == []
    assert [failure.where for failure in result.failures] == [r.job.where for r in group.requests]
    assert "lost 3 times" in result.failures[0].reason
    assert len(received(worker({"number": 1, "group": pickle.dumps(other)})["payload"]).sounds) == 1

    def fail() -> AudioLDM2Pipeline:
        raise OSError("no such checkpoint\nand more")

    for _ in range(MAX_ATTEMPTS):
        payload = Worker(fail, 1, attempts)({"number": 2, "group": pickle.dumps(other)})["payload"]
        with pytest.raises(RuntimeError, match=r"^a worker cannot load the model: no such checkpoint$"):
            received(payload)
    payload = Worker(lambda: tiny, 1, attempts)({"number": 2, "group": pickle.dumps(other)})["payload"]
    with pytest.raises(RuntimeError, match=r"cannot load the model: its process was lost 3 times"):
        received(payload)


def test_a_connection_of_this_process_is_used_or_the_address_refused(cluster: None):
    with connected() as here:
        assert here.nodes == (Node(cpus=2, gpus=here.gpus),)
    assert ray.is_initialized()
    with pytest.raises(ValueError, match="address: this process is connected"), connected("auto"):
        pass


# --- without a cluster

LAPTOP = Cluster((Node(8, 0),))
MIXED = Cluster((Node(0, 0), Node(8, 0), Node(4, 0)))
GPUS = Cluster((Node(16, 0), Node(64, 4), Node(32, 4)))


@pytest.mark.parametrize(
    ("cluster", "workers", "threads", "expected"),
    [
        (LAPTOP, None, None, Placement(1, 8, 8, 0)),
        (LAPTOP, 2, None, Placement(2, 4, 4, 0)),
        (LAPTOP, 3, None, Placement(3, 2, 2, 0)),
        (LAPTOP, 2, 1, Placement(2, 1, 1, 0)),
        (MIXED, None, None, Placement(2, 4, 4, 0)),
        (MIXED, 3, None, Placement(3, 4, 4, 0)),
        (GPUS, None, None, Placement(8, 8, 1, 1)),
        (GPUS, 2, 3, Placement(2, 3, 1, 1)),
    ],
)
def test_workers_share_the_cpus_of_their_machines(
    cluster: Cluster, workers: int | None, threads: int | None, expected: Placement
):
    assert placement(cluster, workers, threads, cluster.gpus > 0) == expected


@pytest.mark.parametrize(
    ("cluster", "workers", "threads", "use_gpus", "message"),
    [
        (LAPTOP, 9, None, False, "workers: 9 do not fit into the Ray cluster, which has 8 CPUs"),
        (LAPTOP, 2, 5, False, "workers: 2 of 5 threads do not fit"),
        (GPUS, 9, None, True, "8 GPUs on 2 machines"),
        (LAPTOP, None, None, True, "workers: the Ray cluster has no GPUs"),
        (Cluster((Node(0, 0),)), None, None, False, "workers: the Ray cluster has no CPUs"),
    ],
)
def test_a_cluster_that_is_too_small_is_refused(
    cluster: Cluster, workers: int | None, threads: int | None, use_gpus: bool, message: str
):
    with pytest.raises(ValueError, match=message):
        placement(cluster, workers, threads, use_gpus)


@pytest.mark.parametrize("name", ["workers", "threads"])
def test_numbers_are_checked_before_anything_starts(name: str):
    with pytest.raises(ValueError, match=name):
        RayEngine(partial(load_pipeline, "tiny"), **{name: 0})


@pytest.mark.parametrize(
    ("address", "error", "message"),
    [
        ("127.0.0.1:{closed}", ConnectionError, r"no Ray cluster at 127\.0\.0\.1:\d+: Connection refused"),
        ("somewhere", ValueError, "'somewhere' is not the address of a Ray cluster; use HOST:PORT or auto"),
        ("ray://127.0.0.1:10001", ValueError, "use the cluster's HOST:PORT"),
    ],
)
def test_an_address_without_a_cluster_is_refused_at_once(address: str, error: type[Exception], message: str):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        closed = listener.getsockname()[1]
    with pytest.raises(error, match=message):
        check_address(address.format(closed=closed))


def test_errors_of_ray_are_one_line():
    def fail() -> None:
        import a_package_that_only_this_machine_has  # noqa: F401

    try:
        fail()
    except ImportError as error:
        failed = ray.exceptions.RayTaskError("Map", traceback.format_exc(), error)
    with pytest.raises(RuntimeError) as raised, one_line_errors():
        raise failed
    assert str(raised.value) == (
        "Ray stopped the batch, RayTaskError: ModuleNotFoundError: No module named "
        "'a_package_that_only_this_machine_has'; what is finished stays"
    )


# --- the command

PAGE = ROOT / "docs" / "many-machines.md"


def test_the_commands_of_the_page_are_valid():
    text = PAGE.read_text(encoding="utf-8").replace("\\\n", " ")
    commands = re.findall(r"^.*?audioldm2 batch (.+)$", text, re.MULTILINE)
    assert len(commands) == 5
    for command in commands:
        options = command_parser.parse(command_parser.parser(), shlex.split(command, comments=True))
        assert options.engine == "ray"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--device", "cuda:1"], "argument --device: a worker of --engine ray sees one GPU, which is cuda"),
        (["--dry-run"], "argument --dry-run: measures this machine; leave out --engine"),
        (["--threads", "0"], "argument --threads: must be an integer of at least 1"),
    ],
)
def test_options_that_ray_cannot_use_are_refused(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(SystemExit, match="2"):
        main([*batch_command(Path("prompts.txt"), Path("sounds"), "--engine", "ray"), *options])
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_the_code_of_the_page_runs(cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(
        r"^```python\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
    )
    names: dict[str, Any] = {}
    exec(compile(code, PAGE.name, "exec"), names)
    assert [sound["file"] for sound in names["report"].sounds] == ["A-rising-sweep.wav", "Rain.wav"]


def batch_command(table: Path, folder: Path, *options: str) -> list[str]:
    """The arguments of a batch of short sounds."""
    short = ("--model", "tiny", "--steps", "2", "--duration", "0.64", "--batch-size", "2")
    return ["batch", str(table), "-o", str(folder), *short, "--sample-format", "float32", *options]


def processes_with(mark: str) -> list[str]:
    """The processes whose environment has a mark: a command and all that it started."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (path / "environ").read_bytes():
                found.append((path / "cmdline").read_text())
        except OSError:
            continue  # it has ended, or is another user's
    return found


def wait_until(condition: Any, what: str) -> None:
    """Wait for a condition, as long as a busy machine may need."""
    deadline = time.monotonic() + HANGS_AFTER
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.1)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="looks for processes in /proc")
def test_a_batch_that_is_interrupted_or_killed_leaves_no_process_and_goes_on(tmp_path: Path):
    table = tmp_path / "prompts.txt"
    table.write_text("".join(f"Rain of {word}\n" for word in ("frogs", "glass", "stones") for _ in range(20)))
    folder = tmp_path / "ray"
    mark = f"AUDIOLDM2_MARK={tmp_path}"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "AUDIOLDM2_MARK": str(tmp_path)}
    same = ("--threads", "1", "--steps", "20")  # with fewer steps, all is done before a signal arrives
    options = batch_command(table, folder, "--engine", "ray", "--workers", "2", *same)

    def lines() -> int:
        manifest = folder / MANIFEST
        return manifest.read_bytes().count(b"\n") if manifest.exists() else 0

    def stop_after_a_sound(number: signal.Signals) -> tuple[int, str]:
        before = lines()
        with subprocess.Popen(
            [sys.executable, "-m", "audioldm2", *options],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        ) as command:
            wait_until(lambda: lines() > before or command.poll() is not None, "nothing was generated")
            # Ctrl-C goes to all processes of a terminal's group.
            (os.killpg if number == signal.SIGINT else os.kill)(command.pid, number)
            _, said = command.communicate(timeout=HANGS_AFTER)
        wait_until(lambda: not processes_with(mark), f"processes were left after {number.name}")
        assert before < lines() < 60
        return command.returncode, said

    code, said = stop_after_a_sound(signal.SIGINT)
    assert code == 130, said
    assert said.endswith(
        "audioldm2: error: interrupted; finished sounds stay; run the same command again to continue\n"
    )
    assert "Traceback" not in said
    assert stop_after_a_sound(signal.SIGTERM)[0] == 143
    assert stop_after_a_sound(signal.SIGKILL)[0] == -signal.SIGKILL

    run_python("-m", "audioldm2", *options)
    assert main(batch_command(table, tmp_path / "local", *same)) == 0
    assert len(files_of(folder)) == 60
    assert files_of(folder) == files_of(tmp_path / "local")


@pytest.mark.slow
def test_the_command_uses_a_cluster_that_is_there(cluster: None, tmp_path: Path):
    address = ray.get_runtime_context().gcs_address
    table = tmp_path / "prompts.txt"
    table.write_text("Rain\nA bell\n")
    options = batch_command(table, tmp_path / "ray", "--engine", "ray")
    done = run_python("-m", "audioldm2", *options, "--address", address, cwd=tmp_path)
    assert done.stdout == f"{tmp_path / 'ray'}: 2 sounds, 2 new\n"
    assert set(files_of(tmp_path / "ray")) == {"Rain.wav", "A-bell.wav"}
    assert ray.get(ray.remote(num_cpus=0)(lambda: 7).remote()) == 7, "the cluster was stopped"
    for wrong, message in (
        (["--workers", "3"], "argument --workers: 3 do not fit into the Ray cluster"),
        (["--device", "cuda"], "argument --device: the Ray cluster has no GPU"),
    ):
        done = run_python("-m", "audioldm2", *options, *wrong, check=False, RAY_ADDRESS=address)
        assert done.returncode == 2
        assert message in done.stderr.splitlines()[-1]


def load_and_die(folder: Path) -> AudioLDM2Pipeline:
    """Load tiny. A worker that generates 0.32 seconds is killed."""
    pipe = load_tiny(folder)

    def kill(module: Any, arguments: tuple[Any, ...]) -> None:
        if arguments[0].shape[2] == 3:  # the latents of 0.32 s
            os.kill(os.getpid(), signal.SIGKILL)

    pipe.unet.register_forward_pre_hook(kill)
    return pipe


@pytest.mark.slow
def test_a_group_that_kills_its_workers_does_not_stop_the_others(
    cluster: None, tiny: AudioLDM2Pipeline, tmp_path: Path
):
    processes = tmp_path / "processes"
    processes.mkdir()
    jobs = [*JOBS[:4], {"prompt": "Rain", **SHORT, "audio_length_in_s": 0.32}, *JOBS[4:8]]
    engine = RayEngine(partial(load_and_die, processes), workers=1, threads=1)
    report = batch.run(jobs, tiny, tmp_path / "ray", engine=engine)
    assert [failure.where for failure in report.failures] == ["job 5"]
    assert report.failures[0].reason.startswith("the worker that generated it was lost 3 times")
    assert len(report.sounds) == 8
    assert len(list(processes.iterdir())) == MAX_ATTEMPTS + 1
