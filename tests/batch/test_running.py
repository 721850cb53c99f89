"""Batches: the sounds of a folder, going on after any stop, and failures that stay alone."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from audioldm2 import AudioLDM2Pipeline, batch, cli, read_wav
from audioldm2.batch.generating import Result, Sound
from audioldm2.batch.manifest import MANIFEST, Manifest, read_manifest
from audioldm2.batch.planning import FileOptions, Group, in_groups, plan
from tests.helpers import load_pipeline, seeded

SHORT = {"duration": 0.64, "steps": 2}
JOBS: list[dict[str, Any]] = [
    {"prompt": "A rising sweep", "seed": 3, **SHORT},
    {"prompt": "Rain", "candidates": 2, "negative": "noise", **SHORT},
    {"prompt": "A rising sweep", "guidance": 1, **SHORT},
    {"prompt": "A falling sweep", "scheduler": "ddim", "eta": 0.5, **SHORT},
    {"prompt": "A falling sweep", **SHORT},
]


@pytest.fixture(scope="module")
def tiny() -> AudioLDM2Pipeline:
    return load_pipeline("tiny")


@pytest.fixture(scope="module")
def finished(tiny: AudioLDM2Pipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which all of `JOBS` are finished; copy it before changing it."""
    folder = tmp_path_factory.mktemp("batch") / "sounds"
    report = batch.run(JOBS, tiny, folder)
    assert (report.failures, report.generated) == ([], 5)
    return folder


def fake_engine(groups: Sequence[Group]) -> Iterator[Result]:
    """Noise from each request's seed, without a model."""
    for group in groups:
        sounds = []
        for request in group.requests:
            waveforms = 0.1 * torch.randn(len(request.files), 800, generator=seeded(request.job.seed or 0))
            sounds.append(Sound(request.index, waveforms.numpy(), None, 0.0))
        yield Result(sounds, [])


def check_folder(folder: Path, count: int) -> dict[str, dict[str, Any]]:
    """The manifest by file, after checking that it and the folder agree, and that nothing else is there."""
    lines = [json.loads(line) for line in (folder / MANIFEST).read_text("utf-8").splitlines()]
    records = {line["file"]: line for line in lines}
    assert len(records) == len(lines) == count
    assert {path.name for path in folder.iterdir()} == {MANIFEST, *records}
    for name, record in records.items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == record["sha256"]
    return records


def test_the_manifest_says_how_each_sound_was_made(finished: Path) -> None:
    records = check_folder(finished, 5)
    assert list(records) == [
        *("A-rising-sweep.wav", "Rain.wav", "A-rising-sweep-2.wav"),
        *("A-falling-sweep.wav", "A-falling-sweep-2.wav"),
    ]
    rain = records["Rain.wav"]
    assert (rain["prompt"], rain["negative_prompt"], rain["checkpoint"]) == ("Rain", "noise", "tiny")
    assert (rain["guidance_scale"], rain["num_inference_steps"], rain["sampling_rate"]) == (2.0, 2, 16000)
    assert rain["revision"].startswith("audioldm2-torch")
    assert (rain["seconds"], rain["candidate"], rain["num_waveforms_per_prompt"]) == (0.64, 0, 2)
    assert -1 < rain["score"] < 1
    assert records["A-rising-sweep.wav"]["score"] is None
    assert records["A-falling-sweep.wav"]["scheduler"] == "DDIMScheduler"


def test_each_sound_is_that_of_a_generation_with_its_seed(tiny: AudioLDM2Pipeline, finished: Path) -> None:
    records = check_folder(finished, 5)
    own = tiny.scheduler
    for name, job in zip(records, JOBS, strict=True):
        tiny.scheduler = batch.planning.scheduler_of(batch.Job.of(job), tiny)
        alone = tiny(
            job["prompt"],
            negative_prompt=job.get("negative"),
            num_inference_steps=2,
            audio_length_in_s=0.64,
            guidance_scale=job.get("guidance", 2.0),
            num_waveforms_per_prompt=job.get("candidates", 1),
            eta=job.get("eta", 0.0),
            generator=seeded(records[name]["seed"]),
        )
        tiny.scheduler = own
        stored, rate = read_wav(finished / name)
        assert rate == 16000
        assert np.abs(stored[0].numpy() - alone.audios[0]).max() <= 1e-4
        assert stored.std() > 5e-4, "comparing silence proves nothing"


def test_a_group_has_one_length_of_prompt(tiny: AudioLDM2Pipeline) -> None:
    jobs = [batch.Job(prompt) for prompt in ("Rain", "A low steady tone", "Wind", "A high steady tone")]
    groups = in_groups(plan(jobs, tiny, FileOptions()), batch_size=8)
    assert [[request.job.prompt for request in group.requests] for group in groups] == [
        ["Rain", "Wind"],
        ["A low steady tone", "A high steady tone"],
    ]
    planned = plan([batch.Job("Rain", num_waveforms_per_prompt=3) for _ in range(5)], tiny, FileOptions())
    assert [len(group.requests) for group in in_groups(planned, batch_size=8)] == [2, 2, 1]
    assert [len(group.requests) for group in in_groups(planned, batch_size=1)] == [1] * 5


def generated(jobs: Sequence[dict[str, Any]], pipe: AudioLDM2Pipeline, folder: Path, **options: Any) -> int:
    report = batch.run(jobs, pipe, folder, engine=fake_engine, **options)
    assert report.failures == []
    assert len(report.sounds) == len(jobs)
    return report.generated


def test_only_what_is_missing_or_changed_is_made(tiny: AudioLDM2Pipeline, tmp_path: Path) -> None:
    assert generated(JOBS, tiny, tmp_path) == 5
    before = check_folder(tmp_path, 5)
    assert generated(JOBS, tiny, tmp_path) == 0
    changed = [*JOBS[:1], {**JOBS[1], "seed": 9}, *JOBS[2:], {"prompt": "Wind", **SHORT}]
    assert generated(changed, tiny, tmp_path) == 2
    after = check_folder(tmp_path, 6)
    assert {name for name in before if before[name] != after[name]} == {"Rain.wav"}
    (tmp_path / "Wind.wav").unlink()
    (tmp_path / "Rain.wav").write_bytes((tmp_path / "Rain.wav").read_bytes()[:-1])
    assert generated(changed, tiny, tmp_path) == 2
    with open(tmp_path / MANIFEST, "ab") as file:
        file.write(b'{"file": "half')
    (tmp_path / ".Rain-0123456789abcdef.wav").write_bytes(b"RIFF")
    assert generated(changed, tiny, tmp_path) == 0
    assert generated(changed, tiny, tmp_path, sampling_rate=16000) == 0
    assert generated(changed, tiny, tmp_path, sample_format="float32") == 6
    check_folder(tmp_path, 6)
    assert generated(changed[:1], tiny, tmp_path, sample_format="float32") == 0
    assert "Wind.wav" in check_folder(tmp_path, 6)


def test_a_process_that_is_killed_at_any_moment_loses_nothing(
    tiny: AudioLDM2Pipeline, tmp_path: Path
) -> None:
    # Forked children with an engine without a model: many kills in little time. tests/batch/test_killed.py
    # kills the command itself.
    jobs = [{"prompt": f"Sound {i}", **SHORT} for i in range(40)]
    random.seed(0)
    known: dict[str, Any] = {}
    kills = 0
    while kills < 25:
        child = os.fork()
        if child == 0:
            batch.run(jobs, tiny, tmp_path, engine=slowly, batch_size=4)
            os._exit(0)
        time.sleep(random.uniform(0.005, 0.12))
        os.kill(child, signal.SIGKILL)
        kills += os.WIFSIGNALED(os.waitpid(child, 0)[1])
        found, _ = read_manifest(tmp_path / MANIFEST)
        assert known.items() <= found.items(), "a finished sound was lost or made again"
        known = found
        if len(found) == len(jobs):
            break
    assert kills > 5
    made = generated(jobs, tiny, tmp_path, batch_size=4)
    assert made == len(jobs) - len(known)
    records = check_folder(tmp_path, len(jobs))
    whole = tmp_path / "whole"
    generated(jobs, tiny, whole, batch_size=4)
    assert {name: each["sha256"] for name, each in records.items()} == {
        name: each["sha256"] for name, each in check_folder(whole, len(jobs)).items()
    }


def slowly(groups: Sequence[Group]) -> Iterator[Result]:
    for result in fake_engine(groups):
        time.sleep(0.01)
        yield result


def test_all_candidates_can_be_kept_in_any_type_at_any_rate(tiny: AudioLDM2Pipeline, tmp_path: Path) -> None:
    soundfile = pytest.importorskip("soundfile")
    jobs = [{"prompt": "Rain", "candidates": 3, **SHORT}, {"prompt": "Wind", "name": "w.flac", **SHORT}]
    report = batch.run(jobs, tiny, tmp_path, file_format="ogg", sampling_rate=48000, keep_all=True)
    *rain, wind = report.sounds
    assert [sound["file"] for sound in rain] == [f"Rain-candidate-{i}.ogg" for i in (1, 2, 3)]
    scores = [sound["score"] for sound in rain]
    assert scores == sorted(scores, reverse=True)
    assert (wind["file"], wind["sampling_rate"]) == ("w.flac", 48000)
    for sound in report.sounds:
        info = soundfile.info(str(tmp_path / sound["file"]))
        assert (info.samplerate, info.duration) == (48000, pytest.approx(0.64, abs=0.01))
        assert soundfile.read(str(tmp_path / sound["file"]))[0].std() > 0.001
    assert soundfile.info(str(tmp_path / "w.flac")).format == "FLAC"
    for options, reason in [
        ({"file_format": "mid"}, "file_format must be one of wav"),
        ({"file_format": "mp3", "sample_format": "float32"}, "lossy"),
        ({"file_format": "mp3", "sampling_rate": 12345}, "12345 Hz cannot be written"),
        ({"batch_size": 0}, "batch_size must be an integer of at least 1"),
    ]:
        with pytest.raises(ValueError, match=reason):
            batch.run(jobs, tiny, tmp_path / "none", **options)
    assert not (tmp_path / "none").exists()


def test_a_job_that_fails_stops_no_other(
    tiny: AudioLDM2Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = AudioLDM2Pipeline.__call__

    def failing(pipe: AudioLDM2Pipeline, prompt: list[str], **arguments: Any) -> Any:
        if "Snow" in prompt:
            raise RuntimeError("no snow\nat all")
        return call(pipe, prompt, **arguments)

    monkeypatch.setattr(AudioLDM2Pipeline, "__call__", failing)
    jobs = [{"prompt": each, **SHORT} for each in ("Rain", "Snow", "Wind")]
    told: list[batch.Failure] = []
    jobs += [{"prompt": "Rain", "steps": 9999}, {"prompt": "Rain", "transcription": "hello"}]
    report = batch.run([*jobs, {"prompt": ""}], tiny, tmp_path, on_failure=told.append)
    assert [sound["file"] for sound in report.sounds] == ["Rain.wav", "Wind.wav"]
    assert told == report.failures
    assert sorted(map(str, told)) == [
        "job 2: no snow",
        "job 4: num_inference_steps must be an integer from 1 to 1000, got 9999",
        "job 5: transcription is for the speech checkpoints; this one takes only a prompt",
        "job 6: prompt is empty; describe the sound",
    ]
    assert "Traceback" in next(failure.details for failure in told if failure.where == "job 2")
    monkeypatch.undo()
    again = batch.run(jobs[:3], tiny, tmp_path)
    assert (again.generated, len(again.sounds), again.failures) == (1, 3, [])


def test_a_file_that_cannot_be_written_fails_its_job_alone(tiny: AudioLDM2Pipeline, tmp_path: Path) -> None:
    def engine(groups: Sequence[Group]) -> Iterator[Result]:
        (tmp_path / "Rain.wav").mkdir()
        for result in fake_engine(groups):
            for sound in result.sounds:
                sound.waveforms[:] *= np.nan if sound.index == 2 else 1
            yield result

    report = batch.run(["Rain", "Wind", "Snow"], tiny, tmp_path, engine=engine)
    assert [sound["file"] for sound in report.sounds] == ["Wind.wav"]
    reasons = [f"job 1: {tmp_path / 'Rain.wav'}: the output path is a folder", "job 3: 800 of 800 samples"]
    for failure, reason in zip(report.failures, reasons, strict=True):
        assert str(failure).startswith(reason)


def test_a_file_of_the_users_is_not_replaced(tiny: AudioLDM2Pipeline, tmp_path: Path) -> None:
    (tmp_path / "Rain.wav").write_bytes(b"mine")
    report = batch.run(["Rain", "Wind"], tiny, tmp_path, engine=fake_engine)
    assert [sound["file"] for sound in report.sounds] == ["Wind.wav"]
    (failure,) = report.failures
    assert str(failure) == f"job 1: {tmp_path / 'Rain.wav'} is not a sound of this batch; move it away"
    assert (tmp_path / "Rain.wav").read_bytes() == b"mine"


@pytest.mark.parametrize("jobs", ["Rain", {"prompt": "Rain"}, batch.Job("Rain"), None, 3])
def test_what_is_not_a_list_of_jobs_is_refused(tiny: AudioLDM2Pipeline, tmp_path: Path, jobs: Any) -> None:
    with pytest.raises(TypeError, match="jobs must be a list of prompts, mappings or jobs"):
        batch.run(jobs, tiny, tmp_path / "none", engine=fake_engine)
    assert not (tmp_path / "none").exists()


def test_an_engine_must_return_every_job(tiny: AudioLDM2Pipeline, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="the engine gave no result for 1 jobs"):
        batch.run(JOBS[:1], tiny, tmp_path, engine=lambda groups: iter(()))


def test_a_folder_is_written_by_one_process(tiny: AudioLDM2Pipeline, tmp_path: Path) -> None:
    with Manifest(tmp_path), pytest.raises(OSError, match="another process is writing sounds"):
        batch.run(JOBS, tiny, tmp_path, engine=fake_engine)
    (tmp_path / MANIFEST).write_text('{"key": 1}\n')
    with pytest.raises(ValueError, match=r"manifest\.jsonl:1 is not a line of a batch's manifest"):
        batch.run(JOBS, tiny, tmp_path, engine=fake_engine)
    (tmp_path / MANIFEST).write_text('{"file": "../a.wav", "key": "", "sha256": ""}\n')
    with pytest.raises(ValueError, match="is not a line of a batch's manifest"):
        batch.run(JOBS, tiny, tmp_path, engine=fake_engine)


def test_the_estimate_writes_nothing(tiny: AudioLDM2Pipeline, finished: Path, tmp_path: Path) -> None:
    jobs = [*JOBS, {"prompt": "Wind", "candidates": 2, **SHORT}, {"prompt": 3}]
    found = batch.estimate(jobs, tiny, finished)
    assert (found.finished, len(found.failures), found.sound_seconds) == (5, 1, 1.28)
    assert [request.files for request in found.requests] == [("Wind.wav",)]
    assert 0.01 < found.seconds < 60
    check_folder(finished, 5)
    batch.estimate(JOBS[:1], tiny, tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_equal_jobs_get_different_seeds_that_stay(tiny: AudioLDM2Pipeline) -> None:
    jobs = [batch.Job("Rain"), batch.Job("Rain"), batch.Job("Rain", name="other"), batch.Job("Wind")]
    seeds = [request.job.seed for request in plan(jobs, tiny, FileOptions()).requests]
    assert len({*seeds}) == 4
    assert seeds == [request.job.seed for request in plan(jobs, tiny, FileOptions()).requests]


# --- the command


def test_the_command_reports_bad_rows_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("prompts.csv").write_text("prompt,steps\nRain,\nWind,9999\nSnow,x\n")
    options = ["--model", "tiny", "--device", "cpu", "--duration", "0.64", "--steps", "2", "--quiet"]
    arguments = ["batch", "prompts.csv", "-o", "a/b", *options]
    assert cli.main(arguments) == 1
    out, err = capsys.readouterr()
    assert out == "a/b: 1 sound, 1 new\n"
    wind = "prompts.csv:3: steps must be an integer from 1 to 1000, got 9999"
    snow = "prompts.csv:4: steps must be an integer, got 'x'"
    assert err.splitlines() == [
        *(f"audioldm2: error: {snow}", f"audioldm2: error: {wind}"),
        *("audioldm2: 2 rows without a sound:", f"audioldm2:   {wind}", f"audioldm2:   {snow}"),
    ]
    assert check_folder(tmp_path / "a" / "b", 1)["Rain.wav"]["num_inference_steps"] == 2
    Path("prompts.csv").write_text("prompt,steps\nRain,\n")
    assert cli.main(arguments) == 0
    assert capsys.readouterr().out == "a/b: 1 sound, 0 new, 1 already there\n"
    assert cli.main([*arguments, "--seed", "5", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("Rain.wav: Rain (0.64 s, 2 steps, seed 5)\n1 row to generate, 1 s of sound, about ")
    assert out.endswith(" with tiny on this machine; 0 rows already finished\n")


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["prompts.csv"], "the folder is missing"),
        (["-o", "a"], "the table is missing"),
        (["prompts.csv", "-o", "-"], "into a folder, not to standard output"),
        (["missing.csv", "-o", "a"], "missing.csv: No such file"),
        (["prompts.xls", "-o", "a"], "prompts.xls: No such file"),
        (["prompts", "-o", "a"], "unknown type of table; use .csv"),
        (["prompts.csv", "-o", "prompts.csv"], "the output path is not a folder"),
        (["prompts.csv", "-o", "a", "--format", "mp3", "--sample-format", "float32"], "lossy"),
        (["prompts.csv", "-o", "a", "--workers", "2"], "argument --workers: is for --engine ray"),
        (["prompts.csv", "-o", "a", "--steps", "9999"], "--steps must be an integer from 1 to 1000"),
        (["prompts.csv", "more.csv", "-o", "a"], "there is one table"),
    ],
)
def test_mistakes_are_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    reason: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("prompts.csv", "prompts"):
        Path(name).write_text("prompt\nRain\n")
    try:
        code = cli.main(["batch", *arguments, "--model", "tiny", "--device", "cpu", "--quiet"])
    except SystemExit as stop:
        code = int(str(stop.code))
    assert code in (1, 2)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert reason in err
    assert {path.name for path in tmp_path.iterdir()} == {"prompts.csv", "prompts"}
