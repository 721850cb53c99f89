"""What a visitor asks for: its limits, and the checks of every value. Imports only the standard library.

The values come from a form or from any program that calls the HTTP API, so each may be of any type. An error
is one line in the words of the page.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from audioldm2.arguments import (
    MAX_GUIDANCE,
    as_integer,
    as_texts,
    check_choice,
    check_count,
    check_flag,
    check_length,
    check_number,
)
from audioldm2.editing.checks import METHODS, SKIP, check_edit, check_inversion, read_pairs
from audioldm2.guidance import UNCONDITIONAL
from audioldm2.prompt_weights import Weights, check_weights, weights_of
from audioldm2.quality import QUALITIES
from audioldm2.quality_settings import cache_of, check_quality_settings, interval_of, preset_of
from audioldm2.quoting import quoted
from audioldm2.schedulers import DEFAULT_SAMPLER, SAMPLERS

MAX_SEED = 2**53 - 1  # the largest integer that JavaScript can store
MAX_CHARACTERS = 2000  # of a text; the encoders read far fewer
# The pipeline's names of arguments in the page's words.
WORDS = {
    "audio_length_in_s": "the length",
    "feature_cache": "the cache",
    "guidance_rescale": "the guidance rescale",
    "a guidance_scale": "a guidance",
    "guidance_scale": "the guidance",
    "negative_prompt": "the negative prompt",
    "num_inference_steps": "the number of steps",
    "num_waveforms_per_prompt": "the number of candidates",
    "transcription": "the text to speak",
}
# Those that are also words: only an error that begins with one of them is about an argument.
WORDS_OF_EDITS = {
    "audio": "the sound",
    "blend": "the blend",
    "cache": "the cache",
    "extend": "the time to add",
    "guidance_interval": "the guidance interval",
    "invert": "the inversion",
    "keep": "the part to keep",
    "quality": "the quality",
    "replace": "the part to replace",
    "skip": "the share to skip",
    "source_prompt": "the source prompt",
    "strength": "the strength",
    "unconditional": "the unconditional side",
    "word_weights": "the word weights",
}
# Those that are texts, "" by default.
TEXTS = ("keep", "replace", "source_prompt", "blend", "word_weights", "cache", "guidance_interval")
_OF_EDITS = re.compile(rf"\b({'|'.join(WORDS_OF_EDITS)})\b")
BYTES_PER_SECOND = 48_000 * 2 * 4  # of an uploaded sound: stereo at 48 kHz, as 32-bit floats


@dataclass(frozen=True)
class Limits:
    """The most that one request may ask for.

    Attributes:
        duration: the longest sound, in seconds.
        candidates: the largest number of sounds.
        steps: the largest number of denoising steps.
        queue: the number of requests that may wait; more are refused.
    """

    duration: float = 30.0
    candidates: int = 4
    steps: int = 200
    queue: int = 20

    @property
    def upload(self) -> int:
        """The size of the largest file that may be uploaded, in bytes."""
        return max(2**20, int(self.duration * BYTES_PER_SECOND))


@dataclass(frozen=True)
class Checkpoint:
    """What the page knows about a checkpoint before its weights are loaded.

    Attributes:
        name: a repository on the Hub, a folder, or "tiny".
        duration: the length of the sounds that it was trained on, in seconds.
        steps: the number of steps that suits each sampler, by the sampler's name.
        guidance: the guidance scale that suits it.
        negative: the negative prompt that suits it; "" for none.
        speaks: whether it needs a text to speak.
        examples: prompts that it can do; with a speaking checkpoint, each with a text to speak.
    """

    name: str
    duration: float
    steps: Mapping[str, int]
    guidance: float
    negative: str
    speaks: bool
    examples: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Request:
    """A generation that has been checked; see the page's fields.

    Attributes:
        duration: in seconds; None is the length of the sound that is edited.
        audio: the path of that sound; None if there is none.
        strength: None is the default.
        keep: spans as text, such as "0-2.5, 4-"; "" for none.
        replace: likewise.
        extend: in seconds; None for no extension.
        invert: the method of an edit by inversion; "" for another edit.
        source_prompt: what the sound is, for an inversion.
        skip: the share of an inversion's steps that is left out; None is the method's default.
        blend: prompts to mix in as text, such as "a bell: 0.3"; "" for none.
        word_weights: of words of the prompt, likewise.
        quality: the name of a preset; "" for none. What it stands for is in `sampler` and `steps`, too.
        cache: of feature caching, as text such as "3" or "0,1,2,5"; "" is the preset's, or off.
        guidance_interval: fractions of the steps as text, such as "0-0.75"; "" is the preset's, or all.
        guidance_rescale: from 0 to 1.
        unconditional: one of `UNCONDITIONAL`.
    """

    prompt: str
    negative: str
    duration: float | None
    steps: int
    sampler: str
    guidance: float
    candidates: int
    seed: int
    checkpoint: str
    speech: str | None
    audio: str | None = None
    strength: float | None = None
    keep: str = ""
    replace: str = ""
    extend: float | None = None
    loop: bool = False
    invert: str = ""
    source_prompt: str = ""
    skip: float | None = None
    blend: str = ""
    word_weights: str = ""
    quality: str = ""
    cache: str = ""
    guidance_interval: str = ""
    guidance_rescale: float = 0.0
    unconditional: str = UNCONDITIONAL[0]

    @property
    def sampling(self) -> dict[str, Any]:
        """The pipeline's arguments of the steps, feature caching and guidance."""
        given: dict[str, Any] = {
            "num_inference_steps": self.steps,
            "guidance_scale": self.guidance,
            "feature_cache": cache_of("cache", self.cache) if self.cache else None,
            "guidance_interval": interval_of("guidance_interval", self.guidance_interval)
            if self.guidance_interval
            else None,
            "guidance_rescale": self.guidance_rescale,
            "unconditional": self.unconditional,
        }
        if self.quality:
            preset = preset_of({"quality": self.quality, "scheduler": self.sampler})
            given["quality"] = preset
            if preset.steps == self.steps:  # perhaps timesteps, in place of which a number would be taken
                given["num_inference_steps"] = None
        return given

    @property
    def weights(self) -> dict[str, Weights]:
        """`blend` and `word_weights`, each as texts and numbers."""
        given = {"blend": self.blend, "word_weights": self.word_weights}
        return {name: weights_of(name, text) if text else () for name, text in given.items()}

    @property
    def taken_steps(self) -> int:
        """The steps that an edit by inversion takes."""
        skip = SKIP[self.invert] if self.skip is None else self.skip
        return self.steps - round(skip * self.steps)

    @property
    def edits(self) -> dict[str, Any]:
        """The pipeline's arguments of edits and loops, without the sound."""
        given = {
            "strength": self.strength,
            "keep": read_pairs("keep", self.keep) if self.keep else None,
            "replace": read_pairs("replace", self.replace) if self.replace else None,
            "extend": self.extend,
            "loop": self.loop or None,
        }
        return {name: value for name, value in given.items() if value is not None}


def new_seed() -> int:
    """A random seed, as the command line draws it."""
    return secrets.randbits(32)


def read_request(values: Mapping[str, Any], checkpoints: Mapping[str, Checkpoint], limits: Limits) -> Request:
    """Check the values of a request.

    Args:
        values: by the names of `Request`'s fields. None, or no value, is the checkpoint's default, but there
            is none for the prompt.
        checkpoints: those that can be chosen, by name; the first is the default.
        limits: what a request may ask for.

    Raises:
        ValueError, TypeError: a value that cannot be used; the message says which and what is allowed.
    """
    given = {name: value for name, value in values.items() if value is not None}
    name = given.get("checkpoint", next(iter(checkpoints)))
    check_choice("the checkpoint", name, list(checkpoints))
    checkpoint = checkpoints[name]
    invert = given.get("invert") or ""
    if invert:
        check_choice("the inversion", invert, METHODS)
    quality = given.get("quality") or ""
    if quality:
        check_choice("the quality", quality, list(QUALITIES))
    if "sampler" in given:
        check_choice("the sampler", given["sampler"], list(SAMPLERS))
    preset = preset_of({"quality": quality or None, "scheduler": given.get("sampler")})
    sampler = preset.sampler or ("ddim" if invert else DEFAULT_SAMPLER)
    if invert and sampler != "ddim" and not quality:
        raise ValueError("an inversion takes the steps of DDIM; choose the sampler ddim")
    prompt = _text("the prompt", given.get("prompt", ""))
    unconditional = given.get("unconditional", UNCONDITIONAL[0])
    default = checkpoint.negative if unconditional == UNCONDITIONAL[0] else ""
    negative = _text("the negative prompt", given.get("negative", default), empty=True)
    steps = given.get("steps", preset.steps or checkpoint.steps[sampler])
    steps = _integer("the number of steps", steps, 1, limits.steps)
    candidates = _integer("the number of candidates", given.get("candidates", 1), 1, limits.candidates)
    seed = _integer("the seed", given.get("seed", new_seed()), 0, MAX_SEED)
    guidance = given.get("guidance", checkpoint.guidance)
    check_number("the guidance", guidance)
    if not 0 <= guidance <= MAX_GUIDANCE:
        raise ValueError(f"the guidance must be from 0 to {MAX_GUIDANCE:g}, got {quoted(guidance)}")
    if as_integer(given.get("cache")) is not None:
        given["cache"] = str(given["cache"])
    audio = given.get("audio")
    duration = given.get("duration", None if audio is not None else checkpoint.duration)
    request = Request(
        prompt=prompt,
        negative=negative,
        duration=None if duration is None else _seconds("the length", duration, limits.duration),
        steps=steps,
        sampler=sampler,
        guidance=float(guidance),
        candidates=candidates,
        seed=seed,
        checkpoint=name,
        speech=_speech(given.get("speech") or None, checkpoint.speaks),
        audio=audio,
        strength=given.get("strength"),
        **{name: _text(WORDS_OF_EDITS[name], given.get(name, ""), empty=True).strip() for name in TEXTS},
        extend=given.get("extend"),
        loop=check_flag("the loop", given.get("loop")),
        invert=invert,
        skip=given.get("skip"),
        quality=quality,
        guidance_rescale=given.get("guidance_rescale", 0.0),
        unconditional=unconditional,
    )
    inversion = {
        "source_prompt": request.source_prompt or None,
        "skip": request.skip,
        "num_waveforms_per_prompt": candidates,
    }
    try:
        check_edit(audio is not None, request.edits, request.loop)
        check_inversion(audio is not None, invert or None, {**request.edits, **inversion})
        check_weights(prompt, **request.weights, transcription=request.speech)
        together = {"quality": quality or None, "negative_prompt": negative, "invert": invert}
        check_quality_settings({**request.sampling, **together})
    except ValueError as error:
        raise ValueError(in_words(str(error))) from error
    if request.extend is not None:
        _seconds("the time to add", request.extend, limits.duration)
        if "duration" in given:
            raise ValueError("with a time to add, leave out the length")
    return request


def in_words(text: str) -> str:
    """An error of the pipeline with the page's words instead of the arguments' names."""
    for name, words in WORDS.items():
        text = text.replace(name, words)
    if _OF_EDITS.match(text):
        text = _OF_EDITS.sub(lambda match: WORDS_OF_EDITS[match[1]], text)
    return text


def _text(name: str, value: Any, empty: bool = False) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{name} must be text, got {quoted(value)}")
    (text,) = as_texts(name, value, empty)
    if len(text) > MAX_CHARACTERS:
        raise ValueError(f"{name} has {len(text)} characters; write at most {MAX_CHARACTERS}")
    return text


def _integer(name: str, value: Any, lowest: int, highest: int) -> int:
    if isinstance(value, float) and value.is_integer():  # JavaScript has no integers
        value = int(value)
    check_count(name, value, lowest, highest)
    number = as_integer(value)
    assert number is not None
    return number


def _seconds(name: str, value: Any, longest: float) -> float:
    try:
        check_length(value)
    except ValueError:
        pass
    else:
        if value <= longest:
            return float(value)
    raise ValueError(
        f"{name} must be a number of seconds, more than 0 and at most {longest:g}, got {quoted(value)}"
    )


def _speech(value: Any, speaks: bool) -> str | None:
    if not speaks:
        if value is not None:
            raise ValueError("this checkpoint does not speak; leave out the text to speak")
        return None
    return _text("the text to speak", "" if value is None else value)
