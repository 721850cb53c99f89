"""Progress bars, and where they appear in a notebook that has no widgets.

In a notebook with ipywidgets, tqdm draws each bar as a widget. Without them it prints to standard error: a
line for each bar, and, in a notebook that is run by a program, for each state of each bar. There, the bars of
a generation share one output of the notebook cell (`NotebookScreen`) instead, which is replaced as they
advance and ends as one line.
"""

from __future__ import annotations

import os
import re
import sys
import uuid
import warnings
from collections.abc import Iterable
from typing import Any

with warnings.catch_warnings():
    # In a notebook, tqdm warns that there is no ipywidgets.
    warnings.filterwarnings("ignore", message="IProgress not found")
    from tqdm.auto import tqdm as tqdm

# What tqdm writes between texts: the start of the line, the next line, the line above.
CONTROL = re.compile(r"(\r|\n|\x1b\[A)")


class NotebookScreen:
    """A small terminal for tqdm's bars (their argument `file`) in one output of a notebook cell.

    Args:
        display: IPython.display, or what shows texts as it does.
    """

    encoding = "utf-8"  # tqdm draws smooth bars if the file can show them

    def __init__(self, display: Any):
        self._display = display
        self._id = uuid.uuid4().hex
        self._lines = [""]
        self._row = 0
        self._shown: str | None = None

    def write(self, text: str) -> int:
        """Write as to a terminal; a text replaces its whole line, as tqdm pads it with spaces."""
        for part in CONTROL.split(text):
            if part == "\n":
                self._row += 1
                self._lines += [""] * (self._row == len(self._lines))
            elif part == "\x1b[A":
                self._row = max(0, self._row - 1)
            elif part and part != "\r":
                self._lines[self._row] = part.rstrip()
        return len(text)

    def flush(self) -> None:
        """Show what was written, in place of what was shown before."""
        text = "\n".join(self._lines).rstrip()
        if text == self._shown:
            return
        content = {"text/plain": text}
        if self._shown is None:
            self._display.display(content, raw=True, display_id=self._id)
        else:
            self._display.update_display(content, raw=True, display_id=self._id)
        self._shown = text


def notebook_screen() -> NotebookScreen | None:
    """A screen for the bars of a generation, if this is a notebook in which tqdm does not draw widgets."""
    kernel, ipython = sys.modules.get("ipykernel.zmqshell"), sys.modules.get("IPython")
    if kernel is None or ipython is None or any(c.__module__ == "tqdm.notebook" for c in tqdm.__mro__):
        return None
    if any(name == "QT_API" or name.startswith("SPYDER") for name in os.environ):
        return None  # consoles, which show bars as terminals do; this is how tqdm tells them apart
    if not isinstance(ipython.get_ipython(), kernel.ZMQInteractiveShell):
        return None
    return NotebookScreen(ipython.display)


def progress_bar(
    iterable: Iterable[Any] | None, screen: NotebookScreen | None, options: dict[str, Any], leave: bool = True
) -> tqdm[Any]:
    """A progress bar.

    Args:
        iterable: what to iterate over, or None.
        screen: where to show it, from `notebook_screen`.
        options: of tqdm.
        leave: whether the bar stays on a `screen` once it is full. Elsewhere it does by tqdm's default.
    """
    if screen is not None:
        options = {"file": screen, "leave": leave, **options}
    return tqdm(iterable, **options)
