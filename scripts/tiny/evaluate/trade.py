"""What steps and precision buy: samplers, steps and dtypes on the same prompts and the same noise.

Each setting is scored by `measures.matches`, and its latents are compared with those that 200 steps of DDIM
in float32 make of the same noise: root mean square of the difference over that of the latents, in percent.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from audioldm2 import AudioLDM2Pipeline, DDIMScheduler, DPMSolverMultistepScheduler
from audioldm2.atomic import replacing
from scripts.tiny.data.sounds import SECONDS
from scripts.tiny.evaluate.evaluation import Prompt, batches, judge, share, start_noise

SAMPLERS = {"DDIM": DDIMScheduler, "DPM-Solver++": DPMSolverMultistepScheduler}


@dataclass(frozen=True)
class Setting:
    """A sampler, its steps, and the dtype of all stages."""

    sampler: str
    steps: int
    dtype: str = "float32"


SETTINGS = (
    Setting("DDIM", 200),
    Setting("DDIM", 50),
    Setting("DDIM", 20),
    Setting("DPM-Solver++", 20),
    Setting("DPM-Solver++", 10),
    Setting("DPM-Solver++", 5),
    Setting("DPM-Solver++", 20, "float16"),
    Setting("DPM-Solver++", 20, "bfloat16"),
)


@dataclass(frozen=True)
class Outcome:
    """A setting, the share of prompts right, the distance from the reference (%), and seconds a clip."""

    setting: Setting
    right: float
    distance: float
    seconds: float


def trade(
    load: Callable[[torch.dtype], AudioLDM2Pipeline],
    prompts: Sequence[Prompt],
    *,
    guidance: float,
    batch: int,
    settings: Sequence[Setting] = SETTINGS,
) -> list[Outcome]:
    """Measure settings, of which the first is what the others are compared with; `load` gives a pipeline."""
    outcomes, reference = [], None
    for setting in settings:
        pipe = load(getattr(torch, setting.dtype))
        pipe.scheduler = SAMPLERS[setting.sampler].from_config(pipe.scheduler.config)
        sounds, latents, seconds = _run(pipe, prompts, setting, guidance, batch)
        reference = latents if reference is None else reference
        apart = (latents - reference).pow(2).mean().sqrt() / reference.pow(2).mean().sqrt()
        right = share(judge(prompts, sounds, "Judging"))
        outcomes.append(Outcome(setting, right, 100 * apart.item(), seconds / len(prompts)))
    return outcomes


def _run(
    pipe: AudioLDM2Pipeline, prompts: Sequence[Prompt], setting: Setting, guidance: float, batch: int
) -> tuple[list[np.ndarray], Tensor, float]:
    """Sounds, latents (n, C, T, F) float32, and seconds in all, without a first batch that warms up."""
    sounds: dict[int, np.ndarray] = {}
    latents: dict[int, Tensor] = {}

    def make(places: list[int], steps: int) -> tuple[np.ndarray, Tensor]:
        kept: list[Tensor] = []
        audios = pipe(
            [prompts[i].text for i in places],
            audio_length_in_s=SECONDS,
            num_inference_steps=steps,
            guidance_scale=guidance,
            latents=torch.cat([start_noise(pipe, prompts[i].seed) for i in places]),
            callback=lambda step, t, latents: kept.append(latents),
        ).audios
        return audios, kept[-1].float().cpu()

    groups = [*batches(pipe, prompts, batch)]
    make(groups[0], 2)
    seconds = 0.0
    title = f"{setting.sampler}, {setting.steps} steps, {setting.dtype}"
    with tqdm(total=len(prompts), desc=title, disable=None) as bar:
        for places in groups:
            start = time.perf_counter()
            audios, rows = make(places, setting.steps)
            seconds += time.perf_counter() - start
            sounds.update(zip(places, audios, strict=True))
            latents.update(zip(places, rows, strict=True))
            bar.update(len(places))
    order = range(len(prompts))
    return [sounds[i] for i in order], torch.stack([latents[i] for i in order]), seconds


def table(outcomes: Sequence[Outcome]) -> str:
    """The outcomes as a Markdown table."""
    lines = [
        "| sampler | steps | precision | prompts right | from 200 steps of DDIM | seconds a clip |",
        "| --- | ---: | --- | ---: | ---: | ---: |",
    ]
    for o in outcomes:
        s = o.setting
        distance = "-" if o is outcomes[0] else f"{o.distance:.1f} %"
        lines.append(
            f"| {s.sampler} | {s.steps} | {s.dtype} | {100 * o.right:.0f} % | {distance} | {o.seconds:.2f} |"
        )
    return "\n".join(lines)


def draw(outcomes: Sequence[Outcome], path: Path) -> None:
    """Draw score and distance over the steps into a PNG file."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), dpi=100, layout="constrained")
    scores, distances = figure.subplots(1, 2)
    for sampler, color in (("DDIM", "tab:blue"), ("DPM-Solver++", "tab:orange")):
        some = [o for o in outcomes if o.setting.sampler == sampler and o.setting.dtype == "float32"]
        some.sort(key=lambda o: o.setting.steps)
        steps = [o.setting.steps for o in some]
        scores.plot(steps, [100 * o.right for o in some], "o-", color=color, label=f"{sampler}, float32")
        others = [o for o in some if o is not outcomes[0]]
        distances.plot(
            [o.setting.steps for o in others],
            [o.distance for o in others],
            "o-",
            color=color,
            label=f"{sampler}, float32",
        )
    for o, marker in zip([o for o in outcomes if o.setting.dtype != "float32"], "s^vD", strict=False):
        label = f"{o.setting.sampler}, {o.setting.dtype}"
        look = {"linestyle": "", "marker": marker, "markersize": 8, "fillstyle": "none", "label": label}
        scores.plot([o.setting.steps], [100 * o.right], color="tab:green", **look)
        distances.plot([o.setting.steps], [o.distance], color="tab:green", **look)
    for axes, what in ((scores, "prompts right (%)"), (distances, "distance from 200 steps of DDIM (%)")):
        ticks = sorted({o.setting.steps for o in outcomes})
        axes.set_xscale("log")
        axes.set_xticks(ticks, [str(n) for n in ticks])
        axes.minorticks_off()
        axes.set(xlabel="steps", ylabel=what)
        axes.grid(alpha=0.3)
    scores.set_ylim(0, 102)
    distances.set_ylim(bottom=0)
    distances.legend(fontsize=8)
    with replacing(path.resolve()) as temporary:
        figure.savefig(temporary, format="png")
