"""The HTTP API: the endpoint /generate, for programs. docs/web-page.md describes it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from audioldm2.extras import import_extra
from audioldm2.web.files import save_sounds, uploaded
from audioldm2.web.requests import read_request
from audioldm2.web.studio import Progress, Refused, Sounds, Stopped, Studio


def endpoint(studio: Studio, folder: Path) -> Callable[..., Iterator[dict[str, Any]]]:
    """The function behind /generate.

    Args:
        studio: generates.
        folder: where files are written.

    Returns:
        A generator function, whose parameters and documentation Gradio publishes.
    """
    gr: Any = import_extra("gradio", "web", "the web page")

    def generate(
        prompt: str,
        negative: str | None = None,
        duration: float | None = None,
        steps: int | None = None,
        sampler: str | None = None,
        guidance: float | None = None,
        candidates: int | None = None,
        seed: int | None = None,
        checkpoint: str | None = None,
        speech: str | None = None,
        audio: dict | None = None,  # type: ignore[type-arg]  # Gradio's description of an uploaded file
        strength: float | None = None,
        keep: str | None = None,
        replace: str | None = None,
        extend: float | None = None,
        loop: bool | None = None,
        invert: str | None = None,
        source_prompt: str | None = None,
        skip: float | None = None,
        blend: str | None = None,
        word_weights: str | None = None,
        quality: str | None = None,
        cache: str | None = None,
        guidance_interval: str | None = None,
        guidance_rescale: float | None = None,
        unconditional: str | None = None,
    ) -> Iterator[dict]:  # type: ignore[type-arg]  # Gradio publishes the type, and knows the plain one
        """Generate sounds from a prompt, or edit a sound, which is an uploaded file.

        null, or a parameter that is left out, is the checkpoint's default. While the generation runs, the
        results are {"status", "step", "steps"}. The last one has "sounds", a list of {"file", "score"}, the
        best first, and "seed", "checkpoint", "sampling_rate" and "warnings".
        """
        values: dict[str, Any] = {
            "prompt": prompt,
            "negative": negative,
            "duration": duration,
            "steps": steps,
            "sampler": sampler,
            "guidance": guidance,
            "candidates": candidates,
            "seed": seed,
            "checkpoint": checkpoint,
            "speech": speech,
            "strength": strength,
            "keep": keep,
            "replace": replace,
            "extend": extend,
            "loop": loop,
            "invert": invert,
            "source_prompt": source_prompt,
            "skip": skip,
            "blend": blend,
            "word_weights": word_weights,
            "quality": quality,
            "cache": cache,
            "guidance_interval": guidance_interval,
            "guidance_rescale": guidance_rescale,
            "unconditional": unconditional,
        }
        try:
            values["audio"] = uploaded(audio, folder)
            request = read_request(values, studio.checkpoints, studio.limits)
            for message in studio.run(request, threading.Event()):
                yield _described(message) if isinstance(message, Progress) else _result(message, folder)
        except (ValueError, TypeError, Refused) as error:
            raise gr.Error(str(error), print_exception=False) from error
        except Stopped:
            raise gr.Error("the server is closing", print_exception=False) from None

    return generate


def _described(progress: Progress) -> dict[str, Any]:
    return {"status": progress.text, "step": progress.step, "steps": progress.steps}


def _result(sounds: Sounds, folder: Path) -> dict[str, Any]:
    return {
        "sounds": [
            {"file": {"path": sound.wav, "meta": {"_type": "gradio.FileData"}}, "score": sound.score}
            for sound in save_sounds(sounds, folder, pictures=False)
        ],
        "seed": sounds.request.seed,
        "checkpoint": sounds.request.checkpoint,
        "sampling_rate": sounds.sampling_rate,
        "warnings": list(sounds.notes),
    }
