"""The settings of a scheduler: `scheduler.config`, saving and loading them, and conversion between classes.

A scheduler's `__init__` lists its settings as keyword parameters with defaults, and `@records_settings`
checks their types and stores the arguments of each call in `scheduler.config`. Names, defaults and conversion
rules are those of diffusers, so a `scheduler_config.json` means the same in both libraries, and either reads
the other's `scheduler.config`.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import json
import math
import os
import typing
import warnings
from collections.abc import Callable, Iterable, Mapping
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Concatenate, Literal, NoReturn, ParamSpec, TypeVar, overload

from audioldm2.arguments import as_integer
from audioldm2.quoting import quoted

P = ParamSpec("P")
C = TypeVar("C", bound="Configurable")

# Settings that only other samplers of diffusers have. They are stored for a conversion back, without effect.
OTHER_SETTINGS = frozenset(
    (
        *("interpolation_type", "noise_sampler_seed", "rho", "sigma_data", "sigma_schedule"),
        *("skip_prk_steps", "timestep_type"),
    )
)

# Settings that describe what the network was trained on: a sampler that lacks one samples wrongly, unless it
# has the value that such a sampler takes for granted.
TRAINING_DEFAULTS = {
    "rescale_betas_zero_snr": (False, None),
    "prediction_type": ("epsilon", None),
    "trained_betas": (None,),
}


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
    """Make a scheduler's `__init__` check the types of its arguments and store them in `self.config`.

    A plain default cannot tell `DDIMScheduler(timestep_spacing="leading")` from `DDIMScheduler()`; this sees
    the call and records the settings that were left out as `_use_default_values`. Arguments that begin with
    an underscore are stored only, so that `DDIMScheduler(**scheduler.config)` works.
    """
    signature = inspect.signature(init)

    @functools.wraps(init)
    def wrapper(self: C, /, *args: P.args, **kwargs: P.kwargs) -> None:
        private = {name: value for name, value in kwargs.items() if name.startswith("_")}
        bound = signature.bind(self, *args, **{name: v for name, v in kwargs.items() if name not in private})
        stated = set(bound.arguments)
        bound.apply_defaults()
        for name, value in bound.arguments.items():
            bound.arguments[name] = value if name == "self" else _checked(name, value, _hints(init).get(name))
        settings = {name: value for name, value in bound.arguments.items() if name != "self"}
        defaults = sorted(settings.keys() - stated)
        if defaults:
            private["_use_default_values"] = defaults
        self._internal_dict = SchedulerConfig({**private, **settings})
        init(*bound.args, **bound.kwargs)

    return wrapper


class Configurable:
    """Base class of objects whose `__init__` records its parameters with `@records_settings`.

    Attributes:
        config_name: the name of the file that the settings are saved in.
        has_compatibles: whether the settings of one class mean something to others; see `compatibles`.
    """

    config_name: ClassVar[str] = "scheduler_config.json"
    has_compatibles: ClassVar[bool] = True
    _deprecated_kwargs: ClassVar[tuple[str, ...]] = ()
    # diffusers' name, which some scripts assign to.
    _internal_dict: SchedulerConfig

    @property
    def config(self) -> SchedulerConfig:
        """The settings, read-only: `config.beta_start` or `config["beta_start"]`."""
        return self._internal_dict

    @property
    def compatibles(self) -> list[type[Any]]:
        """The classes that can be made from this scheduler's settings with `from_config`.

        They are this package's and, if diffusers is installed, its other ones, which work in a pipeline as
        well. Reading this property imports diffusers, which takes seconds.

        Example:
            >>> samplers = {cls.__name__: cls for cls in pipe.scheduler.compatibles}
            >>> pipe.scheduler = samplers["DPMSolverMultistepScheduler"].from_config(pipe.scheduler.config)
        """
        own: dict[str, type[Any]] = {type(self).__name__: type(self), **_schedulers()}
        return [*own.values(), *(cls for cls in _diffusers_schedulers() if cls.__name__ not in own)]

    # ------------------------------------------------------------ from settings

    @overload
    @classmethod
    def from_config(
        cls: type[C],
        config: Mapping[str, Any],
        return_unused_kwargs: Literal[False] = False,
        **overrides: Any,
    ) -> C: ...

    @overload
    @classmethod
    def from_config(
        cls: type[C], config: Mapping[str, Any], return_unused_kwargs: Literal[True], **overrides: Any
    ) -> tuple[C, dict[str, Any]]: ...

    @classmethod
    def from_config(
        cls: type[C], config: Mapping[str, Any], return_unused_kwargs: bool = False, **overrides: Any
    ) -> C | tuple[C, dict[str, Any]]:
        """Make a scheduler from another scheduler's settings.

        Settings that this class does not have stay in the new `config` but have no effect. Settings that were
        left at the other class's defaults (`_use_default_values`) take this class's defaults.

        A warning names the settings without effect that matter: overrides, settings that no scheduler has,
        and settings of the training, such as `rescale_betas_zero_snr`.

        Args:
            config: `scheduler.config` of any scheduler of this package or of diffusers, or the content of a
                `scheduler_config.json`.
            return_unused_kwargs: return the overrides that are not settings of this class, instead of
                warning about them or refusing them.
            **overrides: settings that replace those in `config`.

        Returns:
            A scheduler of this class. With `return_unused_kwargs`, also a dict of the settings without
            effect.

        Raises:
            TypeError: if `config` is not a mapping, or an override is not a setting of any scheduler.
            ValueError: if a setting has a value that is not supported.

        Example:
            >>> pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
        """
        if not isinstance(config, Mapping):
            raise TypeError(
                f"from_config needs a mapping such as scheduler.config, got {type(config).__name__}; "
                "use from_pretrained(folder) for a saved scheduler"
            )
        if not all(isinstance(name, str) for name in config):
            raise TypeError("the names of a config's settings must be strings")
        own = _setting_names(cls)
        known = OTHER_SETTINGS.union(*map(_setting_names, _schedulers().values()))
        foreign = {name: value for name, value in overrides.items() if name not in own}
        if not return_unused_kwargs:
            for name in foreign:
                if name not in known:
                    raise TypeError(
                        f"{quoted(name)} is not a setting of {cls.__name__} or of any other scheduler"
                    )
            _warn_of("overrides", foreign, cls)
        defaults = config.get("_use_default_values") or ()
        if not isinstance(defaults, list | tuple) or not all(isinstance(name, str) for name in defaults):
            raise ValueError(f"_use_default_values must be a list of names, got {quoted(defaults)}")
        skipped = {"_use_default_values", *defaults}
        stated = {name: value for name, value in config.items() if name not in skipped} | overrides
        scheduler = cls(**{name: value for name, value in stated.items() if name in own})
        # As in diffusers, an override that is another class's setting is dropped.
        carried = {name: value for name, value in config.items() if name not in skipped | own}
        unknown = [name for name in carried if not name.startswith("_") and name not in known]
        wrong = [name for name, fine in TRAINING_DEFAULTS.items() if carried.get(name, fine[0]) not in fine]
        if _is_known(config.get("_class_name")):
            _warn_of("settings", {name: carried[name] for name in unknown}, cls)
        _warn_of("settings of the training", {name: carried[name] for name in wrong}, cls)
        if "_class_name" in carried:
            carried["_class_name"] = cls.__name__
        scheduler.register_to_config(**carried)
        return (scheduler, {**foreign, **carried}) if return_unused_kwargs else scheduler

    def register_to_config(self, **settings: Any) -> None:
        """Store settings in `config`, after checking the types of those that this class has."""
        hints = _hints(type(self).__init__)
        checked = {name: _checked(name, value, hints.get(name)) for name, value in settings.items()}
        self._internal_dict = SchedulerConfig({**self._internal_dict, **checked})

    if not TYPE_CHECKING:  # a type checker would take every name for an attribute

        def __getattr__(self, name: str) -> Any:
            settings = self.__dict__.get("_internal_dict", {})
            if name.startswith("__") or name not in settings:
                raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
            warnings.warn(
                f"read {name} from the config, as {type(self).__name__}.config.{name}; "
                "as an attribute it is deprecated",
                FutureWarning,
                stacklevel=2,
            )
            return settings[name]

    # ------------------------------------------------------------ files

    @overload
    @classmethod
    def from_pretrained(
        cls: type[C],
        pretrained_model_name_or_path: str | os.PathLike[str],
        subfolder: str | None = None,
        return_unused_kwargs: Literal[False] = False,
        **options: Any,
    ) -> C: ...

    @overload
    @classmethod
    def from_pretrained(
        cls: type[C],
        pretrained_model_name_or_path: str | os.PathLike[str],
        subfolder: str | None = None,
        *,
        return_unused_kwargs: Literal[True],
        **options: Any,
    ) -> tuple[C, dict[str, Any]]: ...

    @classmethod
    def from_pretrained(
        cls: type[C],
        pretrained_model_name_or_path: str | os.PathLike[str],
        subfolder: str | None = None,
        return_unused_kwargs: bool = False,
        **options: Any,
    ) -> C | tuple[C, dict[str, Any]]:
        """Load the settings of a checkpoint's scheduler, of this class or of another, as `from_config` does.

        Args:
            pretrained_model_name_or_path: a local folder, "owner/name" on the Hub, of which only this
                subfolder is downloaded, or "tiny" for the checkpoint inside this package.
            subfolder: the scheduler's folder in the checkpoint; by default "scheduler", or a local folder
                itself if it has a scheduler_config.json.
            return_unused_kwargs: see `from_config`.
            **options: `revision`, `cache_dir`, `token`, `local_files_only` and `force_download`, as in
                `AudioLDM2Pipeline.from_pretrained`; all others are settings that replace the checkpoint's.

        Returns:
            A scheduler of this class; see `from_config`.

        Raises:
            CheckpointError: the checkpoint or the file cannot be found or read, or has a setting with a value
                that is not supported.
            TypeError, ValueError: an override is not a setting of any scheduler, or its value not supported.

        Example:
            >>> DPMSolverMultistepScheduler.from_pretrained("cvssp/audioldm2", subfolder="scheduler")
        """
        config, path, overrides = cls._read(pretrained_model_name_or_path, subfolder, **options)
        try:
            return cls.from_config(config, return_unused_kwargs, **overrides)  # type: ignore[call-overload, no-any-return]
        except ValueError as error:
            if overrides:
                raise  # it may be one of these that is wrong
            from audioldm2.checkpoints.errors import CheckpointError

            raise CheckpointError(f"{path}: {error}") from error

    @classmethod
    def load_config(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        return_unused_kwargs: bool = False,
        subfolder: str | None = None,
        **options: Any,
    ) -> dict[str, Any] | tuple[dict[str, Any], dict[str, Any]]:
        """The content of a checkpoint's scheduler_config.json; see `from_pretrained`.

        Args:
            pretrained_model_name_or_path: see `from_pretrained`.
            return_unused_kwargs: return a pair, of which the second are the options that are not used here.
            subfolder: see `from_pretrained`.
            **options: see `from_pretrained`.
        """
        config, _, unused = cls._read(pretrained_model_name_or_path, subfolder, **options)
        return (config, unused) if return_unused_kwargs else config

    @classmethod
    def _read(
        cls,
        repo_or_folder: str | os.PathLike[str],
        subfolder: str | None,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
        force_download: bool = False,
        **overrides: Any,
    ) -> tuple[dict[str, Any], Path, dict[str, Any]]:
        """The content of a checkpoint's config file, its path, and the arguments that are settings."""
        from audioldm2.checkpoints.hub import Source, check_subfolder, checkpoint_folder
        from audioldm2.checkpoints.tensors import read_json

        source = Source(
            os.fspath(repo_or_folder),
            None,
            revision,
            cache_dir,
            token,
            local_files_only,
            force_download=force_download,
        )
        inside = ("", "scheduler") if subfolder is None else (check_subfolder(subfolder),)
        folder = checkpoint_folder(source, [inside[-1]], first_file=cls.config_name)
        paths = [folder / name / cls.config_name for name in inside]
        path = next((path for path in paths if path.is_file()), paths[-1])
        return read_json(path), path, overrides

    def save_pretrained(self, save_directory: str | os.PathLike[str], push_to_hub: bool = False) -> None:
        """Write `scheduler_config.json`, which this package and diffusers can load.

        Args:
            save_directory: the folder; created if it does not exist.
            push_to_hub: not supported.

        Raises:
            ValueError: with `push_to_hub`.
        """
        from audioldm2.atomic import replacing

        if push_to_hub:
            raise ValueError("push_to_hub is not supported; upload the saved folder with `hf upload`")
        self.register_to_config(_class_name=type(self).__name__)  # as in diffusers
        folder = Path(save_directory).expanduser()
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(folder / self.config_name) as temporary:
            temporary.write_text(self.to_json_string(), encoding="utf-8")

    save_config = save_pretrained

    def config_dict(self) -> dict[str, Any]:
        """The content of `scheduler_config.json`: the settings as JSON types, and `_class_name`."""
        settings = {name: value for name, value in self.config.items() if name != "_use_default_values"}
        return {**settings, "_class_name": type(self).__name__}

    def to_json_string(self) -> str:
        """The text of `scheduler_config.json`."""
        return json.dumps(self.config_dict(), indent=2, sort_keys=True) + "\n"

    def __repr__(self) -> str:
        return f"{type(self).__name__} {self.to_json_string()}"


def _checked(name: str, value: Any, hint: Any) -> Any:
    """A setting as a plain Python value, or ValueError if it is not of its parameter's type."""
    options = typing.get_args(hint) or (hint,)
    if value is None and (type(None) in options or hint is bool):  # a null stands for False in some configs
        return value
    if hint is bool:
        if str(getattr(value, "dtype", "")) == "bool" and getattr(value, "shape", None) == ():
            value = bool(value)  # NumPy's
        if not isinstance(value, bool):
            raise ValueError(f"{name} must be True or False, got {quoted(value)}")
    elif hint is int:
        integer = as_integer(value)
        if integer is None:
            raise ValueError(f"{name} must be an integer, got {quoted(value)}")
        value = integer
    elif hint in (float, float | None):
        try:
            number = math.nan if isinstance(value, bool) or not isinstance(value, Real) else float(value)
        except OverflowError:
            number = math.nan
        if math.isnan(number):
            raise ValueError(f"{name} must be a number, got {quoted(value)}")
        value = value if type(value) is int else number
    elif str in options and not isinstance(value, str):
        raise ValueError(f"{name} must be a string, got {quoted(value)}")
    return value


@functools.cache
def _hints(init: Callable[..., None]) -> dict[str, Any]:
    """The types of the parameters of an `__init__`; none if they cannot be resolved."""
    try:
        return typing.get_type_hints(init)
    except NameError:
        return {}


def _warn_of(kind: str, settings: Mapping[str, Any], cls: type[Any]) -> None:
    if settings:
        listed = ", ".join(f"{name}={quoted(value)}" for name, value in settings.items())
        warnings.warn(f"{kind} without effect on {cls.__name__}: {listed}", stacklevel=3)


def _setting_names(cls: type[Any]) -> set[str]:
    return set(inspect.signature(cls).parameters)


def _schedulers() -> dict[str, type[Configurable]]:
    from audioldm2.schedulers import SCHEDULERS  # imports every sampler, and they import this module

    return {**SCHEDULERS}


def _is_known(class_name: object) -> bool:
    """Whether the settings of a class are known here: this package's classes, and those without a name."""
    return class_name is None or (isinstance(class_name, str) and class_name in _schedulers())


def _diffusers_schedulers() -> Iterable[type[Any]]:
    """diffusers' samplers that take the same settings, if diffusers is installed and can be imported."""
    if importlib.util.find_spec("diffusers") is None:
        return
    try:
        diffusers = importlib.import_module("diffusers")
        names: list[str] = diffusers.DDIMScheduler._compatibles
    except (ImportError, RuntimeError):  # an installation that does not fit the others
        return
    for name in sorted(names):
        cls = getattr(diffusers, name, None)
        # A class with `_backends` stands in for one that needs a package that is not installed.
        if isinstance(cls, type) and not hasattr(cls, "_backends"):
            yield cls
