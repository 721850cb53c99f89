"""The trade between speed and quality: samplers, steps and dtypes on the same prompts and the same noise.

Each setting is scored by `criteria.matches`. Its latents are compared with those of the first setting, 200
steps of DDIM in float32, made from the same noise: the root mean square of the difference over that of the
latents, in percent.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from audioldm2 import AudioLDM2Pipeline, Quality
from audioldm2.atomic import replacing
from scripts.tiny.evaluate.evaluation import judge, share_right
from scripts.tiny.evaluate.generation import generate_once, latent_distance
from scripts.tiny.evaluate.prompts import Prompt

# By the names in the table.
NAMES = {"DDIM": "ddim", "DPM-Solver++": "dpmsolver++"}


@dataclass(frozen=True)
class Setting:
    """A sampler, its number of steps, and the dtype of all stages."""

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
class TradeResult:
    """A setting, the share of right prompts, the distance from the first setting in %, seconds per clip."""

    setting: Setting
    right: float
    distance: float
    seconds: float


def measure_trade(
    load: Callable[[torch.dtype], AudioLDM2Pipeline],
    prompts: Sequence[Prompt],
    *,
    guidance: float,
    batch: int,
    settings: Sequence[Setting] = SETTINGS,
) -> list[TradeResult]:
    """Measure each setting.

    Args:
        load: gives a pipeline in a dtype.
        prompts: what to generate.
        guidance: its scale.
        batch: sounds generated at once, at most.
        settings: what to measure; the others are compared with the first.
    """
    results: list[TradeResult] = []
    reference: Tensor | None = None
    for setting in settings:
        found = generate_once(
            load(getattr(torch, setting.dtype)),
            prompts,
            Quality(NAMES[setting.sampler], setting.steps),
            guidance=guidance,
            batch=batch,
            title=f"{setting.sampler}, {setting.steps} steps, {setting.dtype}",
        )
        reference = found.latents if reference is None else reference
        distance = latent_distance(found.latents, reference)
        right = share_right(judge(prompts, found.sounds, "Judging"))
        results.append(TradeResult(setting, right, distance, found.seconds / len(prompts)))
    return results


def trade_table(results: Sequence[TradeResult]) -> str:
    """The results as a Markdown table."""
    lines = [
        "| sampler | steps | precision | prompts right | distance from DDIM, 200 steps | seconds per clip |",
        "| --- | ---: | --- | ---: | ---: | ---: |",
    ]
    for r in results:
        s = r.setting
        distance = "-" if r is results[0] else f"{r.distance:.1f} %"
        lines.append(
            f"| {s.sampler} | {s.steps} | {s.dtype} | {100 * r.right:.0f} % | {distance} | {r.seconds:.2f} |"
        )
    return "\n".join(lines)


def draw_trade(results: Sequence[TradeResult], path: Path) -> None:
    """Plot score and distance over the steps into a PNG file."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), dpi=100, layout="constrained")
    scores, distances = figure.subplots(1, 2)
    for sampler, color in (("DDIM", "tab:blue"), ("DPM-Solver++", "tab:orange")):
        some = [r for r in results if r.setting.sampler == sampler and r.setting.dtype == "float32"]
        some.sort(key=lambda r: r.setting.steps)
        label = f"{sampler}, float32"
        steps = [r.setting.steps for r in some]
        scores.plot(steps, [100 * r.right for r in some], "o-", color=color, label=label)
        others = [r for r in some if r is not results[0]]
        steps = [r.setting.steps for r in others]
        distances.plot(steps, [r.distance for r in others], "o-", color=color, label=label)
    for r, marker in zip([r for r in results if r.setting.dtype != "float32"], "s^vD", strict=False):
        style: dict[str, Any] = {
            "linestyle": "",
            "marker": marker,
            "markersize": 8,
            "fillstyle": "none",
            "color": "tab:green",
            "label": f"{r.setting.sampler}, {r.setting.dtype}",
        }
        scores.plot([r.setting.steps], [100 * r.right], **style)
        distances.plot([r.setting.steps], [r.distance], **style)
    for axes, what in ((scores, "prompts right (%)"), (distances, "distance from 200 steps of DDIM (%)")):
        ticks = sorted({r.setting.steps for r in results})
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
