"""From noise to latents: the initial noise, and the loop over the sampler's steps.

At each step the UNet predicts the noise in the latents twice: with the prompt (cond) and with an empty or
negative prompt (uncond). Guidance extrapolates from uncond past cond (`audioldm2.guidance`).
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from audioldm2.arguments import check_number
from audioldm2.conditioning import Conditioning
from audioldm2.feature_cache import FeatureCache, FeatureCaching, state_of
from audioldm2.guidance import Guidance, guide
from audioldm2.noise import Generators, check_generators, randn
from audioldm2.quoting import quoted
from audioldm2.runtime.foreign import outputs
from audioldm2.runtime.precision import stage_dtype
from audioldm2.runtime.profiling import recorded
from audioldm2.tensors import check_tensor

Callback = Callable[[int, Tensor, Tensor], None]
StepCallback = Callable[[Any, int, Tensor, dict[str, Tensor]], Mapping[str, Tensor] | None]

# What `callback_on_step_end` may ask for and return besides the latents, and the fields of `Conditioning`.
CONDITIONING_TENSORS = {
    "prompt_embeds": "t5_states",
    "attention_mask": "t5_mask",
    "generated_prompt_embeds": "gpt2_vectors",
}
CALLBACK_TENSORS = ("latents", *CONDITIONING_TENSORS)


class Changes(NamedTuple):
    """What a run goes on with after a callback, and whether it stops."""

    latents: Tensor
    conditioning: Conditioning
    guidance_scale: float
    stop: bool = False


# From latents (B, ...) and timestep to the UNet's output, with the conditioning's rows.
Predict = Callable[[Tensor, Tensor], Tensor]
# Wraps a predictor, to call it on parts of the latents, for example: for one evaluation of the UNet, or for
# those that share features (see `feature_cache`).
Around = Callable[[Predict], Predict]
# From step, timestep, latents, conditioning and guidance scale.
AfterStep = Callable[[int, Tensor, Tensor, Conditioning, float], Changes | None]


def set_timesteps(scheduler: Any, steps: int, timesteps: Sequence[int] | None, device: torch.device) -> None:
    """Begin a sampling run.

    Args:
        scheduler: any sampler with diffusers' interface.
        steps: the number of sampling steps.
        timesteps: chosen by the caller; None for the sampler's own.
        device: of the timesteps.

    Raises:
        ValueError: the sampler cannot take these, or this number of steps.
    """
    if timesteps is None:
        scheduler.set_timesteps(steps, device=device)
    elif "timesteps" in inspect.signature(scheduler.set_timesteps).parameters:
        scheduler.set_timesteps(timesteps=list(timesteps), device=device)
    else:
        raise ValueError(
            f"{type(scheduler).__name__} chooses its timesteps itself; pass num_inference_steps instead"
        )


def initial_noise(
    shape: Sequence[int],
    generator: Generators,
    device: torch.device,
    dtype: torch.dtype,
    latents: Tensor | None = None,
) -> Tensor:
    """The noise of a sampling run, before it is scaled to the sampler's first noise level.

    Args:
        shape: (B, channels, T/4, F/4).
        generator: draws the noise; a list has one for each of the B sounds.
        device: where the noise goes.
        dtype: its dtype.
        latents: noise to use instead, of that shape.

    Raises:
        TypeError: a generator or latents of another type.
        ValueError: a list of generators of another length, or latents that do not have this shape or finite
            numbers.
    """
    check_generators(generator, shape[0])
    if latents is None:
        return randn(shape, generator, device, dtype)
    check_tensor("latents", latents, "(B, channels, T/4, F/4)")
    if latents.shape != tuple(shape):
        raise ValueError(f"latents have shape {tuple(latents.shape)}; here they must have {tuple(shape)}")
    return latents.to(device, dtype)


def denoise(
    unet: nn.Module,
    scheduler: Any,
    latents: Tensor,
    conditioning: Conditioning,
    guidance: Guidance,
    num_inference_steps: int | None = None,
    generator: Generators = None,
    eta: float = 0.0,
    after_step: AfterStep | None = None,
    progress: Callable[[], object] = lambda: None,
    begin: int = 0,
    around: Around | None = None,
    after_update: Callable[[int, Tensor], Tensor] | None = None,
    caching: FeatureCaching | None = None,
) -> Tensor:
    """Run the sampler from noise to latents.

    Args:
        unet: predicts the noise: this package's, or any module that is called like diffusers'.
        scheduler: any sampler with diffusers' interface, after `set_timesteps`.
        latents: noise, or noisy latents at the level of the first step, (B, channels, T/4, F/4).
        conditioning: what the UNet attends to; with guidance, 2 B rows.
        guidance: its weight, and at which steps; without uncond in `conditioning` it has no effect.
        num_inference_steps: what `set_timesteps` was called with, which is less than the number of timesteps
            for samplers that evaluate the UNet several times a step; by default, the number of timesteps.
        generator: draws the noise that some samplers add.
        eta: how much of it DDIM adds (Song et al. 2021, eq. 16); with other samplers it has no effect, and a
            warning says so.
        after_step: called as after_step(step, timestep, latents, conditioning, guidance_scale) after each
            step, counted from `begin`; what it returns, if anything, replaces the last three, and may end the
            run.
        progress: called after each step.
        begin: the step with which the run begins; 0 is pure noise.
        around: wraps the UNet as a function of latents and timestep, to call it on parts of the latents, for
            example.
        after_update: called as after_update(index, latents) after each update of the sampler, with the index
            of the next timestep, or the number of timesteps after the last; what it returns replaces the
            latents.
        caching: which evaluations of the UNet run all of it; without it, all of them do.

    Returns:
        (B, channels, T/4, F/4).

    Raises:
        TypeError: `caching` needs this package's UNet.
        ValueError: `caching` does not fit the UNet or the number of steps.
    """
    accepted = inspect.signature(scheduler.step).parameters
    options = {name: v for name, v in {"eta": eta, "generator": generator}.items() if name in accepted}
    if eta and "eta" not in options:
        warnings.warn(
            f"eta = {eta} has no effect: {type(scheduler).__name__} has no such setting", stacklevel=2
        )
    timesteps = scheduler.timesteps
    order = getattr(scheduler, "order", 1)
    # Evaluations with which a sampler starts and which are not steps of their own, as in diffusers.
    starting = len(timesteps) - (num_inference_steps or len(timesteps)) * order

    first = begin * order
    cache = None if caching is None else FeatureCache(caching, len(timesteps) - first)
    guided = conditioning.guided
    predictors: dict[bool, Predict] = {}

    def predict_now(latents: Tensor, t: Tensor) -> Tensor:
        """The UNet's output, with rows for uncond if this step is guided."""
        if guided not in predictors:
            part = conditioning if guided == conditioning.guided else conditioning.without_guidance()
            predictors[guided] = predictor(unet, part, cache)
        return predictors[guided](latents, t)

    predict: Predict = predict_now
    for i in range(first, len(timesteps)):
        t = timesteps[i]
        guided = conditioning.guided and guidance.has_step(i, len(timesteps))
        rows = conditioning.batch * (2 if guided else 1)
        if (cache is None or cache.begin_step(i - first, rows)) and around is not None:
            predict = around(predict_now)
        noise = predict(scheduler.scale_model_input(latents, t), t)
        if guided:
            noise = guide(noise, guidance.scale, guidance.rescale)
        with recorded("scheduler"):
            latents = scheduler.step(noise, t, latents, **options).prev_sample
        if after_update is not None:
            latents = after_update(i + 1, latents)
        if i + 1 < len(timesteps) and (i < starting or (i + 1) % order):
            continue
        if after_step is not None:
            before = [] if cache is None else state_of(unet, conditioning)
            changed = after_step(i // order - begin, t, latents, conditioning, guidance.scale)
            if changed is not None:
                latents, conditioning, scale, stop = changed
                if stop:
                    return latents
                guidance = dataclasses.replace(guidance, scale=scale)
                predictors.clear()
                if cache is not None and before != state_of(unet, conditioning):
                    cache.forget()
        progress()
    return latents


def check_callbacks(callback: Any, on_step_end: Any, tensor_inputs: Any) -> None:
    """Check a caller's callbacks before the first step.

    Args:
        callback: None, or called as in `callbacks`.
        on_step_end: None, or called as in `callbacks`.
        tensor_inputs: names from `CALLBACK_TENSORS`.

    Raises:
        TypeError: a callback is not callable.
        ValueError: `tensor_inputs` is not a list of these names.
    """
    for name, one in (("callback", callback), ("callback_on_step_end", on_step_end)):
        if one is not None and not callable(one):
            raise TypeError(f"{name} must be a function, got {quoted(one)}")
    is_list = isinstance(tensor_inputs, list | tuple)
    if not is_list or not all(name in CALLBACK_TENSORS for name in tensor_inputs):
        raise ValueError(
            f"callback_on_step_end_tensor_inputs must be a list of names from {', '.join(CALLBACK_TENSORS)}; "
            f"got {quoted(tensor_inputs)}"
        )


def callbacks(
    pipe: Any,
    callback: Callback | None,
    callback_steps: int,
    on_step_end: StepCallback | None,
    tensor_inputs: Sequence[str],
) -> AfterStep | None:
    """A caller's two callbacks as one function for `denoise`.

    Args:
        pipe: the pipeline, which diffusers passes to `on_step_end`.
        callback: called as callback(step, timestep, latents) after steps 0, `callback_steps`,
            2 `callback_steps` and so on.
        callback_steps: see `callback`.
        on_step_end: called as on_step_end(pipe, step, timestep, tensors) after every step; the tensors that
            it returns, by name, replace those of the run. It may also set `pipe._guidance_scale`, or
            `pipe._interrupt` to end the run.
        tensor_inputs: the names of its tensors, from `CALLBACK_TENSORS`.
    """
    if callback is None and on_step_end is None:
        return None

    def after_step(
        step: int, t: Tensor, latents: Tensor, conditioning: Conditioning, guidance_scale: float
    ) -> Changes | None:
        due = callback is not None and step % callback_steps == 0
        if callback is not None and due:
            callback(step, t, latents)
        if on_step_end is None:
            return Changes(latents, conditioning, guidance_scale) if due else None
        values = {name: getattr(conditioning, field) for name, field in CONDITIONING_TENSORS.items()}
        values["latents"] = latents
        returned = on_step_end(pipe, step, t, {name: values[name] for name in tensor_inputs}) or {}
        if not isinstance(returned, Mapping):
            raise TypeError(
                f"callback_on_step_end must return a dict of tensors or None, got {quoted(returned)}"
            )
        guidance_scale = pipe.guidance_scale
        check_number("_guidance_scale", guidance_scale)
        if guidance_scale > 1 and not conditioning.guided:
            raise ValueError(
                "a callback cannot switch guidance on in a run without it; begin with guidance_scale > 1"
            )
        if conditioning.guided and not guidance_scale > 1:
            # As in diffusers, where the callback then returns the second half of the rows.
            conditioning = conditioning.without_guidance()
            values |= {name: getattr(conditioning, field) for name, field in CONDITIONING_TENSORS.items()}
        for name, tensor in returned.items():
            if name not in values:
                raise ValueError(
                    f"callback_on_step_end returned {quoted(name)}; it may return {', '.join(values)}"
                )
            shape = str(tuple(values[name].shape))
            check_tensor(f"{name} of callback_on_step_end", tensor, shape, name != "attention_mask")
            if name != "latents":
                tensor = tensor[-len(values[name]) :]
            if tensor.shape != values[name].shape:
                raise ValueError(
                    f"callback_on_step_end returned {name} of shape {tuple(tensor.shape)}; it must keep the "
                    f"shape {tuple(values[name].shape)}"
                )
            values[name] = tensor.to(values[name])
        latents = values["latents"]
        fields = {field: values[name] for name, field in CONDITIONING_TENSORS.items()}
        conditioning = dataclasses.replace(conditioning, **fields)
        return Changes(latents, conditioning, guidance_scale, pipe._interrupt)

    return after_step


class LatentRecorder:
    """Records the latents after each step, as a callback of the pipeline.

    It is used as `callback`, or its method `on_step_end` as `callback_on_step_end`.

    Attributes:
        steps: the steps that were recorded, from 0.
        timesteps: their timesteps.
        latents: their latents, (B, channels, T/4, F/4) each, copied to the CPU.

    Example:
        >>> recorder = LatentRecorder()
        >>> output = pipe("A bell over rain", callback=recorder, callback_steps=5, num_inference_steps=20)
        >>> recorder.steps
        [0, 5, 10, 15]
    """

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.timesteps: list[float] = []
        self.latents: list[Tensor] = []

    def __call__(self, step: int, timestep: Tensor | float, latents: Tensor) -> None:
        """Record the latents of a step."""
        self.steps.append(step)
        self.timesteps.append(float(timestep))
        self.latents.append(latents.detach().to("cpu", copy=True))

    def on_step_end(
        self, pipe: Any, step: int, timestep: Tensor | float, tensors: Mapping[str, Tensor]
    ) -> None:
        """The same for `callback_on_step_end`; nothing is changed."""
        self(step, timestep, tensors["latents"])


def predictor(unet: nn.Module, conditioning: Conditioning, cache: FeatureCache | None = None) -> Predict:
    """The UNet as a function of latents (B, ...) and timestep alone; the result has the conditioning's rows.

    Our UNet computes the keys and values of the conditions once, here, and takes the latents once for both
    uncond and cond. Any other module is called as diffusers calls its UNet. The latents are converted to the
    UNet's dtype, and the result to that of the latents.

    Args:
        unet: this package's, or any module that is called like diffusers'.
        conditioning: what it attends to, of B sounds, or with guidance of 2 B rows.
        cache: says at which steps only a part of the UNet runs.

    Raises:
        TypeError: `cache` needs this package's UNet.
    """
    dtype = stage_dtype(unet)
    states, vectors = conditioning.t5_states.to(dtype), conditioning.gpt2_vectors.to(dtype)
    mask = conditioning.t5_mask
    if _takes(unet, "contexts"):
        contexts = unet.contexts(vectors, states, mask)  # type: ignore[operator]
        if cache is None:
            return _converting(dtype, lambda latents, t: unet(latents, t, contexts=contexts))
        if _takes(unet, "features"):
            return _converting(dtype, lambda latents, t: cache.predict(unet, latents, t, contexts))
    if cache is not None:
        raise TypeError(
            f"feature_cache needs a UNet that takes level and features, as this package's does; "
            f"{type(unet).__name__} does not"
        )

    copies = 2 if conditioning.guided else 1

    def predict(latents: Tensor, t: Tensor) -> Tensor:
        output = unet(
            torch.cat([latents] * copies),
            t,
            encoder_hidden_states=vectors,
            encoder_hidden_states_1=states,
            encoder_attention_mask_1=mask,
        )
        prediction = outputs("unet", output)[0]
        if prediction.shape[0] != copies * len(latents) or prediction.shape[2:] != latents.shape[2:]:
            raise ValueError(
                f"unet returned {tuple(prediction.shape)} for {copies * len(latents)} latents of shape "
                f"{tuple(latents.shape[1:])}"
            )
        return prediction

    return _converting(dtype, predict)


def _converting(dtype: torch.dtype, predict: Predict) -> Predict:
    """A predictor for latents of any dtype, which it returns, too; `predict` gets those of `dtype`."""
    return lambda latents, t: predict(latents.to(dtype), t).to(latents.dtype)


def _takes(unet: nn.Module, argument: str) -> bool:
    """Whether a UNet, or a wrapper of one, has the method `contexts` and takes an argument of our UNet's."""
    if not callable(getattr(unet, "contexts", None)):
        return False
    parameters = inspect.signature(unet.forward).parameters.values()
    return any(p.name == argument or p.kind is p.VAR_KEYWORD for p in parameters)


# --- schedulers have state

# By id, for the duration of a run: the scheduler, and a copy of it from before the run, None if it cannot be
# copied.
_schedulers_in_use: dict[int, tuple[Any, Any]] = {}
_in_use_lock = threading.Lock()


@contextmanager
def exclusive(scheduler: Any) -> Iterator[Any]:
    """The scheduler for one sampling run: itself, or a copy while another run is using it.

    A sampler keeps its timesteps and the estimates of earlier steps. Two runs with one scheduler, in two
    threads or one in the callback of the other, would mix them.

    Raises:
        ValueError: another run is using it, and it cannot be copied.
    """
    with _in_use_lock:
        in_use = _schedulers_in_use.get(id(scheduler))
        if in_use is None:
            _schedulers_in_use[id(scheduler)] = (scheduler, _copy_of(scheduler))
        elif in_use[1] is None:
            raise ValueError(
                f"another generation is using this {type(scheduler).__name__}, which cannot be copied; "
                "give each pipeline a scheduler of its own"
            )
        else:
            scheduler = copy.deepcopy(in_use[1])
    try:
        yield scheduler
    finally:
        if in_use is None:
            with _in_use_lock:
                del _schedulers_in_use[id(scheduler)]


def _copy_of(scheduler: Any) -> Any:
    """A deep copy; None if there can be none, as of a scheduler that holds a lock or an open file."""
    try:
        # A shallow copy first, so that attributes that are set meanwhile do not disturb deepcopy.
        return copy.deepcopy(copy.copy(scheduler))
    except Exception:  # whatever a scheduler's attributes raise
        return None
