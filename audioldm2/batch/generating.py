"""From a group of requests to its sounds. An engine calls `generate` wherever the group is generated."""

from __future__ import annotations

import dataclasses
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from audioldm2.audio.resample import resample
from audioldm2.batch.jobs import Failure, Job
from audioldm2.batch.planning import SHARED, SHARED_OF_EDITS, SHARED_OF_QUALITY, Group, Request, scheduler_of
from audioldm2.batch.sources import check_unchanged
from audioldm2.editing.generations import with_inverted, with_prompts
from audioldm2.pipeline import AudioLDM2Pipeline
from audioldm2.quoting import one_line


@dataclass(frozen=True)
class Sound:
    """The sounds of a request.

    Attributes:
        index: of the request, in its plan.
        waveforms: the candidates that are stored, the best one first, (candidates, samples), float32.
        scores: their cosine similarities to the prompt, by CLAP; None if there was only one candidate.
        generated_in_s: the request's share of the time that its group took, in seconds.
    """

    index: int
    waveforms: np.ndarray
    scores: list[float] | None
    generated_in_s: float


class Result(NamedTuple):
    """The outcome of a group.

    Attributes:
        sounds: those that were generated.
        failures: the jobs whose generation failed.
    """

    sounds: list[Sound]
    failures: list[Failure]


# Generates groups, in any order.
Engine = Callable[[Sequence[Group]], Iterator[Result]]


def local_engine(pipe: AudioLDM2Pipeline) -> Engine:
    """The engine that generates one group after another with a pipeline of this process."""
    return lambda groups: (generate(pipe, group) for group in groups)


def generate(pipe: AudioLDM2Pipeline, group: Group) -> Result:
    """Generate the sounds of a group.

    If that fails, each request is generated alone, so that one that fails does not affect the others. If
    memory was short, a warning says so.

    Args:
        pipe: the pipeline; its sampler is replaced for the duration of the call if the requests name another.
        group: what to generate.

    Returns:
        The sounds, and the failures.
    """
    try:
        return Result(_sounds(pipe, group, group.requests), [])
    except Exception as error:
        if len(group.requests) == 1:
            return Result([], [_failure(group.requests[0], error)])
        if isinstance(error, torch.OutOfMemoryError):
            warnings.warn(
                f"out of memory: {len(group.requests)} requests are generated one by one instead of at once; "
                "a smaller batch size is faster",
                stacklevel=2,
            )
    sounds, failures = [], []
    for request in group.requests:
        try:
            sounds += _sounds(pipe, group, [request])
        except Exception as error:
            failures.append(_failure(request, error))
    return Result(sounds, failures)


def _failure(request: Request, error: Exception) -> Failure:
    details = "".join(traceback.format_exception(error))
    return Failure(request.job.where, one_line(error), details)


def _sounds(pipe: AudioLDM2Pipeline, group: Group, requests: Sequence[Request]) -> list[Sound]:
    start = time.perf_counter()
    jobs = [request.job for request in requests]
    first = jobs[0]
    for request in requests:
        check_unchanged(request.source)
    count = first.num_waveforms_per_prompt or 1
    generators = [torch.Generator(pipe.device).manual_seed(job.seed or 0) for job in jobs]
    negatives = [job.negative_prompt or "" for job in jobs]
    transcriptions = [job.transcription for job in jobs if job.transcription is not None]
    arguments: dict[str, Any] = {
        "transcription": transcriptions or None,
        # The candidates of a job draw from one generator, as they do when it is generated alone.
        "generator": [generator for generator in generators for _ in range(count)],
        **{name: getattr(first, name) for name in SHARED},
    }
    with _sampler_of(first, pipe):
        arguments = with_prompts(
            pipe,
            _with_edits(arguments, requests, pipe),
            [job.prompt for job in jobs],
            [job.blend or () for job in jobs],
            [job.word_weights or () for job in jobs],
        )
        output = pipe(negative_prompt=negatives if any(negatives) else None, output_type="pt", **arguments)
    audio: Tensor = output.audios
    rate = pipe.vocoder.config.sampling_rate
    sounds = []
    for i, request in enumerate(requests):
        rows = slice(i * count, i * count + len(request.files))
        waveforms = audio[rows]
        if group.sampling_rate != rate:
            waveforms = resample(waveforms, rate, group.sampling_rate)
        scores = None if output.scores is None else [round(float(score), 6) for score in output.scores[rows]]
        sounds.append(Sound(request.index, waveforms.numpy(), scores, 0.0))
    seconds = (time.perf_counter() - start) / len(requests)
    return [dataclasses.replace(sound, generated_in_s=seconds) for sound in sounds]


def _with_edits(
    arguments: dict[str, Any], requests: Sequence[Request], pipe: AudioLDM2Pipeline
) -> dict[str, Any]:
    """Arguments with those that few requests have, such as those of edits; sounds are inverted here."""
    first = requests[0].job
    names = (*SHARED_OF_EDITS, *SHARED_OF_QUALITY)
    given = {name: getattr(first, name) for name in names if getattr(first, name) is not None}
    if "adapters" in given:
        given["adapters"] = dict(given["adapters"])
    # Without caching, that of the pipeline is off, too.
    arguments = {**arguments, "feature_cache": False, **given}
    sounds = [request.source.path for request in requests if request.source is not None]
    if not sounds:
        return arguments
    if first.invert is None:
        return {**arguments, "audio": sounds}
    return with_inverted(
        pipe,
        arguments,
        sounds,
        None,
        method=first.invert,
        source_prompt=[request.job.source_prompt or "" for request in requests],
        skip=first.skip,
    )


@contextmanager
def _sampler_of(job: Job, pipe: AudioLDM2Pipeline) -> Iterator[None]:
    """Give the pipeline a job's sampler, and hold its lock."""
    with pipe.generation():
        own = pipe.scheduler  # read under the lock: another thread may have replaced it for its own job
        pipe.scheduler = scheduler_of(job, pipe)
        try:
            yield
        finally:
            pipe.scheduler = own
