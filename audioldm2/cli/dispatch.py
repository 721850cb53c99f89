"""Runs a command, and turns its errors and the signals that stop it into messages and exit codes."""

from __future__ import annotations

import contextlib
import signal
import sys
import warnings
from collections.abc import Sequence
from importlib import import_module

from audioldm2.cli import messages, process
from audioldm2.cli.commands import COMMANDS, DEFAULT, hint


def run(arguments: Sequence[str] | None) -> int:
    """Run the command that the arguments name; see `audioldm2.cli.main`."""
    process.fill_descriptors()
    stderr = process.Tolerant(sys.stderr)
    with contextlib.redirect_stderr(stderr), process.flushed_output():
        debug, state = False, "no partial file was left"
        received: list[signal.Signals] = []
        try:
            with process.stoppable(received):
                words = list(sys.argv[1:] if arguments is None else arguments)
                named = bool(words) and words[0] in COMMANDS
                command = import_module(f"{__package__}.{words.pop(0) if named else DEFAULT}")
                state = getattr(command, "WHEN_STOPPED", state)
                parser = command.parser()
                if words and not named and (text := hint(words)):
                    parser.error(text)
                chosen = command.parse(parser, words)
                debug = chosen.debug
                with warnings.catch_warnings():
                    warnings.showwarning = messages.Warnings()
                    code: int = command.run(parser, chosen)
                    return code
        except (KeyboardInterrupt, process.Stopped):
            return _stopped(received[0] if received else signal.SIGINT, state, debug)
        except Exception as error:
            if received:  # a library turned the interrupt into an error, as extension modules do at import
                return _stopped(received[0], state, debug)
            if isinstance(error, ValueError | TypeError) and (text := messages.with_option_names(error)):
                messages.print_traceback(debug)
                parser.error(text)
            messages.print_error(messages.reason(error), debug)
            return 1


def _stopped(number: signal.Signals, state: str, debug: bool) -> int:
    how = "interrupted" if number == signal.SIGINT else f"stopped by {number.name}"
    messages.print_error(f"{how}; {state}", debug)
    return 128 + number
