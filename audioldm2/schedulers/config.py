"""The settings of a scheduler: `scheduler.config`, and one scheduler made from another's settings.

A scheduler's `__init__` lists its settings as keyword parameters with defaults, and `@records_settings`
stores the arguments of each call in `scheduler.config`. Names, defaults and conversion rules are those of
diffusers, so a `scheduler_config.json` means the same in both libraries, and either reads the other's
`scheduler.config`.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, Concatenate, NoReturn, ParamSpec, TypeVar

P = ParamSpec("P")
C = TypeVar("C", bound="Configurable")


class SchedulerConfig(dict[str, Any]):
    """The settings of a scheduler: a read-only dict whose items can also be read as attributes.

    It is a `dict` because diffusers' `from_config` accepts nothing else. Apart from the scheduler's own
    settings it can hold

    - settings of the class that the scheduler was converted from, so that converting back loses nothing;
    - `_use_default_values`, the names of the settings that were left at their defaults. A conversion skips
      them, so that the new class applies its own defaults.

    Example:
        >>> config = DDIMScheduler(beta_end=0.0195).config
        >>> config.beta_end, config["beta_end"], config.get("solver_order")
        (0.0195, 0.0195, None)
    """

    # The settings that every scheduler in this package has.
    num_train_timesteps: int
    beta_start: float
    beta_end: float
    beta_schedule: str
    trained_betas: list[float] | None

    def __getattr__(self, name: str) -> Any:
        if name in self:
            return self[name]
        raise AttributeError(f"the scheduler's config has no setting {name!r}")

    def _refuse(self, *args: object, **kwargs: object) -> NoReturn:
        raise TypeError("a scheduler's config is read-only; use from_config(scheduler.config, name=value)")

    __setitem__ = __delitem__ = __setattr__ = __delattr__ = _refuse
    __ior__ = update = setdefault = pop = popitem = clear = _refuse

    def __reduce__(self) -> tuple[type[SchedulerConfig], tuple[dict[str, Any]]]:
        return SchedulerConfig, (dict(self),)  # by default, pickle and deepcopy set one item after another


def records_settings(init: Callable[Concatenate[C, P], None]) -> Callable[Concatenate[C, P], None]:
    """Make a scheduler's `__init__` store its arguments in `self.config` before it runs.

    A plain default cannot tell `DDIMScheduler(timestep_spacing="leading")` from `DDIMScheduler()`; this sees
    the call and records the settings that were left out as `_use_default_values`.
    """
    signature = inspect.signature(init)

    @functools.wraps(init)
    def wrapper(self: C, /, *args: P.args, **kwargs: P.kwargs) -> None:
        bound = signature.bind(self, *args, **kwargs)
        stated = set(bound.arguments)
        bound.apply_defaults()
        settings = {name: value for name, value in bound.arguments.items() if name != "self"}
        defaults = sorted(settings.keys() - stated)
        self._config = SchedulerConfig(settings, **({"_use_default_values": defaults} if defaults else {}))
        init(self, *args, **kwargs)

    return wrapper


class Configurable:
    """Base class of objects whose `__init__` records its parameters with `@records_settings`."""

    _config: SchedulerConfig

    @property
    def config(self) -> SchedulerConfig:
        """The settings, read-only: `config.beta_start` or `config["beta_start"]`."""
        return self._config

    @classmethod
    def from_config(cls: type[C], config: Mapping[str, Any], **overrides: Any) -> C:
        """Make a scheduler from another scheduler's settings.

        Settings that this class does not have stay in the new `config` but have no effect. Settings that were
        left at the other class's defaults (`_use_default_values`) take this class's defaults.

        Args:
            config: `scheduler.config` of any scheduler of this package or of diffusers, or the content of a
                `scheduler_config.json`.
            **overrides: settings that replace those in `config`.

        Returns:
            A scheduler of this class.

        Raises:
            TypeError: if `config` is not a mapping, or an override is not a setting of any scheduler.
            ValueError: if a setting has a value that is not supported.

        Example:
            >>> pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
        """
        if not isinstance(config, Mapping):
            raise TypeError(
                f"from_config needs a mapping such as scheduler.config, got {type(config).__name__}"
            )
        own = _setting_names(cls)
        for name in overrides:
            if name not in own and name not in _all_setting_names():
                raise TypeError(f"{name!r} is not a setting of {cls.__name__} or of any other scheduler")
        skipped = {"_use_default_values", *config.get("_use_default_values", ())}
        stated = {name: value for name, value in config.items() if name not in skipped} | overrides
        scheduler = cls(**{name: value for name, value in stated.items() if name in own})
        # As in diffusers, an override that is another class's setting is accepted and dropped.
        carried = {name: value for name, value in config.items() if name not in skipped | own}
        if "_class_name" in carried:
            carried["_class_name"] = cls.__name__
        scheduler._update_config(**carried)
        return scheduler

    def config_dict(self) -> dict[str, Any]:
        """The content of `scheduler_config.json`: the settings as JSON types, and `_class_name`."""
        settings = {name: value for name, value in self.config.items() if name != "_use_default_values"}
        return {**settings, "_class_name": type(self).__name__}

    def _update_config(self, **settings: Any) -> None:
        self._config = SchedulerConfig({**self._config, **settings})


def _setting_names(cls: type[Configurable]) -> set[str]:
    return set(inspect.signature(cls).parameters)


def _all_setting_names() -> set[str]:
    from audioldm2.schedulers import SCHEDULERS  # imports every sampler, and they import this module

    return set().union(*map(_setting_names, SCHEDULERS.values()))
