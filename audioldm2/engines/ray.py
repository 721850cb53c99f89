"""A batch on the machines of a Ray cluster, with Ray Data.

    from functools import partial
    from audioldm2 import AudioLDM2Pipeline, batch
    from audioldm2.engines.ray import RayEngine

    load = partial(AudioLDM2Pipeline.from_pretrained, "tiny")
    batch.run(["A rising sweep", "Rain"], load(), "sounds", engine=RayEngine(load, workers=2))

The groups are the rows of a dataset, one in each of its blocks. Ray Data maps them with a pool of actors,
each with its own pipeline, and gives back the results in the order in which they are finished. A worker that
is lost is started again, and its groups are generated again. Only the process that runs the batch writes
files.

Groups are generated in the shapes that they have in the local engine. With the same number of threads and the
same kind of processor, the sounds are the same bit for bit.
"""

from __future__ import annotations

import logging
import pickle
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from audioldm2.arguments import check_count
from audioldm2.batch.generating import Result, generate
from audioldm2.batch.jobs import Failure
from audioldm2.batch.planning import Group
from audioldm2.engines.attempts import Attempts
from audioldm2.engines.cluster import PURPOSE, Placement, connected, placement
from audioldm2.extras import import_extra
from audioldm2.pipeline import AudioLDM2Pipeline
from audioldm2.quoting import one_line

# Groups that a worker has at hand, so that it does not wait for the next one.
GROUPS_IN_FLIGHT = 3
MAX_ATTEMPTS = 3  # at a group, or at loading; Ray itself would start a lost worker again without end


class RayEngine:
    """Generates groups on a Ray cluster; an `Engine` for `audioldm2.batch.run`.

    Args:
        load: loads the pipeline in each worker. It is pickled; a worker needs the checkpoint in its Hub cache
            or a folder that it shares.
        workers: copies of the model. By default one for each GPU; without GPUs, one for each machine.
        address: of the cluster, as in `connected`.
        threads: CPU threads of each worker; by default its share of its machine's.
        use_gpus: whether each worker reserves a GPU; by default, if the cluster has any.

    Raises:
        TypeError, ValueError: `workers` or `threads` is not a positive integer.

    Calling it with groups yields their results in any order, and raises

        ImportError: Ray is not installed.
        ConnectionError: there is no cluster at `address`.
        ValueError: the cluster is too small for `workers` or `threads`.
        RuntimeError: a worker cannot load the pipeline, or is lost again and again.
    """

    def __init__(
        self,
        load: Callable[[], AudioLDM2Pipeline],
        *,
        workers: int | None = None,
        address: str | None = None,
        threads: int | None = None,
        use_gpus: bool | None = None,
    ):
        for name, value in (("workers", workers), ("threads", threads)):
            if value is not None:
                check_count(name, value)
        self.load = load
        self.workers = workers
        self.address = address
        self.threads = threads
        self.use_gpus = use_gpus

    def __call__(self, groups: Sequence[Group]) -> Iterator[Result]:
        """Generate groups."""
        with connected(self.address) as cluster:
            use_gpus = cluster.gpus > 0 if self.use_gpus is None else self.use_gpus
            placed = placement(cluster, self.workers, self.threads, use_gpus)
            yield from self._generated(groups, placed)

    def _generated(self, groups: Sequence[Group], placed: Placement) -> Iterator[Result]:
        ray = import_extra("ray", "ray", PURPOSE)
        data = import_extra("ray.data", "ray", PURPOSE)
        attempts = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(Attempts).remote()
        dataset = data.from_items(
            [{"number": number, "group": pickle.dumps(group)} for number, group in enumerate(groups)],
            override_num_blocks=len(groups),
        )
        # The dataset's own copy of the settings.
        dataset.context.enable_progress_bars = False
        dataset.context.print_on_execution_start = False
        results = dataset.map(
            Worker,
            fn_constructor_kwargs={"load": self.load, "threads": placed.threads, "attempts": attempts},
            compute=data.ActorPoolStrategy(
                size=placed.workers, max_tasks_in_flight_per_actor=GROUPS_IN_FLIGHT
            ),
            num_cpus=placed.cpus,
            num_gpus=placed.gpus,
        )
        with _quiet("ray.data"), one_line_errors():
            # Without prefetching, which would hold a result back until the next one is there.
            for batch in results.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
                for payload in batch["payload"]:
                    yield received(payload.as_py())


class Worker:
    """Generates groups with a pipeline of its own, in a process of Ray.

    Args:
        load: loads the pipeline.
        threads: for PyTorch on the CPU.
        attempts: the actor that counts.
    """

    def __init__(self, load: Callable[[], AudioLDM2Pipeline], threads: int, attempts: Any):
        torch.set_num_threads(threads)
        self._attempts = attempts
        self._pipe: AudioLDM2Pipeline | None = None
        # An error is sent with the first result. Ray would load again and again, and print each failure.
        self._error = ""
        # An actor keeps its id when it is started again.
        loading = f"loading by {import_extra('ray', 'ray', PURPOSE).get_runtime_context().get_actor_id()}"
        if self._attempt(loading) > MAX_ATTEMPTS:
            self._error = f"its process was lost {MAX_ATTEMPTS} times; it may need more memory"
            return
        try:
            self._pipe = load()
        except Exception as error:
            self._error = f"{one_line(error)}\n{traceback.format_exc()}"
        else:
            self._pipe.set_progress_bar_config(disable=True)
            self._attempts.end.remote(loading)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Generate the group of a row."""
        payload = Payload(None, [], self._error)
        if self._pipe is not None:
            group = pickle.loads(row["group"])
            attempt = self._attempt(f"group {row['number']}")
            if attempt > MAX_ATTEMPTS:
                payload = Payload(_lost(group), [], "")
            else:
                with warnings.catch_warnings(record=True) as caught:
                    warnings.simplefilter("always")
                    if attempt > 1:
                        warnings.warn("a worker was lost; what it generated is generated again", stacklevel=1)
                    result = generate(self._pipe, group)
                said = [(str(warning.message), warning.category) for warning in caught]
                payload = Payload(result, said, "")
        return {"payload": pickle.dumps(payload)}

    def _attempt(self, name: str) -> int:
        """Count an attempt. Returns its number, from 1."""
        number: int = import_extra("ray", "ray", PURPOSE).get(self._attempts.begin.remote(name))
        return number


class Payload(NamedTuple):
    """What a worker sends.

    Attributes:
        result: of a group; None if the pipeline could not be loaded.
        said: the warnings, each with its class.
        error: why it could not be loaded: one line, then the traceback.
    """

    result: Result | None
    said: list[tuple[str, type[Warning]]]
    error: str


def _lost(group: Group) -> Result:
    reason = f"the worker that generated it was lost {MAX_ATTEMPTS} times; it may need more memory"
    return Result([], [Failure(request.job.where, reason) for request in group.requests])


def received(pickled: bytes) -> Result:
    """The result that a worker sent, after its warnings.

    Raises:
        RuntimeError: the worker could not load the pipeline.
    """
    payload: Payload = pickle.loads(pickled)
    for text, category in payload.said:
        warnings.warn(text, category, stacklevel=2)
    if payload.result is None:
        reason, _, trace = payload.error.partition("\n")
        raise RuntimeError(f"a worker cannot load the model: {reason}") from RuntimeError(trace)
    return payload.result


# --- what Ray prints and raises


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    """Keep a logger from printing. Ray Data also writes everything to files."""
    streams = [each for each in logging.getLogger(name).handlers if isinstance(each, logging.StreamHandler)]
    levels = [stream.level for stream in streams]
    for stream in streams:
        stream.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        for stream, level in zip(streams, levels, strict=True):
            stream.setLevel(level)


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Raise Ray's errors as a RuntimeError of one line.

    Raises:
        RuntimeError: with Ray's error as its cause.
    """
    errors = import_extra("ray.exceptions", "ray", PURPOSE)
    try:
        yield
    except errors.RayError as error:
        # Tracebacks of other processes; the last line is the error at the bottom of it.
        reason = one_line(str(error).strip().rpartition("\n")[2])
        kind = type(error).__name__
        raise RuntimeError(f"Ray stopped the batch, {kind}: {reason}; what is finished stays") from error
