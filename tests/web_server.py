"""A server of the web page with "tiny", in this process, for the tests of the page and its API."""

from __future__ import annotations

import dataclasses
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

from audioldm2.cli import serve
from audioldm2.web.requests import Limits
from audioldm2.web.server import serving
from audioldm2.web.studio import Studio
from tests.helpers import HANGS_AFTER, load_pipeline

# Long enough that no test sees its end.
LONG = {"duration": 10.0, "steps": 1000}


class Server(NamedTuple):
    """A running server."""

    url: str
    studio: Studio
    log: list[str]


@contextmanager
def tiny_server(**limits: float) -> Iterator[Server]:
    """Serve the page with "tiny" and short sounds by default.

    Args:
        limits: other limits of the requests.
    """
    checkpoint = dataclasses.replace(
        serve.describe("tiny"), duration=0.64, steps={"dpmsolver++": 2, "unipc": 2, "ddim": 3}
    )
    log: list[str] = []
    studio = Studio(
        load_pipeline, {"tiny": checkpoint}, Limits(**{"steps": 1000, "queue": 4, **limits}), log.append
    )
    studio.load("tiny")
    with serving(studio, "127.0.0.1", free_port()) as url:
        yield Server(url.rstrip("/"), studio, log)


def free_port() -> int:
    """A port on which nothing listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def wait_until(condition: Callable[[], bool]) -> float:
    """Wait until a condition holds; fails after `HANGS_AFTER` seconds. Returns how long it took."""
    begin = time.monotonic()
    while not condition():
        assert time.monotonic() - begin < HANGS_AFTER, "this never happened"
        time.sleep(0.01)
    return time.monotonic() - begin
