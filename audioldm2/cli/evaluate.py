"""`audioldm2 evaluate`: figures of the quality of the sounds in a folder."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from audioldm2.audio.file_types import SOUND_TYPES
from audioldm2.cli.loading import check_revision, checked_device
from audioldm2.cli.messages import print_error, say
from audioldm2.cli.options import (
    Parser,
    add_model_options,
    add_threads_option,
    number,
    parse_options,
)
from audioldm2.cli.process import print_line
from audioldm2.extras import install_hint
from audioldm2.training.table import METADATA, read_table

WHEN_STOPPED = "nothing was written"
SUFFIXES = tuple(filter(None, SOUND_TYPES))
DESCRIPTION = f"""\
Measure how good the sounds in a folder are, with the CLAP of a checkpoint.

  Fréchet distance   how far the sounds are, as a whole, from those of the
                     reference: real recordings of the same kinds. Smaller is
                     better. It is too high for few sounds: compare only values
                     of equally many sounds and the same reference. Beside it
                     stands what two halves of the reference give
  kernel distance    the same without that bias: about 0 if nothing differs
  CLAP score         how well each sound matches its caption, from -1 to 1
  log-mel distance   dB between files of the same name in both folders, which
                     should be the same sound (--paired)

The spread is the standard deviation that a figure would have with as many
other sounds. Some hundreds of sounds are needed for distances.

Captions are those of the manifest.jsonl that "audioldm2 batch" writes, or of a
metadata.csv with the columns file_name and caption, or of --captions. Files may
have any rates and lengths. WAV needs nothing else; FLAC, Ogg, MP3 and others
need soundfile: {install_hint("sound")}
"""
EXAMPLES = """\
examples:
  audioldm2 evaluate sounds --reference recordings
  audioldm2 evaluate sounds --reference recordings --rate 16000
  audioldm2 evaluate sounds --captions captions.csv --model tiny
  audioldm2 evaluate 10-steps --reference 200-steps --paired
  audioldm2 evaluate sounds --reference recordings --json > scores.json

exit codes:
  0  the figures were printed
  1  an error occurred, such as a file that is not a sound
  2  an argument is invalid
  129, 130, 143  stopped by SIGHUP, SIGINT (Ctrl-C) or SIGTERM
"""


def parser() -> Parser:
    """The parser with all options and their help."""
    p = Parser("evaluate", "[options] FOLDER [--reference FOLDER]", DESCRIPTION, EXAMPLES)
    p.add_argument("folder", nargs="?", metavar="FOLDER", help="folder of the sounds to measure")
    p.add_argument(
        "--reference",
        metavar="FOLDER",
        help="folder of real sounds; best as many, of the same kinds and lengths (default: only the CLAP "
        "score)",
    )
    p.add_argument(
        "--captions",
        metavar="TABLE",
        help=".csv, .tsv or .jsonl file with the columns file_name, relative to FOLDER, and caption "
        "(default: what FOLDER has: manifest.jsonl, metadata.csv or metadata.jsonl)",
    )
    p.add_argument(
        "--paired",
        action="store_true",
        help="also compare files of the same name, as in sounds/1.wav and reference/1.flac",
    )
    p.add_argument(
        "--rate",
        type=number(int, 1),
        metavar="HZ",
        help="resample all sounds to this rate before CLAP, so that frequencies that only one folder can "
        "have do not count, as in 16000 for recordings of 44100 Hz",
    )
    p.add_argument("--json", action="store_true", help="print JSON with the figures, and those of each sound")
    add_model_options(p, generates=False)
    add_threads_option(p)
    return p


def parse(p: Parser, arguments: Sequence[str]) -> argparse.Namespace:
    """Parse and check the arguments.

    Args:
        p: from `parser`.
        arguments: without the names of the program and the command.

    Raises:
        SystemExit: with code 2 if one is invalid, and with code 0 for --help and --version.
    """
    options, rest = parse_options(p, arguments)
    if rest:
        p.error(f"unrecognized arguments: {' '.join(rest)}; there is one folder, and its --reference")
    if options.folder is None:
        p.error(f"the folder is missing: {p.prog} sounds --reference recordings")
    if options.paired and options.reference is None:
        p.error("argument --paired: say with which folder, as in --reference 200-steps")
    return options


def run(parser: Parser, options: argparse.Namespace) -> int:
    """Measure the sounds of a folder.

    Args:
        parser: for errors of arguments that are found here.
        options: as `parse` returns them.

    Returns:
        The exit code: 0, or 1 if the figures could not be printed.

    Raises:
        SystemExit: with code 2 for invalid arguments.
        Exception: the sounds cannot be read or measured.
    """
    check_revision(parser, options.model, options.revision)
    sounds = _sounds_of(parser, "FOLDER", options.folder)
    reference = options.reference and _sounds_of(parser, "--reference", options.reference)
    for name, files in (("FOLDER", sounds), ("--reference", reference)):
        if reference and len(files) < 2:
            parser.error(f"argument {name}: a distance needs at least 2 sounds, and the folder has 1")
    captions = _captions(parser, options, sounds)
    if not any(captions) and not reference:
        parser.error(f"nothing to compare with: give --reference, or captions of {options.folder}")
    originals = None
    if options.paired:
        named = {path.stem: path for path in reference}
        originals = [named.get(path.stem) for path in sounds]
        if not any(originals):
            parser.error("argument --paired: no file has the same name in both folders")

    import torch

    if options.threads is not None:
        torch.set_num_threads(options.threads)
    device = checked_device(parser, options)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from audioldm2.metrics import ClapScorer, evaluate

    say(f"loading CLAP of {options.model}", options.quiet)
    clap = ClapScorer.from_pretrained(
        options.model, device=device, variant=options.variant, revision=options.revision
    )
    clap.set_progress_bar_config(disable=options.quiet, file=sys.stderr)
    found = evaluate(
        clap,
        sounds,
        reference=reference,
        captions=captions if any(captions) else None,
        originals=originals,
        resample_to=options.rate,
    )
    text = _as_json(found, options, sounds) if options.json else _table(found)
    unprinted = print_line(text)
    if unprinted:
        print_error(f"the figures were not written to standard output: {unprinted}")
    return 1 if unprinted else 0


def _sounds_of(parser: Parser, name: str, folder: str) -> list[Path]:
    """The sound files of a folder, sorted by name."""
    path = Path(folder)
    if not path.is_dir():
        parser.error(f"argument {name}: {folder} is {'not a folder' if path.exists() else 'not there'}")
    found = sorted(each for each in path.iterdir() if each.suffix.lower() in SUFFIXES and each.is_file())
    found = [each for each in found if not each.name.startswith(".")]
    if not found:
        parser.error(f"argument {name}: {folder} has no sound files ({', '.join(SUFFIXES)})")
    return found


def _captions(parser: Parser, options: argparse.Namespace, sounds: Sequence[Path]) -> list[list[str]]:
    """The captions of each sound, of which a table can have several."""
    folder = Path(options.folder)
    captions: dict[str, list[str]] = {}
    if options.captions is not None:
        try:
            items = read_table(options.captions, folder)
        except ValueError as error:
            parser.error(f"argument --captions: {error}")
    elif (folder / "manifest.jsonl").is_file():
        from audioldm2.batch.manifest import MANIFEST, read_manifest

        records, _ = read_manifest(folder / MANIFEST)
        captions = {name: [str(record["prompt"])] for name, record in records.items() if record.get("prompt")}
        items = []
    else:
        items = read_table(folder) if any((folder / name).is_file() for name in METADATA) else []
    for item in items:
        captions.setdefault(item.path.name, []).append(item.caption)
    return [captions.get(path.name, []) for path in sounds]


def _table(found: Any) -> str:
    """The figures for a terminal."""
    rows = [
        ("Fréchet distance", "3f", found.frechet, f" and {found.references} of the reference"),
        ("  reference in halves", "3f", found.halves, " and as many"),
        ("kernel distance", "2f", found.kernel, f" and {found.references} of the reference"),
        ("CLAP score", "3f", found.clap, ""),
        ("log-mel distance, dB", "2f", found.log_mel, ""),
    ]
    lines = [f"{'':22}{'value':>9}{'spread':>9}  sounds"]
    for name, digits, figure, more in rows:
        if figure is not None:
            known = figure.spread == figure.spread  # not NaN
            spread = f"{figure.spread:.{digits}}" if known else "-"
            lines.append(f"{name:22}{figure.value:9.{digits}}{spread:>9}  {figure.count}{more}")
    return "\n".join(lines)


def _as_json(found: Any, options: argparse.Namespace, sounds: Sequence[Path]) -> str:
    figures = found.as_dict()
    each = {name: figures.pop(name) for name in ("clap_scores", "log_mel_distances")}
    rows: list[dict[str, Any]] = [{"file": path.name} for path in sounds]
    for name, values in each.items():
        for row, value in zip(rows, values, strict=False):
            row[name.removesuffix("s")] = value
    content = {"model": options.model, "rate": options.rate, **figures, "sounds": rows}
    return json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False)
