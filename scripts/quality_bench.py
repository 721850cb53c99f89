"""Presets of quality, side by side with diffusers: what each computes, takes, and loses.

`scripts/bench --quality` runs it. Speed and memory are those of a checkpoint with the real sizes and random
weights; quality is measured on the tiny checkpoint (see scripts/tiny/evaluate/quality.py). Each of the two
has a file of its own, so that they can be measured at different times: the first needs a quiet machine, the
second about an hour.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import shutil
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from audioldm2 import QUALITIES, AudioLDM2Pipeline, DDIMScheduler, FeatureCaching, Quality
from audioldm2.arguments import GUIDANCE
from audioldm2.atomic import replacing
from audioldm2.checkpoints.formats import PARTS
from audioldm2.conditioning import Conditioning
from audioldm2.feature_cache import as_feature_caching
from audioldm2.guidance import ALL_STEPS, Guidance, guidance_of
from audioldm2.sampling import denoise, set_timesteps
from audioldm2.schedulers import SAMPLERS
from audioldm2.schedulers.timesteps import optimized_timesteps
from scripts.tiny.evaluate.prompts import draw_prompts
from scripts.tiny.evaluate.quality import (
    QualityScore,
    Setting,
    measure_distances,
    measure_quality,
    with_spread,
)
from scripts.tiny.evaluate.report import replace_block

TINY_GUIDANCE = 2.0  # what the tiny checkpoint recommends
# What presets are compared with, and what diffusers is timed on.
REFERENCE, WITHOUT = Quality("dpmsolver++", 20), "without"
BATCH = 16
FEW_CLIPS = 8  # of each kind and trait, for the combinations: 232 prompts, of which every fourth counts

PICTURE = "quality-over-seconds.png"  # in docs/

# Where guidance is left out in the plot: at the first and the last steps.
MIDDLE = (0.2, 0.8)


def combination(
    sampler: str, steps: int, found: bool = False, interval: int = 1, middle: bool = False
) -> Quality:
    """A point of the plot.

    Args:
        sampler: its name.
        steps: their number.
        found: whether the timesteps are `optimized_timesteps`, not the sampler's own.
        interval: of feature caching; 1 is none.
        middle: whether guidance is left out of the first and the last steps.
    """
    return Quality(
        sampler,
        None if found else steps,
        tuple(optimized_timesteps(steps)) if found else None,
        FeatureCaching(interval) if interval > 1 else False,
        MIDDLE if middle else ALL_STEPS,
    )


COMBINATIONS = (
    *(combination("dpmsolver++", steps) for steps in (4, 5, 6, 8, 10, 15, 20)),
    *(combination("unipc", steps) for steps in (4, 5, 6, 8, 10, 15, 20)),
    *(combination("unipc", steps, found=True) for steps in (5, 6, 8, 10, 15, 20)),
    *(combination("unipc", steps, interval=2) for steps in (6, 8, 10, 20)),
    *(combination("unipc", steps, found=True, interval=2) for steps in (8, 12, 20)),
    *(combination("unipc", steps, middle=True) for steps in (5, 8)),
    *(combination("unipc", steps, found=True, middle=True) for steps in (8, 10)),
)
Timer = Callable[[Callable[[], Any]], float]
DTYPES = ("float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True)
class Row:
    """A line of the table; diffusers' has no score.

    Attributes:
        name: of the preset.
        dtype: of all stages.
        steps: their number, and how many of them run the whole UNet.
        gflop: of the UNet in one clip.
        seconds: of a clip.
        ratio: how many times as fast as diffusers in float32.
        memory: of a process that imports, loads and generates, at most, in GiB.
        score: on the tiny checkpoint.
    """

    name: str
    dtype: str
    steps: str
    gflop: float
    seconds: float
    ratio: float
    memory: float
    score: QualityScore | None


def whole_steps(quality: Quality) -> list[int]:
    """The steps that run the whole UNet, counted from 0."""
    caching = as_feature_caching(quality.feature_cache) or FeatureCaching(1)
    return caching.full_steps(quality.steps or 0)


# --- operations


def operations(
    sizes: Mapping[str, Mapping[str, Any]],
    quality: Quality,
    frames: int,
    tokens: int,
    scale: float = GUIDANCE,
) -> float:
    """The multiplications and additions of the UNet in one generation: `denoise`, run without data.

    Args:
        sizes: the configs of the checkpoint's parts.
        quality: the preset.
        frames: of the mel spectrogram.
        tokens: of the prompt.
        scale: of guidance.
    """
    form, device = PARTS["unet"][0], torch.device("meta")
    scheduler = quality.make_scheduler(DDIMScheduler())
    steps = quality.steps or scheduler.default_num_inference_steps
    set_timesteps(scheduler, steps, quality.timesteps, device)
    rows = 2 if scale > 1 else 1
    with torch.device(device), torch.no_grad():
        unet = form.stage(form.config.from_dict(sizes["unet"]))
        vectors = torch.empty(rows, 8, sizes["projection_model"]["langauge_model_dim"])
        states = torch.empty(rows, tokens, sizes["text_encoder_2"]["d_model"])
        conditioning = Conditioning(states, torch.ones(rows, tokens), vectors, rows == 2, None)
        latents = torch.empty(1, unet.config.in_channels, frames // 4, 16)
        guidance = guidance_of(scale, None, 0.0, quality.guidance_interval)
        caching = as_feature_caching(quality.feature_cache)
        with FlopCounterMode(display=False) as counter:
            denoise(unet, scheduler, latents, conditioning, guidance, steps, caching=caching)
    return float(counter.get_total_flops())


# --- speed


@dataclasses.dataclass(frozen=True)
class Parts:
    """Seconds of the parts of a clip: of a UNet step by whether it is guided and whole, and of all else."""

    steps: Mapping[tuple[bool, bool], float]
    rest: float

    def clip(self, quality: Quality) -> float:
        """Seconds of a clip: the sum over its steps, and the rest."""
        count, whole = quality.steps or 0, {*whole_steps(quality)}
        guidance = Guidance(GUIDANCE, quality.guidance_interval or ALL_STEPS)
        return self.rest + sum(self.steps[guidance.has_step(i, count), i in whole] for i in range(count))


def measure_parts(pipe: AudioLDM2Pipeline, clip: Callable[[Quality], Any], time_of: Timer) -> Parts:
    """Time the parts of a clip.

    Args:
        pipe: this package's.
        clip: generates a clip with it.
        time_of: the median seconds of a call.
    """
    steps = {}
    shape = (1, pipe.unet.config.in_channels, pipe.unet.config.sample_size, 16)
    latents, t = (
        torch.randn(shape, device=pipe.device, dtype=pipe.dtype),
        torch.tensor(500, device=pipe.device),
    )
    for guided in (True, False):
        states, mask, vectors = pipe.encode_prompt("Rain", do_classifier_free_guidance=guided)
        with torch.no_grad(), pipe.generation(), pipe.running("unet") as unet:
            contexts = unet.contexts(vectors, states, mask)
            whole = functools.partial(unet, latents, t, contexts=contexts, level=0)
            features = whole()[1]
            steps[guided, True] = time_of(whole)
            steps[guided, False] = time_of(functools.partial(whole, features=features))
    one = Quality("dpmsolver++", 1)
    return Parts(steps, time_of(functools.partial(clip, one)) - steps[True, True])


# --- reporting


def markdown(rows: Sequence[Row], prompts: int) -> str:
    """The table as it stands in docs/speed.md."""
    lines = [
        "| preset | dtype | steps | UNet, GFLOP | seconds | times as fast | peak memory, GiB | "
        f"right of {prompts}, % | Fréchet distance | CLAP score | from 200 steps, % | log-mel, dB |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        cells = [row.name, row.dtype, row.steps, f"{row.gflop:.0f}", f"{row.seconds:.1f}", f"{row.ratio:.2f}"]
        cells.append(f"{row.memory:.2f}")
        if row.score is None:
            cells += [""] * 5
        else:
            cells += [
                f"{100 * row.score.right:.1f}",
                with_spread(row.score.frechet, 4),
                with_spread(row.score.clap, 3),
                f"{row.score.distance:.1f}",
                f"{row.score.log_mel:.2f}",
            ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(parts: Parts, combinations: Mapping[Quality, float], path: Path, machine: str) -> None:
    """Plot the distance from 200 steps over the seconds of a clip, for all combinations.

    The seconds are those of the parts, added up. The line joins the combinations that no other one beats in
    both.
    """
    from matplotlib.figure import Figure

    points = [(parts.clip(quality), distance, quality) for quality, distance in combinations.items()]
    points.sort(key=lambda point: point[:2])
    figure = Figure(figsize=(9, 5.4), dpi=100, layout="constrained")
    axes = figure.subplots()
    colors = dict(zip(SAMPLERS, ("tab:gray", "tab:blue", "tab:orange"), strict=True))
    seen = set()
    for seconds, distance, quality in points:
        cached = isinstance(quality.feature_cache, FeatureCaching)
        middle = quality.guidance_interval != ALL_STEPS
        words = [quality.sampler or "", "found timesteps" if quality.timesteps else "even timesteps"]
        words += ["cache 2"] * cached + ["guidance in the middle"] * middle
        label = ", ".join(words)
        axes.plot(
            [seconds],
            [distance],
            "^" if cached else "s" if middle else "o",
            color=colors[quality.sampler or ""],
            fillstyle="full" if quality.timesteps else "none",
            linestyle="",
            label=None if label in seen else label,
        )
        seen.add(label)
        axes.annotate(str(quality.steps), (seconds, distance), (4, 3), textcoords="offset points", fontsize=7)
    best, front = float("inf"), []
    for seconds, distance, _ in points:
        if distance < best:
            best = distance
            front.append((seconds, distance))
    axes.plot(*zip(*front, strict=True), color="black", linewidth=1, zorder=0, label="frontier")
    for name, preset in QUALITIES.items():
        at = combinations.get(preset)
        if at is not None:
            axes.plot([parts.clip(preset)], [at], "*", color="red", markersize=14, zorder=5)
            axes.annotate(name, (parts.clip(preset), at), (8, 8), textcoords="offset points", color="red")
    axes.set(
        xscale="log",
        yscale="log",
        xlabel=f"seconds for a clip of the base checkpoint ({machine})",
        ylabel="log-mel distance from 200 steps on tiny (dB)",
    )
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=7)
    with replacing(path.resolve()) as temporary:
        figure.savefig(temporary, format="png")


def key(quality: Quality, dtype: str) -> str:
    """What a setting's figures are stored under: all that they depend on."""
    return json.dumps({**dataclasses.asdict(quality), "dtype": dtype}, sort_keys=True)


def presets(dtypes: Sequence[str]) -> list[Setting]:
    """The presets in all dtypes."""
    named = {WITHOUT: REFERENCE, **QUALITIES}
    return [Setting(name, quality, dtype) for dtype in dtypes for name, quality in named.items()]


def save(path: Path, content: Mapping[str, Any]) -> None:
    """Write figures as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path.resolve()) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def load(path: Path) -> dict[str, Any]:
    """Read figures; {} if there are none."""
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return found


def scores_command(path: Path, dtypes: Sequence[str], clips: int, seeds: int) -> None:
    """Measure the scores of all presets and combinations, and store them."""
    drawn = draw_prompts(clips, 0)
    content: dict[str, Any] = {
        "prompts": len(drawn),
        "seeds": seeds,
        "presets": {},
        "combinations": {},
    }

    def load_tiny(dtype: torch.dtype) -> AudioLDM2Pipeline:
        pipe = AudioLDM2Pipeline.from_pretrained("tiny", torch_dtype=dtype)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    for setting, score in measure_quality(
        load_tiny, drawn, presets(dtypes), guidance=TINY_GUIDANCE, batch=BATCH, seeds=seeds
    ):
        print(f"{setting.title}: {score}", flush=True)
        content["presets"][key(setting.quality, setting.dtype)] = dataclasses.asdict(score)
        save(path, content)
    few = draw_prompts(min(clips, FEW_CLIPS), 0)
    points = dict.fromkeys((*COMBINATIONS, *QUALITIES.values()))
    for quality, distance in measure_distances(
        load_tiny, few, [*points], guidance=TINY_GUIDANCE, batch=BATCH
    ):
        content["combinations"][key(quality, "float32")] = distance
        save(path, content)


def speed_command(
    path: Path,
    sizes: Mapping[str, Mapping[str, Any]],
    pipes: Mapping[str, Any],
    memory: Mapping[str | None, float],
    time_of: Timer,
    length: float,
    repeat: int,
    about: Mapping[str, Any],
) -> None:
    """Time whole clips of diffusers and of all presets in turns, and the parts of a clip, and store them.

    Args:
        path: of the JSON file.
        sizes: the configs of the checkpoint's parts.
        pipes: `Pipelines` of `scripts/bench` by dtype; the first also has diffusers'.
        memory: the peak memory in GiB of a process that generates one clip, by title of the setting, and of
            diffusers, None.
        time_of: the seconds of one call.
        length: of a clip, in seconds.
        repeat: how often each is timed; medians count.
        about: the machine.
    """
    first = next(iter(pipes.values()))
    settings = presets([*pipes])
    times: dict[str, list[float]] = {}
    for _ in range(repeat):
        calls: dict[str, Callable[[], Any]] = {
            "diffusers": functools.partial(first.clip, first.theirs, REFERENCE.steps, length)
        }
        for s in settings:
            ours = pipes[s.dtype]
            calls[s.title] = functools.partial(ours.clip, ours.ours, None, length, quality=s.quality)
        for title, call in calls.items():
            times.setdefault(title, []).append(time_of(call))
            print(f"{title}: {times[title][-1]:.2f} s", flush=True)
    frames = round(length * 100 / 4) * 4
    tokens = first.tokens()
    seconds = {title: statistics.median(taken) for title, taken in times.items()}
    content: dict[str, Any] = {"about": dict(about), "rows": {}, "parts": {}}
    content["rows"]["diffusers"] = {
        "seconds": seconds["diffusers"],
        "gflop": operations(sizes, REFERENCE, frames, tokens) / 1e9,
        "memory": memory[None],
    }
    for s in settings:
        content["rows"][key(s.quality, s.dtype)] = {
            "seconds": seconds[s.title],
            "gflop": operations(sizes, s.quality, frames, tokens) / 1e9,
            "memory": memory[s.title],
        }
    parts = measure_parts(
        first.ours,
        lambda quality: first.clip(first.ours, None, length, quality=quality),
        lambda call: statistics.median(time_of(call) for _ in range(3)),
    )
    content["parts"] = {
        "steps": [[*form, taken] for form, taken in parts.steps.items()],
        "rest": parts.rest,
    }
    save(path, content)


def report(speed: Mapping[str, Any], scores: Mapping[str, Any], picture: Path) -> str:
    """The table as Markdown, of what has been measured; the plot goes into a PNG file."""
    if not speed:
        return "There are no figures of speed yet: scripts/bench --quality speed"
    rows, theirs = [], speed["rows"]["diffusers"]
    rows.append(Row("diffusers", "float32", str(REFERENCE.steps), **theirs, ratio=1.0, score=None))
    for setting in presets(DTYPES):
        found = speed["rows"].get(key(setting.quality, setting.dtype))
        score = scores.get("presets", {}).get(key(setting.quality, setting.dtype))
        if found is None:
            continue
        count, whole = setting.quality.steps or 0, len(whole_steps(setting.quality))
        rows.append(
            Row(
                setting.name,
                setting.dtype,
                str(count) if whole == count else f"{count}, {whole} whole",
                **found,
                ratio=theirs["seconds"] / found["seconds"],
                score=QualityScore(**score) if score else None,
            )
        )
    combinations = {
        quality: distance
        for quality in (*COMBINATIONS, *QUALITIES.values())
        if (distance := scores.get("combinations", {}).get(key(quality, "float32"))) is not None
    }
    if combinations:
        parts = Parts({(a, b): taken for a, b, taken in speed["parts"]["steps"]}, speed["parts"]["rest"])
        draw(parts, combinations, picture, speed["about"]["machine"])
    return markdown(rows, scores.get("prompts", 0))


def write_documents(docs: Path, text: str, picture: Path) -> None:
    """Put the table and the plot into docs/speed.md."""
    shown = f"![distance from 200 steps over seconds]({PICTURE})"
    replace_block(docs / "speed.md", "presets", f"{text}\n\n{shown}")
    shutil.copyfile(picture, docs / PICTURE)
