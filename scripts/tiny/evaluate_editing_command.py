"""How well does the tiny checkpoint edit sounds? Measured by signal processing, not by ear.

Sounds and the phrasing of the prompts are ones that training never used. A result is right if its waveform
passes fixed checks, such as whether a sweep falls or whether a bell has kept its pitch. The rates of right
results stand beside those of no editing and of text alone. A setting, such as the strength of a variation, is
chosen on some sounds and reported on others. The output is Markdown.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm.auto import tqdm

from audioldm2 import AudioLDM2Pipeline, CheckpointError, DPMSolverMultistepScheduler
from scripts.tiny.evaluate.editing.details import DETAILS
from scripts.tiny.evaluate.editing.methods import Model
from scripts.tiny.evaluate.editing.running import measure_task, sounds_to_make
from scripts.tiny.evaluate.editing.table import task_section
from scripts.tiny.evaluate.editing.tasks import TASKS
from scripts.tiny.evaluate.report import replace_block

ROOT = Path(__file__).resolve().parents[2]
PAGE = Path("docs") / "editing-measured.md"
EXAMPLES = """\
examples:
  .venv/bin/python scripts/evaluate_editing --kinds sweep bell --cases 4
  .venv/bin/python scripts/evaluate_editing --write  # everything that docs/editing-measured.md shows
  .venv/bin/python scripts/evaluate_editing --details windows decoding seams skip --write"""


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/evaluate_editing",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=EXAMPLES,
    )
    parser.add_argument(
        "--model", default="tiny", help='"tiny", or a folder in the Hub\'s layout (default %(default)s)'
    )
    names = [task.name for task in TASKS]
    parser.add_argument(
        "--kinds",
        nargs="+",
        choices=names,
        default=names,
        metavar="KIND",
        help=f"tasks to measure: {', '.join(names)} (default: all)",
    )
    details = [detail.name for detail in DETAILS]
    parser.add_argument(
        "--details",
        nargs="+",
        choices=details,
        default=[],
        metavar="NAME",
        help=f"instead, the tables inside of other documents: {', '.join(details)}",
    )
    parser.add_argument(
        "--cases", type=int, default=16, metavar="N", help="sounds of each task (default %(default)s)"
    )
    parser.add_argument(
        "--chosen-on",
        type=int,
        metavar="N",
        help="other sounds of each task on which settings are chosen (default: a quarter as many)",
    )
    parser.add_argument("--steps", type=int, default=20, help="steps of DPM-Solver++ (default %(default)s)")
    parser.add_argument("--guidance", type=float, default=2.0, help="guidance scale (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of sounds, prompts and noise (default 0)")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: PyTorch's choice)")
    parser.add_argument(
        "--write",
        type=Path,
        nargs="?",
        const=ROOT,
        metavar="CHECKOUT",
        help=f"update what was measured in {PAGE} and the other documents of a checkout (default: this one)",
    )
    options = parser.parse_args(arguments)
    if options.chosen_on is None:
        options.chosen_on = -(-options.cases // 4)
    for name in ("cases", "chosen_on", "steps", "threads"):
        value = getattr(options, name)
        if value is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, not {value}")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse_arguments(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    try:
        pipe = AudioLDM2Pipeline.from_pretrained(options.model, torch_dtype=torch.float32)
    except CheckpointError as error:
        sys.exit(f"evaluate_editing: error: {error}")
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    model = Model(pipe, options.steps, options.guidance)
    for detail in DETAILS:
        if detail.name in options.details:
            table = detail.measure(model, options.cases, options.seed)
            print(table, end="\n\n", flush=True)
            if options.write:
                replace_block(options.write / detail.page, f"detail: {detail.name}", table)
    if options.details:
        return
    tasks = [task for task in TASKS if task.name in options.kinds]
    about = (
        f"{options.steps} steps (DPM-Solver++; DDIM for inversion), guidance {options.guidance:g} unless a "
        f"setting says otherwise, seed {options.seed}."
    )
    total = sounds_to_make(tasks, options.cases, options.chosen_on)
    with tqdm(total=total, desc="Editing", unit="sound", disable=None) as bar:
        for task in tasks:
            bar.set_description(task.title)
            rows = measure_task(model, task, options.cases, options.chosen_on, options.seed, bar.update)
            section = task_section(task, rows, options.cases, options.chosen_on, about)
            with tqdm.external_write_mode():
                print(section, end="\n\n", flush=True)
            if options.write:
                replace_block(options.write / PAGE, f"editing: {task.name}", section)
