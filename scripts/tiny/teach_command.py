"""Teach the tiny checkpoint a sound that it does not know, a ringing telephone, and measure what that costs.

Forty clips are synthesized with captions, and `audioldm2 finetune` trains an adapter on them, while sounds of
the kinds that tiny knows are rehearsed; with --all, also without these, and all weights of the UNet. Each is
scored on held-out captions of telephones, judged by their rhythm and pitch, and on the prompts of
`scripts/evaluate_tiny`: what was learned, and what was forgotten. With an adapter off, sounds are compared
with those of tiny bit by bit. The output is Markdown.

Trainings that the folder holds are not run again, and one that was stopped is resumed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from audioldm2 import AudioLDM2Pipeline
from scripts.tiny.data.sounds import KINDS, draw_scene, render
from scripts.tiny.evaluate.evaluation import by_row, judge
from scripts.tiny.evaluate.generation import generate
from scripts.tiny.evaluate.prompts import HELD_OUT_SEED, Prompt, draw_prompts
from scripts.tiny.evaluate.report import replace_block
from scripts.tiny.teach import telephone
from scripts.tiny.teach.rehearsal import write_rehearsal

ROOT = Path(__file__).resolve().parents[2]
PAGE = Path("docs/finetuning.md")
CLIPS = 40
DATA_SEED = 0
SAMPLING: dict[str, Any] = {"steps": 20, "guidance": 2.0, "batch": 16}
REHEARSED = 800  # clips of the kinds that it knows
# tiny was trained on the means of the latents and with equal weights, and its captions speak of the level.
SHARED = (
    *("--keep-level", "--latents", "mean", "--min-snr", "0", "--rehearse-share", "0.7"),
    *("--steps", "600", "--batch-size", "16", "--warmup", "20"),
)
# The attention of so small a UNet is on its lowest level alone; the rest needs updates, too.
WIDE = (
    *("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"),
    *("proj_in", "proj_out", "conv1", "conv2"),
)
LORA = ("--rate", "2e-3", "--rank", "16", "--targets", *WIDE)


@dataclass(frozen=True)
class Training:
    """A training to compare: its row of the table, its arguments, and whether it rehearses."""

    name: str
    arguments: tuple[str, ...]
    rehearses: bool


ADAPTER = Training("adapter", LORA, True)
OTHERS = (
    Training("adapter without rehearsal", LORA, False),
    Training("all weights without rehearsal", ("--full", "--rate", "1e-3"), False),
)
EXAMPLES = """\
examples:
  .venv/bin/python scripts/teach_tiny                # about half an hour on two cores
  .venv/bin/python scripts/teach_tiny --all --write  # everything that docs/finetuning.md shows
  .venv/bin/python scripts/teach_tiny --prompts 8 --clips 1 --real 1"""


@dataclass(frozen=True)
class Score:
    """How a model did.

    Attributes:
        name: of the row of the table.
        telephones: share of the held-out prompts of telephones that are right.
        known: share of the prompts of the seventeen kinds that are right.
        by_kind: the same of each kind.
        mistaken: share of the sounds of the seventeen kinds that are telephones.
    """

    name: str
    telephones: float
    known: float
    by_kind: dict[str, float]
    mistaken: float


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/teach_tiny",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=EXAMPLES,
    )
    parser.add_argument(
        "--folder", type=Path, default=ROOT / "out" / "teach-tiny", help="where to work (default %(default)s)"
    )
    parser.add_argument(
        "--all", action="store_true", help="also train an adapter and all weights without rehearsal"
    )
    parser.add_argument(
        "--prompts", type=int, default=100, help="held-out prompts of telephones (default %(default)s)"
    )
    parser.add_argument(
        "--clips", type=int, default=16, help="prompts per kind and trait (default %(default)s, 464 in all)"
    )
    parser.add_argument(
        "--real",
        type=int,
        default=8,
        help="synthesized sounds of each kind for the judge (default %(default)s)",
    )
    parser.add_argument("--threads", type=int, help="CPU threads (default: the number of cores)")
    parser.add_argument(
        "--write",
        type=Path,
        nargs="?",
        const=ROOT,
        metavar="CHECKOUT",
        help=f"put the table into {PAGE} of a checkout (default: this one)",
    )
    options = parser.parse_args(arguments)
    for name in ("prompts", "clips", "real", "threads"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            parser.error(f"--{name} must be at least 1, not {getattr(options, name)}")
    return options


def telephone_prompts(count: int) -> list[tuple[str, int]]:
    """Held-out captions of telephones, and the seeds of their noise."""
    found = []
    for i in range(count):
        rng = np.random.default_rng([DATA_SEED, telephone.HELD_OUT_SEED, 1, i])
        found.append((telephone.caption_telephone(rng, held_out=True), 50_000 + i))
    return found


def check_judge(sounds: int) -> tuple[float, float]:
    """The shares of real telephones and of real sounds of the seventeen kinds that are judged telephones."""
    accepted = [
        not telephone.misses(
            telephone.render_telephone(np.random.default_rng([DATA_SEED, telephone.HELD_OUT_SEED, 0, i]))
        )
        for i in range(sounds * len(KINDS))
    ]
    others = []
    for number, kind in enumerate(KINDS):
        for i in range(sounds):
            rng = np.random.default_rng([DATA_SEED, HELD_OUT_SEED, 4, number, i])
            others.append(not telephone.misses(render(draw_scene(rng, kind), rng)))
    return sum(accepted) / len(accepted), sum(others) / len(others)


def generated(
    pipe: AudioLDM2Pipeline, options: argparse.Namespace
) -> tuple[list[Prompt], np.ndarray, np.ndarray]:
    """The prompts of the known kinds and their sounds, and the sounds of the telephones."""
    pipe.set_progress_bar_config(disable=True)
    known = draw_prompts(options.clips, DATA_SEED)
    phones = [Prompt(known[0].scene, text, seed) for text, seed in telephone_prompts(options.prompts)]
    return (
        known,
        generate(pipe, known, **SAMPLING, title="Generating known kinds")[:, 0],
        generate(pipe, phones, **SAMPLING, title="Generating telephones")[:, 0],
    )


def score(name: str, pipe: AudioLDM2Pipeline, options: argparse.Namespace) -> Score:
    """Score a model."""
    known, sounds, phones = generated(pipe, options)
    rows = by_row(known, right=judge(known, sounds, "Judging known kinds"))
    shares = {row: values["right"] for row, values in rows.items()}
    return Score(
        name,
        telephones=float(np.mean([not telephone.misses(sound) for sound in phones])),
        known=shares.pop("all"),
        by_kind=shares,
        mistaken=float(np.mean([not telephone.misses(sound) for sound in sounds])),
    )


def finetune(training: Training, folder: Path, threads: int) -> dict[str, float]:
    """Run `scripts/finetune` in a process of its own; what it cost. A finished one is not run again."""
    output = folder / training.name.replace(" ", "-")
    costs = output / "costs.json"
    if not costs.is_file():
        table = telephone.write_table(folder / "telephones", CLIPS, DATA_SEED)
        command = [sys.executable, str(ROOT / "scripts" / "finetune"), str(table), "-o", str(output)]
        command += ["--model", "tiny", "--device", "cpu", "--threads", str(threads)]
        command += [*SHARED, *training.arguments]
        if training.rehearses:
            command += ["--rehearse", str(write_rehearsal(folder / "known", REHEARSED, DATA_SEED))]
        start, before = time.monotonic(), os.times()
        subprocess.run(command, check=True)
        after = os.times()
        used = after.children_user + after.children_system - before.children_user - before.children_system
        size = sum(path.stat().st_size for path in result_files(output))
        costs.write_text(json.dumps({"seconds": time.monotonic() - start, "cpu": used, "bytes": size}))
    found: dict[str, float] = json.loads(costs.read_text())
    return found


def result_files(output: Path) -> list[Path]:
    """What has to be kept of a fine-tune's folder: the checkpoint, or diffusers' file of the adapter."""
    adapter = output / "pytorch_lora_weights.safetensors"
    if adapter.is_file():
        return [adapter]
    return [path for path in output.rglob("*") if path.is_file() and "training" not in path.parts]


def report(
    scores: Sequence[Score], costs: dict[str, dict[str, float]], judged: tuple[float, float], about: str
) -> str:
    """The table, in Markdown, with a sentence about how it was made."""
    lines = [
        "| model | telephones right | known kinds right | known kinds as telephones | training | file |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for one in scores:
        cost = costs.get(one.name)
        spent = (
            f"{cost['seconds'] / 60:.1f} min ({cost['cpu'] / 60:.1f} CPU min) | {cost['bytes'] / 1e6:.2f} MB"
            if cost
            else "|"
        )
        lines.append(
            f"| {one.name} | {one.telephones:.1%} | {one.known:.1%} | {one.mistaken:.1%} | {spent} |"
        )
    lines += [
        "",
        about,
        f"The judge takes {judged[0]:.1%} of synthesized telephones that are in no table for telephones, and "
        f"{judged[1]:.1%} of the sounds of the seventeen kinds.",
    ]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse_arguments(arguments)
    threads = options.threads or os.cpu_count() or 1
    torch.set_num_threads(threads)
    trainings = (ADAPTER, *OTHERS) if options.all else (ADAPTER,)
    costs = {one.name: finetune(one, options.folder, threads) for one in trainings}
    pipe = AudioLDM2Pipeline.from_pretrained("tiny")
    few = argparse.Namespace(clips=1, prompts=4)
    before = generated(pipe, few)
    scores = [score("tiny", pipe, options)]
    for one in trainings:
        output = options.folder / one.name.replace(" ", "-")
        if "--full" in one.arguments:
            scores.append(score(one.name, AudioLDM2Pipeline.from_pretrained(output), options))
            continue
        pipe.load_lora_weights(output)
        scores.append(score(one.name, pipe, options))
        pipe.disable_lora()
        after = generated(pipe, few)
        if not all(np.array_equal(a, b) for a, b in zip(before[1:], after[1:], strict=True)):
            sys.exit(f"teach_tiny: error: with the {one.name} off, the sounds are not those of tiny")
        pipe.unload_lora_weights()
    known = len(draw_prompts(options.clips, DATA_SEED))
    about = f"{options.prompts} prompts of telephones and {known} of known kinds; {threads} threads."
    text = report(scores, costs, check_judge(options.real), about)
    print(text)
    content = {"scores": [asdict(one) for one in scores], "costs": costs}
    (options.folder / "scores.json").write_text(json.dumps(content, indent=1), encoding="utf-8")
    if options.write:
        replace_block(options.write / PAGE, "teach", text)
