"""From noise to latents: the initial noise, classifier-free guidance, and the loop over the sampler's steps.

At each step the UNet predicts the noise in the latents twice: with the prompt (cond) and with an empty or
negative prompt (uncond). Guidance extrapolates from uncond past cond (Ho and Salimans 2021, eq. 6, whose
1 + w is the w here):

    noise = uncond + w (cond - uncond),     w = guidance_scale
"""

from __future__ import annotations

import copy
import inspect
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from audioldm2.conditioning import Conditioning
from audioldm2.noise import Generators, randn
from audioldm2.runtime.precision import stage_dtype

Callback = Callable[[int, Tensor, Tensor], None]


def initial_latents(
    shape: tuple[int, int, int, int],
    scheduler: Any,
    generator: Generators,
    device: torch.device,
    dtype: torch.dtype,
    latents: Tensor | None = None,
) -> Tensor:
    """The noise that denoising starts from, at the sampler's first noise level.

    Args:
        shape: (B, channels, T/4, F/4).
        scheduler: the sampler, after `set_timesteps`.
        generator: draws the noise; a list has one for each of the B sounds.
        device: where the latents go.
        dtype: their dtype.
        latents: noise to use instead, of any length in time.

    Raises:
        ValueError: a list of generators or latents of another shape.
    """
    batch, channels, _, bands = shape
    if isinstance(generator, Sequence) and len(generator) != batch:
        raise ValueError(f"{len(generator)} generators for {batch} waveforms; give one, or one per waveform")
    if latents is None:
        latents = randn(shape, generator, device, dtype)
    elif latents.dim() != 4 or (*latents.shape[:2], latents.shape[3]) != (batch, channels, bands):
        raise ValueError(
            f"latents have shape {tuple(latents.shape)}; they should be ({batch}, {channels}, any, {bands})"
        )
    scaled: Tensor = latents.to(device, dtype) * scheduler.init_noise_sigma
    return scaled


def denoise(
    unet: nn.Module,
    scheduler: Any,
    latents: Tensor,
    conditioning: Conditioning,
    guidance_scale: float,
    generator: Generators = None,
    eta: float = 0.0,
    callback: Callback | None = None,
    callback_steps: int = 1,
    progress: Callable[[], object] = lambda: None,
) -> Tensor:
    """Run the sampler from noise to latents.

    Args:
        unet: predicts the noise: this package's, or any module that is called like diffusers'.
        scheduler: any sampler with diffusers' interface, after `set_timesteps`.
        latents: noise, (B, channels, T/4, F/4).
        conditioning: what the UNet attends to; with guidance, 2 B rows.
        guidance_scale: the weight w of guidance.
        generator: draws the noise that some samplers add.
        eta: how much of it DDIM adds (Song et al. 2021, eq. 16); other samplers ignore it.
        callback: called as callback(step, timestep, latents) after steps 0, `callback_steps`,
            2 `callback_steps` and so on.
        callback_steps: see `callback`.
        progress: called after each step.

    Returns:
        (B, channels, T/4, F/4).
    """
    accepted = inspect.signature(scheduler.step).parameters
    options = {name: v for name, v in {"eta": eta, "generator": generator}.items() if name in accepted}
    predict = _predictor(unet, conditioning)
    for step, t in enumerate(scheduler.timesteps):
        noise = predict(scheduler.scale_model_input(latents, t), t)
        if conditioning.guided:
            uncond, cond = noise.chunk(2)
            noise = uncond + guidance_scale * (cond - uncond)
        latents = scheduler.step(noise, t, latents, **options).prev_sample
        if callback is not None and step % callback_steps == 0:
            callback(step, t, latents)
            predict = _predictor(unet, conditioning)  # the callback may have changed weights
        progress()
    return latents


def _predictor(unet: nn.Module, conditioning: Conditioning) -> Callable[[Tensor, Tensor], Tensor]:
    """The UNet as a function of latents (B, ...) and timestep alone; the result has the conditioning's rows.

    Our UNet computes the keys and values of the conditions once, here, and takes the latents once for both
    uncond and cond. Any other module is called as diffusers calls its UNet.
    """
    dtype = stage_dtype(unet)
    states, vectors = conditioning.t5_states.to(dtype), conditioning.gpt2_vectors.to(dtype)
    mask = conditioning.t5_mask
    if _takes_contexts(unet):
        contexts = unet.contexts(vectors, states, mask)  # type: ignore[operator]
        return lambda latents, t: unet(latents.to(dtype), t, contexts=contexts)

    copies = 2 if conditioning.guided else 1

    def predict(latents: Tensor, t: Tensor) -> Tensor:
        output = unet(
            torch.cat([latents.to(dtype)] * copies),
            t,
            encoder_hidden_states=vectors,
            encoder_hidden_states_1=states,
            encoder_attention_mask_1=mask,
        )
        prediction: Tensor = output if isinstance(output, Tensor) else output[0]
        return prediction

    return predict


def _takes_contexts(unet: nn.Module) -> bool:
    """Whether a UNet, or a wrapper of one, has the method `contexts` and takes what it returns."""
    if not callable(getattr(unet, "contexts", None)):
        return False
    parameters = inspect.signature(unet.forward).parameters.values()
    return any(p.name == "contexts" or p.kind is p.VAR_KEYWORD for p in parameters)


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
