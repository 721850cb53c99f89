"""What the commands' options share: the parser, groups of options, and hints for mistakes."""

from __future__ import annotations

import argparse
import math
import re
import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, NoReturn, TypeVar

from audioldm2 import __version__
from audioldm2.arguments import GUIDANCE, MAX_LENGTH_IN_S, MAX_SEED, as_texts, check_length, did_you_mean
from audioldm2.cli.commands import PROGRAM
from audioldm2.cli.messages import OPTIONS, summary, with_option_names
from audioldm2.guidance import UNCONDITIONAL
from audioldm2.quality import QUALITIES
from audioldm2.quality_settings import (
    cache_of,
    check_quality_settings,
    interval_of,
    preset_of,
    timesteps_of,
)
from audioldm2.schedulers import DEFAULT_SAMPLER, SAMPLERS

DEFAULT_MODEL = "cvssp/audioldm2"
# The pipeline's arguments, and the options that set them, of `add_quality_options`.
OF_QUALITY = {
    "quality": "quality",
    "feature_cache": "cache",
    "guidance_interval": "guidance_interval",
    "guidance_rescale": "guidance_rescale",
    "unconditional": "unconditional",
    "timesteps": "timesteps",
}
STANDARD_OUTPUT = ("-", "/dev/stdout", "/dev/fd/1", "/proc/self/fd/1")
MAX_COLUMNS = 80
DTYPES = ("float32", "float16", "bfloat16")
Number = TypeVar("Number", int, float)
Read = TypeVar("Read")


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Help of at most 80 columns, also where the terminal is wider."""

    def __init__(self, prog: str, **options: Any):
        options.setdefault("width", min(MAX_COLUMNS, shutil.get_terminal_size().columns) - 2)
        super().__init__(prog, **options)


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, without the usage before it.

    Args:
        command: the name of the subcommand; "" for the default one.
        usage: the arguments, such as "[options] PROMPT".
        description: printed before the options.
        examples: printed after them.
    """

    def __init__(self, command: str, usage: str, description: str, examples: str):
        program = f"{PROGRAM} {command}".strip()
        super().__init__(
            program,
            usage=f"{program} {usage}",
            description=description,
            epilog=examples,
            formatter_class=HelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message: str) -> NoReturn:
        """Print an error and exit with code 2."""
        self.exit(2, f"{self.prog}: error: {summary(message)}; see {self.prog} --help\n")

    @property
    def names(self) -> list[str]:
        """All options, such as "--seed" and "-o"."""
        return [name for action in self._actions for name in action.option_strings]


def add_sound_options(p: argparse.ArgumentParser, seed: str = "a new seed, which is printed") -> None:
    """Add the options that say what to generate; `seed` is what its help says about the default."""
    sound = p.add_argument_group("sound")
    sound.add_argument(
        "--negative", metavar="TEXT", help='description of what to avoid, such as "Low quality"'
    )
    sound.add_argument("--transcription", metavar="TEXT", help="words to speak; only for speech checkpoints")
    sound.add_argument(
        "--duration",
        type=seconds,
        metavar="SECONDS",
        help=f"length of the sound, at most {MAX_LENGTH_IN_S:g} (default: the length of the training clips, "
        "10.24, or 5.12 for tiny)",
    )
    sound.add_argument(
        "--candidates",
        type=number(int, 1),
        default=1,
        metavar="N",
        help="generate N sounds and keep the one that matches the prompt best, as judged by CLAP "
        "(default: %(default)s)",
    )
    sound.add_argument(
        "--seed",
        type=number(int, 0, MAX_SEED),
        metavar="N",
        help=f"random seed; the same seed and options give the same sound (default: {seed})",
    )


def add_quality_options(p: argparse.ArgumentParser) -> None:
    """Add the options that trade quality for speed."""
    quality = p.add_argument_group("quality and speed")
    quality.add_argument(
        "--quality",
        choices=tuple(QUALITIES),
        help="preset of scheduler, steps, cache and guidance interval: draft is the fastest, best comes "
        "closest to the result of many steps, and normal is in between. Options given beside it take "
        "precedence (default: none)",
    )
    quality.add_argument(
        "--scheduler",
        choices=tuple(SAMPLERS),
        help="sampling algorithm: dpmsolver++ needs a tenth of ddim's steps, and unipc loses least below 10 "
        f"steps (default: {DEFAULT_SAMPLER})",
    )
    quality.add_argument(
        "--steps",
        type=number(int, 1),
        metavar="N",
        help="number of denoising steps; more take longer and usually sound better (default: what the "
        "checkpoint recommends for dpmsolver++ and unipc, otherwise what the scheduler needs: 20 for these "
        "two and 200 for ddim)",
    )
    quality.add_argument(
        "--guidance",
        type=number(float, 0),
        metavar="W",
        help="guidance scale; larger values follow the prompt more closely, and 1 or less disables guidance, "
        f"which takes half the time (default: what the checkpoint recommends, otherwise {GUIDANCE})",
    )
    quality.add_argument(
        "--cache",
        type=reading("cache", cache_of),
        metavar="N",
        help="feature caching: run the whole UNet only at every Nth step, as in 3, or at these steps, "
        "counted from 0, as in 0,1,2,5; the others run its upper levels, in a fraction of the time. 1 is off "
        "(default: 1)",
    )
    quality.add_argument(
        "--guidance-interval",
        type=reading("guidance_interval", interval_of),
        metavar="START-END",
        help="fractions of the steps that have guidance, as in 0-0.75; the others take half the time "
        "(default: 0-1, all)",
    )
    quality.add_argument(
        "--guidance-rescale",
        type=number(float, 0, 1),
        metavar="PHI",
        help="strength, from 0 to 1, of rescaling the guided prediction to the standard deviation of the "
        "conditional one, against the distortion that a strong --guidance brings; try 0.7 (default: 0, off)",
    )
    quality.add_argument(
        "--unconditional",
        choices=UNCONDITIONAL,
        help="what guidance steers away from without --negative: the empty text, or zeros in place of its "
        "GPT-2 vectors, as in the original repository (default: text)",
    )
    quality.add_argument(
        "--timesteps",
        type=reading("timesteps", timesteps_of),
        metavar="T,T,...",
        help="the timesteps of the run, as in 999,800,500,200, in place of --steps",
    )


def sampler_of(options: argparse.Namespace) -> str:
    """The name of the sampler that the options of `add_quality_options` choose."""
    return options.scheduler or preset_of({"quality": options.quality}).sampler or DEFAULT_SAMPLER


def quality_arguments(options: argparse.Namespace) -> dict[str, Any]:
    """The pipeline's arguments in `OF_QUALITY` that the options set."""
    given = {name: getattr(options, option) for name, option in OF_QUALITY.items()}
    return {name: value for name, value in given.items() if value is not None}


def check_quality(p: Parser, options: argparse.Namespace) -> None:
    """Check that the options of `add_quality_options` go together.

    Raises:
        SystemExit: with code 2 if they do not.
    """
    others = {
        "num_inference_steps": options.steps,
        "guidance_scale": options.guidance,
        "negative_prompt": options.negative,
        "scheduler": options.scheduler,
        "invert": vars(options).get("invert"),  # of single sounds only
    }
    try:
        check_quality_settings({**quality_arguments(options), **others})
    except (TypeError, ValueError) as error:
        p.error(with_option_names(error) or str(error))


def add_model_options(p: argparse.ArgumentParser, several: bool = False, generates: bool = True) -> None:
    """Add the options that say which checkpoint runs where, and what is printed.

    Args:
        p: the parser of a command.
        several: whether --model may be given several times; it is then a list, None by default.
        generates: whether the command generates sounds, so that adapters, a dtype and compiling are options.
    """
    machine = p.add_argument_group("model and device")
    machine.add_argument(
        "--model",
        default=None if several else DEFAULT_MODEL,
        action="append" if several else "store",
        metavar="NAME",
        help="repository on the Hugging Face Hub (also cvssp/audioldm2-large and cvssp/audioldm2-music), "
        f"path of a folder, or tiny (default: {DEFAULT_MODEL})"
        + ("; give it several times to let visitors choose" if several else ""),
    )
    machine.add_argument(
        "--variant", metavar="NAME", help='weights of a variant of the checkpoint, such as "fp16"'
    )
    machine.add_argument(
        "--revision", metavar="NAME", help="branch, tag or commit of a repository on the Hub (default: main)"
    )
    if generates:
        machine.add_argument(
            "--lora",
            type=_adapter,
            action="append",
            metavar="FOLDER[:WEIGHT]",
            help="adapter (LoRA) of the checkpoint, a folder, a file or a repository, and how strongly it is "
            "on, as in telephone-lora:0.8 (default weight: 1). May be given several times",
        )
    machine.add_argument(
        "--device",
        type=device_name,
        help="cpu, cuda, cuda:1, mps or xpu (default: cuda if available, or cpu)",
    )
    if generates:
        machine.add_argument(
            "--dtype",
            choices=DTYPES,
            help="precision of weights and computation (default: float16 with cuda, bfloat16 with a CPU that "
            "multiplies it in hardware, as with AVX512_BF16 or AMX, otherwise float32)",
        )
        machine.add_argument(
            "--compile",
            action="store_true",
            help="compile the model with torch.compile: minutes in the first run, then faster; best on a GPU",
        )
    machine.add_argument("--quiet", action="store_true", help="print only the result, warnings and errors")
    add_common_options(machine)


def add_common_options(p: argparse._ActionsContainer) -> None:
    """Add the options of every command: --debug and --version."""
    p.add_argument("--debug", action="store_true", help="print the full traceback of an error")
    p.add_argument(
        "--version", action="version", version=f"{PROGRAM} {__version__}", help="print the version and exit"
    )


def add_threads_option(p: argparse._ActionsContainer) -> None:
    """Add --threads, for commands that run in this process alone."""
    p.add_argument("--threads", type=number(int, 1), metavar="N", help="CPU threads (default: all)")


def check_words(p: Parser, options: argparse.Namespace) -> None:
    """Check the texts of `add_sound_options`.

    Raises:
        SystemExit: with code 2 for one that cannot be used.
    """
    try:
        for name in ("negative", "transcription"):
            if getattr(options, name) is not None:
                as_texts(f"--{name}", getattr(options, name), empty=name == "negative")
    except ValueError as error:
        p.error(str(error))


def number(kind: type[Number], low: Number, high: Number | None = None) -> Callable[[str], Number]:
    """An argparse type: a finite number from `low` to `high`."""

    def parse(text: str) -> Number:
        with suppress(ValueError):
            value = kind(text)
            if low <= value < float("inf") and (high is None or value <= high):  # also false for NaN
                return value
        what = "an integer" if kind is int else "a number"
        limits = f"from {low} to {high}" if high is not None else f"of at least {low}"
        raise argparse.ArgumentTypeError(f"must be {what} {limits}, got {text!r}")

    return parse


def reading(name: str, read: Callable[[str, str], Read]) -> Callable[[str], Read]:
    """An argparse type: the result of read(name, text), whose errors begin with the name as argparse's do."""

    def parse(text: str) -> Read:
        try:
            return read(name, text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error).removeprefix(f"{name} ")) from error

    return parse


def seconds(text: str) -> float:
    """An argparse type: the length of a sound."""
    try:
        length = float(text)
        check_length(length)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"must be a number of seconds, more than 0 and at most {MAX_LENGTH_IN_S:g}, got {text!r}"
        ) from None
    return length


def _adapter(text: str) -> tuple[str, float]:
    folder, separator, end = text.rpartition(":")
    try:
        found = (folder, float(end)) if separator else (text, 1.0)
    except ValueError:
        found = text, 1.0  # the colon is one of the path
    if not found[0].strip() or not math.isfinite(found[1]):
        raise argparse.ArgumentTypeError(f"must be FOLDER or FOLDER:WEIGHT, got {text!r}")
    return found


def device_name(text: str) -> str:
    """An argparse type: the name of a device, which need not be available."""
    if re.fullmatch(r"(cpu|cuda|mps|xpu)(:\d{1,3})?", text) is None:
        hint = f"; the GPU of that number is cuda:{text}" if text.isdecimal() else ""
        raise argparse.ArgumentTypeError(f"unknown device {text!r}; use cpu, cuda, cuda:1, mps or xpu{hint}")
    return text


def parse_options(p: Parser, arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Parse the arguments, with a suggestion for an unknown option.

    Args:
        p: the parser of a command.
        arguments: without the program's and the command's names.

    Returns:
        The options, and the words for which the parser has no place.

    Raises:
        SystemExit: with code 2 if one is invalid, and with code 0 for --help and --version.
    """
    for argument in arguments:  # argparse takes -output for -o with the value "utput"
        if f"-{argument.partition('=')[0]}" in p.names:
            p.error(f"unrecognized argument: {argument}; did you mean -{argument}?")
    options, rest = p.parse_known_args(arguments)
    if "--" in arguments:
        end = list(arguments).index("--")
        after = arguments[end + 1 :]
        late = next((word for word in after[1:] if word in rest and word.partition("=")[0] in p.names), None)
        if late is not None:
            p.error(f'after "--" all words are text; write {late} and what belongs to it before the "--"')
    unknown = next((word for word in rest if word.startswith("-") and len(word) > 1), None)
    if unknown is not None:
        p.error(f"unrecognized argument: {unknown}{suggestion(unknown, p.names)}")
    return options, rest


def suggestion(unknown: str, names: Sequence[str]) -> str:
    """What to say about an unknown option: the nearest one, or how to write the prompt."""
    name = unknown.partition("=")[0]
    if name in ("--prompt", "--text", "-p"):
        return f'; the prompt needs no option: {PROGRAM} "Slow rain on a tin roof"'
    renamed = OPTIONS.get(name.lstrip("-").replace("-", "_"))
    return f"; did you mean {renamed}?" if renamed else did_you_mean(name, names)
