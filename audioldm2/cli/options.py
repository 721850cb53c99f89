"""The command line's options: the parser, its help, and what it says about mistakes."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from difflib import get_close_matches
from typing import NoReturn, TypeVar

from audioldm2 import __version__
from audioldm2.arguments import MAX_LENGTH_IN_S, as_texts, check_length
from audioldm2.audio.file_types import SAMPLE_FORMATS
from audioldm2.cli.messages import OPTIONS, PROGRAM, summary
from audioldm2.extras import install_hint
from audioldm2.schedulers import SAMPLERS

GUIDANCE = 3.5  # where the checkpoint recommends nothing
STANDARD_OUTPUT = ("-", "/dev/stdout", "/dev/fd/1", "/proc/self/fd/1")
DTYPES = ("float32", "float16", "bfloat16")
DESCRIPTION = """\
Generate sound from a text description with AudioLDM 2.

Describe the sound in a sentence: what makes it, how, and where. For example:
"A hammer hits a wooden surface", "Slow rain on a tin roof, distant thunder".

The default model is downloaded from the Hugging Face Hub when it is first used
(about 5 GB). "--model tiny" selects a small model that is included in this
package. It knows only synthetic sounds: tones (low, middle, high), sweeps,
scales and arpeggios (rising, falling), pulses, clicks and drums (slow, fast),
sirens, bells, plucked and struck notes, noise, rain, wind, waves, engines and
birds. They can be loud or soft, and two can be mixed: "A bell over rain".
"""
EXAMPLES = """\
examples:
  audioldm2 "A low steady tone" --model tiny
  audioldm2 "A rising sweep" --model tiny -o sweep.wav --spectrogram sweep.png
  audioldm2 "A hammer hits a wooden surface" -o hammer.wav
  audioldm2 "Techno with a strong beat" -o techno.wav --duration 20 --seed 7 \\
      --negative "Low quality"
  audioldm2 "Birds in a forest" -o birds.wav --candidates 3
  audioldm2 "Rain" -o rain.wav --model ./my-checkpoint --scheduler ddim

exit codes:
  0  success
  1  an error occurred; no partial file is left behind. If a file was written
     and only the message about it was not, standard error says so
  2  an argument is invalid
  129, 130, 143  stopped by SIGHUP, SIGINT (Ctrl-C) or SIGTERM
"""

Number = TypeVar("Number", int, float)


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, without the usage before it."""

    def error(self, message: str) -> NoReturn:
        """Print an error and exit with code 2."""
        self.exit(2, f"{self.prog}: error: {summary(message)}; see {self.prog} --help\n")

    @property
    def names(self) -> list[str]:
        """All options, such as "--seed" and "-o"."""
        return [name for action in self._actions for name in action.option_strings]


def parser() -> Parser:
    """The parser with all options and their help."""
    p = Parser(
        PROGRAM,
        usage=f"{PROGRAM} [options] PROMPT",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    p.add_argument("prompt", nargs="?", metavar="PROMPT", help="description of the sound, in quotes")
    p.add_argument(
        "-o",
        "--output",
        default="audio.wav",
        metavar="FILE",
        help="file to write, WAV by default; .flac, .ogg, .mp3 and others need soundfile "
        f"({install_hint('sound')}); - is standard output, as WAV (default: %(default)s)",
    )
    p.add_argument(
        "--format",
        choices=SAMPLE_FORMATS,
        help="format of the samples, 16-bit integers or 32-bit floats, for types of files that have both "
        "(default: pcm16)",
    )
    p.add_argument(
        "--spectrogram",
        metavar="FILE",
        help="also save an image of the spectrogram, .png, .jpg, .svg or .pdf; needs matplotlib "
        f"({install_hint('plot')})",
    )

    sound = p.add_argument_group("sound")
    sound.add_argument(
        "--negative", metavar="TEXT", help='description of what to avoid, such as "Low quality"'
    )
    sound.add_argument("--transcription", metavar="TEXT", help="words to speak; only for speech checkpoints")
    sound.add_argument(
        "--duration",
        type=_seconds,
        metavar="SECONDS",
        help=f"length of the sound, at most {MAX_LENGTH_IN_S:g} (default: the length of the training clips, "
        "10.24, or 5.12 for tiny)",
    )
    sound.add_argument(
        "--candidates",
        type=_number(int, 1),
        default=1,
        metavar="N",
        help="generate N sounds and keep the one that matches the prompt best, as judged by CLAP "
        "(default: %(default)s)",
    )
    sound.add_argument(
        "--seed",
        type=_number(int, 0, 2**63 - 1),
        metavar="N",
        help="random seed; the same seed and options give the same sound (default: a new seed, which is "
        "printed)",
    )

    quality = p.add_argument_group("quality and speed")
    quality.add_argument(
        "--scheduler",
        choices=tuple(SAMPLERS),
        default="dpmsolver++",
        help="sampling algorithm; dpmsolver++ needs a tenth of ddim's steps (default: %(default)s)",
    )
    quality.add_argument(
        "--steps",
        type=_number(int, 1),
        metavar="N",
        help="number of denoising steps; more take longer and usually sound better (default: what the "
        "checkpoint recommends for dpmsolver++, otherwise what the scheduler needs: 20 for dpmsolver++ and "
        "200 for ddim)",
    )
    quality.add_argument(
        "--guidance",
        type=_number(float, 0),
        metavar="W",
        help="guidance scale; larger values follow the prompt more closely, and 1 or less disables guidance, "
        f"which takes half the time (default: what the checkpoint recommends, otherwise {GUIDANCE})",
    )

    machine = p.add_argument_group("model and device")
    machine.add_argument(
        "--model",
        default="cvssp/audioldm2",
        metavar="NAME",
        help="repository on the Hugging Face Hub (also cvssp/audioldm2-large and cvssp/audioldm2-music), "
        "path of a folder, or tiny (default: %(default)s)",
    )
    machine.add_argument(
        "--device", type=_device, help="cpu, cuda, cuda:1, mps or xpu (default: cuda if available, or cpu)"
    )
    machine.add_argument(
        "--dtype",
        choices=DTYPES,
        help="precision of weights and computation (default: float16 with cuda, otherwise float32)",
    )
    machine.add_argument(
        "--compile",
        action="store_true",
        help="compile the model with torch.compile: minutes in the first run, then faster; best on a GPU",
    )
    machine.add_argument("--quiet", action="store_true", help="print only the result, warnings and errors")
    machine.add_argument("--debug", action="store_true", help="print the full traceback of an error")
    machine.add_argument(
        "--version", action="version", version=f"{PROGRAM} {__version__}", help="print the version and exit"
    )
    return p


def _number(kind: type[Number], low: Number, high: Number | None = None) -> Callable[[str], Number]:
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


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
        check_length(seconds)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"must be a number of seconds, more than 0 and at most {MAX_LENGTH_IN_S:g}, got {text!r}"
        ) from None
    return seconds


def _device(text: str) -> str:
    if re.fullmatch(r"(cpu|cuda|mps|xpu)(:\d{1,3})?", text) is None:
        hint = f"; the GPU of that number is cuda:{text}" if text.isdecimal() else ""
        raise argparse.ArgumentTypeError(f"unknown device {text!r}; use cpu, cuda, cuda:1, mps or xpu{hint}")
    return text


def parse(p: Parser, arguments: Sequence[str]) -> argparse.Namespace:
    """Parse and check the arguments.

    Args:
        p: from `parser`.
        arguments: without the program's name.

    Raises:
        SystemExit: with code 2 if one is invalid, and with code 0 for --help and --version.
    """
    for argument in arguments:  # argparse takes -output for -o with the value "utput"
        if f"-{argument.partition('=')[0]}" in p.names:
            p.error(f"unrecognized argument: {argument}; did you mean -{argument}?")
    options, rest = p.parse_known_args(arguments)
    unknown = next((word for word in rest if word.startswith("-") and len(word) > 1), None)
    if unknown is not None:
        p.error(f"unrecognized argument: {unknown}{_suggestion(unknown, p.names)}")
    if rest:
        words = " ".join(rest)
        p.error(f'unrecognized arguments: {words}; put the prompt in quotes: "{options.prompt} {words}"')
    if re.match(r"--[\w-]+=", options.prompt or ""):  # to argparse, what has a space is not an option
        p.error(f"unrecognized argument: {options.prompt}{_suggestion(options.prompt, p.names)}")
    if options.prompt is None:
        p.error(f'the prompt is missing; describe the sound: {PROGRAM} "Slow rain on a tin roof"')
    try:
        as_texts("the prompt", options.prompt)
        if options.transcription is not None:
            as_texts("--transcription", options.transcription)
        if options.negative is not None:
            as_texts("--negative", options.negative, empty=True)
    except ValueError as error:
        p.error(str(error))
    return options


def _suggestion(unknown: str, names: Sequence[str]) -> str:
    """What to say about an unknown option: the nearest one, or how to write the prompt."""
    name = unknown.partition("=")[0]
    if name in ("--prompt", "--text", "-p"):
        return f'; the prompt needs no option: {PROGRAM} "Slow rain on a tin roof"'
    nearest = OPTIONS.get(name.lstrip("-").replace("-", "_"))
    nearest = nearest or next(iter(get_close_matches(name, names, n=1)), None)
    return f"; did you mean {nearest}?" if nearest else ""
