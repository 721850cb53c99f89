"""`audioldm2 finetune`: from a table of sound files and captions to an adapter or a checkpoint."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any

from audioldm2.adapters.config import TARGET_MODULES
from audioldm2.arguments import MAX_SEED
from audioldm2.cli.loading import Loader, check_revision, checked_device
from audioldm2.cli.messages import clean, counted, say
from audioldm2.cli.options import (
    DEFAULT_MODEL,
    STANDARD_OUTPUT,
    Parser,
    add_common_options,
    add_threads_option,
    device_name,
    number,
    parse_options,
    seconds,
)
from audioldm2.cli.process import print_line
from audioldm2.extras import install_hint
from audioldm2.training.options import (
    FULL_RATE,
    LATENTS,
    LORA_RATE,
    PRECISIONS,
    STEP_SEEDS,
    FinetuneOptions,
)

DEFAULTS = FinetuneOptions()
WHEN_STOPPED = "the last saved state stays; run the same command again to continue"
DESCRIPTION = f"""\
Teach a checkpoint your own sounds, from a table of sound files and captions.

The table is a .csv, .tsv or .jsonl file with the columns file_name (or file,
audio, path) and caption (or text, prompt), or a folder with a metadata.csv, as
Hugging Face's audio folders have. Paths are relative to the table. WAV files
need nothing else; FLAC, Ogg, MP3 and others need soundfile:
{install_hint("sound")}

By default a small adapter (LoRA) is trained, which is loaded beside the
checkpoint and can be switched off; --full trains all of the UNet and writes a
whole checkpoint. Start with some tens of clips and the defaults, and listen to
the samples (--sample-every): too few steps and the new sound is missing, too
many or too high a rate and it is in every sound. If known sounds suffer, mix
some of them in (--rehearse).

The folder holds the result, and in training/ the state, the losses (plots/)
and the samples. A run that was stopped, at any moment, is resumed by giving the
same command again, and ends with the same result.
"""
EXAMPLES = """\
examples:
  audioldm2 finetune data.csv -o my-sounds
  audioldm2 finetune data.csv -o my-sounds --model tiny --steps 500 --rate 1e-3
  audioldm2 finetune clips/ -o my-sounds --rank 32 --targets to_q to_k to_v
  audioldm2 finetune data.csv -o my-sounds --sample-every 200 \\
      --sample-prompt "my door" --sample-prompt "rain"
  audioldm2 finetune data.csv -o my-model --full --precision bf16 \\
      --gradient-checkpointing
  accelerate launch -m audioldm2 finetune data.csv -o my-sounds --batch-size 16

exit codes:
  0  the result was written
  1  an error occurred; the last saved state stays
  2  an argument is invalid
  129, 130, 143  stopped by SIGHUP, SIGINT (Ctrl-C) or SIGTERM
"""


def parser() -> Parser:
    """The parser with all options and their help."""
    p = Parser("finetune", "[options] TABLE -o FOLDER", DESCRIPTION, EXAMPLES)
    p.add_argument(
        "table", nargs="?", metavar="TABLE", help="table of files and captions, or a folder with one"
    )
    p.add_argument("-o", "--output", metavar="FOLDER", help="folder of the result; created if it is missing")
    _add_data_options(p)
    _add_training_options(p)
    _add_watch_options(p)
    machine = p.add_argument_group("model and device")
    machine.add_argument(
        "--model",
        default=DEFAULT_MODEL,
        metavar="NAME",
        help="checkpoint to start from: repository on the Hugging Face Hub, path of a folder, or tiny "
        "(default: %(default)s)",
    )
    machine.add_argument("--variant", metavar="NAME", help='weights of a variant, such as "fp16"')
    machine.add_argument("--revision", metavar="NAME", help="branch, tag or commit on the Hub")
    machine.add_argument(
        "--device", type=device_name, help="cpu, cuda, cuda:1 or mps (default: cuda if available, or cpu)"
    )
    machine.add_argument(
        "--precision",
        choices=PRECISIONS,
        default=DEFAULTS.precision,
        help="bf16 computes in bfloat16, which is faster on a GPU and takes less memory; weights stay "
        "float32 (default: %(default)s)",
    )
    machine.add_argument(
        "--gradient-checkpointing",
        action="store_true",
        help="take less memory and a third more time",
    )
    add_threads_option(machine)
    machine.add_argument("--quiet", action="store_true", help="print only the result, warnings and errors")
    add_common_options(machine)
    return p


def _add_data_options(p: Parser) -> None:
    data = p.add_argument_group("data")
    data.add_argument(
        "--duration",
        type=seconds,
        metavar="SECONDS",
        help="length of the training clips; longer files are cut, shorter ones end in silence (default: the "
        "checkpoint's, 10.24, or 5.12 for tiny)",
    )
    data.add_argument(
        "--excerpts",
        type=number(int, 1),
        default=DEFAULTS.excerpts,
        metavar="N",
        help="take up to N clips of each longer file, spread evenly over it (default: %(default)s, its "
        "beginning)",
    )
    data.add_argument(
        "--keep-level",
        action="store_true",
        help="leave the level of the sounds as it is, if captions speak of it; otherwise clips are centered "
        "and scaled to a peak of 0.5, as in AudioLDM 2's training",
    )
    data.add_argument(
        "--latents",
        choices=LATENTS,
        default=DEFAULTS.latents,
        help="draw the latents of a clip from the VAE's posterior, as in AudioLDM 2's training, or take the "
        "mean, as in tiny's (default: %(default)s)",
    )
    data.add_argument(
        "--rehearse", metavar="TABLE", help="another table, of sounds that must not be forgotten"
    )
    data.add_argument(
        "--rehearse-share",
        type=number(float, 0, 0.99),
        default=DEFAULTS.rehearse_share,
        metavar="SHARE",
        help="of each batch, drawn from that table (default: %(default)s)",
    )


def _add_training_options(p: Parser) -> None:
    training = p.add_argument_group("training")
    training.add_argument(
        "--full", action="store_true", help="train all weights of the UNet instead of an adapter"
    )
    training.add_argument(
        "--rank",
        type=number(int, 1),
        default=DEFAULTS.rank,
        metavar="N",
        help="rank of the adapter; more can hold more sounds (default: %(default)s)",
    )
    training.add_argument(
        "--alpha",
        type=number(float, 1e-6),
        metavar="A",
        help="the adapter is scaled by alpha / rank (default: the rank)",
    )
    training.add_argument(
        "--targets",
        nargs="+",
        default=list(TARGET_MODULES),
        metavar="NAME",
        help="modules with an adapter, by the ends of their names in diffusers; also ff.net.0.proj, "
        f"ff.net.2, proj_in, proj_out, conv1, conv2 (default: {' '.join(TARGET_MODULES)})",
    )
    count, share = number(int, 1), number(float, 0, 0.99999)
    numbers: tuple[tuple[str, Callable[[str], Any], str, str], ...] = (
        ("steps", count, "N", "number of training steps"),
        ("batch-size", count, "N", "clips in each step, of all processes together"),
        ("accumulate", count, "N", "batches of that size in each step, in the memory of one"),
        ("warmup", number(int, 0), "N", "steps in which the learning rate rises"),
        ("dropout", share, "SHARE", "clips that get an empty caption, for guidance"),
        ("ema", share, "DECAY", "of the average of the weights that is saved; 0 is none"),
    )
    for name, kind, letter, text in numbers:
        training.add_argument(
            f"--{name}",
            type=kind,
            default=getattr(DEFAULTS, name.replace("-", "_")),
            metavar=letter,
            help=f"{text} (default: %(default)s)",
        )
    training.add_argument(
        "--rate",
        type=number(float, 1e-12),
        metavar="R",
        help=f"learning rate (default: {LORA_RATE:g}, or {FULL_RATE:g} with --full)",
    )
    training.add_argument(
        "--min-snr",
        type=number(float, 0),
        default=DEFAULTS.min_snr,
        metavar="GAMMA",
        help="weigh timesteps by min-SNR; 0 weighs all equally (default: %(default)s)",
    )
    training.add_argument(
        "--seed",
        type=number(int, 0, MAX_SEED // STEP_SEEDS),
        default=DEFAULTS.seed,
        metavar="N",
        help="random seed; the same seed and options give the same result (default: %(default)s)",
    )


def _add_watch_options(p: Parser) -> None:
    watch = p.add_argument_group("watching it")
    watch.add_argument(
        "--validation",
        type=_share_or_table,
        default=DEFAULTS.validation,
        metavar="SHARE|TABLE",
        help="share of the files that is held out to measure the loss on, or a table of such files; 0 is "
        "none (default: %(default)s)",
    )
    watch.add_argument(
        "--validate-every",
        type=number(int, 1),
        default=DEFAULTS.validate_every,
        metavar="N",
        help="steps from one validation to the next (default: %(default)s)",
    )
    watch.add_argument(
        "--sample-every",
        type=number(int, 1),
        metavar="N",
        help="generate the sample prompts every N steps, with spectrograms if matplotlib is installed",
    )
    watch.add_argument(
        "--sample-prompt",
        action="append",
        default=[],
        metavar="TEXT",
        help="what to generate then; several times for several sounds",
    )
    watch.add_argument(
        "--save-every",
        type=number(float, 0),
        default=DEFAULTS.save_every,
        metavar="SECONDS",
        help="time from one saved state to the next (default: %(default)s)",
    )


def _share_or_table(text: str) -> float | str:
    """An argparse type: a number from 0 to less than 1, or the name of a table."""
    try:
        share = float(text)
    except ValueError:
        return text
    if not 0 <= share < 1:
        raise argparse.ArgumentTypeError(f"must be a share from 0 to less than 1, or a table, got {text!r}")
    return share


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
        p.error(f"the table is missing: {p.prog} data.csv -o my-sounds")
    if not options.output:
        p.error(f"the folder is missing: {p.prog} {options.table} -o my-sounds")
    if options.output in STANDARD_OUTPUT:
        p.error("argument -o/--output: the result is a folder, not standard output")
    if options.sample_every is not None and not options.sample_prompt:
        p.error('argument --sample-every: say what to generate, as in --sample-prompt "my door"')
    if options.sample_prompt and options.sample_every is None:
        p.error("argument --sample-prompt: say how often, as in --sample-every 200")
    if options.full:
        for name in ("rank", "alpha", "targets"):
            if getattr(options, name) != p.get_default(name):
                p.error(f"argument --{name}: is for an adapter; leave it out with --full")
    try:
        options.finetune = _options(options)
    except (TypeError, ValueError) as error:
        p.error(str(error))
    return options


def _options(options: argparse.Namespace) -> FinetuneOptions:
    """The fine-tune's options, from those of the command line."""
    same = {
        name: value for name, value in vars(options).items() if name in FinetuneOptions.__dataclass_fields__
    }
    changed: dict[str, Any] = {
        "min_snr": options.min_snr or None,
        "targets": tuple(options.targets),
        "sample_prompts": tuple(options.sample_prompt),
    }
    return FinetuneOptions(**{**same, **changed})


def run(parser: Parser, options: argparse.Namespace) -> int:
    """Fine-tune a checkpoint.

    Args:
        parser: for errors of arguments that are found here.
        options: as `parse` returns them.

    Returns:
        The exit code, 0.

    Raises:
        SystemExit: with code 2 for invalid arguments.
        Exception: the run failed; its last saved state stays.
    """
    from audioldm2.training.table import read_table

    check_revision(parser, options.model, options.revision)
    read_table(options.table)  # a mistake there should not wait for the model

    import torch

    from audioldm2.training.finetune import finetune
    from audioldm2.training.processes import own_device

    if options.threads is not None:
        torch.set_num_threads(options.threads)
    device = checked_device(parser, options, own_device())
    say(f"loading {options.model}", options.quiet)
    pipe = Loader(options.model, "float32", device, None, False, options.variant, options.revision)()
    pipe.set_progress_bar_config(disable=options.quiet, file=sys.stderr)
    result = finetune(
        pipe, options.table, options.output, options.finetune, progress=False if options.quiet else None
    )
    what = "checkpoint" if options.full else "adapter"
    losses = ""
    if result.validation is not None:
        losses = ", validation loss {:.4f} before and {:.4f} after".format(*result.validation)
    print_line(
        clean(
            f"{options.output}: {what} of {counted(options.steps, 'step')} on "
            f"{counted(result.examples, 'clip')}{losses}"
        )
    )
    return 0
