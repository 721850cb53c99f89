"""What a batch generates: jobs. Imports only the standard library, so that mistakes are found at once.

A job can be written as a mapping of the fields of `Job`, also under the names of the command line's options
(`COLUMNS`). `tables` reads such mappings from files.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from operator import index
from typing import Any, NamedTuple

from audioldm2.arguments import (
    MAX_SEED,
    as_texts,
    check_choice,
    check_count,
    check_flag,
    check_length,
    check_number,
    did_you_mean,
)
from audioldm2.editing.checks import (
    EXAMPLES,
    METHODS,
    check_edit,
    check_inversion,
    check_strength,
    pairs,
    read_pairs,
)
from audioldm2.feature_cache import FeatureCaching
from audioldm2.guidance import UNCONDITIONAL
from audioldm2.prompt_weights import FORMS, Weights, check_weights, weights_of
from audioldm2.quality import QUALITIES
from audioldm2.quality_settings import NEUTRAL, READERS, check_quality_settings, fitting_defaults
from audioldm2.quoting import listed, quoted
from audioldm2.schedulers import SAMPLERS

MAX_NAME = 1000  # characters; a longer text is probably not meant as a name
BATCH_SIZE = 8  # by default
MAX_CANDIDATES = 1000  # of a job; a larger number is probably a mistake
Pairs = tuple[tuple[float, float | None], ...]


class Failure(NamedTuple):
    """A job that has no sound.

    Attributes:
        where: the file and line of the job, such as "prompts.csv:3", or its number in the list, "job 3".
        reason: the error, as one line.
        details: the traceback, if its generation failed.
    """

    where: str
    reason: str
    details: str = ""

    def __str__(self) -> str:
        return f"{self.where}: {self.reason}"


@dataclass(frozen=True)
class Job:
    """A prompt and the settings of its sound. None stands for the default.

    The arguments of a generation have the names and meanings that they have in `AudioLDM2Pipeline.__call__`.

    Args:
        prompt: the description of the sound.
        name: of the file, with or without the suffix of a sound file; made from the prompt by default.
        negative_prompt: what to steer away from.
        transcription: the words to speak, for the speech checkpoints.
        audio_length_in_s: length of the sound in seconds.
        num_inference_steps: steps of the sampler.
        guidance_scale: 1 or less disables guidance.
        num_waveforms_per_prompt: number of candidates, which CLAP ranks.
        eta: how much noise a DDIM step adds.
        max_new_tokens: how many vectors GPT-2 generates.
        scheduler: the name of a sampler in `SAMPLERS`; the pipeline's own by default.
        seed: of the random numbers, from 0 to 2^63 - 1. By default it is made from the other fields, so that
            another run makes the same sound.
        audio: the path of a sound to edit, whose length the result has by default.
        strength: how much of it is changed, from 0 to 1.
        keep: spans in seconds that are kept: pairs of numbers, or text such as "0-2.5, 4-".
        replace: spans that are generated, likewise.
        replace_band: bands in Hz that are generated, likewise.
        extend: seconds to add to its end.
        loop: whether the sound is to repeat without a seam, also without `audio`.
        window: seconds of the windows in which longer sounds are denoised.
        exact_decoding: False decodes long sounds in windows.
        invert: "ddpm" or "ddim": edit by inversion, with this method.
        source_prompt: with `invert`, what the sound is now; nothing by default.
        skip: with `invert`, the share of the steps that is left out.
        adapters: weights of adapters (LoRA) by name, or text such as "dog:0.8, rain"; by default, those that
            the pipeline has on.
        blend: other prompts to mix in and their weights, of which the prompt has the rest: a mapping such as
            {"a bell": 0.3}, a list of pairs, or text such as "a bell: 0.3, wind: 0.1".
        word_weights: how strongly words of the prompt act, likewise: {"siren": 1.5}.
        quality: the name of a preset in `QUALITIES`; other fields take precedence over it.
        feature_cache: an interval, the steps that run the whole UNet in a list or in text such as "0,1,2,5",
            a mapping of `FeatureCaching`'s fields, or one; 1 is off.
        guidance_interval: the steps with guidance, as two fractions of all steps, or text such as "0-0.75".
        guidance_rescale: from 0 to 1.
        unconditional: "text" or "zeros".
        timesteps: of the run in place of a number of steps, a list or text such as "999,700,300".
        where: the file and line that the job was read from, for messages.

    Raises:
        TypeError, ValueError: a value that cannot be used; the message names the field.
    """

    prompt: str
    name: str | None = None
    negative_prompt: str | None = None
    transcription: str | None = None
    audio_length_in_s: float | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    num_waveforms_per_prompt: int | None = None
    eta: float | None = None
    max_new_tokens: int | None = None
    scheduler: str | None = None
    seed: int | None = None
    audio: str | None = None
    strength: float | None = None
    keep: Pairs | None = None
    replace: Pairs | None = None
    replace_band: Pairs | None = None
    extend: float | None = None
    loop: bool | None = None
    window: float | None = None
    exact_decoding: bool | None = None
    invert: str | None = None
    source_prompt: str | None = None
    skip: float | None = None
    adapters: tuple[tuple[str, float], ...] | None = None
    blend: Weights | None = None
    word_weights: Weights | None = None
    quality: str | None = None
    feature_cache: int | FeatureCaching | None = None
    guidance_interval: tuple[float, float] | None = None
    guidance_rescale: float | None = None
    unconditional: str | None = None
    timesteps: tuple[int, ...] | None = None
    where: str = dataclasses.field(default="", compare=False)

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name != "where" and (value is not None or field.name == "prompt"):
                _CHECKS[field.name](field.name, value)
                # NumPy's numbers as Python's, which JSON can hold.
                convert = _CONVERTED.get(field.name, lambda value: value)
                object.__setattr__(self, field.name, convert(value))
        settings = vars(self)
        check_edit(self.audio is not None, settings, self.loop)
        check_inversion(self.audio is not None, self.invert, settings)
        check_weights(self.prompt, self.blend or (), self.word_weights or (), self.transcription)
        check_quality_settings(settings)

    @property
    def steps(self) -> int | None:
        """The number of steps, also where `timesteps` says it."""
        return self.num_inference_steps if self.timesteps is None else len(self.timesteps)

    def with_defaults(self, defaults: Mapping[str, Any]) -> Job:
        """The job with the values of `defaults` for the fields that are None and do not rule them out."""
        missing = {name: value for name, value in defaults.items() if getattr(self, name) is None}
        if self.extend is not None:  # says how long the sound becomes
            missing.pop("audio_length_in_s", None)
        return dataclasses.replace(self, **fitting_defaults(vars(self), missing))

    @classmethod
    def of(cls, value: Job | Mapping[str, Any] | str, where: str = "") -> Job:
        """A job from a prompt, or from a mapping of fields or of the columns in `COLUMNS`.

        Raises:
            TypeError, ValueError: a name that is not known, or a value that cannot be used; the message has
                the name as the mapping has it.
        """
        if isinstance(value, Job):
            return value if value.where else dataclasses.replace(value, where=where)
        if isinstance(value, str):
            return cls(value, where=where)
        if not isinstance(value, Mapping):
            raise TypeError(f"a job is a prompt, a mapping or a Job, got {quoted(value)}")
        check_columns(value)
        named = {COLUMNS[column]: column for column in value}
        if len(named) < len(value):
            raise ValueError(f"{listed(value)}: two names of the same setting; keep one")
        if value.get("prompt") is None:
            raise ValueError("the prompt is missing")
        try:
            return cls(**{COLUMNS[column]: cell for column, cell in value.items()}, where=where)
        except (TypeError, ValueError) as error:
            message = str(error)
            for field, column in named.items():
                if message.startswith(field):
                    message = column + message.removeprefix(field)
                    break
            raise type(error)(message) from error


def _text(name: str, value: Any) -> None:
    if not isinstance(value, str):
        raise TypeError(f"{name} must be text, got {quoted(value)}")
    as_texts(name, value, empty=name in ("negative_prompt", "source_prompt"))
    if "\0" in value:
        raise ValueError(f"{name} has a NUL character; the text is perhaps UTF-16, save it as UTF-8")


def _name(name: str, value: Any) -> None:
    if isinstance(value, str) and not value.strip():
        raise ValueError(f"{name} is empty; without one, the file is named after the prompt")
    _text(name, value)
    if len(value) > MAX_NAME:
        raise ValueError(f"{name} has {len(value)} characters; at most {MAX_NAME} are allowed")


def _path(name: str, value: Any) -> None:
    if not isinstance(value, str | os.PathLike):
        raise TypeError(f"{name} must be the path of a sound file, got {quoted(value)}")
    if not os.fspath(value):
        raise ValueError(f"{name} is empty; name a sound file")
    _text(name, os.fspath(value))


def _spans(name: str, value: Any) -> Pairs:
    """Spans or bands as pairs of numbers; None is the end of the sound."""
    given = read_pairs(name, value) if isinstance(value, str) else value
    return tuple((start, None if end == math.inf else end) for start, end in pairs(name, given))


def _adapters(name: str, value: Any) -> tuple[tuple[str, float], ...]:
    """Adapters by name with their weights, in the order of the names."""
    if isinstance(value, str):
        parts = (part.strip().rpartition(":") for part in value.split(","))
        value = {first if colon else last: last if colon else 1.0 for first, colon, last in parts}
    elif isinstance(value, tuple):
        value = dict(value)
    if not isinstance(value, Mapping):
        raise TypeError(
            f"{name} must be weights by name, or text such as 'dog:0.8, rain', got {quoted(value)}"
        )
    found = []
    for adapter, weight in value.items():
        try:
            number = float(weight)
        except (TypeError, ValueError):
            number = math.nan
        if not isinstance(adapter, str) or not adapter or not math.isfinite(number):
            raise ValueError(f"{name} must have a name and a number, as in 'dog:0.8', got {quoted(value)}")
        found.append((adapter, number))
    return tuple(sorted(found))


def _weights(name: str, value: Any) -> Weights | None:
    """Weights in one order, as theirs makes no difference; None for no weights."""
    return tuple(sorted(weights_of(name, value))) or None


_CHECKS: dict[str, Callable[[str, Any], object]] = {
    "prompt": _text,
    "name": _name,
    "negative_prompt": _text,
    "transcription": _text,
    "audio_length_in_s": lambda name, value: check_length(value),
    "num_inference_steps": check_count,
    "guidance_scale": check_number,
    "num_waveforms_per_prompt": lambda name, value: check_count(name, value, 1, MAX_CANDIDATES),
    "eta": check_number,
    "max_new_tokens": check_count,
    "scheduler": lambda name, value: check_choice(name, value, tuple(SAMPLERS)),
    "seed": lambda name, value: check_count(name, value, 0, MAX_SEED),
    "audio": _path,
    "strength": lambda name, value: check_strength(value),
    "keep": _spans,
    "replace": _spans,
    "replace_band": _spans,
    "extend": check_number,
    "loop": check_flag,
    "window": check_number,
    "exact_decoding": check_flag,
    "invert": lambda name, value: check_choice(name, value, METHODS),
    "source_prompt": _text,
    "skip": check_number,
    "adapters": _adapters,
    **dict.fromkeys(FORMS, weights_of),
    "quality": lambda name, value: check_choice(name, value, tuple(QUALITIES)),
    **READERS,
    "guidance_rescale": check_number,
    "unconditional": lambda name, value: check_choice(name, value, UNCONDITIONAL),
}
# What a cell of a table is read as.
NUMBERS: dict[str, Callable[[Any], Any]] = {
    "audio_length_in_s": float,
    "num_inference_steps": index,
    "guidance_scale": float,
    "num_waveforms_per_prompt": index,
    "eta": float,
    "max_new_tokens": index,
    "seed": index,
    "strength": float,
    "extend": float,
    "window": float,
    "skip": float,
    "guidance_rescale": float,
}
FLAGS = ("loop", "exact_decoding")
_CONVERTED: dict[str, Callable[[Any], Any]] = {
    **NUMBERS,
    # None where the value is the default, so that it makes no difference to write it.
    "loop": lambda value: bool(value) or None,
    "exact_decoding": lambda value: None if value else False,
    **{name: partial(_spans, name) for name in EXAMPLES},
    "audio": os.fspath,
    "adapters": partial(_adapters, "adapters"),
    **{name: partial(_weights, name) for name in FORMS},
    **{name: partial(read, name) for name, read in READERS.items()},
}
COLUMNS = {
    **{name: name for name in _CHECKS},
    "negative": "negative_prompt",
    "duration": "audio_length_in_s",
    "steps": "num_inference_steps",
    "guidance": "guidance_scale",
    "candidates": "num_waveforms_per_prompt",
    "from": "audio",
    "cache": "feature_cache",
}


# One name of each setting, in the order of the help.
SHOWN_COLUMNS = (
    *("prompt", "name", "negative", "transcription", "duration", "seed"),
    *("steps", "guidance", "candidates", "scheduler", "eta", "max_new_tokens"),
    *("from", "strength", "keep", "replace", "replace_band", "extend"),
    *("invert", "source_prompt", "skip", "loop", "window", "exact_decoding", "adapters"),
    *FORMS,
    *("quality", *(name.replace("feature_cache", "cache") for name in NEUTRAL)),
)


def check_columns(names: Iterable[str]) -> None:
    """Raise ValueError unless all names are those of columns."""
    for name in names:
        if name not in COLUMNS:
            hint = did_you_mean(str(name), COLUMNS) or f"; the columns are {', '.join(SHOWN_COLUMNS)}"
            raise ValueError(f"unknown column {quoted(name)}{hint}")
