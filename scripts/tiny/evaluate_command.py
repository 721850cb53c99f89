"""How often does the tiny checkpoint do what a prompt says? Measured by signal processing, not by ear.

Prompts are drawn in phrasings and with seeds that training never used. Each generated clip is measured:
whether it is the kind of sound asked for, with the pitch, direction or rate asked for, as loud or soft as
asked for, and with a background if the prompt names one. A prompt is right if all of this is. Three more
columns put the score into perspective:

  by chance     the same clips judged by other prompts: the floor
  real          sounds synthesized for these prompts, as for training: the ceiling
  decoded       the real sounds through the VAE and the vocoder: the most that any denoiser could reach

Further lines give the errors of the VAE and the vocoder, how often CLAP finds a caption's sound among one of
each kind, and whether its ranking of four candidates helps. The output is Markdown.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from audioldm2 import AudioLDM2Pipeline, CheckpointError, DPMSolverMultistepScheduler
from audioldm2.plots import check_can_draw
from scripts.tiny.data.captions import describe
from scripts.tiny.data.sounds import ALL_SOUNDS, Scene
from scripts.tiny.evaluate.evaluation import (
    by_row,
    clap_retrieval,
    judge,
    rank_candidates,
    reconstruct,
    repetition,
    share_right,
)
from scripts.tiny.evaluate.generation import generate
from scripts.tiny.evaluate.pictures import draw_spectrograms
from scripts.tiny.evaluate.prompts import Prompt, draw_prompts, shuffled
from scripts.tiny.evaluate.report import replace_block, score_report
from scripts.tiny.evaluate.trade import draw_trade, measure_trade, trade_table

ROOT = Path(__file__).resolve().parents[2]
CARD, README, DOCS = Path("audioldm2/tiny/README.md"), Path("README.md"), Path("docs")
EXAMPLES = """\
examples:
  .venv/bin/python scripts/evaluate_tiny --quick
  .venv/bin/python scripts/evaluate_tiny --model out/train-tiny/tiny --json out/scores.json
  .venv/bin/python scripts/evaluate_tiny --trade --pictures --write  # everything that the documents show"""


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/evaluate_tiny",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=EXAMPLES,
    )
    parser.add_argument(
        "--model", default="tiny", help='"tiny", or a folder in the Hub\'s layout (default %(default)s)'
    )
    parser.add_argument(
        "--clips",
        type=int,
        help=f"clips of each of the {len(ALL_SOUNDS)} kinds and traits, such as a rising scale (default 16)",
    )
    parser.add_argument("--steps", type=int, default=20, help="steps of DPM-Solver++ (default %(default)s)")
    parser.add_argument(
        "--guidance",
        type=float,
        default=2.0,
        help="guidance scale (default %(default)s; 3.5 is too high for this checkpoint)",
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of prompts, noise and sounds (default %(default)s)"
    )
    parser.add_argument("--batch", type=int, default=16, help="clips generated at once (default %(default)s)")
    parser.add_argument("--quick", action="store_true", help="2 clips unless --clips is given, no ranking")
    parser.add_argument(
        "--trade",
        action="store_true",
        help="also compare samplers, steps and dtypes: score, distance from 200 DDIM steps, seconds per clip",
    )
    parser.add_argument(
        "--pictures", action="store_true", help="also draw the spectrograms of all kinds, in one picture"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there, prompt by prompt")
    parser.add_argument(
        "--out",
        type=Path,
        default=ROOT / "out" / "evaluate-tiny",
        help="folder of pictures (default %(default)s)",
    )
    parser.add_argument(
        "--write",
        type=Path,
        nargs="?",
        const=ROOT,
        metavar="CHECKOUT",
        help=f"update the scores in {CARD}, the trade in {README} and the pictures in {DOCS}/ of a checkout "
        "(default: this one)",
    )
    options = parser.parse_args(arguments)
    for name in ("clips", "steps", "batch"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            parser.error(f"--{name} must be at least 1, not {getattr(options, name)}")
    options.clips = options.clips or (2 if options.quick else 16)
    return options


def evaluate(pipe: AudioLDM2Pipeline, options: argparse.Namespace) -> dict[str, Any]:
    """All scores but those of --trade."""
    sampling = {"steps": options.steps, "guidance": options.guidance, "batch": options.batch}
    prompts = draw_prompts(options.clips, options.seed)
    generated = generate(pipe, prompts, **sampling)[:, 0]
    real = np.stack([prompt.real() for prompt in prompts])
    vocoded, vocoder_errors = reconstruct(pipe, real, vae=False)
    decoded, vae_errors = reconstruct(pipe, real, vae=True)
    checks = judge(prompts, generated, "Judging generated sounds")
    rows = by_row(
        prompts,
        right=checks,
        floor=judge(shuffled(prompts, options.seed), generated, "Judging by other prompts"),
        ceiling=judge(prompts, real, "Judging real sounds"),
        decoded=judge(prompts, decoded, "Judging decoded sounds"),
    )
    vocoder_errors["right"] = share_right(judge(prompts, vocoded, "Judging vocoded sounds"))
    result = {
        "rows": rows,
        "vae": vae_errors,
        "vocoder": vocoder_errors,
        "repetition": [repetition(prompts, sounds) for sounds in (real, generated)],
        "retrieval": clap_retrieval(pipe, 2 * options.clips, options.seed),
        "prompts": [
            {"text": p.text, "row": p.row, "seed": p.seed, **passed}
            for p, passed in zip(prompts, checks, strict=True)
        ],
    }
    if not options.quick:
        few = draw_prompts(max(1, options.clips // 2), options.seed + 1)
        result["ranking"] = rank_candidates(pipe, few, **sampling)
    return result


def draw_kinds(pipe: AudioLDM2Pipeline, options: argparse.Namespace, path: Path) -> None:
    """Generate one clip of every kind with every trait and draw their spectrograms."""
    texts = [describe(sound, "", np.random.default_rng(options.seed), False) for sound in ALL_SOUNDS]
    prompts = [
        Prompt(Scene((sound,)), text, 1000 * options.seed + i)
        for i, (sound, text) in enumerate(zip(ALL_SOUNDS, texts, strict=True))
    ]
    sounds = generate(
        pipe,
        prompts,
        steps=options.steps,
        guidance=options.guidance,
        batch=options.batch,
        title="Generating for the picture",
    )
    draw_spectrograms(texts, [*sounds[:, 0]], path)


def trade(
    load: Callable[[torch.dtype], AudioLDM2Pipeline], options: argparse.Namespace, path: Path
) -> tuple[list[dict[str, Any]], str]:
    """The figures of --trade, and the README's text about them. Draws them into a PNG file."""
    prompts = draw_prompts(max(1, options.clips // 8), options.seed, two=0)
    results = measure_trade(load, prompts, guidance=options.guidance, batch=options.batch)
    draw_trade(results, path)
    text = (
        f"{trade_table(results)}\n\n{len(prompts)} prompts, guidance {options.guidance:g}, from the same "
        f"noise; seconds in batches of up to {options.batch} on a CPU with {torch.get_num_threads()} "
        "threads. Distance: root-mean-square difference of the latents from those of the first row, in "
        "percent of their root mean square."
    )
    return [asdict(result) for result in results], text


def write_documents(checkout: Path, texts: dict[str, str], pictures: Sequence[Path]) -> None:
    """Put texts and pictures into the documents of a checkout."""
    replace_block(checkout / CARD, "scores", texts["scores"])
    if "trade" in texts:
        shown = f"![score and distance over steps]({DOCS / 'tiny-trade.png'})"
        replace_block(checkout / README, "tiny: trade", f"{texts['trade']}\n\n{shown}")
    for path in pictures:
        (checkout / DOCS).mkdir(exist_ok=True)
        shutil.copyfile(path, checkout / DOCS / path.name)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse_arguments(arguments)
    if options.trade or options.pictures:
        try:
            check_can_draw()
        except ImportError as error:
            sys.exit(f"evaluate_tiny: error: {error}")

    def load(dtype: torch.dtype) -> AudioLDM2Pipeline:
        pipe = AudioLDM2Pipeline.from_pretrained(options.model, torch_dtype=dtype)
        pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    try:
        pipe = load(torch.float32)
    except CheckpointError as error:
        sys.exit(f"evaluate_tiny: error: {error}")
    options.out.mkdir(parents=True, exist_ok=True)
    pictures: list[Path] = []
    result = evaluate(pipe, options)
    report = score_report(result, steps=options.steps, guidance=options.guidance, seed=options.seed)
    texts = {"scores": report}
    print(report, flush=True)
    if options.pictures:
        pictures.append(options.out / "tiny-kinds.png")
        draw_kinds(pipe, options, pictures[-1])
    if options.trade:
        pictures.append(options.out / "tiny-trade.png")
        result["trade"], texts["trade"] = trade(load, options, pictures[-1])
        print(f"\n{texts['trade']}", flush=True)
    for path in pictures:
        print(f"\n{path}")
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        about = {name: str(value) for name, value in vars(options).items()}
        about |= {"machine": platform.machine(), "threads": str(torch.get_num_threads())}
        options.json.write_text(json.dumps({"about": about, **result}, indent=1), encoding="utf-8")
    if options.write:
        write_documents(options.write, texts, pictures)
