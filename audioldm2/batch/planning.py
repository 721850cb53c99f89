"""From jobs to requests, which have every setting, and to groups that are generated together.

The requests of a group share all settings but the prompt and its weights, the negative prompt, the
transcription, the seed and the sound to edit. Their prompts have the same number of tokens, and their sounds
the same number of samples. These need no padding, so a sound does not depend on the others of its group, up
to rounding.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from operator import index
from typing import Any, NamedTuple

from audioldm2 import __version__
from audioldm2.arguments import GUIDANCE, check_choice, check_count, check_flag, did_you_mean
from audioldm2.audio.file_types import FILE_FORMATS, sound_type
from audioldm2.audio.sound_file import check_can_write
from audioldm2.batch.jobs import Failure, Job
from audioldm2.batch.names import distinct, file_name, split_name
from audioldm2.batch.sources import InputFile, input_file
from audioldm2.blending import blended_tokens
from audioldm2.checkpoints.recommended import recommended_for
from audioldm2.conditioning import check_transcription, speaks, token_count, token_limit
from audioldm2.decoding import frames_and_samples
from audioldm2.editing.checks import OF_EDITS
from audioldm2.pipeline import AudioLDM2Pipeline
from audioldm2.prompt_weights import FORMS
from audioldm2.quality_settings import NEUTRAL, as_plain, preset_of
from audioldm2.quoting import one_line, quoted
from audioldm2.sampling import set_timesteps
from audioldm2.schedulers import DDIMScheduler, as_sampler
from audioldm2.words import token_weights

# Arguments of a generation that all sounds of a group share.
SHARED = (
    "audio_length_in_s",
    "num_inference_steps",
    "guidance_scale",
    "num_waveforms_per_prompt",
    "eta",
    "max_new_tokens",
)
# The same of edits, and of loops and long sounds; most jobs have none, and the pipeline decides.
SHARED_OF_EDITS = (
    *OF_EDITS,
    *("loop", "window", "exact_decoding", "adapters"),
)
# The same of guidance and feature caching, and of chosen timesteps; None has no effect.
SHARED_OF_QUALITY = tuple(NEUTRAL)
SETTINGS = ("prompt", "negative_prompt", "transcription", *SHARED, "seed")  # of a job, in the manifest
# In the manifest, and in what a seed is made from, only if a job has them.
SETTINGS_OF_EDITS = (*SHARED_OF_EDITS, "invert", "source_prompt", "skip", *FORMS)
WEIGHTS = ("adapters", *FORMS)  # settings that are pairs of a text and a number
PROGRESS_DELAY_S = 2.0  # before a bar appears for what takes long only in large batches
# Fields of a job that its seed is made from, besides the settings of edits.
_SEEDING = (*SETTINGS, "scheduler")
DEFAULTS = {"guidance_scale": GUIDANCE, "num_waveforms_per_prompt": 1, "eta": 0.0}


@dataclass(frozen=True)
class FileOptions:
    """How sounds are stored.

    Args:
        file_format: the type of the files, "wav", "flac", "ogg", "mp3" and others; a job's name with the
            suffix of another type takes precedence.
        sampling_rate: in Hz; sounds are resampled to it. The checkpoint's by default.
        sample_format: "pcm16" or "float32", for types that have both.
        keep_all: keep all candidates, not only the best.

    Raises:
        ImportError: the type needs soundfile, which cannot be imported.
        ValueError: an unknown type, or one that does not have the sample format or the sampling rate.
    """

    file_format: str = "wav"
    sampling_rate: int | None = None
    sample_format: str | None = None
    keep_all: bool = False

    def __post_init__(self) -> None:
        check_choice("file_format", self.file_format, FILE_FORMATS)
        if self.sampling_rate is not None:
            check_count("sampling_rate", self.sampling_rate)
            object.__setattr__(self, "sampling_rate", index(self.sampling_rate))
        check_flag("keep_all", self.keep_all)
        sound_type(f"a.{self.file_format}", self.sample_format)


@dataclass(frozen=True)
class Request:
    """A job with every setting, and the files of its sounds.

    Attributes:
        index: of the request, in its plan.
        job: the job with what its preset stands for, in which only `name`, `negative_prompt`,
            `transcription`, `max_new_tokens`, `scheduler`, the settings of edits and of `SHARED_OF_QUALITY`
            may still be None, `audio_length_in_s` if there is a sound, and `num_inference_steps` if there
            are timesteps.
        files: the names of its files, that of the best candidate first.
        key: a digest of all that the sounds depend on; a sound with another key is generated again.
        tokens: the number to which the second encoder's states are padded, of a blend all together; that of
            `source_prompt` follows.
        stored: the settings in the manifest's line of each of its sounds.
        seconds: the length of its sounds.
        source: the sound that is edited; None if there is none.
    """

    index: int
    job: Job
    files: tuple[str, ...]
    key: str
    tokens: tuple[int, ...]
    stored: Mapping[str, Any]
    seconds: float
    source: InputFile | None = None


class Group(NamedTuple):
    """Requests that are generated together.

    Attributes:
        requests: which share their settings, as in the module's docstring.
        sampling_rate: of the stored sounds, in Hz.
    """

    requests: tuple[Request, ...]
    sampling_rate: int


class Plan(NamedTuple):
    """What a batch generates.

    Attributes:
        requests: of the valid jobs, in their order.
        failures: the jobs that are not valid for this checkpoint.
        sampling_rate: of the stored sounds, in Hz.
    """

    requests: list[Request]
    failures: list[Failure]
    sampling_rate: int


def plan(jobs: Sequence[Job], pipe: AudioLDM2Pipeline, files: FileOptions) -> Plan:
    """Complete jobs with the pipeline's defaults, and check them.

    Args:
        jobs: what to generate.
        pipe: the checkpoint's recommended settings, sampler, tokenizers and limits are used, not its weights.
        files: how sounds are stored.

    Raises:
        ImportError: a type of file needs soundfile, which cannot be imported.
        ValueError: the type of file does not have the sampling rate or the sample format.
    """
    rate = files.sampling_rate or pipe.vocoder.config.sampling_rate
    # What many jobs share is checked once: an encoder, a sampler, its steps.
    check_suffix = cache(lambda suffix: check_can_write(f"a{suffix}", rate, files.sample_format))
    check_steps = cache(
        lambda name, steps, timesteps: set_timesteps(
            copy.deepcopy(sampler_of(name)), steps, timesteps, pipe.device
        )
    )
    sampler_of = cache(lambda name: pipe.scheduler if name is None else as_sampler(name, pipe.scheduler))
    check_suffix(f".{files.file_format}")
    completed: list[tuple[Job, str, tuple[int, ...], float, InputFile | None]] = []
    failures = []
    with pipe.progress("Checking jobs", len(jobs), leave=False, delay=PROGRESS_DELAY_S) as bar:
        for job in jobs:
            try:
                suffix = split_name(job.name or "")[1] or f".{files.file_format}"
                check_suffix(suffix)
                source = input_file(job, pipe)
                job = _with_preset(job, pipe)
                whole, seconds = _completed(job, pipe, sampler_of(job.scheduler), check_steps, source)
                completed.append((whole, suffix, _tokens(job, pipe), seconds, source))
            except (ValueError, TypeError) as error:
                failures.append(Failure(job.where, one_line(error)))
            bar.update()
    seeded = _with_seeds([(job, source) for job, *_, source in completed])
    stems = [_stems(job, files.keep_all) for job in seeded]
    names = iter(distinct(name for each in stems for name in each))
    requests: list[Request] = []
    for job, each, (_, suffix, tokens, seconds, source) in zip(seeded, stems, completed, strict=True):
        sampler = sampler_of(job.scheduler)
        stored = {
            **{name: getattr(job, name) for name in SETTINGS},
            **_edit_settings(job, source),
            **_quality_settings(job),
            "scheduler": type(sampler).__name__,
            "sampling_rate": rate,
            "checkpoint": pipe.name_or_path,
            "revision": pipe.revision,
            "variant": pipe.variant,
            "dtype": str(pipe.dtype).removeprefix("torch."),
        }
        _, sample_format = sound_type(f"a{suffix}", files.sample_format)
        kind = {"suffix": suffix, "sample_format": sample_format, "kept": len(each)}
        key = _digest({**stored, "sampler": dict(sampler.config), **kind})
        requests.append(
            Request(
                len(requests),
                job,
                tuple(f"{next(names)}{suffix}" for _ in each),
                key,
                tokens,
                {
                    **stored,
                    **({} if source is None else {"audio": job.audio}),
                    # Not in the key: what the preset stands for is.
                    **({} if job.quality is None else {"quality": job.quality}),
                    "version": __version__,
                },
                seconds,
                source,
            )
        )
    return Plan(requests, failures, rate)


def scheduler_of(job: Job, pipe: AudioLDM2Pipeline) -> Any:
    """The sampler of a job: the pipeline's, unless the job names one of another class."""
    return pipe.scheduler if job.scheduler is None else as_sampler(job.scheduler, pipe.scheduler)


def _with_preset(job: Job, pipe: AudioLDM2Pipeline) -> Job:
    """A job with what its preset stands for, which takes precedence over what a checkpoint recommends."""
    if job.quality is None:
        return job
    preset = preset_of(vars(job))
    return job.with_defaults(
        {
            # Without guidance, a preset's interval is left out.
            "guidance_scale": pipe.recommended.get("guidance_scale", GUIDANCE),
            "scheduler": preset.sampler,
            "num_inference_steps": preset.num_inference_steps,
            "timesteps": preset.timesteps,
            "feature_cache": preset.feature_cache,
            "guidance_interval": preset.guidance_interval,
        }
    )


def _completed(
    job: Job,
    pipe: AudioLDM2Pipeline,
    sampler: Any,
    check_steps: Callable[[str | None, int, tuple[int, ...] | None], object],
    source: InputFile | None,
) -> tuple[Job, float]:
    """A job with the default of every setting but the seed, and the length of its sound in seconds.

    Args:
        job: what to complete.
        pipe: has the defaults.
        sampler: the job's.
        check_steps: raises ValueError unless a sampler, given by its name, has this number of steps, or
            these timesteps.
        source: the sound that it edits.

    Raises:
        ValueError: a setting is out of range for this checkpoint.
    """
    # An inversion is one of DDIM's steps, whatever the sampler.
    name, kind = (job.scheduler, type(sampler)) if job.invert is None else ("ddim", DDIMScheduler)
    defaults = {
        **DEFAULTS,
        "num_inference_steps": getattr(kind, "default_num_inference_steps", 200),
        **recommended_for(pipe.recommended, kind.__name__),
    }
    if on := pipe.get_adapter_weights():
        defaults["adapters"] = tuple(sorted(on.items()))
    if pipe.feature_caching is not None:
        defaults["feature_cache"] = pipe.feature_caching
    if source is not None:
        defaults.pop("audio_length_in_s", None)  # a sound keeps its own
        defaults["strength"] = source.strength
    job = job.with_defaults(defaults)
    # None where the value has no effect, so that it makes no difference to write it.
    neutral: dict[str, Any] = {name: None for name, value in NEUTRAL.items() if getattr(job, name) == value}
    job = dataclasses.replace(job, **neutral)
    check_transcription(job.transcription, speaks(pipe))
    for field in FORMS:
        if getattr(job, field) and speaks(pipe):
            raise ValueError(f"{field} is not for speech checkpoints, which read a transcription")
    if job.adapters:
        known = pipe.get_list_adapters()["unet"]
        for adapter, _ in job.adapters:
            if adapter not in known:
                raise ValueError(f"adapters: {quoted(adapter)} is not loaded{did_you_mean(adapter, known)}")
    check_steps(name, job.steps or 0, job.timesteps)
    if source is not None:
        return job, source.length
    frames, _ = frames_and_samples(pipe.unet, pipe.part("vae"), pipe.part("vocoder"), job.audio_length_in_s)
    vocoder = pipe.part("vocoder")
    length = frames * vocoder.hop_length / vocoder.config.sampling_rate
    job = job.with_defaults({"audio_length_in_s": length})
    assert job.audio_length_in_s is not None
    return job, job.audio_length_in_s


def _edit_settings(job: Job, source: InputFile | None) -> dict[str, Any]:
    """What a sound depends on if it is an edit, a loop, or made in windows; {} for other sounds."""
    given = {name: getattr(job, name) for name in SETTINGS_OF_EDITS if getattr(job, name) is not None}
    given |= {name: dict(given[name]) for name in WEIGHTS if name in given}
    return given if source is None else {**given, "audio_sha256": source.sha256}


def _quality_settings(job: Job) -> dict[str, Any]:
    """What a sound depends on of `SHARED_OF_QUALITY`; {} for most sounds."""
    given = {name: as_plain(getattr(job, name)) for name in SHARED_OF_QUALITY}
    return {name: value for name, value in given.items() if value is not None}


def _tokens(job: Job, pipe: AudioLDM2Pipeline) -> tuple[int, ...]:
    """The numbers of tokens to which the second encoder's states are padded, those of each prompt.

    Raises:
        ValueError: prompts that are blended are too long together, or a word with a weight is cut off.
    """
    prompts = [job.prompt] if job.invert is None else [job.prompt, job.source_prompt or ""]
    if speaks(pipe):
        return (token_limit(pipe, pipe.tokenizer_2),) * len(prompts)
    tokens = [token_count(pipe, text) for text in prompts]
    if job.word_weights:
        token_weights(pipe.tokenizer_2, job.prompt, dict(job.word_weights), tokens[0])
    if job.blend:
        tokens[0] = blended_tokens(pipe, [job.prompt, *(text for text, _ in job.blend)])
    return tuple(tokens)


def _with_seeds(jobs: Sequence[tuple[Job, InputFile | None]]) -> list[Job]:
    """Jobs with a seed each. Equal jobs without one get different seeds."""
    counts: Counter[str] = Counter()
    result = []
    for job, source in jobs:
        if job.seed is None:
            fields = {name: getattr(job, name) for name in _SEEDING}
            more = {**_edit_settings(job, source), **_quality_settings(job)}
            content = _digest({**fields, "name": None, "where": None, **more})
            counts[content] += 1
            seed = int(_digest({"job": content, "number": counts[content]})[:8], 16)
            job = dataclasses.replace(job, seed=seed)
        result.append(job)
    return result


def _stems(job: Job, keep_all: bool) -> list[str]:
    """The names of a job's files, without suffixes, before they are made different from others'."""
    stem = file_name(split_name(job.name)[0]) if job.name else file_name(job.prompt, spaces="-")
    count = job.num_waveforms_per_prompt or 1
    return [f"{stem}-candidate-{i}" for i in range(1, count + 1)] if keep_all and count > 1 else [stem]


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def in_groups(plan: Plan, batch_size: int) -> list[Group]:
    """The requests of a plan in groups, in the order of each group's first request.

    Args:
        plan: of all jobs, also of those whose sounds are finished: the groups must not depend on these.
        batch_size: the most sounds, counting candidates, that are generated together; a group has at least
            one request.
    """
    alike: dict[tuple[Any, ...], list[Request]] = {}
    for request in plan.requests:
        job, source = request.job, request.source
        shared = tuple(
            getattr(job, name)
            for name in (*SHARED, *SHARED_OF_EDITS, *SHARED_OF_QUALITY, "scheduler", "invert", "skip")
        )
        shared = (*shared, job.blend is None)  # embeddings take the place of blended prompts
        samples = None if source is None else source.samples
        alike.setdefault((*shared, request.tokens, samples), []).append(request)
    groups = []
    for requests in alike.values():
        size = max(1, batch_size // (requests[0].job.num_waveforms_per_prompt or 1))
        groups += [tuple(requests[start : start + size]) for start in range(0, len(requests), size)]
    groups.sort(key=lambda group: group[0].index)
    return [Group(requests, plan.sampling_rate) for requests in groups]
