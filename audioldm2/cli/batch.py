"""`audioldm2 batch`: from a table of prompts to a folder of sounds."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import math
from collections.abc import Sequence
from typing import Any

from audioldm2.atomic import check_folder_writable
from audioldm2.audio.file_types import FILE_FORMATS, SAMPLE_FORMATS, sound_type
from audioldm2.batch.jobs import BATCH_SIZE, Failure, Job
from audioldm2.batch.tables import TABLES, parse_jobs, read_jobs
from audioldm2.cli.loading import load_pipeline, loader
from audioldm2.cli.memory import keep_freed_memory
from audioldm2.cli.messages import (
    clean,
    counted,
    print_error,
    say,
    say_beside_bars,
    with_column_names,
)
from audioldm2.cli.options import (
    STANDARD_OUTPUT,
    Parser,
    add_model_options,
    add_quality_options,
    add_sound_options,
    check_quality,
    check_words,
    number,
    parse_options,
    quality_arguments,
)
from audioldm2.cli.process import print_line
from audioldm2.cli.prompts import STANDARD_INPUT, standard_input
from audioldm2.extras import install_hint
from audioldm2.quality_settings import OF_PRESET
from audioldm2.quoting import one_line, shortened
from audioldm2.schedulers import DEFAULT_SAMPLER

ENGINES = ("local", "ray")
MAX_LISTED = 20  # failures at the end
WHEN_STOPPED = "finished sounds stay; run the same command again to continue"
DESCRIPTION = """\
Generate a sound for each prompt of a table, into a folder.

The table is a .csv or .tsv file whose first line names the columns, a .jsonl
file with an object on each line, or a .txt file with a prompt on each line, or
"prompt|file name". "-" reads it from standard input. The columns are

  prompt, name (of the file), negative, transcription, duration, seed,
  steps, guidance, candidates, scheduler, eta and max_new_tokens
for prompts and words with weights:
  blend, as in "a bell: 0.3", and word_weights, as in "siren: 1.5, rain: 0.5"
to edit a sound:
  from (a file, relative to the table's folder), strength, keep, replace,
  replace_band, extend, invert, source_prompt and skip
of loops, long sounds and adapters:
  loop, window, exact_decoding, and adapters, as in "dog:0.8, rain", of those
  that --lora loads, which are named after their folders
of quality and speed:
  quality, cache, guidance_interval, guidance_rescale, unconditional, timesteps

Only prompt is required. The options below are the defaults of what a row
leaves out; but in a row with a quality of its own, that preset takes
precedence over --scheduler, --steps, --timesteps, --cache and
--guidance-interval. "audioldm2 --help" says what the settings of edits mean.
Cells of keep, replace and replace_band are like "0-2.5, 4-". In .jsonl,
weights may be objects, such as {"a bell": 0.3}, and what is several numbers
may be a list.

A batch that was stopped, at any moment, is resumed by giving the same command
again. A sound is generated again if its row or an option has changed. The
folder's manifest.jsonl has a line for each finished sound: its settings, seed,
score and checksum. A row that is not valid is reported and does not stop the
others.
"""
EXAMPLES = """\
examples:
  audioldm2 batch prompts.csv -o sounds --model tiny
  audioldm2 batch prompts.csv -o sounds --dry-run
  audioldm2 batch prompts.jsonl -o sounds --format flac --rate 48000
  audioldm2 batch prompts.txt -o sounds --candidates 4 --keep-all
  audioldm2 batch edits.csv -o edited    # with the column "from"
  audioldm2 batch prompts.csv -o sounds --engine ray --address 10.0.0.5:6379
  printf 'Rain\\nA bell\\n' | audioldm2 batch - -o sounds --model tiny

exit codes:
  0  every row has its sound
  1  some rows have none, which are listed at the end; or an error occurred, and
     what was finished stays
  2  an argument is invalid
  129, 130, 143  stopped by SIGHUP, SIGINT (Ctrl-C) or SIGTERM
"""


def parser() -> Parser:
    """The parser with all options and their help."""
    p = Parser("batch", "[options] TABLE -o FOLDER", DESCRIPTION, EXAMPLES)
    p.add_argument("table", nargs="?", metavar="TABLE", help="the table of prompts; - is standard input")
    p.add_argument("-o", "--output", metavar="FOLDER", help="folder of the sounds, created if it is missing")
    p.add_argument(
        "--table-format",
        choices=TABLES,
        help="the table's format (default: by its suffix; for standard input, txt)",
    )
    p.add_argument(
        "--format",
        choices=FILE_FORMATS,
        default="wav",
        metavar="TYPE",
        help=f"type of the sound files: {', '.join(FILE_FORMATS)}; all but wav need soundfile "
        f"({install_hint('sound')}); the suffix of a row's name takes precedence (default: %(default)s)",
    )
    p.add_argument(
        "--sample-format",
        choices=SAMPLE_FORMATS,
        help="16-bit integers or 32-bit floats, for types that have both (default: pcm16)",
    )
    p.add_argument(
        "--rate",
        type=number(int, 1),
        metavar="HZ",
        help="sampling rate to resample the sounds to (default: the checkpoint's, 16000)",
    )
    p.add_argument(
        "--keep-all", action="store_true", help="keep all candidates, not only the best one of each row"
    )
    p.add_argument(
        "--batch-size",
        type=number(int, 1),
        default=BATCH_SIZE,
        metavar="N",
        help="the most sounds that are generated at once; more are faster on a GPU and need more memory "
        "(default: %(default)s)",
    )
    p.add_argument(
        "--dry-run",
        action="store_true",
        help="write nothing; print what would be made, and how long it would take on this machine",
    )
    add_engine_options(p)
    add_sound_options(p, seed="one for each row, made from what the row says")
    add_quality_options(p)
    add_model_options(p)
    return p


def add_engine_options(p: Parser) -> None:
    """Add the options that say where the batch runs."""
    engine = p.add_argument_group("where it runs")
    engine.add_argument(
        "--engine",
        choices=ENGINES,
        default="local",
        help="local is this process; ray is a Ray cluster, each of whose workers has a copy of the model "
        f"({install_hint('ray')}) (default: %(default)s)",
    )
    engine.add_argument(
        "--address",
        metavar="HOST:PORT",
        help="of the Ray cluster; auto is the one on this machine (default: the environment variable "
        "RAY_ADDRESS, or start one on this machine until the batch ends)",
    )
    engine.add_argument(
        "--workers",
        type=number(int, 1),
        metavar="N",
        help="copies of the model (default: one for each GPU of the cluster, or one for each machine if "
        "there is no GPU)",
    )
    engine.add_argument(
        "--threads",
        type=number(int, 1),
        metavar="N",
        help="CPU threads of this process, or of each worker; sounds are the same to the last bit only with "
        "the same number (default: all, which the workers of a machine share)",
    )


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
        p.error(f"unrecognized arguments: {' '.join(rest)}; there is one table")
    if options.table is None:
        p.error(f"the table is missing: {p.prog} prompts.csv -o sounds")
    if not options.output:
        p.error(f"the folder is missing: {p.prog} {options.table} -o sounds")
    if options.output in STANDARD_OUTPUT:
        p.error("argument -o/--output: a batch is written into a folder, not to standard output")
    if options.engine == "local":
        for name in ("address", "workers"):
            if getattr(options, name) is not None:
                p.error(f"argument --{name}: is for --engine ray")
    elif options.dry_run:
        p.error("argument --dry-run: measures this machine; leave out --engine")
    elif options.device is not None and options.device.startswith("cuda:"):
        p.error("argument --device: a worker of --engine ray sees one GPU, which is cuda")
    try:
        sound_type(f"a.{options.format}", options.sample_format)
    except ValueError as error:
        p.error(str(error))
    check_words(p, options)
    check_quality(p, options)
    return options


def run(parser: Parser, options: argparse.Namespace) -> int:
    """Generate the sounds of a table.

    Args:
        parser: for errors of arguments that are found here.
        options: as `parse` returns them.

    Returns:
        The exit code: 0, or 1 if a row has no sound.

    Raises:
        SystemExit: with code 2 for invalid arguments.
        Exception: the run failed; what was finished stays.
    """
    keep_freed_memory()
    # These checks come before PyTorch, which takes seconds to import.
    jobs, invalid = _read_table(parser, options)
    check_folder_writable(options.output)

    from audioldm2 import batch

    failures: list[Failure] = []

    def failed(failure: Failure) -> None:
        failure = failure._replace(reason=with_column_names(failure.reason))
        failures.append(failure)
        for line in failure.details.splitlines() if options.debug else []:
            say_beside_bars(line)
        say_beside_bars(f"error: {failure}")

    for failure in invalid:
        failed(failure)
    how: dict[str, Any] = {
        "file_format": options.format,
        "sampling_rate": options.rate,
        "sample_format": options.sample_format,
        "keep_all": options.keep_all,
    }
    with contextlib.ExitStack() as stack:
        pipe, engine = _pipeline_and_engine(parser, options, stack)
        if options.dry_run:
            say("measuring this machine", options.quiet)
            found = batch.estimate(jobs, pipe, options.output, **how)
            for failure in found.failures:
                failed(failure)
            return _print_estimate(found, options, failures)
        report = batch.run(
            jobs,
            pipe,
            options.output,
            **how,
            batch_size=options.batch_size,
            engine=engine,
            on_failure=failed,
        )
    there = len(report.sounds) - report.generated
    kept = f", {there} already there" if there else ""
    line = f"{options.output}: {counted(len(report.sounds), 'sound')}, {report.generated} new{kept}"
    unprinted = print_line(clean(line))
    if unprinted:
        print_error(f"the sounds were written, but a message to standard output was not: {unprinted}")
    _print_failures(failures)
    return 1 if failures or unprinted else 0


def _read_table(parser: Parser, options: argparse.Namespace) -> tuple[list[Job], list[Failure]]:
    """The jobs of the table, with the options as their defaults, and the rows that are not valid."""
    try:
        if options.table in STANDARD_INPUT:
            stdin = standard_input("name a table")
            if stdin.isatty():
                parser.error("argument TABLE: standard input is a terminal; redirect a table into it")
            text = io.TextIOWrapper(stdin, encoding="utf-8-sig", newline="")
            jobs, failures = parse_jobs(text, options.table_format or "txt", "standard input")
        else:
            jobs, failures = read_jobs(options.table, options.table_format)
    except ValueError as error:
        parser.error(f"argument TABLE: {error}")
    defaults = {
        "negative_prompt": options.negative,
        "transcription": options.transcription,
        "audio_length_in_s": options.duration,
        "num_inference_steps": options.steps,
        "guidance_scale": options.guidance,
        "num_waveforms_per_prompt": options.candidates,
        "scheduler": options.scheduler,
        "seed": options.seed,
        **quality_arguments(options),
    }
    # A row's own preset says more than an option for all rows.
    beside_preset = {name: value for name, value in defaults.items() if name not in OF_PRESET}
    completed = []
    for job in jobs:
        try:
            whole = job.with_defaults(defaults if job.quality is None else beside_preset)
            if whole.quality is None:
                whole = whole.with_defaults({"scheduler": DEFAULT_SAMPLER})
            completed.append(whole)
        except ValueError as error:  # an option does not go with the row
            failures.append(Failure(job.where, one_line(error)))
    return completed, failures


def _pipeline_and_engine(
    parser: Parser, options: argparse.Namespace, stack: contextlib.ExitStack
) -> tuple[Any, Any]:
    """The pipeline, and the engine; None for the local one. `stack` ends the connection to a cluster."""
    import torch

    if options.engine == "local":
        if options.threads is not None:
            torch.set_num_threads(options.threads)
        return load_pipeline(parser, options, of_rows=True), None
    from audioldm2.engines.cluster import connected, placement
    from audioldm2.engines.ray import RayEngine

    say("connecting to Ray", options.quiet)
    try:
        cluster = stack.enter_context(connected(options.address))
    except (ConnectionError, ValueError) as error:
        parser.error(f"argument --address: {error}")
    load = loader(parser, options, has_gpu=cluster.gpus > 0)
    use_gpus = load.device == "cuda"
    if use_gpus and not cluster.gpus:
        parser.error("argument --device: the Ray cluster has no GPU")
    try:
        placement(cluster, options.workers, options.threads, use_gpus)
    except ValueError as error:
        parser.error(f"argument --{error}")
    # Here the pipeline only plans, so it must not take a GPU's memory.
    pipe = load_pipeline(
        parser, options, dataclasses.replace(load, device="cpu", compile=False), of_rows=True
    )
    return pipe, RayEngine(load, workers=options.workers, threads=options.threads, use_gpus=use_gpus)


def _print_estimate(found: Any, options: argparse.Namespace, failures: Sequence[Failure]) -> int:
    lines = [
        clean(f"{', '.join(request.files)}: {_described(request)}") for request in found.requests[:MAX_LISTED]
    ]
    if len(found.requests) > MAX_LISTED:
        lines.append(f"... and {len(found.requests) - MAX_LISTED} more")
    lines.append(
        f"{counted(len(found.requests), 'row')} to generate, {found.sound_seconds:.0f} s of sound, about "
        f"{duration(found.seconds)} with {options.model} on this machine; "
        f"{counted(found.finished, 'row')} already finished"
    )
    unprinted = print_line("\n".join(lines))
    if unprinted:
        print_error(f"the estimate was not written to standard output: {unprinted}")
    _print_failures(failures)
    return 1 if failures or unprinted else 0


def _described(request: Any) -> str:
    job = request.job
    settings = f"{request.seconds:g} s, {job.steps} steps, seed {job.seed}"
    return f"{shortened(job.prompt, 100)} ({settings})"


def _print_failures(failures: Sequence[Failure]) -> None:
    """List the rows without a sound, if there are any."""
    if failures:
        say(f"{counted(len(failures), 'row')} without a sound:")
        in_order = sorted(failures, key=lambda failure: int(failure.where.rpartition(":")[2]))
        for failure in in_order[:MAX_LISTED]:
            say(f"  {failure}")
        if len(failures) > MAX_LISTED:
            say(f"  ... and {len(failures) - MAX_LISTED} more")


def duration(seconds: float) -> str:
    """A time for a reader: "50 s", "3 min" or "2 h 5 min"."""
    minutes = round(seconds / 60)
    if seconds < 120:
        return f"{math.ceil(seconds)} s"
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"
