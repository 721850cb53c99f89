"""Running a batch: the sounds that are missing are generated and written. Estimating how long it takes."""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from audioldm2.arguments import check_count
from audioldm2.batch.generating import Engine, generate, local_engine
from audioldm2.batch.jobs import BATCH_SIZE, Failure, Job
from audioldm2.batch.manifest import Manifest, Record
from audioldm2.batch.planning import (
    PROGRESS_DELAY_S,
    FileOptions,
    Group,
    Plan,
    Request,
    in_groups,
    plan,
)
from audioldm2.editing.variation import first_step
from audioldm2.pipeline import AudioLDM2Pipeline
from audioldm2.quality_settings import NEUTRAL
from audioldm2.quoting import one_line, quoted

JobLike = Job | Mapping[str, Any] | str


class Report(NamedTuple):
    """The outcome of a batch.

    Attributes:
        sounds: the manifest's line of each sound, in the order of the jobs.
        failures: the jobs without a sound.
        generated: the number of sounds that this run generated; an earlier run generated the others.
    """

    sounds: list[Record]
    failures: list[Failure]
    generated: int


class Estimate(NamedTuple):
    """What a batch would generate.

    Attributes:
        requests: those that are not finished.
        finished: the number of jobs that are.
        failures: the jobs that are not valid.
        sound_seconds: the total length of the sounds to generate, in seconds, with all candidates.
        seconds: about how long it will take with the local engine.
    """

    requests: list[Request]
    finished: int
    failures: list[Failure]
    sound_seconds: float
    seconds: float


def run(
    jobs: Iterable[JobLike],
    pipe: AudioLDM2Pipeline,
    folder: str | Path,
    *,
    file_format: str = "wav",
    sampling_rate: int | None = None,
    sample_format: str | None = None,
    keep_all: bool = False,
    batch_size: int = BATCH_SIZE,
    engine: Engine | None = None,
    on_failure: Callable[[Failure], object] = lambda failure: None,
) -> Report:
    """Generate the sounds of jobs that are not in a folder yet.

    A run that was stopped, at any moment, is resumed by the same call. A sound is generated again if one of
    its settings or its file has changed. Files of jobs that are no longer in the list stay, and files that
    are not of a batch are never replaced. Equal names are numbered in the order of the jobs, so a job that is
    inserted before others of its name renames them, and they are generated again.

    Args:
        jobs: prompts, mappings of `Job`'s fields, or jobs. A sound to edit is a path, `{"prompt": "A cat",
            "audio": "dog.wav"}`; it is part of what a finished sound is compared by, with its content.
        pipe: the pipeline. Its recommended settings are the defaults. Changed weights are not noticed: use
            another folder.
        folder: where the sounds and manifest.jsonl go; created if it does not exist.
        file_format: "wav", "flac", "ogg", "mp3" or another type; all but WAV need soundfile.
        sampling_rate: in Hz; sounds are resampled to it. The checkpoint's by default.
        sample_format: "pcm16" or "float32", for types that have both.
        keep_all: keep all candidates of a job, not only the best.
        batch_size: the most sounds, counting candidates, that are generated at once.
        engine: where groups are generated, such as `audioldm2.engines.ray.RayEngine`; here by default.
        on_failure: called with each job that fails, at once.

    Returns:
        The manifest's lines, and the jobs that failed. They do not stop the others.

    Raises:
        ImportError: the type of file needs soundfile, which cannot be imported.
        OSError: no file can be written, or another process is writing into the folder.
        RuntimeError: the engine failed.
        TypeError, ValueError: an argument that cannot be used.

    Example:
        >>> pipe = AudioLDM2Pipeline.from_pretrained("tiny")
        >>> report = run([{"prompt": "Rain", "seed": 7}], pipe, "sounds")
        >>> report.sounds[0]["file"]
        'Rain.wav'
    """
    files = FileOptions(file_format, sampling_rate, sample_format, keep_all)
    check_count("batch_size", batch_size)
    failures: list[Failure] = []

    def failed(failure: Failure) -> None:
        failures.append(failure)
        on_failure(failure)

    planned = _planned(jobs, pipe, files, failed)
    invalid = len(failures)
    generated = 0
    with Manifest(folder) as manifest:
        records = _finished(planned, manifest, pipe)
        done = {*records}
        for request in planned.requests:
            if request.index not in records and (path := manifest.foreign(request)):
                done.add(request.index)
                failed(Failure(request.job.where, f"{path} is not a sound of this batch; move it away"))
        groups = _without(in_groups(planned, batch_size), done)
        total = sum(len(request.files) for request in planned.requests)
        there = sum(map(len, records.values()))
        with pipe.progress("Sounds", total, initial=there, unit="sound") as bar, _inner_bars(pipe):
            for result in (engine or local_engine(pipe))(groups) if groups else ():
                requests = [planned.requests[sound.index] for sound in result.sounds]
                added, unwritten = manifest.add(zip(requests, result.sounds, strict=True), files)
                for failure in (*result.failures, *unwritten):
                    failed(failure)
                for request, lines in added:
                    records[request.index] = lines
                    generated += len(lines)
                    bar.update(len(lines))
        lines = [line for index in sorted(records) for line in records[index]]
        manifest.arrange([line["file"] for line in lines])
    lost = len(planned.requests) - len(records) - (len(failures) - invalid)
    if lost:
        raise RuntimeError(f"the engine gave no result for {lost} jobs; run the batch again")
    return Report(lines, failures, generated)


def estimate(
    jobs: Iterable[JobLike],
    pipe: AudioLDM2Pipeline,
    folder: str | Path,
    *,
    file_format: str = "wav",
    sampling_rate: int | None = None,
    sample_format: str | None = None,
    keep_all: bool = False,
) -> Estimate:
    """What `run` would generate, and about how long it would take with the local engine.

    Nothing is written. The first sound that is missing is generated with two numbers of steps to measure this
    machine; the time of the others follows from their lengths and their steps. Feature caching and steps
    without guidance are faster than what is estimated.

    Args:
        jobs: as in `run`.
        pipe: as in `run`.
        folder: as in `run`; it need not exist.
        file_format: as in `run`.
        sampling_rate: as in `run`.
        sample_format: as in `run`.
        keep_all: as in `run`.

    Raises:
        ImportError, OSError, TypeError, ValueError: as in `run`.
        RuntimeError: the first sound that is missing cannot be generated.
    """
    files = FileOptions(file_format, sampling_rate, sample_format, keep_all)
    failures: list[Failure] = []
    planned = _planned(jobs, pipe, files, failures.append)
    records = _finished(planned, Manifest(folder).read(), pipe)
    missing = [request for request in planned.requests if request.index not in records]
    seconds = sum(_length(request) for request in missing)
    time_needed = 0.0
    if missing:
        fixed, per_step = _measured(pipe, missing[0], planned.sampling_rate)
        time_needed = sum(_length(request) * (fixed + per_step * _steps(request)) for request in missing)
    return Estimate(missing, len(records), failures, seconds, time_needed)


def _planned(
    jobs: Iterable[JobLike],
    pipe: AudioLDM2Pipeline,
    files: FileOptions,
    failed: Callable[[Failure], object],
) -> Plan:
    if isinstance(jobs, str | bytes | Mapping | Job) or not isinstance(jobs, Iterable):
        raise TypeError(f"jobs must be a list of prompts, mappings or jobs, got {quoted(jobs)}")
    valid = []
    for number, job in enumerate(jobs, 1):
        where = f"job {number}"
        try:
            valid.append(Job.of(job, where))
        except (TypeError, ValueError) as error:
            failed(Failure(where, one_line(error)))
    planned = plan(valid, pipe, files)
    for failure in planned.failures:
        failed(failure)
    return planned


def _finished(planned: Plan, manifest: Manifest, pipe: AudioLDM2Pipeline) -> dict[int, list[Record]]:
    """The lines of the requests that are finished, by the index of the request. Their files are read."""
    found = {}
    count = len(planned.requests)
    with pipe.progress("Checking files", count, leave=False, delay=PROGRESS_DELAY_S) as bar:
        for request in planned.requests:
            records = manifest.finished(request)
            if records is not None:
                found[request.index] = records
            bar.update()
    return found


def _without(groups: Sequence[Group], done: Collection[int]) -> list[Group]:
    """Groups without some requests, which are given by their indices."""
    left = []
    for group in groups:
        requests = tuple(request for request in group.requests if request.index not in done)
        if requests:
            left.append(group._replace(requests=requests))
    return left


@contextmanager
def _inner_bars(pipe: AudioLDM2Pipeline, hidden: bool = False) -> Iterator[None]:
    """Show the bars of a generation only while it runs, and on a terminal, unless they are `hidden`."""
    options = pipe.progress_bar_config
    on_terminal = getattr(options.get("file", sys.stderr), "isatty", lambda: False)()
    disabled = {"disable": True} if hidden or not on_terminal else {}
    pipe.set_progress_bar_config(**{**options, "leave": False, **disabled})
    try:
        yield
    finally:
        pipe.set_progress_bar_config(**options)


# --- how long it takes


def _length(request: Request) -> float:
    """Seconds of sound that are generated for a request."""
    return request.seconds * (request.job.num_waveforms_per_prompt or 1)


def _steps(request: Request) -> int:
    """The steps that are taken for a request."""
    steps, strength = request.job.steps or 0, request.job.strength
    if request.job.invert is not None:
        return 2 * steps  # about: those of the inversion, and most of them again
    return steps if strength is None else steps - first_step(steps, strength)


def _measured(pipe: AudioLDM2Pipeline, request: Request, sampling_rate: int) -> tuple[float, float]:
    """The time for a second of a request's sound without steps, and for each step that leaves nothing out.

    Raises:
        RuntimeError: the sound cannot be generated.
    """
    times = []
    few, more = 1, 3
    strength = None if request.job.strength is None else 1.0  # all of the steps are taken
    with _inner_bars(pipe, hidden=True):
        for steps in (few, few, more):  # the first call is slower than others
            whole: dict[str, Any] = dict.fromkeys(NEUTRAL)
            job = dataclasses.replace(request.job, **whole, num_inference_steps=steps, strength=strength)
            group = Group((dataclasses.replace(request, job=job),), sampling_rate)
            start = time.perf_counter()
            result = generate(pipe, group)
            if result.failures:
                raise RuntimeError(f"the time cannot be measured: {result.failures[0]}")
            times.append(time.perf_counter() - start)
    per_step = max(0.0, (times[2] - times[1]) / (more - few))
    fixed = max(0.0, times[1] - few * per_step)
    return fixed / _length(request), per_step / _length(request)
