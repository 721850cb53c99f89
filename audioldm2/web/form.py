"""The page's form: the fields that describe a sound, and the buttons."""

from __future__ import annotations

from typing import Any

from audioldm2.editing.checks import SKIP, STRENGTH
from audioldm2.guidance import UNCONDITIONAL
from audioldm2.quality import QUALITIES, quality_of
from audioldm2.schedulers import DEFAULT_SAMPLER, SAMPLERS
from audioldm2.web.requests import MAX_CHARACTERS, Checkpoint, Request
from audioldm2.web.studio import Studio

MAX_GUIDANCE_SHOWN = 10.0  # of the slider; the API takes more
SAMPLER_LABELS = {"dpmsolver++": "DPM-Solver++", "unipc": "UniPC", "ddim": "DDIM"}


class Form:
    """The fields that describe a sound, and the buttons.

    Args:
        gr: the module gradio, within its Blocks.
        studio: knows the checkpoints and the limits.
    """

    def __init__(self, gr: Any, studio: Studio):
        self.gr = gr
        self.checkpoints, self.limits = studio.checkpoints, studio.limits
        first = next(iter(self.checkpoints.values()))
        with gr.Column(elem_id="area-prompt"):
            self.prompt = gr.Textbox(
                label="Prompt",
                placeholder="What makes the sound, how, and where",
                lines=2,
                max_length=MAX_CHARACTERS,
                elem_id="prompt",
            )
            self.speech = gr.Textbox(
                label="Text to speak",
                visible=first.speaks,
                max_length=MAX_CHARACTERS,
                elem_id="speech",
            )
            self._add_weights(gr, first)
            self._add_edit(gr)
            with gr.Row(elem_id="buttons"):
                self.run = gr.Button("Generate", variant="primary", min_width=120, elem_id="run")
                self.stop = gr.Button("Stop", interactive=False, min_width=120, elem_id="stop")
            self.examples = gr.Dataset(
                label="Examples",
                components=[gr.Textbox(visible=False)],
                samples=_samples(first),
                layout="gallery",
                type="index",
                elem_id="examples",
            )

    def _add_edit(self, gr: Any) -> None:
        """Add the fields of a sound to edit."""
        with gr.Accordion("Edit a sound", open=False, elem_id="edit"):
            self.audio = gr.Audio(
                type="filepath",
                sources=["upload", "microphone"],
                label=f"Sound, at most {self.limits.duration:g} s",
                buttons=[],
                elem_id="audio",
            )
            self.invert = gr.Radio(
                [("Variation", ""), ("Inversion", "ddpm"), ("Inversion by DDIM", "ddim")],
                value="",
                label="How",
                info="A variation is made of the sound and noise; an inversion stays closer to the sound",
                elem_id="invert",
            )
            with gr.Column(elem_id="variation") as self.variation:
                self.strength = gr.Slider(
                    0,
                    1,
                    STRENGTH,
                    step=0.05,
                    label="Strength",
                    info="0 keeps the sound, 1 is the prompt alone; for a sound that is changed as a whole",
                    elem_id="strength",
                )
                with gr.Row():
                    self.keep = gr.Textbox(
                        label="Keep",
                        info="Seconds, as in 0-2.5, 4-",
                        max_length=MAX_CHARACTERS,
                        elem_id="keep",
                    )
                    self.replace = gr.Textbox(
                        label="Or replace",
                        info="Seconds, likewise",
                        max_length=MAX_CHARACTERS,
                        elem_id="replace",
                    )
                with gr.Row():
                    self.extend = gr.Number(0, label="Or extend", info="Seconds to add", elem_id="extend")
                    self.loop = gr.Checkbox(
                        False, label="Loop", info="Repeats without a seam; also a new sound", elem_id="loop"
                    )
            with gr.Column(visible=False, elem_id="inversion") as self.inversion:
                self.source_prompt = gr.Textbox(
                    label="Source prompt",
                    info="What the sound is now; may be empty",
                    max_length=MAX_CHARACTERS,
                    elem_id="source-prompt",
                )
                self.skip = gr.Slider(
                    0,
                    1,
                    SKIP["ddpm"],
                    step=0.05,
                    label="Skip",
                    info="Share of the steps to leave out: 0 changes the most, 1 nothing",
                    elem_id="skip",
                )

    def _add_weights(self, gr: Any, first: Checkpoint) -> None:
        """Add the fields of prompts and words with weights."""
        with gr.Accordion(
            "Blend prompts, weigh words", open=False, visible=not first.speaks, elem_id="weights"
        ) as self.weights:
            self.blend = gr.Textbox(
                label="Blend in",
                info="Other prompts and their weights, as in a bell: 0.3, wind: 0.1; the prompt has the rest",
                max_length=MAX_CHARACTERS,
                elem_id="blend",
            )
            self.word_weights = gr.Textbox(
                label="Word weights",
                info="Words of the prompt, as in siren: 1.5, rain: 0.5; 1 changes nothing",
                max_length=MAX_CHARACTERS,
                elem_id="word-weights",
            )

    def add_settings(self) -> None:
        """Add the fields below the prompt. On a phone, the results come before them."""
        gr, limits = self.gr, self.limits
        names = list(self.checkpoints)
        first = self.checkpoints[names[0]]
        presets = [name for name, preset in QUALITIES.items() if (preset.steps or 1) <= limits.steps]
        with gr.Column(elem_id="area-settings"):
            self.negative = gr.Textbox(
                first.negative,
                label="Negative prompt",
                info="What to avoid; may be empty",
                max_length=MAX_CHARACTERS,
                elem_id="negative",
            )
            with gr.Row():
                self.duration = gr.Number(
                    min(first.duration, limits.duration),
                    label="Length",
                    info=f"Seconds, at most {limits.duration:g}; an edited sound keeps its own",
                    elem_id="duration",
                )
                self.candidates = gr.Slider(
                    1,
                    limits.candidates,
                    1,
                    step=1,
                    label="Candidates",
                    info="Ranked by CLAP, best first",
                    visible=limits.candidates > 1,
                    elem_id="candidates",
                )
            self.quality = gr.Radio(
                [("As set below", ""), *((name.capitalize(), name) for name in presets)],
                value="",
                label="Quality",
                info="Draft is the fastest. A preset sets sampler, steps, caching and guidance interval; "
                "an inversion has none",
                elem_id="quality",
            )
            with gr.Row():
                self.sampler = gr.Dropdown(
                    [(SAMPLER_LABELS.get(name, name), name) for name in SAMPLERS],
                    value=DEFAULT_SAMPLER,
                    label="Sampler",
                    info="UniPC is best below 10 steps; DDIM needs ten times the steps",
                    elem_id="sampler",
                )
                self.steps = gr.Slider(
                    1,
                    limits.steps,
                    min(first.steps[DEFAULT_SAMPLER], limits.steps),
                    step=1,
                    label="Steps",
                    info="More take longer",
                    elem_id="steps",
                )
            self.guidance = gr.Slider(
                0,
                max(MAX_GUIDANCE_SHOWN, first.guidance),
                first.guidance,
                step=0.1,
                label="Guidance",
                info="Larger values follow the prompt more closely; 1 or less switches guidance off",
                elem_id="guidance",
            )
            self._add_advanced(gr)
            with gr.Row():
                self.seed = gr.Number(
                    precision=0,
                    label="Seed",
                    info="Same seed, same sound",
                    elem_id="seed",
                )
                self.reroll = gr.Checkbox(True, label="New seed each time", elem_id="reroll")
            self.checkpoint = gr.Dropdown(
                names,
                value=names[0],
                label="Checkpoint",
                info="One is in memory at a time; another one is loaded when it is first used"
                if len(names) > 1
                else None,
                interactive=len(names) > 1,
                elem_id="checkpoint",
            )

    def _add_advanced(self, gr: Any) -> None:
        """Add the fields of feature caching, and those of guidance that are seldom changed."""
        with gr.Accordion("Caching and guidance", open=False, elem_id="advanced"):
            with gr.Column(elem_id="saving") as self.saving:
                self.cache = gr.Textbox(
                    label="Cache",
                    info="3: the whole UNet runs at every third step; 0,1,2,5: at these steps; empty: at all",
                    max_length=MAX_CHARACTERS,
                    elem_id="cache",
                )
                self.guidance_interval = gr.Textbox(
                    label="Guidance interval",
                    info="Fractions of the steps that have guidance, as in 0-0.75; empty for all",
                    max_length=MAX_CHARACTERS,
                    elem_id="guidance-interval",
                )
            self.guidance_rescale = gr.Slider(
                0,
                1,
                0,
                step=0.05,
                label="Guidance rescale",
                info="Against the distortion of strong guidance; 0 is off",
                elem_id="guidance-rescale",
            )
            self.unconditional = gr.Dropdown(
                [("The empty text", "text"), ("Zeros, as in the original repository", "zeros")],
                value=UNCONDITIONAL[0],
                label="What guidance steers away from",
                info="Without a negative prompt",
                elem_id="unconditional",
            )

    @property
    def fields(self) -> dict[str, Any]:
        """The components by the names of `Request`'s fields."""
        names = Request.__dataclass_fields__
        return {name: getattr(self, name) for name in names}

    def defaults(self, name: str, sampler: str, quality: str) -> dict[Any, Any]:
        """Updates of the fields for another checkpoint."""
        gr, checkpoint = self.gr, self.checkpoints[name]
        return {
            self.negative: checkpoint.negative,
            self.duration: min(checkpoint.duration, self.limits.duration),
            self.steps: quality_of(quality or None).steps or self.steps_for(name, sampler),
            self.guidance: gr.Slider(
                value=checkpoint.guidance, maximum=max(MAX_GUIDANCE_SHOWN, checkpoint.guidance)
            ),
            self.speech: gr.Textbox(value="", visible=checkpoint.speaks),
            self.examples: gr.Dataset(samples=_samples(checkpoint)),
            self.weights: gr.Accordion(visible=not checkpoint.speaks),
            # Hidden fields must be empty.
            **({self.blend: "", self.word_weights: ""} if checkpoint.speaks else {}),
        }

    def kinds_of_edit(self, method: str) -> dict[Any, Any]:
        """Updates of what is visible for a method of inversion; "" is none."""
        return {
            self.variation: self.gr.Column(visible=not method),
            self.inversion: self.gr.Column(visible=bool(method)),
            self.quality: self.gr.Radio(interactive=not method),
        }

    def kinds_of_quality(self, quality: str) -> dict[Any, Any]:
        """Updates of what can be set with a preset; "" is none."""
        return {
            self.sampler: self.gr.Dropdown(interactive=not quality),
            self.steps: self.gr.Slider(interactive=not quality),
            self.saving: self.gr.Column(visible=not quality),
        }

    def defaults_of_quality(self, quality: str, name: str) -> dict[Any, Any]:
        """Updates of the fields for another preset; "" is none."""
        preset = quality_of(quality or None)
        sampler = preset.sampler or DEFAULT_SAMPLER
        return {self.sampler: sampler, self.steps: preset.steps or self.steps_for(name, sampler)}

    def defaults_of_edit(self, method: str, name: str) -> dict[Any, Any]:
        """Updates of the fields for another method of inversion; "" is none."""
        sampler = "ddim" if method else DEFAULT_SAMPLER
        return {
            self.quality: "",
            self.sampler: sampler,
            self.steps: self.steps_for(name, sampler),
            self.skip: SKIP.get(method, SKIP["ddpm"]),
        }

    def steps_for(self, name: str, sampler: str) -> int:
        """The number of steps that suits a checkpoint and a sampler."""
        return min(self.checkpoints[name].steps[sampler], self.limits.steps)


def _samples(checkpoint: Checkpoint) -> list[list[str]]:
    return [[prompt] for prompt, _ in checkpoint.examples]
