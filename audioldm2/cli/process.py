"""What surrounds a run: signals, and standard streams that are closed or full.

A sound takes minutes, so a broken stream must not lose it. Messages that cannot be printed are dropped, and
the exit code says what happened.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, TextIO


class Stopped(BaseException):
    """A signal asked the program to stop. Like KeyboardInterrupt, it is not an Exception.

    Attributes:
        signal: which one.
    """

    def __init__(self, number: int):
        self.signal = signal.Signals(number)


@contextmanager
def stoppable(received: list[signal.Signals]) -> Iterator[None]:
    """SIGTERM and SIGHUP raise `Stopped` in the block, so that temporary files are removed.

    A signal that is ignored (SIGHUP under nohup) stays ignored. Only the main thread can receive signals; in
    others, this does nothing.

    Args:
        received: the signals that arrive are appended, also SIGINT, which raises KeyboardInterrupt as usual.
    """
    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    replaced = [number for number in numbers if signal.getsignal(number) == signal.SIG_DFL]

    def stop(number: int, frame: FrameType | None) -> None:
        received.append(signal.Signals(number))
        for each in replaced:  # another signal must not interrupt the cleanup
            signal.signal(each, signal.SIG_IGN)
        raise Stopped(number)

    def interrupt(number: int, frame: FrameType | None) -> None:
        received.append(signal.Signals(number))
        raise KeyboardInterrupt

    handlers: dict[int, Any] = dict.fromkeys(replaced, stop)
    if signal.getsignal(signal.SIGINT) == signal.default_int_handler:
        handlers[signal.SIGINT] = interrupt
    installed: dict[int, Any] = {}
    try:
        with suppress(ValueError):  # not the main thread
            for number, handler in handlers.items():
                installed[number] = signal.signal(number, handler)
        yield
    finally:
        for number, handler in installed.items():
            signal.signal(number, handler)


def fill_descriptors() -> None:
    """Open the standard streams that are closed, on the null device.

    Otherwise the next file that is opened would get the number of standard error, and messages of libraries
    would be written into it.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest free number


class Tolerant:
    """A text stream that drops what cannot be written.

    Args:
        stream: the stream, or None if the process has none.
    """

    def __init__(self, stream: TextIO | None):
        self._stream = stream

    def write(self, text: str) -> int:
        """Write text, or drop it. Returns its length."""
        if self._stream is not None:
            with _tolerated(self._stream):
                self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Flush the stream, if it can be written."""
        if self._stream is not None:
            with _tolerated(self._stream):
                self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def print_line(text: str) -> str | None:
    """Print a line to standard output.

    Returns:
        Why this failed, or None.
    """
    if sys.stdout is None:  # closed: the caller does not want the message
        return None
    try:
        encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
        print(text.encode(encoding, "backslashreplace").decode(encoding))
        sys.stdout.flush()
    except (OSError, ValueError) as error:  # ValueError: closed by the program
        give_up(sys.stdout)
        return getattr(error, "strerror", None) or str(error)
    return None


@contextmanager
def flushed_output() -> Iterator[None]:
    """Flush standard output after the block; Python would print an error at its exit if that fails."""
    try:
        yield
    finally:
        if sys.stdout is not None:
            with _tolerated(sys.stdout):
                sys.stdout.flush()


def give_up(stream: Any) -> None:
    """Send what is left in a broken stream's buffer, and all that follows, to the null device."""
    with suppress(OSError, ValueError, AttributeError):
        null = os.open(os.devnull, os.O_WRONLY)
        try:
            os.dup2(null, stream.fileno())
        finally:
            os.close(null)


@contextmanager
def _tolerated(stream: Any) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError):
        give_up(stream)
