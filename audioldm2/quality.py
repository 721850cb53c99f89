"""Presets of quality and speed: a sampler, its steps, and what is saved in each of them.

    pipe("A bell over rain", quality="draft")

docs/speed.md shows how they were chosen, what each saves, and what it costs.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

from audioldm2.arguments import GUIDANCE, as_integer, check_choice, check_count
from audioldm2.feature_cache import FeatureCaching, as_feature_caching
from audioldm2.guidance import ALL_STEPS, guidance_of
from audioldm2.quoting import quoted
from audioldm2.schedulers import SAMPLERS, as_sampler
from audioldm2.schedulers.timesteps import optimized_timesteps


@dataclasses.dataclass(frozen=True)
class Quality:
    """Settings of a sampling run.

    None stands for what the pipeline does without a preset.

    Attributes:
        sampler: a name in `audioldm2.schedulers.SAMPLERS`; its other settings are those of the pipeline's
            scheduler.
        num_inference_steps: of the sampler.
        timesteps: these instead of the sampler's own, decreasing. They also replace a spacing of noise levels
            (Karras and others) in the settings of the pipeline's scheduler.
        feature_cache: an interval, or a `FeatureCaching`; False runs the whole UNet at every step.
        guidance_interval: the steps with guidance, as fractions of all steps. Without guidance it has no
            effect.

    Raises:
        TypeError, ValueError: an attribute that cannot be used; the message names it.

    Example:
        >>> from dataclasses import replace
        >>> pipe("A bell", quality=replace(QUALITIES["best"], guidance_interval=(0, 0.75))).audios
    """

    sampler: str | None = None
    num_inference_steps: int | None = None
    timesteps: Sequence[int] | None = None
    feature_cache: int | FeatureCaching | bool | None = None
    guidance_interval: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        if self.sampler is not None:
            check_choice("sampler", self.sampler, tuple(SAMPLERS))
        if self.num_inference_steps is not None:
            check_count("num_inference_steps", self.num_inference_steps)
        as_feature_caching(self.feature_cache)
        guidance_of(GUIDANCE, self.guidance_interval, 0.0)
        if self.timesteps is None:
            return
        given = self.timesteps.tolist() if hasattr(self.timesteps, "tolist") else self.timesteps
        if not isinstance(given, list | tuple) or any(as_integer(step) is None for step in given):
            raise TypeError(
                f"timesteps must be a list of integers such as [999, 700, 300], got {quoted(self.timesteps)}"
            )
        if self.num_inference_steps is not None:
            raise ValueError("give num_inference_steps or timesteps, not both")
        steps = tuple(int(step) for step in given)
        if not steps or steps[-1] < 0 or any(a <= b for a, b in itertools.pairwise(steps)):
            raise ValueError(f"timesteps must be decreasing and at least 0, got {quoted(self.timesteps)}")
        object.__setattr__(self, "timesteps", steps)

    @property
    def steps(self) -> int | None:
        """The number of steps; None if it is the sampler's default."""
        return self.num_inference_steps if self.timesteps is None else len(self.timesteps)

    def with_arguments(self, num_inference_steps: Any, timesteps: Any, feature_cache: Any) -> Quality:
        """The same with arguments of a generation, which take precedence if they are not None."""
        changes: dict[str, Any] = {}
        if feature_cache is not None:
            changes["feature_cache"] = feature_cache
        if num_inference_steps is not None or timesteps is not None:
            changes |= {"num_inference_steps": num_inference_steps, "timesteps": timesteps}
        return dataclasses.replace(self, **changes)

    def with_sampler(self, sampler: str | None) -> Quality:
        """The same with another sampler, or the same for None."""
        return self if sampler is None else dataclasses.replace(self, sampler=sampler)

    def make_scheduler(self, scheduler: Any) -> Any:
        """The sampler of the preset with a scheduler's settings; that scheduler if the preset names none."""
        if self.sampler is None:
            return scheduler
        found = as_sampler(self.sampler, scheduler)
        spacings = {name: False for name in found.spacings if found.config[name]}
        if self.timesteps is None or not spacings:
            return found
        return type(found).from_config(found.config, **spacings)


QUALITIES = {
    "draft": Quality(
        "unipc", timesteps=(999, 749, 499, 249), feature_cache=False, guidance_interval=ALL_STEPS
    ),
    "normal": Quality(
        "unipc", timesteps=optimized_timesteps(10), feature_cache=False, guidance_interval=ALL_STEPS
    ),
    "best": Quality(
        "unipc", timesteps=optimized_timesteps(20), feature_cache=False, guidance_interval=ALL_STEPS
    ),
}


def quality_of(value: Any) -> Quality:
    """The argument `quality` of a generation: a name in `QUALITIES`, a `Quality`, or None.

    Raises:
        TypeError, ValueError: something else.
    """
    if value is None:
        return Quality()
    if isinstance(value, Quality):
        return value
    if not isinstance(value, str):
        raise TypeError(f"quality must be one of {', '.join(QUALITIES)} or a Quality, got {quoted(value)}")
    check_choice("quality", value, tuple(QUALITIES))
    return QUALITIES[value]
