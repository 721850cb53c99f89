"""The plot of `scripts/bench --quality`: what combinations of sampler, steps, caching and guidance lose."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from audioldm2 import QUALITIES, FeatureCaching, Quality
from audioldm2.atomic import replacing
from audioldm2.guidance import ALL_STEPS
from audioldm2.schedulers import SAMPLERS
from audioldm2.schedulers.timesteps import MAX_STEPS, optimized_timesteps

# Where guidance is left out: at the first and the last steps.
MIDDLE = (0.2, 0.8)


class Point(NamedTuple):
    """A combination: the seconds of a clip, and its distance from 200 steps in dB."""

    seconds: float
    distance: float
    quality: Quality


def combination(
    sampler: str, steps: int, optimized: bool = False, interval: int = 1, middle: bool = False
) -> Quality:
    """A point of the plot.

    Args:
        sampler: its name.
        steps: their number.
        optimized: whether the timesteps are `optimized_timesteps`, not the sampler's own.
        interval: of feature caching; 1 is none.
        middle: whether guidance is left out of the first and the last steps.
    """
    return Quality(
        sampler,
        None if optimized else steps,
        tuple(optimized_timesteps(steps)) if optimized else None,
        FeatureCaching(interval) if interval > 1 else False,
        MIDDLE if middle else ALL_STEPS,
    )


COMBINATIONS = (
    *(combination("dpmsolver++", steps) for steps in (4, 5, 6, 8, 10, 15, 20)),
    *(combination("unipc", steps) for steps in (4, 5, 6, 8, 10, 15, 20)),
    *(combination("unipc", steps, optimized=True) for steps in (5, 6, 8, 10, 15, 20)),
    *(combination("unipc", steps, interval=2) for steps in (6, 8, 10, 20)),
    *(combination("unipc", steps, optimized=True, interval=2) for steps in (8, 12, 20)),
    *(combination("unipc", steps, middle=True) for steps in (5, 8)),
    *(combination("unipc", steps, optimized=True, middle=True) for steps in (8, 10)),
)


def is_optimized(quality: Quality) -> bool:
    """Whether the timesteps are those of `optimized_timesteps`."""
    given = [*(quality.timesteps or [])]
    return 1 <= len(given) <= MAX_STEPS and given == optimized_timesteps(len(given))


def frontier(points: Sequence[Point]) -> list[Point]:
    """The points that no other one equals or beats in both seconds and distance, fastest first."""
    best: list[Point] = []
    for point in sorted(points, key=lambda point: point[:2]):
        if not best or point.distance < best[-1].distance:
            best.append(point)
    return best


def draw(points: Sequence[Point], path: Path, seconds_label: str) -> bool:
    """Plot the distance from 200 steps over the seconds of a clip.

    Args:
        points: the combinations, and the presets, which are marked.
        path: of the PNG file.
        seconds_label: of their axis.

    Returns:
        Whether there is a plot: it needs matplotlib.
    """
    if importlib.util.find_spec("matplotlib") is None:
        return False
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5.4), dpi=100, layout="constrained")
    axes = figure.subplots()
    colors = {sampler: colormaps["tab10"](i) for i, sampler in enumerate(SAMPLERS)}
    seen = set()
    for seconds, distance, quality in points:
        optimized, cached = is_optimized(quality), isinstance(quality.feature_cache, FeatureCaching)
        middle = (quality.guidance_interval or ALL_STEPS) != ALL_STEPS
        words = [quality.sampler or "", "optimized timesteps" if optimized else "even timesteps"]
        words += ["cache 2"] * cached + ["guidance in the middle"] * middle
        label = ", ".join(words)
        axes.plot(
            [seconds],
            [distance],
            "^" if cached else "s" if middle else "o",
            color=colors[quality.sampler or ""],
            fillstyle="full" if optimized else "none",
            linestyle="",
            label=None if label in seen else label,
        )
        seen.add(label)
        axes.annotate(str(quality.steps), (seconds, distance), (4, 3), textcoords="offset points", fontsize=7)
    best = frontier(points)
    axes.plot(
        [point.seconds for point in best],
        [point.distance for point in best],
        color="black",
        linewidth=1,
        zorder=0,
        label="frontier",
    )
    names = {preset: name for name, preset in QUALITIES.items()}
    for seconds, distance, quality in points:
        if quality in names:
            at = seconds, distance
            axes.plot([seconds], [distance], "*", color="red", markersize=14, zorder=5)
            axes.annotate(names[quality], at, (8, 8), textcoords="offset points", color="red")
    axes.set(
        xscale="log",
        yscale="log",
        xlabel=seconds_label,
        ylabel="log-mel distance from 200 steps on tiny (dB)",
    )
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter("{x:g}")
    axes.grid(alpha=0.3, which="both")
    axes.margins(x=0.08)  # for the names of the presets
    axes.legend(fontsize=7)
    with replacing(path.resolve()) as temporary:
        figure.savefig(temporary, format="png")
    return True
