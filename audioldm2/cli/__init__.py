"""The command line: `audioldm2 "a hammer hits wood" -o hammer.wav`, and the commands in `COMMANDS`.

- `commands`: their names; each is a module with its parser and its run, such as `generate`, the default one.
- `dispatch`: runs one; errors, warnings and signals.
- `options`: what their parsers share.
- `loading`: from the options to a pipeline.
- `memory`: keeps freed memory for the next feature map.
- `messages`: errors and warnings as one line.
- `process`: signals, and standard streams that are closed or full.
- `prompts`: prompts from files and standard input.
- `profiling`: traces of a generation.

PyTorch is imported only after the arguments have been checked, so that `--help` and mistakes are answered at
once. Results go to standard output, progress and messages to standard error.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence

from audioldm2.cli.commands import COMMANDS as COMMANDS, PROGRAM


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: the arguments without the program's name; by default, those of the process.

    Returns:
        The exit code: 0, or 1 after an error, or 128 + n if signal n stopped the program.

    Raises:
        SystemExit: with code 2 for invalid arguments, and with code 0 for --help and --version.
    """
    try:
        # Imported here, as Ctrl-C may come during the imports.
        from audioldm2.cli import dispatch

        return dispatch.run(arguments)
    except KeyboardInterrupt:  # before or after the signals are handled
        if sys.stderr is not None:
            print(f"{PROGRAM}: error: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
