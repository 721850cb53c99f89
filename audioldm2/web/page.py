"""The page: the form, the results with pictures, and the visit's history."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from audioldm2.editing.checks import SKIP, STRENGTH
from audioldm2.extras import import_extra
from audioldm2.guidance import UNCONDITIONAL
from audioldm2.web.api import endpoint
from audioldm2.web.files import SavedSound, save_sounds, uploaded
from audioldm2.web.form import SAMPLER_LABELS, Form
from audioldm2.web.requests import Limits, Request, new_seed, read_request
from audioldm2.web.studio import Progress, Refused, Sounds, Stopped, Studio

MAX_HISTORY = 50  # results of one visit
FILES_AGE_S = 24 * 3600  # after which files are deleted
CLEANING_S = 600  # from one look for old files to the next
# Fields that are visible only for one kind of edit.
OF_VARIATIONS = ("strength", "keep", "replace", "extend", "loop")
OF_INVERSIONS = ("source_prompt", "skip")
# Fields that a preset sets.
OF_PRESETS = ("sampler", "steps", "cache", "guidance_interval")
DEVICE = "device"  # the queue of the events that use it
# Options of events that are answered at once, and are not part of the API.
QUICK = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
CSS = (Path(__file__).parent / "page.css").read_text(encoding="utf-8")


@dataclass(frozen=True)
class Shown:
    """A result of the visit's history."""

    request: Request
    saved: Sequence[SavedSound]
    summary: str


def build_page(studio: Studio, folder: Path) -> Any:
    """Build the page, which `launch` serves.

    Args:
        studio: generates, and knows the checkpoints and the limits.
        folder: where files are written; Gradio's folder of temporary files.

    Returns:
        Gradio's Blocks.

    Raises:
        ImportError: gradio is not installed or is broken.
    """
    gr: Any = import_extra("gradio", "web", "the web page")
    with gr.Blocks(
        title="AudioLDM 2", analytics_enabled=False, delete_cache=(CLEANING_S, FILES_AGE_S)
    ) as page:
        gr.Markdown("# AudioLDM 2\nDescribe a sound in a sentence, and listen to it.", elem_id="heading")
        with gr.Row(elem_id="areas"):
            form = Form(gr, studio)
            results = _Results(gr, studio.limits)
            form.add_settings()
        gr.api(endpoint(studio, folder), api_name="generate", concurrency_id=DEVICE, concurrency_limit=1)
        _connect(gr, studio, folder, form, results)
        page.load(new_seed, None, form.seed, **QUICK)
    _forbid_downloads(page)
    page.queue(api_open=False, max_size=studio.limits.queue, default_concurrency_limit=1)
    return page


def _forbid_downloads(page: Any) -> None:
    """Refuse addresses in the place of files, which Gradio would download: the page asks no other machine."""

    def only_files(move: Any) -> Any:
        async def moved(path: Any) -> Any:
            if re.match(r"(?i)[a-z][a-z0-9+.-]*://", str(path)):
                raise ValueError("upload a file; addresses are not downloaded")
            return await move(path)

        return moved

    for block in page.blocks.values():
        if hasattr(block, "async_move_resource_to_block_cache"):
            block.async_move_resource_to_block_cache = only_files(block.async_move_resource_to_block_cache)


class _Results:
    """The state of the generation, its sounds, and the history."""

    def __init__(self, gr: Any, limits: Limits):
        self.gr = gr
        with gr.Column(elem_id="area-results"):
            self.status = gr.HTML(_status("Ready"), padding=False, elem_id="status")
            with gr.Row(elem_id="sounds"):
                self.slots = [self._slot(number) for number in range(limits.candidates)]
            self.table = gr.Dataset(
                label="This visit; click a row to see it again",
                components=[gr.Textbox(visible=False)] * 2,
                headers=["Prompt", "Made with"],
                samples=[],
                layout="table",
                type="index",
                visible=False,
                elem_id="history",
            )

    def _slot(self, number: int) -> tuple[Any, Any, Any, Any]:
        """A place for a sound: its box, player, picture and download."""
        gr = self.gr
        with gr.Column(visible=False, elem_classes="sound", elem_id=f"sound-{number}") as box:
            audio = gr.Audio(type="filepath", interactive=False, buttons=[], elem_id=f"audio-{number}")
            picture = gr.Image(
                type="filepath",
                interactive=False,
                show_label=False,
                label="Waveform and mel spectrogram",
                buttons=["fullscreen"],
                elem_id=f"picture-{number}",
            )
            download = gr.DownloadButton("Download", size="sm", elem_id=f"download-{number}")
        return box, audio, picture, download

    @property
    def components(self) -> list[Any]:
        """Those that change with a result."""
        return [self.status, *(component for slot in self.slots for component in slot)]

    def show(self, saved: Sequence[SavedSound]) -> dict[Any, Any]:
        """Updates of the components for a result; without sounds, they are hidden."""
        gr, updates = self.gr, {}
        for number, (box, audio, picture, download) in enumerate(self.slots):
            if number < len(saved):
                sound = saved[number]
                updates[box] = gr.Column(visible=True)
                updates[audio] = gr.Audio(sound.wav, label=_label(number, len(saved), sound.score))
                updates[picture] = sound.picture
                updates[download] = sound.wav
            else:
                updates |= {box: gr.Column(visible=False), audio: None, picture: None, download: None}
        return updates

    def list(self, history: Sequence[Shown]) -> Any:
        """The update of the table."""
        rows = [
            [
                _shortened(shown.request.prompt),
                _made_with(shown.request),
            ]
            for shown in history
        ]
        return self.gr.Dataset(samples=rows, visible=bool(rows))


def _connect(gr: Any, studio: Studio, folder: Path, form: Form, results: _Results) -> None:
    """Say what the buttons and the fields do."""
    stop_event, history = gr.State(), gr.State([])
    fields = form.fields

    def begin() -> dict[Any, Any]:
        return {
            stop_event: threading.Event(),
            form.run: gr.Button(interactive=False),
            form.stop: gr.Button(interactive=True),
            results.status: _status("Waiting in the queue", running=True),
            **results.show([]),
        }

    def generate(
        stop: threading.Event, past: list[Shown], reroll: bool, *values: Any
    ) -> Iterator[dict[Any, Any]]:
        given = dict(zip(fields, values, strict=True))
        if reroll:
            given["seed"] = new_seed()
        try:
            # An empty field of the page is a mistake; the API has defaults.
            for name, label in (("duration", "the length"), ("seed", "the seed")):
                if given[name] is None:
                    raise ValueError(f"{label} is empty; enter a number")
            given["audio"] = uploaded(given["audio"], folder)
            if given["audio"] is not None:
                given["duration"] = None
            # Fields that are hidden do not count.
            given |= dict.fromkeys(OF_VARIATIONS if given["invert"] else OF_INVERSIONS)
            given |= dict.fromkeys(OF_PRESETS if given["quality"] else ())
            given["extend"] = given["extend"] or None  # 0 adds nothing
            if given["audio"] is None or given["keep"] or given["replace"] or given["extend"]:
                given["strength"] = None  # the slider is for a sound that is changed as a whole
            request = read_request(given, studio.checkpoints, studio.limits)
            yield {form.seed: request.seed}
            for message in studio.run(request, stop):
                if isinstance(message, Progress):
                    yield {results.status: _status(message.text, message.step, message.steps, running=True)}
                else:
                    saved = save_sounds(message, folder, pictures=True)
                    shown = Shown(request, saved, _summary(message))
                    past = [shown, *past][:MAX_HISTORY]
                    yield {
                        history: past,
                        results.table: results.list(past),
                        results.status: shown.summary,
                        **results.show(saved),
                    }
        except (ValueError, TypeError, Refused) as error:
            yield {results.status: _error(str(error))}
        except Stopped:
            yield {results.status: _status("Stopped")}

    def finish() -> dict[Any, Any]:
        return {form.run: gr.Button(interactive=True), form.stop: gr.Button(interactive=False)}

    def explain(event: threading.Event) -> dict[Any, Any]:
        # To Gradio, a generation that was stopped in the queue has failed, too.
        busy = "the generation could not begin: the queue is full; try again in a minute"
        return {results.status: _status("Stopped") if event.is_set() else _error(busy), **finish()}

    def stop(event: threading.Event | None) -> dict[Any, Any]:
        if event is not None:
            event.set()
        return {results.status: _status("Stopped"), **finish()}

    started = gr.on(
        [form.run.click, form.prompt.submit],
        begin,
        None,
        [stop_event, form.run, form.stop, *results.components],
        **QUICK,
    )
    generation = started.then(
        generate,
        [stop_event, history, form.reroll, *fields.values()],
        [history, form.seed, results.table, *results.components],
        show_progress="minimal",
        show_progress_on=results.status,
        concurrency_id=DEVICE,
        concurrency_limit=1,
        api_visibility="private",
    )
    generation.then(finish, None, [form.run, form.stop], **QUICK)
    generation.failure(explain, stop_event, [results.status, form.run, form.stop], **QUICK)
    form.stop.click(
        stop,
        stop_event,
        [results.status, form.run, form.stop],
        cancels=[generation],  # it may wait in the queue
        **QUICK,
    )

    changed = [form.negative, form.duration, form.steps, form.guidance, form.speech, form.examples]
    changed += [form.weights, form.blend, form.word_weights]
    choices = [form.checkpoint, form.sampler, form.quality]
    form.checkpoint.input(form.defaults, choices, changed, **QUICK)
    # The kind of an edit changes with an old sound that is shown again, too, which has settings of its own.
    kinds = [form.variation, form.inversion, form.quality]
    form.invert.change(form.kinds_of_edit, form.invert, kinds, **QUICK)
    of_edit = [form.sampler, form.steps, form.skip, form.quality]
    form.invert.input(form.defaults_of_edit, [form.invert, form.checkpoint], of_edit, **QUICK)
    of_quality = [form.sampler, form.steps]
    form.quality.change(form.kinds_of_quality, form.quality, [*of_quality, form.saving], **QUICK)
    form.quality.input(form.defaults_of_quality, [form.quality, form.checkpoint], of_quality, **QUICK)
    form.sampler.input(form.steps_for, [form.checkpoint, form.sampler], form.steps, **QUICK)

    def use_example(index: int, name: str) -> tuple[str, str]:
        return studio.checkpoints[name].examples[index]

    form.examples.click(use_example, [form.examples, form.checkpoint], [form.prompt, form.speech], **QUICK)

    def show_again(index: int, past: Sequence[Shown]) -> dict[Any, Any]:
        shown = past[index]
        again = {fields[name]: getattr(shown.request, name) for name in fields}
        if shown.request.duration is None:
            again.pop(fields["duration"])
        if shown.request.strength is None:
            again[fields["strength"]] = STRENGTH
        again[fields["extend"]] = shown.request.extend or 0
        if shown.request.skip is None:
            again[fields["skip"]] = SKIP.get(shown.request.invert, SKIP["ddpm"])
        speaks = studio.checkpoints[shown.request.checkpoint].speaks
        again[form.speech] = gr.Textbox(value=shown.request.speech or "", visible=speaks)
        return {results.status: shown.summary, **results.show(shown.saved), **again}

    results.table.click(
        show_again, [results.table, history], [*fields.values(), *results.components], **QUICK
    )


# --- what is written on the page


def _label(number: int, count: int, score: float | None) -> str:
    if score is None:
        return "Sound"
    return f"{number + 1} of {count}, score {score:.2f}"


def _made_with(request: Request) -> str:
    length = "an edited sound" if request.duration is None else f"{request.duration:g} s"
    return f"{request.checkpoint}, {length}, seed {request.seed}"


def _shortened(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:57]}..."


def _status(text: str, step: int = 0, steps: int = 0, running: bool = False) -> str:
    """The state of a generation, which screen readers read out."""
    count = f", step {step} of {steps}" if steps else ""
    bar = ""
    if running:
        position = f'value="{step}" max="{steps}"' if steps else ""
        bar = f'<progress {position} aria-label="progress"></progress>'
    return f'<div class="status" role="status">{escape(text)}{count}{bar}</div>'


def _error(text: str) -> str:
    return f'<div class="status error" role="alert">{escape(text[:1].upper() + text[1:])}.</div>'


def _summary(sounds: Sounds) -> str:
    """What was generated and how, and warnings."""
    request = sounds.request
    count = len(sounds.audios)
    facts = [
        f"{count} candidates" if count > 1 else "1 sound",
        f"{sounds.audios.shape[1] / sounds.sampling_rate:.2f} s at {sounds.sampling_rate / 1000:g} kHz",
        f"{request.checkpoint}, {SAMPLER_LABELS.get(request.sampler, request.sampler)}, "
        f"{request.steps} steps, guidance {request.guidance:g}, seed {request.seed}",
        f"made in {sounds.seconds:.1f} s",
    ]
    if request.invert:
        facts.insert(3, f"by inversion, with {request.taken_steps} of the steps")
    if request.quality:
        facts.append(f"quality {request.quality}")
    if request.cache:
        facts.append(f"cache {request.cache}")
    if request.guidance_interval:
        facts.append(f"guidance interval {request.guidance_interval}")
    if request.guidance_rescale:
        facts.append(f"guidance rescale {request.guidance_rescale:g}")
    if request.unconditional != UNCONDITIONAL[0]:
        facts.append(f"unconditional {request.unconditional}")
    if request.word_weights:
        facts.insert(1, f"word weights {request.word_weights}")
    if request.blend:
        facts.insert(1, f"blended with {request.blend}")
    title = f"<strong>{escape(_shortened(request.prompt))}</strong>"
    scored = (
        "<p>The score says how well a sound matches the prompt, as judged by CLAP, from -1 to 1.</p>"
        if sounds.scores
        else ""
    )
    notes = "".join(f'<p class="note">{escape(note)}</p>' for note in sounds.notes)
    return f'<div class="status" role="status">{title}<p>{escape("; ".join(facts))}</p>{scored}{notes}</div>'
