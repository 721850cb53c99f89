"""Settings of quality and speed as a user writes them, and which of them go together.

The command line, the tables of batches and the web page take

    quality             a preset, by its name in `QUALITIES`
    feature_cache       an interval, "3", or the steps that run the whole UNet, "0,1,2,5"
    guidance_interval   fractions of the steps, "0-0.75"
    guidance_rescale    a number from 0 to 1
    unconditional       one of `UNCONDITIONAL`
    timesteps           decreasing integers, "999,700,300"

Imports only the standard library, so that mistakes are found before PyTorch is imported.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from audioldm2.arguments import GUIDANCE, as_integer
from audioldm2.feature_cache import FeatureCaching, as_feature_caching
from audioldm2.guidance import ALL_STEPS, UNCONDITIONAL, check_unconditional, guidance_of
from audioldm2.quality import Quality, quality_of
from audioldm2.quoting import quoted

# Settings with their values that have no effect. A preset stands for some of them.
NEUTRAL: dict[str, Any] = {
    "feature_cache": 1,
    "guidance_interval": ALL_STEPS,
    "guidance_rescale": 0.0,
    "unconditional": UNCONDITIONAL[0],
    "timesteps": None,
}

# Settings that a preset stands for.
OF_PRESET = ("scheduler", "num_inference_steps", "timesteps", "feature_cache", "guidance_interval")


def cache_of(name: str, value: Any) -> int | FeatureCaching:
    """The settings of feature caching; 1 is off.

    Args:
        name: the setting's, for the error.
        value: text such as "3" or "0,1,2,5"; an interval, a list of steps, a mapping of `FeatureCaching`'s
            fields, or one. False is off.

    Raises:
        ValueError: it is something else.

    Example:
        >>> cache_of("feature_cache", "0,1,2,5").steps
        (0, 1, 2, 5)
    """
    given = value
    try:
        if isinstance(given, str):
            steps = [int(part) for part in given.split(",")]
            given = steps if len(steps) > 1 else steps[0]
        if isinstance(given, list | tuple):
            given = FeatureCaching(steps=given)
        elif isinstance(given, Mapping):
            given = FeatureCaching(**given)
        found = as_feature_caching(given)
    except (TypeError, ValueError):
        raise ValueError(
            f"{name} must be an interval such as 3, or a list of the steps that run the whole UNet, such as "
            f"0,1,2,5; got {quoted(value)}"
        ) from None
    if found is None:
        return 1
    if found == FeatureCaching(found.interval):
        return int(found.interval)
    steps_of_run = None if found.steps is None else tuple(int(step) for step in found.steps)
    return dataclasses.replace(found, steps=steps_of_run)


def interval_of(name: str, value: Any) -> tuple[float, float]:
    """The interval of the steps with guidance, as fractions of all steps.

    Args:
        name: the setting's, for the error.
        value: text such as "0-0.75", or two numbers.

    Raises:
        ValueError: it is something else.
    """
    try:
        given = value
        if isinstance(value, str):
            given = [float(part) for part in value.replace("\N{EN DASH}", "-").split("-")]
        return guidance_of(GUIDANCE, given, 0.0).interval
    except (TypeError, ValueError):
        raise ValueError(
            f"{name} must be START-END, two fractions with 0 <= START < END <= 1, such as 0-0.75; "
            f"got {quoted(value)}"
        ) from None


def timesteps_of(name: str, value: Any) -> tuple[int, ...]:
    """The timesteps of a run.

    Args:
        name: the setting's, for the error.
        value: text such as "999,700,300", or a list of integers.

    Raises:
        ValueError: it is something else, or they do not decrease.
    """
    try:
        listed = [int(part) for part in value.split(",")] if isinstance(value, str) else value
        found = Quality(timesteps=listed).timesteps
    except (TypeError, ValueError):
        found = None
    if found is None:
        raise ValueError(
            f"{name} must be decreasing integers of at least 0, such as 999,700,300; got {quoted(value)}"
        )
    return tuple(found)


READERS: dict[str, Callable[[str, Any], Any]] = {
    "feature_cache": cache_of,
    "guidance_interval": interval_of,
    "timesteps": timesteps_of,
}


def as_plain(value: Any) -> Any:
    """A setting as JSON can hold it, so that `cache_of` reads it again."""
    if not isinstance(value, FeatureCaching):
        return value
    default = FeatureCaching()
    changed = {name: field for name, field in vars(value).items() if field != getattr(default, name)}
    return list(value.steps) if value.steps is not None and len(changed) == 1 else changed


def preset_of(given: Mapping[str, Any]) -> Quality:
    """The preset that settings name, with the sampler that they name.

    Args:
        given: `quality` and `scheduler`, a name in `SAMPLERS`; None, or no value, is the default.
    """
    return quality_of(given.get("quality")).with_sampler(given.get("scheduler"))


def check_quality_settings(given: Mapping[str, Any]) -> None:
    """Check which settings go together.

    Args:
        given: arguments of a generation by their names, and `scheduler` and `invert` as the command line has
            them. None, or no value, is the default.

    Raises:
        TypeError, ValueError: settings that cannot be used; the message begins with the name of one.
    """
    steps, timesteps = given.get("num_inference_steps"), given.get("timesteps")
    if timesteps is not None and steps is not None:
        raise ValueError("timesteps and num_inference_steps cannot be used together; leave out one of them")
    if given.get("invert"):
        for name in ("quality", "timesteps"):
            if given.get(name) is not None:
                raise ValueError(
                    f"{name} cannot be used with invert, which determines the sampler and its steps"
                )
    scale = given.get("guidance_scale")
    scale = GUIDANCE if scale is None else scale
    rescale = given.get("guidance_rescale")
    guidance_of(scale, given.get("guidance_interval"), 0.0 if rescale is None else rescale)
    unconditional = given.get("unconditional")
    if unconditional is not None:
        check_unconditional(unconditional, scale > 1, bool(given.get("negative_prompt")))
    run = preset_of(given).with_arguments(steps, timesteps, given.get("feature_cache"))
    caching = as_feature_caching(run.feature_cache)
    if caching is not None and run.steps is not None and not given.get("invert"):
        caching.full_steps(as_integer(run.steps) or 0)


def fitting_defaults(given: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Defaults without those that given settings rule out, since they cannot be used together.

    Args:
        given: as in `check_quality_settings`.
        defaults: likewise.
    """
    ruled_out: set[str] = set()
    if given.get("timesteps") is not None:
        ruled_out |= {"num_inference_steps"}
    elif given.get("num_inference_steps") is not None:
        ruled_out |= {"timesteps"}
    if given.get("invert"):
        ruled_out |= {"quality", "timesteps"}
    scale = given.get("guidance_scale")
    scale = defaults.get("guidance_scale") if scale is None else scale
    if scale is not None and not scale > 1:
        ruled_out |= {"guidance_interval", "guidance_rescale", "unconditional"}
    if given.get("negative_prompt"):
        ruled_out |= {"unconditional"}
    elif given.get("unconditional") not in (None, UNCONDITIONAL[0]):
        ruled_out |= {"negative_prompt"}
    return {name: value for name, value in defaults.items() if name not in ruled_out}
