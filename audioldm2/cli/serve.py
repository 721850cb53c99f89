"""The web page: `audioldm2 serve --model tiny`."""

from __future__ import annotations

import argparse
import dataclasses
import ipaddress
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING

from audioldm2.arguments import GUIDANCE
from audioldm2.cli.loading import check_revision, config_folder, loader, speaks, stand_ins
from audioldm2.cli.memory import keep_freed_memory
from audioldm2.cli.messages import say
from audioldm2.cli.options import (
    DEFAULT_MODEL,
    Parser,
    add_model_options,
    number,
    parse_options,
    seconds,
)
from audioldm2.extras import import_extra, install_hint
from audioldm2.schedulers import DEFAULT_SAMPLER, SAMPLERS
from audioldm2.web.requests import Checkpoint, Limits

if TYPE_CHECKING:
    from audioldm2.pipeline import AudioLDM2Pipeline

WHEN_STOPPED = "the server has ended"
PORT = 7860  # Gradio's
LOOPBACK, EVERYWHERE = "127.0.0.1", "0.0.0.0"
MAX_CANDIDATES = 16  # of the limit; each has a place on the page
MAX_STEPS = 1000
LIMITS = Limits()
DESCRIPTION = f"""\
Serve a web page for generating sounds: a form, the candidates to play with
their waveforms and spectrograms, and downloads. It needs Gradio:
{install_hint("web")}

The page is for this machine only, at http://{LOOPBACK}:{PORT}, unless --public
is given. One sound is generated at a time; other requests wait in a queue.
One checkpoint is in memory at a time: the first one from the start, another
one when a visitor's choice first needs it. Nothing is sent to other machines,
apart from downloads of checkpoints from the Hugging Face Hub.
"""
EXAMPLES = f"""\
examples:
  audioldm2 serve --model tiny
  audioldm2 serve --model cvssp/audioldm2 --model cvssp/audioldm2-music
  audioldm2 serve --port 8080 --device cuda:1 --max-duration 60
  audioldm2 serve --public --max-duration 10 --max-steps 50 --max-queue 8

Programs can use the page's HTTP API, with the same limits:
  from gradio_client import Client
  client = Client("http://{LOOPBACK}:{PORT}")
  result = client.predict(prompt="A rising sweep", api_name="/generate")

exit codes:
  1  an error occurred, such as a port that is in use
  2  an argument is invalid
  129, 130, 143  stopped by SIGHUP, SIGINT (Ctrl-C) or SIGTERM
"""
# Sounds that checkpoints can do, each with a text to speak if the checkpoint speaks.
TINY_EXAMPLES = (
    "A rising sweep",
    "A slow drum beat",
    "A bell over rain",
    "A falling arpeggio",
    "Loud birdsong",
)
GENERAL_EXAMPLES = (
    "A hammer hits a wooden surface",
    "Birds in a forest, a river nearby",
    "Slow rain on a tin roof, distant thunder",
    "Techno with a strong beat",
)
MUSIC_EXAMPLES = (
    "Techno with a strong beat",
    "A slow piano piece in a large hall",
    "An acoustic guitar and a soft female voice",
    "A string quartet, cheerful and fast",
)
SPEECH_EXAMPLES = (
    ("A woman speaks calmly in a quiet room", "The quick brown fox jumps over the lazy dog."),
    ("A man speaks fast and cheerfully", "Good morning, and welcome to the show."),
)


def parser() -> Parser:
    """The parser with all options and their help."""
    p = Parser("serve", "[options]", DESCRIPTION, EXAMPLES)
    server = p.add_argument_group("server")
    server.add_argument(
        "--host",
        metavar="ADDRESS",
        help=f"address to listen on; one that other machines can reach needs --public (default: {LOOPBACK}, "
        f"with --public {EVERYWHERE}, which is every address of this machine)",
    )
    server.add_argument(
        "--port", type=number(int, 1, 65535), default=PORT, metavar="N", help="(default: %(default)s)"
    )
    server.add_argument(
        "--public",
        action="store_true",
        help="let other machines use the page. There is no password and no encryption: everyone who can "
        "reach this machine can generate sounds, within the limits below. On the internet, put a server in "
        "front of it that has both",
    )
    limits = p.add_argument_group("limits of one request")
    limits.add_argument(
        "--max-duration",
        type=seconds,
        default=LIMITS.duration,
        metavar="SECONDS",
        help="longest sound (default: %(default)g)",
    )
    limits.add_argument(
        "--max-candidates",
        type=number(int, 1, MAX_CANDIDATES),
        default=LIMITS.candidates,
        metavar="N",
        help=f"most candidates, at most {MAX_CANDIDATES} (default: %(default)s)",
    )
    limits.add_argument(
        "--max-steps",
        type=number(int, 1, MAX_STEPS),
        default=LIMITS.steps,
        metavar="N",
        help=f"most denoising steps, at most {MAX_STEPS} (default: %(default)s)",
    )
    limits.add_argument(
        "--max-queue",
        type=number(int, 1),
        default=LIMITS.queue,
        metavar="N",
        help="most requests that wait; more are refused (default: %(default)s)",
    )
    add_model_options(p, several=True)
    return p


def parse(p: Parser, arguments: Sequence[str]) -> argparse.Namespace:
    """Parse and check the arguments.

    Args:
        p: from `parser`.
        arguments: without the program's and the command's names.

    Raises:
        SystemExit: with code 2 if one is invalid, and with code 0 for --help and --version.
    """
    options, rest = parse_options(p, arguments)
    if rest:
        p.error(f"unrecognized arguments: {' '.join(rest)}; visitors write the prompts on the page")
    options.model = list(dict.fromkeys(options.model or [DEFAULT_MODEL]))
    if options.lora and len(options.model) > 1:
        p.error("argument --lora: an adapter is for one checkpoint; give one --model")
    if options.host is None:
        options.host = EVERYWHERE if options.public else LOOPBACK
    elif options.host == "localhost":
        options.host = LOOPBACK
    try:
        address = ipaddress.ip_address(options.host)
    except ValueError:
        p.error(f"argument --host: must be an IP address of this machine, got {options.host!r}")
    if not address.is_loopback and not options.public:
        p.error(
            f"argument --host: other machines can reach {options.host}, and their users could use the page; "
            "add --public if that is what you want"
        )
    return options


def run(parser: Parser, options: argparse.Namespace) -> int:
    """Serve the page until a signal ends it.

    Args:
        parser: for errors of arguments that are found here.
        options: as `parse` returns them.

    Raises:
        SystemExit: with code 2 for invalid arguments.
        KeyboardInterrupt, process.Stopped: a signal ended it.
        Exception: the server could not start.
    """
    keep_freed_memory()
    # These checks come before PyTorch, which takes seconds to import.
    from audioldm2.web.server import check_port, prepare, serving

    check_port(options.host, options.port)
    prepare(options.host)
    import_extra("gradio", "web", "the web page")
    import_extra("matplotlib.figure", "web", "the web page")

    from audioldm2.web.studio import Studio

    for name in options.model:
        check_revision(parser, name, options.revision)
    first = {"model": options.model[0], "scheduler": DEFAULT_SAMPLER}  # visitors choose others
    load_first = loader(parser, argparse.Namespace(**{**vars(options), **first}))

    def load(name: str) -> AudioLDM2Pipeline:
        say(f"loading {name}", options.quiet)
        pipe = dataclasses.replace(load_first, model=name)()
        pipe.set_progress_bar_config(disable=True)  # the page shows the progress
        return pipe

    checkpoints = {name: describe(name, options.variant, options.revision) for name in options.model}
    limits = Limits(options.max_duration, options.max_candidates, options.max_steps, options.max_queue)
    studio = Studio(load, checkpoints, limits, lambda line: say(line, options.quiet))
    studio.load(options.model[0])
    with serving(studio, options.host, options.port) as address:
        print(f"{address} serves the page; Ctrl-C ends it", flush=True)
        if options.public:
            say(
                f"public: everyone who can reach port {options.port} of this machine can generate sounds of "
                f"up to {limits.duration:g} s, without a password or encryption"
            )
        threading.Event().wait()
    return 0


def describe(name: str, variant: str | None = None, revision: str | None = None) -> Checkpoint:
    """What the page shows of a checkpoint before its weights are loaded, from its configs.

    Args:
        name: the checkpoint.
        variant: weights of a variant, such as "fp16".
        revision: branch, tag or commit on the Hub.

    Raises:
        CheckpointError: the checkpoint cannot be found or read.
    """
    from audioldm2 import schedulers
    from audioldm2.checkpoints.errors import CheckpointError
    from audioldm2.checkpoints.hub import TINY_FOLDER
    from audioldm2.checkpoints.recommended import RECOMMENDED, read_settings, recommended_for
    from audioldm2.decoding import frames_and_samples
    from audioldm2.quoting import one_line

    folder = config_folder(name, variant, revision)
    recommended = read_settings(folder).get(RECOMMENDED, {})
    try:
        parts = stand_ins(folder)
        _, samples = frames_and_samples(*parts, None)
    except Exception as error:
        raise CheckpointError(f"{folder}: the configs cannot be used ({one_line(error)})") from error
    steps = {
        sampler: recommended_for(recommended, class_name).get(
            "num_inference_steps", schedulers.sampler_class(sampler).default_num_inference_steps
        )
        for sampler, (_, class_name) in SAMPLERS.items()
    }
    examples: Sequence[tuple[str, str]]
    if speaks(folder):
        examples = SPEECH_EXAMPLES
    else:
        music = MUSIC_EXAMPLES if "music" in name else GENERAL_EXAMPLES
        examples = [(prompt, "") for prompt in (TINY_EXAMPLES if folder == TINY_FOLDER else music)]
    return Checkpoint(
        name,
        duration=recommended.get("audio_length_in_s", samples / parts[2].config.sampling_rate),
        steps=steps,
        guidance=recommended.get("guidance_scale", GUIDANCE),
        negative=recommended.get("negative_prompt", ""),
        speaks=speaks(folder),
        examples=examples,
    )
