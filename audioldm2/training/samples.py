"""Sounds that are generated now and then during a training, to listen to what it has learned."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch

from audioldm2.audio.wav import write_wav
from audioldm2.checkpoints.recommended import recommended_for
from audioldm2.pipeline import AudioLDM2Pipeline
from audioldm2.plots import plot_sound, save_figure
from audioldm2.schedulers import as_sampler
from audioldm2.training.options import FinetuneOptions

SAMPLER = "dpmsolver++"


class SampleWriter:
    """Writes sounds of the options' prompts, and their spectrograms if matplotlib is installed; see `Watch`.

    Args:
        pipe: generates them, with the options' seed and length.
        options: of the fine-tune.
        folder: created if it does not exist.
    """

    def __init__(self, pipe: AudioLDM2Pipeline, options: FinetuneOptions, folder: Path):
        self.pipe, self.options, self.folder = pipe, options, folder

    def __call__(self, done: int) -> dict[str, float]:
        """Write the samples after `done` steps; there is nothing to plot."""
        self.folder.mkdir(parents=True, exist_ok=True)
        pipe, scheduler, bars = self.pipe, self.pipe.scheduler, self.pipe.progress_bar_config
        pipe.scheduler = as_sampler(SAMPLER, scheduler)
        pipe.set_progress_bar_config(disable=True)
        arguments = recommended_for(pipe.recommended, type(pipe.scheduler).__name__)
        if self.options.duration is not None:
            arguments = {**arguments, "audio_length_in_s": self.options.duration}
        try:
            for number, prompt in enumerate(self.options.sample_prompts, 1):
                generator = torch.Generator().manual_seed(self.options.seed)
                output = pipe(prompt, generator=generator, **arguments)
                path = self.folder / f"step-{done:06}-{number}.wav"
                write_wav(path, output.audios[0], output.sampling_rate)
                if importlib.util.find_spec("matplotlib") is not None:
                    title = f"{prompt} ({done} steps)"
                    figure = plot_sound(output.audios[0], output.sampling_rate, title=title)
                    save_figure(path.with_suffix(".png"), figure)
        finally:
            pipe.scheduler = scheduler
            pipe.set_progress_bar_config(**bars)
        return {}
