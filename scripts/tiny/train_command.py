"""Train a miniature AudioLDM 2 from random weights, stage by stage, on sounds that are synthesized here.

It takes about five hours on two CPU cores, three of them for the UNet. You can stop it at any time: the same
command resumes where it stopped and ends with the same weights. Afterwards the folder (--folder) holds

  library-*/    the sounds, their log-mel spectrograms and captions
  plots/        the losses, one picture per stage
  *.pt          the state that a stage resumes from; delete it to train that stage again
  checkpoint/   the trained parts, float32
  tiny/         the complete checkpoint, float16, in the Hub's layout: from_pretrained("FOLDER/tiny")

On a CPU under Linux, --compile makes the UNet's steps faster, and so does an allocator that keeps its memory:
MALLOC_TRIM_THRESHOLD_=17179869184 MALLOC_MMAP_THRESHOLD_=33554432 MALLOC_TOP_PAD_=268435456.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from audioldm2 import CheckpointError
from audioldm2.checkpoints.formats import PARTS
from audioldm2.plots import check_can_draw
from audioldm2.runtime.device import available_device
from audioldm2.training.loop import RunMismatchError
from scripts.tiny.assemble import assemble, parts_in, take_parts
from scripts.tiny.data.library import LIBRARY_SIZE, load_library
from scripts.tiny.run import Run
from scripts.tiny.stages import STAGES, TrainingStage

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = """\
examples:
  .venv/bin/python scripts/train_tiny
  .venv/bin/python scripts/train_tiny --device cuda
  .venv/bin/python scripts/train_tiny --stages unet      # train only the UNet, after the stages before it
  .venv/bin/python scripts/train_tiny --parts audioldm2/tiny --stages unet
  .venv/bin/python scripts/train_tiny --parts audioldm2/tiny --stages unet --begin audioldm2/tiny
  .venv/bin/python scripts/train_tiny --steps 2 --sounds 16 --folder /tmp/smoke"""


def stage_list() -> str:
    """The stages for --help, one per line."""
    lines = [f"  {stage.name:<12} {stage.steps:>6}  {stage.help}" for stage in STAGES]
    return "\n".join(["stages, their steps and what they learn:", *lines])


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="scripts/train_tiny",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"{stage_list()}\n\n{EXAMPLES}",
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default %(default)s)")
    parser.add_argument(
        "--folder", type=Path, default=ROOT / "out" / "train-tiny", help="where to work (default %(default)s)"
    )
    parser.add_argument(
        "--stages",
        nargs="+",
        choices=[stage.name for stage in STAGES],
        metavar="STAGE",
        help="stages to run, of the list below (default: all, or with --parts those whose parts are missing)",
    )
    parser.add_argument(
        "--parts", type=Path, metavar="FOLDER", help="use trained parts from this folder, in the Hub's layout"
    )
    parser.add_argument(
        "--begin",
        type=Path,
        metavar="FOLDER",
        help="start the UNet from the one in this folder instead of random weights",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of everything random (default %(default)s)")
    parser.add_argument("--sounds", type=int, help=f"size of the library (default {LIBRARY_SIZE})")
    parser.add_argument("--steps", type=int, help="steps of each stage (default: see the list below)")
    parser.add_argument("--batch", type=int, help="examples per step (default: each stage's own)")
    parser.add_argument(
        "--compile", action="store_true", help="compile the UNet: takes minutes, then each step is faster"
    )
    parser.add_argument("--threads", type=int, help="CPU threads (default: the number of cores)")
    return parser


def missing_parts(stages: Sequence[TrainingStage], present: set[str]) -> str:
    """What the first stage that cannot run lacks, as an error message; "" if all stages can run."""
    available = set(present)
    for stage in stages:
        missing = stage.needs - available
        if missing:
            trainers = [other.name for other in STAGES if other.writes & missing - other.needs]
            return (
                f"stage {stage.name} needs {', '.join(sorted(missing))}; run the stages "
                f"{', '.join(trainers)} first, or name a folder with trained parts with --parts"
            )
        available |= stage.writes
    return ""


def main(arguments: Sequence[str] | None = None) -> None:
    parser = make_parser()
    options = parser.parse_args(arguments)
    for name in ("sounds", "steps", "batch", "threads"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            parser.error(f"--{name} must be at least 1, not {getattr(options, name)}")
    try:
        available_device(options.device)
        check_can_draw()
    except (ValueError, ImportError) as error:
        parser.error(str(error))
    torch.set_num_threads(options.threads or os.cpu_count() or 1)
    if options.begin and not (options.begin / "unet").is_dir():
        parser.error(f"--begin: {options.begin / 'unet'} is not a folder")
    run = Run(
        options.folder,
        options.device,
        options.seed,
        options.steps,
        options.batch,
        options.compile,
        options.begin,
    )
    chosen = [stage for stage in STAGES if not options.stages or stage.name in options.stages]
    if options.parts:
        try:
            taken = take_parts(run, options.parts)
        except (FileNotFoundError, CheckpointError) as error:
            parser.error(f"--parts: {error}")
        print(f"taken from {options.parts}: {', '.join(sorted(taken))}", flush=True)
        if not options.stages:
            chosen = [stage for stage in STAGES if not stage.writes <= taken]
    if obstacle := missing_parts(chosen, parts_in(run.checkpoint)):
        parser.error(obstacle)

    library = load_library(options.folder, options.sounds or LIBRARY_SIZE, options.seed)
    for stage in chosen:
        start = time.monotonic()
        try:
            stage.train(library, run)
        except KeyboardInterrupt:
            sys.exit(f"\nstopped in stage {stage.name}; run the same command to resume")
        except (CheckpointError, RunMismatchError) as error:
            sys.exit(f"train_tiny: error: {stage.name}: {error}")
        print(f"{stage.name}: {(time.monotonic() - start) / 60:.1f} min", flush=True)
    if parts_in(run.checkpoint) >= {*PARTS}:
        assemble(run, options.folder / "tiny")
        print(f"the checkpoint is in {options.folder / 'tiny'}; listen to it:")
        print(
            f'  audioldm2 "a loud bell" --model {options.folder / "tiny"} --scheduler dpmsolver++ -o bell.wav'
        )
