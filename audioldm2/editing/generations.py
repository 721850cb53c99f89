"""The arguments of a generation for what the command line, batches and the web page offer in one step.

The pipeline blends prompts and inverts sounds by methods of their own, whose results are arguments of the
generation. Here both are part of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from audioldm2.conditioning import Text
from audioldm2.editing.methods import EditingMethods
from audioldm2.editing.sound import Audio
from audioldm2.prompt_weights import Weights, blend_of


def with_prompts(
    pipe: EditingMethods,
    arguments: dict[str, Any],
    prompts: Sequence[str],
    blends: Sequence[Weights],
    word_weights: Sequence[Weights],
) -> dict[str, Any]:
    """The arguments of a generation with those of its prompts.

    Args:
        pipe: encodes blends.
        arguments: the others.
        prompts: B texts.
        blends: what is mixed into each, see `audioldm2.prompt_weights`: into all of them, or () into none.
        word_weights: of each.

    Raises:
        ValueError: prompts or weights that cannot be used.
    """
    if any(blends):
        mixed = [blend_of(prompt, others) for prompt, others in zip(prompts, blends, strict=True)]
        return {**arguments, **pipe.blend(mixed, max_new_tokens=arguments.get("max_new_tokens"))}
    weighted = {"word_weights": [dict(weights) for weights in word_weights]} if any(word_weights) else {}
    return {**arguments, "prompt": list(prompts), **weighted}


def with_inverted(
    pipe: EditingMethods,
    arguments: dict[str, Any],
    sounds: Audio,
    sampling_rate: int | None,
    *,
    method: str,
    source_prompt: Text,
    skip: float | None,
    callback: Callable[[int, int], object] | None = None,
) -> dict[str, Any]:
    """The arguments of a generation that edits sounds by inversion. They are inverted here.

    Args:
        pipe: inverts them.
        arguments: the others. `num_inference_steps`, `audio_length_in_s`, `transcription`,
            `num_waveforms_per_prompt`, `generator` and `adapters` are those of the inversion, too.
        sounds: see `EditingMethods.invert`, as for the others.
        sampling_rate: of the waveforms.
        method: of the inversion.
        source_prompt: what the sounds are; one for all, or one for each.
        skip: see the pipeline; None is the default.
        callback: see `EditingMethods.invert`.

    Raises:
        ValueError, TypeError, ImportError, OSError: as `EditingMethods.invert` does.
    """
    arguments = dict(arguments)
    inverted = pipe.invert(
        sounds,
        sampling_rate,
        source_prompt,
        # The inversion says how long the sound becomes, and in how many steps.
        num_inference_steps=arguments.pop("num_inference_steps", None),
        audio_length_in_s=arguments.pop("audio_length_in_s", None),
        transcription=arguments.get("transcription"),
        num_waveforms_per_prompt=arguments.get("num_waveforms_per_prompt", 1),
        method=method,
        generator=arguments.get("generator") if method == "ddpm" else None,
        adapters=arguments.get("adapters"),
        callback=callback,
    )
    return {**arguments, "inverted": inverted, "skip": skip}
