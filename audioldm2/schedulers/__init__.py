"""The samplers, which turn noise into latents step by step.

`SAMPLERS` lists them all. It is plain data, so the command line can read it for `--help` without importing
PyTorch; the classes are imported when they are first used. docs/adding-a-sampler.md shows how to add one.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from audioldm2.schedulers.base import Scheduler
    from audioldm2.schedulers.ddim import DDIMScheduler
    from audioldm2.schedulers.dpm_solver import DPMSolverMultistepScheduler
    from audioldm2.schedulers.unipc import UniPCMultistepScheduler

# The name on the command line: the module in this package, and the class, whose name is also what
# `_class_name` in a checkpoint's scheduler_config.json says.
SAMPLERS = {
    "ddim": ("ddim", "DDIMScheduler"),
    "dpmsolver++": ("dpm_solver", "DPMSolverMultistepScheduler"),
    "unipc": ("unipc", "UniPCMultistepScheduler"),
}

DEFAULT_SAMPLER = "dpmsolver++"  # of the commands and of the page; a checkpoint's own is its scheduler's

SCHEDULERS: dict[str, type[Scheduler]]  # the classes by class name, made from SAMPLERS when it is read

__all__ = [
    "DEFAULT_SAMPLER",
    "SAMPLERS",
    "SCHEDULERS",
    "DDIMScheduler",
    "DPMSolverMultistepScheduler",
    "UniPCMultistepScheduler",
    "as_sampler",
    "sampler_class",
]


def __getattr__(name: str) -> Any:
    modules = {class_name: module for module, class_name in SAMPLERS.values()}
    if name == "SCHEDULERS":
        return {class_name: _load(module, class_name) for class_name, module in modules.items()}
    if name in modules:
        return _load(modules[name], name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def sampler_class(name: str) -> type[Scheduler]:
    """The class of a sampler, by its name in `SAMPLERS`."""
    return _load(*SAMPLERS[name])


def as_sampler(name: str, scheduler: Any) -> Any:
    """The sampler of a name in `SAMPLERS`: the given one if it is of that class, or one with its config.

    Raises:
        ValueError: the given one has no config.
    """
    wanted = sampler_class(name)
    if isinstance(scheduler, wanted):
        return scheduler
    if not isinstance(getattr(scheduler, "config", None), Mapping):
        raise ValueError(
            f"{wanted.__name__} takes the noise schedule from the scheduler's config, and "
            f"{type(scheduler).__name__} has none; set pipe.scheduler to one of this package or of diffusers"
        )
    return wanted.from_config(scheduler.config)


def _load(module: str, class_name: str) -> type[Scheduler]:
    scheduler: type[Scheduler] = getattr(import_module(f"{__name__}.{module}"), class_name)
    return scheduler
