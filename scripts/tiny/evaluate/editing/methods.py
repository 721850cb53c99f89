"""What is measured: no editing, text alone, and each feature of the pipeline.

A method is prepared with some cases, and then gives their sounds for one setting after the other: what does
not depend on the setting, an inversion, is done once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from audioldm2 import AudioLDM2Pipeline
from scripts.tiny.data.sounds import CLIP_SECONDS, SAMPLING_RATE
from scripts.tiny.evaluate.editing.cases import CUTOFF, GAP, Case, above, samples

HAND_MADE = (0.5, 0.25)  # s that a loop made by hand lacks at both ends, and of its crossfade

Setting = Mapping[str, Any]  # arguments of the pipeline
Sounds = list[np.ndarray]


@dataclass(frozen=True)
class Model:
    """A pipeline and how it is called.

    Attributes:
        pipe: the pipeline.
        steps: of its sampler.
        guidance: its scale.
    """

    pipe: AudioLDM2Pipeline
    steps: int
    guidance: float

    def __call__(self, cases: Sequence[Case], **arguments: Any) -> Sounds:
        """Call the pipeline with the cases' prompts and seeds."""
        options = {"num_inference_steps": self.steps, "guidance_scale": self.guidance, **arguments}
        audios = self.pipe([case.text for case in cases], generator=generators(cases), **options).audios
        return [*audios]

    def edit(self, cases: Sequence[Case], **arguments: Any) -> Sounds:
        """Call it with the cases' sources, too."""
        return self(cases, **sources(cases), **arguments)

    def write(self, cases: Sequence[Case], seconds: float = CLIP_SECONDS, **arguments: Any) -> Sounds:
        """Generate from text alone."""
        return self(cases, audio_length_in_s=seconds, **arguments)


def generators(cases: Sequence[Case]) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(case.seed) for case in cases]


def sources(cases: Sequence[Case]) -> dict[str, Any]:
    """The arguments of the pipeline that pass the sources."""
    return {"audio": [case.source for case in cases], "sampling_rate": SAMPLING_RATE}


Prepare = Callable[[Model, Sequence[Case]], Callable[[Setting], Sounds]]


@dataclass(frozen=True)
class Method:
    """A way to do a task.

    Attributes:
        name: in the table.
        prepare: see above.
        settings: to choose from, that which changes the source least first; of equals, the first is chosen.
    """

    name: str
    prepare: Prepare
    settings: tuple[Setting, ...] = field(default=({},))


# --- no editing


def unchanged(model: Model, cases: Sequence[Case]) -> Callable[[Setting], Sounds]:
    """The sources as they are."""
    return lambda setting: [case.source for case in cases]


def padded(model: Model, cases: Sequence[Case]) -> Callable[[Setting], Sounds]:
    """The sources with silence after them."""
    silence = np.zeros(samples((CLIP_SECONDS,))[0], np.float32)
    return lambda setting: [np.concatenate([case.source, silence]) for case in cases]


def round_trip(model: Model, cases: Sequence[Case]) -> Callable[[Setting], Sounds]:
    """The originals through the VAE and the vocoder."""
    audio = [case.original for case in cases]
    return lambda setting: model(cases, audio=audio, sampling_rate=SAMPLING_RATE, strength=0)


# --- from text alone


def from_text(model: Model, cases: Sequence[Case]) -> Callable[[Setting], Sounds]:
    return lambda setting: model.write(cases, **setting)


def pasted_text(model: Model, cases: Sequence[Case]) -> Callable[[Setting], Sounds]:
    """A sound from text in the gap."""

    def run(setting: Setting) -> Sounds:
        first, last = samples(GAP)
        results = []
        for case, sound in zip(cases, model.write(cases), strict=True):
            result = case.source.copy()
            result[first:last] = sound[first:last]
            results.append(result)
        return results

    return run


def appended_text(model: Model, cases: Sequence[Case]) -> Callable[[Setting], Sounds]:
    """A sound from text after the source."""

    def run(setting: Setting) -> Sounds:
        written = model.write(cases)
        return [np.concatenate([case.source, sound]) for case, sound in zip(cases, written, strict=True)]

    return run


def band_of_text(model: Model, cases: Sequence[Case]) -> Callable[[Setting], Sounds]:
    """The high frequencies of a sound from text."""

    def run(setting: Setting) -> Sounds:
        results = []
        for case, sound in zip(cases, model.write(cases), strict=True):
            count = min(len(sound), len(case.source))
            results.append(case.source[:count] + above(sound[:count], CUTOFF))
        return results

    return run


def crossfaded_text(model: Model, cases: Sequence[Case]) -> Callable[[Setting], Sounds]:
    """The middle of a sound from text, its end faded into its beginning: a loop made by hand."""

    def run(setting: Setting) -> Sounds:
        trimmed, fade = samples(HAND_MADE)
        rising = np.sin(np.linspace(0, np.pi / 2, fade))
        results = []
        for sound in model.write(cases):
            middle = sound[trimmed:-trimmed]
            result = middle[:-fade].copy()
            result[:fade] = rising * middle[:fade] + rising[::-1] * middle[-fade:]
            results.append(result)
        return results

    return run


# --- features


def edited(model: Model, cases: Sequence[Case]) -> Callable[[Setting], Sounds]:
    """The pipeline's call with the source, and the setting as its arguments."""
    return lambda setting: model.edit(cases, **setting)


def edited_by_other_text(model: Model, cases: Sequence[Case]) -> Callable[[Setting], Sounds]:
    """The same with the cases' other prompt."""
    return edited(model, [dataclasses.replace(case, text=case.other_text) for case in cases])


def inverted(how: str) -> Prepare:
    """Inversion with the source's description, then another prompt."""

    def prepare(model: Model, cases: Sequence[Case]) -> Callable[[Setting], Sounds]:
        found = model.pipe.invert(
            **sources(cases),
            prompt=[case.source_text for case in cases],
            num_inference_steps=model.steps,
            method=how,
            generator=generators(cases) if how == "ddpm" else None,
        )
        texts = [case.text for case in cases]

        def run(setting: Setting) -> Sounds:
            options = {"guidance_scale": model.guidance, **setting}
            return [*model.pipe(texts, inverted=found, **options).audios]

        return run

    return prepare
