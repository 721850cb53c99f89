"""A sound as input: its options, what can be checked of them at once, and the pipeline's arguments."""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from audioldm2.audio.file_types import SOUND_TYPES
from audioldm2.cli.messages import with_option_names
from audioldm2.cli.options import Parser, number, reading, seconds
from audioldm2.cli.prompts import STANDARD_INPUT, standard_input
from audioldm2.editing.checks import METHODS, OF_EDITS, check_edit, check_inversion, read_pair
from audioldm2.extras import install_hint

if TYPE_CHECKING:
    import torch

    from audioldm2.pipeline import AudioLDM2Pipeline

# The pipeline's arguments of loops and long sounds.
OF_LONG_SOUNDS = ("loop", "window", "exact_decoding")


def add_editing_options(p: argparse.ArgumentParser) -> None:
    """Add the options of a sound as input."""
    edit = p.add_argument_group(
        "editing", "With --from, a sound is changed to fit the prompt, and keeps its length."
    )
    edit.add_argument(
        "--from",
        dest="audio",
        metavar="FILE",
        help="the sound to edit, WAV, or any other type with soundfile "
        f"({install_hint('sound')}); - is standard input",
    )
    edit.add_argument(
        "--strength",
        type=_share,
        metavar="S",
        help="how much of the sound is changed, from 0 (only encoded and decoded) to 1 (the prompt alone); "
        "0.3 keeps its events and changes their timbre, 0.7 keeps its rough course (default: 0.5, or 1 for a "
        "part that is replaced)",
    )
    edit.add_argument(
        "--keep",
        type=reading("keep", read_pair),
        action="append",
        metavar="START-END",
        help="seconds that are kept, as in 0-2.5, or 4- for up to the end; the rest is generated to fit. May "
        "be given several times",
    )
    edit.add_argument(
        "--replace",
        type=reading("replace", read_pair),
        action="append",
        metavar="START-END",
        help="the opposite: seconds that are generated. May be given several times",
    )
    edit.add_argument(
        "--replace-band",
        type=reading("replace_band", read_pair),
        action="append",
        metavar="LOW-HIGH",
        help="frequencies in Hz that are generated, as in 4000-8000; the others are kept. May be given "
        "several times, and with --keep or --replace",
    )
    edit.add_argument(
        "--extend",
        type=seconds,
        metavar="SECONDS",
        help="keep all of the sound, and generate this much more after its end",
    )
    edit.add_argument(
        "--invert",
        nargs="?",
        const=METHODS[0],
        type=_method,
        metavar="METHOD",
        help="find the noise from which the model would make the sound, and denoise it with the prompt: it "
        "stays closer to the sound than --strength. ddpm (the default of METHOD) or ddim. Write the prompt "
        "before this option",
    )
    edit.add_argument(
        "--source-prompt",
        metavar="TEXT",
        help="with --invert, what the sound is now (default: none, the empty text)",
    )
    edit.add_argument(
        "--skip",
        type=_share,
        metavar="S",
        help="with --invert, the share of the steps that is left out: 0 changes the most, 1 nothing "
        "(default: 0.4, or 0.2 with ddim). --steps is 200 by default, and --guidance of about 10 suits large "
        "changes",
    )


def add_length_options(p: argparse.ArgumentParser) -> None:
    """Add the options of loops and of long sounds."""
    length = p.add_argument_group("loops and long sounds")
    length.add_argument(
        "--loop", action="store_true", help="make a sound that repeats without a seam; also with --from"
    )
    length.add_argument(
        "--window",
        type=seconds,
        metavar="SECONDS",
        help="denoise what is longer in windows of this length, which overlap by half; for sounds longer "
        "than the 10.24 s that the model was trained on (default: all at once; with --extend, that length)",
    )
    length.add_argument(
        "--windowed-decoding",
        dest="exact_decoding",
        action="store_false",
        default=None,
        help="also decode in windows, which takes less memory, and is not exactly the same",
    )


def _share(text: str) -> float:
    return number(float, 0, 1)(text)


def _method(text: str) -> str:
    if text not in METHODS:
        raise argparse.ArgumentTypeError(
            f"must be {' or '.join(METHODS)}, got {text!r}; write the prompt before --invert"
        )
    return text


def check_editing(p: Parser, options: argparse.Namespace) -> None:
    """Check the options of a sound, and that its file is there.

    Raises:
        SystemExit: with code 2 for what cannot be used.
    """
    given = {name: getattr(options, name) for name in (*OF_EDITS, *OF_LONG_SOUNDS, "source_prompt", "skip")}
    more = {"audio_length_in_s": options.duration, "num_waveforms_per_prompt": options.candidates}
    try:
        check_edit(options.audio is not None, {**given, **more}, options.loop)
        check_inversion(options.audio is not None, options.invert, {**given, **more})
    except ValueError as error:
        p.error(with_option_names(error) or str(error))
    path = options.audio
    if path is None:
        return
    if path in STANDARD_INPUT:
        if options.from_file in STANDARD_INPUT:
            p.error("argument --from: standard input is either the prompt or the sound")
        if standard_input("name a file").isatty():
            p.error("argument --from: standard input is a terminal; redirect a sound into it")
    elif not os.path.exists(path):
        p.error(f"argument --from: there is no file {path}")
    elif os.path.isdir(path):
        p.error(f"argument --from: {path} is a folder; name a sound file")
    elif Path(path).suffix.lower() in (".txt", ".csv", ".tsv", ".jsonl"):
        p.error(f"argument --from: is for a sound; read the prompt from {path} with --from-file")


def check_prompt_file(p: Parser, name: str) -> None:
    """Exit with code 2 if a file for the prompt is one of a sound."""
    suffix = Path(name).suffix.lower()
    if suffix and suffix in SOUND_TYPES:
        p.error(f"argument --from-file: is for the prompt; edit the sound with --from {name}")


def read_input(options: argparse.Namespace) -> tuple[torch.Tensor, int] | None:
    """The sound to edit, (channels, samples), and its sampling rate; None if there is none.

    Raises:
        ImportError: it needs soundfile, which cannot be imported.
        OSError: it cannot be read.
        ValueError: it is not a sound, or cannot be edited.
    """
    if options.audio is None:
        return None
    from audioldm2.audio.sound_file import read_sound

    if options.audio not in STANDARD_INPUT:
        return read_sound(options.audio)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "sound"
        path.write_bytes(standard_input("name a file").read())
        try:
            return read_sound(path)
        except (ImportError, ValueError) as error:
            raise type(error)(str(error).replace(str(path), "standard input")) from error


def edited(
    options: argparse.Namespace,
    pipe: AudioLDM2Pipeline,
    sound: tuple[torch.Tensor, int] | None,
    arguments: dict[str, Any],
) -> dict[str, Any]:
    """The arguments of the pipeline with those of a sound, and of loops and long sounds.

    Args:
        options: of `add_editing_options` and `add_length_options`.
        pipe: inverts a sound.
        sound: from `read_input`.
        arguments: the others, with the random generator.
    """
    given = {name: getattr(options, name) for name in (*OF_LONG_SOUNDS, *OF_EDITS)}
    arguments.update({name: value for name, value in given.items() if value not in (None, False)})
    if options.exact_decoding is False:
        arguments["exact_decoding"] = False
    if sound is None:
        return arguments
    arguments["audio_length_in_s"] = options.duration  # not the checkpoint's
    if options.invert is None:
        return {**arguments, "audio": sound[0], "sampling_rate": sound[1]}
    from audioldm2.editing.generations import with_inverted

    arguments["num_inference_steps"] = options.steps  # not what suits the sampler, but the inversion
    return with_inverted(
        pipe,
        arguments,
        *sound,
        method=options.invert,
        source_prompt=options.source_prompt or "",
        skip=options.skip,
    )
