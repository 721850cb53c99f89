"""A Ray cluster: connecting to one or starting one, and which workers fit into it.

Imports only the standard library, and Ray when it connects.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

from audioldm2.extras import import_extra
from audioldm2.quoting import one_line, quoted

CONNECT_TIMEOUT = 10.0  # seconds
PURPOSE = "running a batch on many machines"


class Node(NamedTuple):
    """What a machine of a cluster has, as Ray counts it."""

    cpus: int
    gpus: int


@dataclass(frozen=True)
class Cluster:
    """A cluster that this process is connected to.

    Attributes:
        nodes: its machines.
    """

    nodes: tuple[Node, ...]

    @property
    def gpus(self) -> int:
        """The number of GPUs."""
        return sum(node.gpus for node in self.nodes)


class Placement(NamedTuple):
    """Which workers run.

    Attributes:
        workers: their number.
        threads: of each, on the CPU.
        cpus: that Ray reserves for each.
        gpus: that Ray reserves for each.
    """

    workers: int
    threads: int
    cpus: int
    gpus: int


def placement(cluster: Cluster, workers: int | None, threads: int | None, use_gpus: bool) -> Placement:
    """Choose the workers, and share the CPUs of the machines among them.

    Args:
        cluster: where they run.
        workers: how many; by default one for each GPU, or one for each machine.
        threads: of each; by default as many as fit.
        use_gpus: whether each has a GPU of its own.

    Raises:
        ValueError: the cluster is too small.
    """
    nodes = [node for node in cluster.nodes if node.cpus > 0 and (node.gpus > 0 or not use_gpus)]
    if not nodes:
        raise ValueError(f"workers: the Ray cluster has no {'GPUs' if use_gpus else 'CPUs'} for them")

    if use_gpus:
        wanted = workers or cluster.gpus
        # Ray reserves one CPU for each, as the others are mostly idle, and may be used by other programs.
        share = min(max(1, node.cpus // node.gpus) for node in nodes) if wanted <= cluster.gpus else 0
    else:
        wanted = workers or len(nodes)
        shares = range(max(nodes).cpus, 0, -1)
        share = next((n for n in shares if sum(node.cpus // n for node in nodes) >= wanted), 0)
    if share < (threads or 1):
        size = f"{sum(node.cpus for node in nodes)} CPUs and {cluster.gpus} GPUs on {len(nodes)} machines"
        of = f" of {threads} threads" if threads else ""
        raise ValueError(f"workers: {wanted}{of} do not fit into the Ray cluster, which has {size}")
    threads = threads or share
    return Placement(wanted, threads, 1 if use_gpus else threads, int(use_gpus))


@contextmanager
def connected(address: str | None = None) -> Iterator[Cluster]:
    """Connect this process to a cluster, or start one on this machine, for the duration of the block.

    If this process is connected already, that connection is used, and left as it is. A cluster that was
    started here ends with the block; any other keeps running.

    Args:
        address: HOST:PORT of the cluster, "auto" for the one that runs on this machine, or "local" to start
            one. By default the environment variable RAY_ADDRESS, or else "local".

    Raises:
        ImportError: Ray is not installed.
        ConnectionError: there is no cluster at the address.
        ValueError: it is not an address, or this process is connected and an address is given.
    """
    # Ray reads these when it is imported. Nothing about the use of Ray is sent, unless the user wants it.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # without it, Ray prints a warning
    # What Ray prints on standard output about lost workers, at length; the engine warns about them.
    os.environ.setdefault(
        "RAY_DEDUP_LOGS_SKIP_REGEX", "so the task will be retried|A worker died or was killed"
    )
    ray = import_extra("ray", "ray", PURPOSE)
    with ExitStack() as stack:
        if not ray.is_initialized():
            stack.callback(ray.shutdown)
            _connect(ray, address or os.environ.get("RAY_ADDRESS") or "local")
        elif address is not None:
            raise ValueError("address: this process is connected to a Ray cluster already; leave it out")
        resources = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        yield Cluster(tuple(Node(int(each.get("CPU", 0)), int(each.get("GPU", 0))) for each in resources))


def _connect(ray: Any, address: str) -> None:
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address == "local":
        options["include_dashboard"] = False
    elif address != "auto":
        check_address(address)
    try:
        with _own_signals(), _muted():
            ray.init(address=address, **options)
    except (ConnectionError, RuntimeError, ValueError) as error:
        if address == "local":
            raise RuntimeError(f"Ray cannot be started on this machine: {one_line(error)}") from error
        place = "on this machine" if address == "auto" else f"at {address}"
        raise ConnectionError(f"there is no Ray cluster {place}: {one_line(error)}") from error


def check_address(address: str) -> None:
    """Raise unless something listens at an address. Ray would try for a minute, and print what it does."""
    if "://" in address:
        raise ValueError(f"{quoted(address)} is an address for Ray's client; use the cluster's HOST:PORT")
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65535:
        raise ValueError(f"{quoted(address)} is not the address of a Ray cluster; use HOST:PORT or auto")
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_TIMEOUT).close()
    except OSError as error:
        raise ConnectionError(f"there is no Ray cluster at {address}: {error.strerror or error}") from error


@contextmanager
def _own_signals() -> Iterator[None]:
    """Keep this process's answer to SIGTERM, which `ray.init` replaces."""
    own = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, own)


@contextmanager
def _muted() -> Iterator[None]:
    """Keep Ray's C++ code from printing while it connects and, unless the user wants it, afterwards."""
    name = "RAY_BACKEND_LOG_LEVEL"
    own = os.environ.get(name)
    os.environ[name] = own or "fatal"
    sys.stderr.flush()
    stderr = os.dup(2)
    try:
        with open(os.devnull, "w") as null:
            os.dup2(null.fileno(), 2)
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        if own is None:
            del os.environ[name]
