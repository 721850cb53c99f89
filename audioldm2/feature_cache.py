"""Feature caching: most steps run only the UNet's upper levels (DeepCache, Ma et al. 2024, section 3).

From one step of the sampler to the next, the feature maps of the UNet's lower levels change little, and they
take most of its time. With an interval N, every N-th step runs the whole UNet and keeps the features that
enter level l of the upsampling path from below,

    features_s = up_{l+1}(...),     s = 0, N, 2 N, ...

and the steps after it run only the levels 0 to l around them:

    noise = up_0(... up_l(features_s, down_l(... down_0(x_t))))

The features belong to one sampling run. They are forgotten when the run ends, and when a callback changes the
UNet's weights or the conditioning.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from audioldm2.arguments import as_integer, check_count, check_number
from audioldm2.quoting import quoted

if TYPE_CHECKING:  # the command line reads settings before PyTorch is imported
    from torch import Tensor, nn

    from audioldm2.conditioning import Conditioning


@dataclass(frozen=True)
class FeatureCaching:
    """Which steps run the whole UNet, and what the others run.

    Attributes:
        interval: every which step runs all levels; 1 runs all levels at all steps.
        level: the lowest level that runs at every step; 0 is that of the latents' resolution.
        power: of the spacing: with K steps that run all levels out of N, they are round(N (k / K) ** power).
            1 spaces them evenly; with more, they are denser at the beginning, with less at the end.
        steps: these steps instead, counted from 0, the first of them 0.

    Raises:
        TypeError, ValueError: an attribute that cannot be used; the message names it.

    Example:
        >>> FeatureCaching(interval=3).full_steps(10)
        [0, 3, 6, 9]
        >>> FeatureCaching(interval=3, power=2).full_steps(10)
        [0, 1, 2, 6]
    """

    interval: int = 3
    level: int = 0
    power: float = 1.0
    steps: Sequence[int] | None = None

    def __post_init__(self) -> None:
        check_count("interval", self.interval)
        check_count("level", self.level, lowest=0)
        check_number("power", self.power)
        if not self.power > 0:
            raise ValueError(f"power must be a positive number, got {quoted(self.power)}")
        if self.steps is None:
            return
        if not isinstance(self.steps, list | tuple) or any(as_integer(step) is None for step in self.steps):
            raise TypeError(
                f"steps must be a list of integers such as [0, 1, 2, 5], got {quoted(self.steps)}"
            )
        increases = all(a < b for a, b in zip(self.steps, self.steps[1:], strict=False))
        if not self.steps or self.steps[0] != 0 or not increases:
            raise ValueError(f"steps must increase from 0, got {quoted(list(self.steps))}")

    def full_steps(self, steps: int) -> list[int]:
        """The steps that run all levels.

        Args:
            steps: of the run.

        Raises:
            ValueError: a step is beyond the run's last one.
        """
        if self.steps is not None:
            if self.steps[-1] >= steps:
                raise ValueError(
                    f"feature_cache lists step {self.steps[-1]}, but the last of the run's {steps} steps is "
                    f"{steps - 1}"
                )
            return [int(step) for step in self.steps]
        if self.power == 1:
            return list(range(0, steps, int(self.interval)))
        count = -(-steps // int(self.interval))
        found: list[int] = []
        for k in range(count):
            # No step twice, and room for those that follow.
            earliest = found[-1] + 1 if found else 0
            wanted = round(steps * (k / count) ** float(self.power))
            found.append(min(max(wanted, earliest), steps - count + k))
        return found


def as_feature_caching(value: Any) -> FeatureCaching | None:
    """The argument `feature_cache` of a generation as settings; None if all steps run the whole UNet.

    Raises:
        TypeError: something else.
        ValueError: an interval that is not positive.
    """
    if value is None or value is False:
        return None
    if as_integer(value) is not None:
        check_count("feature_cache", value)
        value = FeatureCaching(int(value))
    if not isinstance(value, FeatureCaching):
        raise TypeError(
            "feature_cache must be an interval such as 3, a FeatureCaching, or False; got " + quoted(value)
        )
    return None if value.interval == 1 and value.steps is None else value


class FeatureCache:
    """The features of one sampling run.

    Args:
        settings: which steps run the whole UNet.
        steps: the number of the run's evaluations of the UNet.
    """

    def __init__(self, settings: FeatureCaching, steps: int):
        self.level = int(settings.level)
        self._full_steps = {*settings.full_steps(steps)}
        # One for each call of the UNet in a step: there are several if it is called on windows.
        self._features: list[Tensor] = []
        self._is_full = True
        self._call = 0

    def begin_step(self, step: int, rows: int) -> bool:
        """Begin a step.

        Args:
            step: counted from 0.
            rows: of the conditioning; with guidance, the unconditional ones first.

        Returns:
            Whether the whole UNet runs.
        """
        known = bool(self._features) and len(self._features[0]) >= rows
        self._is_full = step in self._full_steps or not known
        self._call = 0
        if self._is_full:
            self._features.clear()
        return self._is_full

    def predict(self, unet: Callable[..., Any], latents: Tensor, t: Tensor, contexts: Any) -> Tensor:
        """Call the UNet, on all levels or with the features of an earlier step.

        Args:
            unet: this package's.
            latents: (B, channels, T/4, F/4).
            t: the timestep.
            contexts: of the conditioning, with B rows, or 2 B with guidance.
        """
        prediction: Tensor
        if self._is_full:
            prediction, features = unet(latents, t, contexts=contexts, level=self.level)
            self._features.append(features)
        else:
            # Without guidance, at a step after one with it, only the second half of the rows is used.
            features = self._features[self._call][-contexts.rows :]
            prediction = unet(latents, t, contexts=contexts, level=self.level, features=features)
        self._call += 1
        return prediction

    def forget(self) -> None:
        """Run the whole UNet at the next step."""
        self._features.clear()


def state_of(unet: nn.Module, conditioning: Conditioning) -> list[tuple[int, int, int]]:
    """What changes when a callback changes weights or the conditioning.

    Like PyTorch's autograd, it does not notice writes to `weight.data` or to memory shared with NumPy, nor
    changes in place of inference tensors. These have an effect on the lower levels at the next step that runs
    them.
    """
    tensors = [*unet.parameters(), *unet.buffers()]
    tensors += [conditioning.t5_states, conditioning.t5_mask, conditioning.gpt2_vectors]
    return [(id(x), 0 if x.is_inference() else x._version, x.data_ptr()) for x in tensors]


class FeatureCacheMethods:
    """The methods of a pipeline that switch feature caching on and off."""

    _feature_caching: FeatureCaching | None = None

    @property
    def feature_caching(self) -> FeatureCaching | None:
        """The settings of `enable_feature_cache`; None if it is off."""
        return self._feature_caching

    def enable_feature_cache(
        self, interval: int = 3, level: int = 0, power: float = 1.0, steps: Sequence[int] | None = None
    ) -> None:
        """Run the whole UNet only at some steps of each generation, and its upper levels at the others.

        In a generation, the argument `feature_cache` takes precedence, and so does a preset (`quality`): the
        named ones turn caching off.

        Args:
            interval: see `FeatureCaching`.
            level: see `FeatureCaching`.
            power: see `FeatureCaching`.
            steps: see `FeatureCaching`.

        Raises:
            TypeError, ValueError: an argument that cannot be used.

        Example:
            >>> pipe.enable_feature_cache(interval=3)
            >>> fast = pipe("A bell over rain", **pipe.recommended)
        """
        self._feature_caching = as_feature_caching(FeatureCaching(interval, level, power, steps))

    def disable_feature_cache(self) -> None:
        """Run the whole UNet at every step again."""
        self._feature_caching = None
