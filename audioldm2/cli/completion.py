"""Scripts with which a shell completes commands, options, their values and file names at the Tab key.

shtab writes them from the commands' parsers.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from importlib import import_module

from audioldm2.cli import generate
from audioldm2.cli.commands import COMMANDS, DEFAULT, PROGRAM
from audioldm2.cli.messages import print_error
from audioldm2.cli.options import Parser, add_common_options, parse_options
from audioldm2.cli.process import print_line
from audioldm2.extras import import_extra, install_hint

SHELLS = ("bash", "zsh", "fish")
# Metavars of names of files and of folders.
FILES = ("FILE", "TABLE")
FOLDERS = ("FOLDER",)
NAMES = "--model"  # a repository, or a folder
DESCRIPTION = f"""\
Print a script with which a shell completes {PROGRAM}'s commands, options, their
values and the names of files when you press Tab.

This needs shtab: {install_hint("completion")}
Print the script again after an update of {PROGRAM}.
"""
EXAMPLES = f"""\
examples:
  {PROGRAM} completion bash

to install it for your user:
  bash:
    mkdir -p ~/.local/share/bash-completion/completions
    {PROGRAM} completion bash \\
        > ~/.local/share/bash-completion/completions/{PROGRAM}
  zsh, with these two lines in ~/.zshrc, in this order:
    fpath=(~/.zfunc $fpath)
    autoload -Uz compinit && compinit
  and then:
    mkdir -p ~/.zfunc && {PROGRAM} completion zsh > ~/.zfunc/_{PROGRAM}
  fish:
    mkdir -p ~/.config/fish/completions
    {PROGRAM} completion fish > ~/.config/fish/completions/{PROGRAM}.fish

to try it in the current shell:
  bash:  eval "$({PROGRAM} completion bash)"
  zsh:   eval "$({PROGRAM} completion zsh)"
  fish:  {PROGRAM} completion fish | source
"""


def parser() -> Parser:
    """The parser with all options and their help."""
    p = Parser("completion", f"[options] {{{','.join(SHELLS)}}}", DESCRIPTION, EXAMPLES)
    p.add_argument("shell", choices=SHELLS, help="the shell that reads the script")
    add_common_options(p)
    return p


def parse(p: Parser, arguments: Sequence[str]) -> argparse.Namespace:
    """Parse the arguments.

    Raises:
        SystemExit: with code 2 if one is invalid, and with code 0 for --help and --version.
    """
    options, rest = parse_options(p, arguments)
    if rest:
        p.error(f"unrecognized arguments: {' '.join(rest)}")
    return options


def run(parser: Parser, options: argparse.Namespace) -> int:
    """Print a script.

    Returns:
        The exit code: 0, or 1 if it could not be printed.

    Raises:
        ImportError: shtab is not installed.
    """
    failure = print_line(script(options.shell))
    if failure:
        print_error(f"the script was not written to standard output: {failure}")
    return 1 if failure else 0


def script(shell: str) -> str:
    """The completion script for a shell.

    Args:
        shell: from `SHELLS`.

    Raises:
        ImportError: shtab is not installed.
    """
    shtab = import_extra("shtab", "completion", "shell completion")
    whole = argparse.ArgumentParser(PROGRAM)
    generate.add_options(whole)
    commands = whole.add_subparsers()
    parsers = [whole]
    for name, line in COMMANDS.items():
        command = import_module(f"{__package__}.{name}").parser()
        parsers.append(commands.add_parser(name, help=line, parents=[command], add_help=False))
    for action in (action for one in parsers for action in one._actions):
        if action.metavar in FILES:
            action.complete = shtab.FILE  # type: ignore[attr-defined]
        elif action.metavar in FOLDERS or NAMES in action.option_strings:
            action.complete = shtab.DIRECTORY  # type: ignore[attr-defined]
        elif not action.option_strings and action.choices is None:
            # A text. By default zsh would show its help and not complete options in its place.
            action.complete = {"zsh": "( )"}  # type: ignore[attr-defined]
    text: str = shtab.complete(whole, shell)
    if shell == "zsh":
        # After a first word that is not a command, shtab offers nothing. Here it is the default one's prompt.
        command = f"${{${{(M)line[1]:#({'|'.join(COMMANDS)})}}:-{DEFAULT}}}"
        text = text.replace("case $line[1] in", f"case {command} in")
    return text
