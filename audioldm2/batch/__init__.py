"""Batches: sounds from a list of prompts, in a folder. A run that was stopped can be resumed.

    from audioldm2 import AudioLDM2Pipeline, batch

    pipe = AudioLDM2Pipeline.from_pretrained("tiny")
    report = batch.run(["A rising sweep", {"prompt": "Rain", "seed": 7}], pipe, "sounds")

- `jobs`: what to generate.
- `tables`: the files that jobs are read from.
- `names`: a file name for any prompt.
- `planning`: from jobs to requests, which have every setting, in groups that are generated together.
- `generating`: from a group of requests to its sounds.
- `manifest`: manifest.jsonl, the list of finished sounds.
- `running`: runs a batch, or estimates how long it would take.

An engine generates the groups: by default the pipeline in this process, or one of `audioldm2.engines`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

_HOMES = {
    "Failure": "audioldm2.batch.jobs",
    "Job": "audioldm2.batch.jobs",
    "read_jobs": "audioldm2.batch.tables",
    "Estimate": "audioldm2.batch.running",
    "Report": "audioldm2.batch.running",
    "estimate": "audioldm2.batch.running",
    "run": "audioldm2.batch.running",
}

__all__ = [*_HOMES]

if TYPE_CHECKING:
    from audioldm2.batch.jobs import Failure as Failure, Job as Job
    from audioldm2.batch.running import (
        Estimate as Estimate,
        Report as Report,
        estimate as estimate,
        run as run,
    )
    from audioldm2.batch.tables import read_jobs as read_jobs


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
