"""The command line: `audioldm2 "a hammer hits wood" -o hammer.wav`, and the commands in `COMMANDS`.

- `generate` and one module for each command: its parser and its run.
- `options`: what their parsers share.
- `loading`: from the options to a pipeline.
- `messages`: errors and warnings as one line.
- `process`: signals, and standard streams that are closed or full.

PyTorch is imported only after the arguments have been checked, so that `--help` and mistakes are answered at
once. Results go to standard output, progress and messages to standard error.
"""

from __future__ import annotations

import contextlib
import signal
import sys
import warnings
from collections.abc import Sequence
from importlib import import_module

from audioldm2.cli import messages, process

# The first argument selects a command, a module of this package with `parser`, `parse` and `run`. Anything
# else is the prompt of the first one.
COMMANDS = ("generate",)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: the arguments without the program's name; by default, those of the process.

    Returns:
        The exit code: 0, or 1 after an error, or 128 + n if signal n stopped the program.

    Raises:
        SystemExit: with code 2 for invalid arguments, and with code 0 for --help and --version.
    """
    process.fill_descriptors()
    stderr = process.Tolerant(sys.stderr)
    with contextlib.redirect_stderr(stderr), process.flushed_output():
        debug = False
        try:
            with process.stoppable():
                words = list(sys.argv[1:] if arguments is None else arguments)
                name = words.pop(0) if words and words[0] in COMMANDS else COMMANDS[0]
                command = import_module(f"audioldm2.cli.{name}")
                parser = command.parser()
                chosen = command.parse(parser, words)
                debug = chosen.debug
                with warnings.catch_warnings():
                    warnings.showwarning = messages.Warnings()
                    code: int = command.run(parser, chosen)
                    return code
        except KeyboardInterrupt:
            return _stopped(signal.SIGINT, debug)
        except process.Stopped as stop:
            return _stopped(stop.signal, debug)
        except Exception as error:
            if isinstance(error, ValueError | TypeError) and (text := messages.with_option_names(error)):
                messages.print_traceback(debug)
                parser.error(text)
            messages.print_error(messages.reason(error), debug)
            return 1


def _stopped(number: signal.Signals, debug: bool) -> int:
    how = "interrupted" if number == signal.SIGINT else f"stopped by {number.name}"
    messages.print_error(f"{how}; no partial file was left", debug)
    return 128 + number
