"""Presets of quality and speed: a sampler, its steps, and what is saved in each of them.

    pipe("A bell over rain", quality="draft")

docs/speed.md shows how they were chosen, what each saves, and what it costs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from audioldm2.arguments import as_integer, check_choice, check_count
from audioldm2.feature_cache import FeatureCaching, as_feature_caching
from audioldm2.guidance import ALL_STEPS
from audioldm2.quoting import quoted
from audioldm2.schedulers import SAMPLERS, as_sampler
from audioldm2.schedulers.timesteps import optimized_timesteps


@dataclasses.dataclass(frozen=True)
class Quality:
    """How a sampling run is done.

    None stands for what the pipeline does without a preset.

    Attributes:
        sampler: a name in `audioldm2.schedulers.SAMPLERS`. The pipeline's scheduler gives the noise schedule.
        num_inference_steps: of the sampler.
        timesteps: these instead of the sampler's own, decreasing.
        feature_cache: an interval, or a `FeatureCaching`; False runs the whole UNet at every step.
        guidance_interval: the steps with guidance, as shares of all steps. Without guidance it has no effect.

    Raises:
        TypeError, ValueError: an attribute that cannot be used; the message names it.

    Example:
        >>> from dataclasses import replace
        >>> pipe("A bell", quality=replace(QUALITIES["draft"], num_inference_steps=12)).audios
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
        if self.timesteps is None:
            return
        given = self.timesteps.tolist() if hasattr(self.timesteps, "tolist") else self.timesteps
        if not isinstance(given, list | tuple) or any(as_integer(step) is None for step in given):
            raise TypeError(
                f"timesteps must be a list of integers such as [999, 700, 300], got {quoted(self.timesteps)}"
            )
        if self.num_inference_steps is not None:
            raise ValueError("give num_inference_steps or timesteps, not both")
        object.__setattr__(self, "timesteps", tuple(int(step) for step in given))

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
        """The same with another sampler, or the same for None.

        The number of steps stays. Timesteps do not, as they were chosen for the preset's sampler.
        """
        if sampler is None or sampler == self.sampler:
            return self
        return dataclasses.replace(self, sampler=sampler, num_inference_steps=self.steps, timesteps=None)

    def scheduler(self, scheduler: Any) -> Any:
        """The sampler of the preset with a scheduler's noise schedule, or that scheduler."""
        return scheduler if self.sampler is None else as_sampler(self.sampler, scheduler)


QUALITIES = {
    "draft": Quality("unipc", 5, feature_cache=False, guidance_interval=(0.2, 0.8)),
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
