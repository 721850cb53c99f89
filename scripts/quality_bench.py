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
from audioldm2.runtime.capability import multiplies_bfloat16
from audioldm2.sampling import denoise, set_timesteps
from scripts.quality_plot import COMBINATIONS, Point
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
DIFFUSERS = "diffusers"  # its row in the file of speed
# Figures that were measured with other ones of these are not kept beside new ones.
SAME = ("machine", "torch", "seconds", "prompts", "seeds")

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
        ratio: how many times as fast as diffusers in the same run.
        memory: of a process that imports, loads and generates, at most, in GiB; on a GPU, the GPU's.
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


def measure_parts(
    pipe: AudioLDM2Pipeline, clip: Callable[[Quality], Any], frames: int, time_of: Timer
) -> Parts:
    """Time the parts of a clip.

    Args:
        pipe: this package's.
        clip: generates a clip with it.
        frames: of the clip's mel spectrogram.
        time_of: the median seconds of a call.
    """
    steps = {}
    shape = (1, pipe.unet.config.in_channels, frames // 4, 16)
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


# --- settings and files


def key(quality: Quality, dtype: str) -> str:
    """What a setting's figures are stored under: all that they depend on."""
    return json.dumps({**dataclasses.asdict(quality), "dtype": dtype}, sort_keys=True)


def presets(dtypes: Sequence[str]) -> list[Setting]:
    """The presets in all dtypes."""
    named = {WITHOUT: REFERENCE, **QUALITIES}
    return [Setting(name, quality, dtype) for dtype in dtypes for name, quality in named.items()]


def default_dtypes(device: str) -> list[str]:
    """The dtypes that are worth measuring on a device: on a CPU, float32 first."""
    if device.startswith("cuda"):
        return ["float16", "bfloat16"]
    return ["float32", "bfloat16"] if multiplies_bfloat16() else ["float32"]


def diffusers_dtype(device: str) -> str:
    """The dtype of diffusers, whatever that of the presets: on a GPU that of its published recipe."""
    return "float16" if device.startswith("cuda") else "float32"


def save(path: Path, content: Mapping[str, Any]) -> None:
    """Write figures as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path.resolve()) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def load(path: Path) -> dict[str, Any]:
    """Read figures; {} if there are none."""
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return content


def resumed(path: Path, fresh: dict[str, Any]) -> dict[str, Any]:
    """A file's figures, to which new ones are added, or `fresh` if they were measured under other conditions.

    What the file does not say counts as equal.
    """
    stored = load(path)
    was, now = ({**content, **content.get("about", {})} for content in (stored, fresh))
    if any(was.get(name, now.get(name)) != now.get(name) for name in SAME):
        return fresh
    return {**fresh, **stored, "about": fresh["about"]}


# --- measuring all presets


def scores_command(
    path: Path, dtypes: Sequence[str], clips: int, seeds: int, device: str, about: Mapping[str, str]
) -> None:
    """Measure the scores of all presets, and of all combinations in float32, and store them.

    Args:
        path: of the JSON file.
        dtypes: of the presets.
        clips: of each kind and trait.
        seeds: of each prompt's noise.
        device: where they are generated.
        about: the machine.
    """
    drawn = draw_prompts(clips, 0)
    fresh = {"about": dict(about), "prompts": len(drawn), "seeds": seeds, "presets": {}, "combinations": {}}
    content = resumed(path, fresh)

    def load_tiny(dtype: torch.dtype) -> AudioLDM2Pipeline:
        pipe = AudioLDM2Pipeline.from_pretrained("tiny", torch_dtype=dtype, device=device)
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
    theirs: Any,
    ours: Mapping[str, Any],
    memory: Mapping[str, float],
    time_of: Timer,
    length: float,
    repeat: int,
    about: Mapping[str, str],
) -> None:
    """Time whole clips of diffusers and of all presets in turns, and the parts of a clip, and store them.

    Args:
        path: of the JSON file.
        sizes: the configs of the checkpoint's parts.
        theirs: `Pipelines` of `scripts/bench` with diffusers', in `diffusers_dtype`.
        ours: those with this package's, by dtype. The parts of a clip are those of the first.
        memory: the peak memory in GiB of a process that generates one clip, by title of the setting, and of
            DIFFUSERS.
        time_of: the seconds of one call.
        length: of a clip, in seconds.
        repeat: how often each is timed; medians count. If more than once, a first call is not timed.
        about: the machine.
    """
    settings = presets([*ours])
    calls: dict[str, Callable[[], Any]] = {
        DIFFUSERS: functools.partial(theirs.clip, theirs.theirs, REFERENCE.steps, length)
    }
    for s in settings:
        pipes = ours[s.dtype]
        calls[s.title] = functools.partial(pipes.clip, pipes.ours, None, length, quality=s.quality)
    if repeat > 1:
        for call in calls.values():
            call()
    times: dict[str, list[float]] = {title: [] for title in calls}
    for _ in range(repeat):
        for title, call in calls.items():
            times[title].append(time_of(call))
            print(f"{title}: {times[title][-1]:.2f} s", flush=True)
    seconds = {title: statistics.median(taken) for title, taken in times.items()}
    first, pipes = next(iter(ours.items()))
    frames, tokens = round(length * 100 / 4) * 4, pipes.tokens()

    # The same for all dtypes.
    qualities = dict.fromkeys((REFERENCE, *(s.quality for s in settings)))
    gflop = {quality: operations(sizes, quality, frames, tokens) / 1e9 for quality in qualities}

    def row(title: str, quality: Quality) -> dict[str, Any]:
        return {"seconds": seconds[title], "gflop": gflop[quality], "memory": memory[title]}

    content = resumed(path, {"about": {**about, "seconds": length}, "rows": {}, "parts": {}})
    rows = content["rows"]
    rows[DIFFUSERS] = {**row(DIFFUSERS, REFERENCE), "dtype": diffusers_dtype(about["device"])}
    for s in settings:
        # Rows that are measured later are compared with diffusers in their own run.
        rows[key(s.quality, s.dtype)] = {**row(s.title, s.quality), "diffusers": seconds[DIFFUSERS]}
    save(path, content)
    if content["parts"].get("dtype", first) != first:
        return  # those of the dtype that was measured first stay
    parts = measure_parts(
        pipes.ours,
        lambda quality: pipes.clip(pipes.ours, None, length, quality=quality),
        frames,
        lambda call: statistics.median(time_of(call) for _ in range(3)),
    )
    content["parts"] = {
        "dtype": first,
        "steps": [[*form, taken] for form, taken in parts.steps.items()],
        "rest": parts.rest,
    }
    save(path, content)


# --- reporting


def markdown(rows: Sequence[Row], prompts: int, memory: str) -> str:
    """The table as it stands in docs/speed.md; `memory` says which."""
    lines = [
        f"| preset | dtype | steps | UNet, GFLOP | seconds | times as fast | {memory}, GiB | "
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
                with_spread(row.score.right, 1, 100),
                with_spread(row.score.frechet, 4),
                with_spread(row.score.clap, 3),
                f"{row.score.distance:.1f}",
                f"{row.score.log_mel:.2f}",
            ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def conditions(about: Mapping[str, Any]) -> str:
    """What figures of speed were measured on, in one line, as far as it is known."""
    words = [str(about["machine"])] if "machine" in about else []
    words += [f"{name} {about[name]}" for name in ("torch", "diffusers") if name in about]
    words += [f"{about['model']} checkpoint"] if "model" in about else []
    words += [f"clips of {about['seconds']:g} s"] if "seconds" in about else []
    return ", ".join(words)


def report(speed: Mapping[str, Any], scores: Mapping[str, Any]) -> str:
    """The table of what has been measured as Markdown, and what it was measured on."""
    if not speed:
        return "There are no figures of speed yet: scripts/bench --quality speed"
    about = speed.get("about", {})
    theirs = {"dtype": "float32", **speed["rows"][DIFFUSERS]}
    rows = [Row(DIFFUSERS, steps=str(REFERENCE.steps), **theirs, ratio=1.0, score=None)]
    for setting in presets(DTYPES):
        stored = speed["rows"].get(key(setting.quality, setting.dtype))
        score = scores.get("presets", {}).get(key(setting.quality, setting.dtype))
        if stored is None:
            continue
        count, whole = setting.quality.steps or 0, len(whole_steps(setting.quality))
        rows.append(
            Row(
                setting.name,
                setting.dtype,
                str(count) if whole == count else f"{count}, {whole} whole",
                stored["gflop"],
                stored["seconds"],
                stored.get("diffusers", theirs["seconds"]) / stored["seconds"],
                stored["memory"],
                QualityScore(**score) if score else None,
            )
        )
    memory = "peak GPU memory" if about.get("device", "").startswith("cuda") else "peak memory"
    where = conditions(about)
    return (f"{where}:\n\n" if where else "") + markdown(rows, scores.get("prompts", 0), memory)


def points(speed: Mapping[str, Any], scores: Mapping[str, Any]) -> list[Point]:
    """The combinations and presets whose distance is known, with the seconds of their parts, added up."""
    stored, distances = speed.get("parts"), scores.get("combinations", {})
    if not stored:
        return []
    parts = Parts({(a, b): taken for a, b, taken in stored["steps"]}, stored["rest"])
    return [
        Point(parts.clip(quality), distances[key(quality, "float32")], quality)
        for quality in dict.fromkeys((*COMBINATIONS, *QUALITIES.values()))
        if key(quality, "float32") in distances
    ]


def seconds_label(speed: Mapping[str, Any]) -> str:
    """What the seconds of `points` were measured on, for the plot."""
    about, dtype = speed.get("about", {}), speed["parts"].get("dtype", "float32")
    machine = f" ({about['machine']})" if "machine" in about else ""
    return f"seconds for a clip of the {about.get('model', 'base')} checkpoint in {dtype}{machine}"


def write_documents(docs: Path, text: str, picture: Path) -> None:
    """Put the table and the plot into docs/speed.md."""
    with replacing((docs / PICTURE).resolve()) as temporary:
        shutil.copyfile(picture, temporary)
    shown = f"![distance from 200 steps over seconds]({PICTURE})"
    replace_block(docs / "speed.md", "presets", f"{text}\n\n{shown}")
