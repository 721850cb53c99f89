"""The commands, a line about each, and hints for words that look like a command.

A command is a module of this package with `parser`, `parse` and `run`, and perhaps with `WHEN_STOPPED`, what
to add to the message that a signal stopped it. The first word of the command line selects a command; any
other word is the prompt of `generate`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import PurePath

PROGRAM = "audioldm2"
DEFAULT = "generate"
# In the order of the help. The lines fit 80 columns.
COMMANDS = {
    "generate": "one sound from its description; the default",
    "batch": "a sound for each prompt of a table, into a folder",
    "finetune": "teach a checkpoint your own sounds",
    "evaluate": "measure how good the sounds in a folder are",
    "serve": "a web page for generating sounds",
    "completion": "Tab completion for bash, zsh and fish",
}


def overview() -> str:
    """The commands for the help of the default one."""
    width = max(map(len, COMMANDS))
    lines = [f"  {PROGRAM} {name:<{width}}  {line}" for name, line in COMMANDS.items()]
    return "\n".join(
        [
            "commands (each has its own --help):",
            *lines,
            f'A prompt that is the name of a command: {PROGRAM} {DEFAULT} "{DEFAULT}".\n',
        ]
    )


def hint(words: Sequence[str]) -> str | None:
    """What to say about words that look like a command rather than a prompt, if they do.

    Args:
        words: the first ones of the command line.

    Returns:
        The message, or None. A single word that only resembles a command is a prompt.
    """
    from difflib import get_close_matches

    first, *others = words
    more = [word for word in others if not word.startswith("-") or word == "-"]

    def nearest(word: str) -> str | None:
        return next(iter(get_close_matches(word.casefold(), COMMANDS, n=1, cutoff=0.75)), None)

    command, separator, what = first.casefold().replace("_", "-").rpartition("-")
    if what == "help" and not first.startswith("-") and (not separator or nearest(command)):
        command = (nearest(command) if separator else nearest(others[0]) if others else None) or ""
        text = " ".join(filter(None, (PROGRAM, command, "--help")))
        return f'for help: {text}; for a sound: {PROGRAM} {DEFAULT} "{first}"'
    table = PurePath(first).suffix.lower() in (".csv", ".tsv", ".jsonl", ".txt") and " " not in first
    if table:
        return (
            f"{first} looks like a file: {PROGRAM} batch {first} -o FOLDER, or {PROGRAM} --from-file {first}"
        )
    if first in COMMANDS:
        return f"the command comes first: {' '.join((PROGRAM, first, *more))}"
    if not others or others[0] not in more or (found := nearest(first)) is None:
        return None
    rest = " ".join(more)
    return (
        f"there is no command {first}; did you mean: {PROGRAM} {found} {rest}? A prompt of several words "
        f'needs quotes: {PROGRAM} "{first} {rest}"'
    )
