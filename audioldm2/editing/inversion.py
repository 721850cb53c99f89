"""Inversion: from a sound to the sampling run that generates it, so that another prompt edits the sound.

A run goes from x_N (noise) over x_i, at the noise level of timestep t_i, to x_0 (the sound). abar_i is the
schedule's alphas_cumprod at t_i, and mu_i(x) a step of DDIM from x at t_i (schedulers/ddim.py).

    ddpm    x_i = sqrt(abar_i) x_0 + sqrt(1 - abar_i) eps_i,    eps_i ~ N(0, 1), drawn independently
            residual_i = x_{i-1} - mu_i(x_i),                   mu with eta = 1, without its noise

    ddim    x_i solves mu_i(x_i) = x_{i-1},                     mu with eta = 0

"ddpm" is the edit-friendly inversion of Huberman-Spiegelglas et al. (2024, "An Edit Friendly DDPM Noise
Space: Inversion and Manipulations"), which Manor and Michaeli (2024, "Zero-Shot Unsupervised and Text-Based
Audio Editing Using DDPM Inversion") apply to AudioLDM 2. An edit runs x_{i-1} = mu_i(x_i) + residual_i with
another prompt. With the same prompt and guidance it gives back the sound, exactly, in any number of steps.
Difference from the papers: they divide the residual by DDPM's sigma_i; here it is stored as it is, so that
the last step, whose sigma can be 0, is exact, too.

"ddim" (Song et al. 2021, "Denoising diffusion implicit models", section 4.3) is deterministic, and
approximate: mu_i needs the UNet's output for x_i, which is not known yet, and takes that for x_{i-1}. Solving
for x_i once more with the output for the first solution makes the error several times smaller (a fixed-point
iteration, as in Pan et al. 2023, "Effective Real Image Editing with Accelerated Iterative Diffusion
Inversion"): on "tiny", a generated sweep in 20 steps, 0.10 instead of 0.47, and 0.27 in 40 steps without it.
`Inverted.error` is what is left.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from audioldm2.conditioning import Conditioning
from audioldm2.editing.checks import METHODS as METHODS, SKIP, check_skip
from audioldm2.editing.edit import Start
from audioldm2.guidance import guide
from audioldm2.noise import Generators, randn
from audioldm2.quoting import quoted
from audioldm2.runtime.foreign import setting
from audioldm2.sampling import Around, Predict, predictor
from audioldm2.schedulers import as_sampler
from audioldm2.schedulers.ddim import DDIMScheduler

ITERATIONS = 2  # by which a step of DDIM is inverted, each with an evaluation of the UNet
DDIM_EVALUATIONS = ITERATIONS + 1  # for each step of an inversion, one of them to measure the error
# The settings that an edit's sampler must share with that of the inversion.
SCHEDULE = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "set_alpha_to_one",
    "prediction_type",
    "rescale_betas_zero_snr",
)


@dataclass(frozen=True)
class Inverted:
    """Sounds, inverted by `pipe.invert`; `pipe(prompt, inverted=inverted)` edits them.

    It can be pickled, and saved with `torch.save`.

    Attributes:
        latents: the run's latents before each step and after the last, (N + 1, B, channels, T/4, F/4),
            float32, from noise to the sounds.
        residuals: what each step adds to DDPM's mean, (N, B, channels, T/4, F/4); None for "ddim".
        timesteps: the N timesteps, from noise to the sounds.
        settings: of the sampler.
        samples: the length of the sounds at the checkpoint's sampling rate.
        waveforms: how often each sound was inverted, `num_waveforms_per_prompt`; its rows stand together.
        error: for "ddim", root-mean-square error of the latents that the run gives with the same prompt,
            relative to that of the sounds' latents, (B,). None for "ddpm", which is exact.
    """

    latents: Tensor
    residuals: Tensor | None
    timesteps: tuple[int, ...]
    settings: dict[str, Any]
    samples: int
    waveforms: int = 1
    error: Tensor | None = None

    @property
    def method(self) -> str:
        """ "ddpm" or "ddim"."""
        return "ddim" if self.residuals is None else "ddpm"

    def __repr__(self) -> str:
        sounds = "1 sound" if self.sounds == 1 else f"{self.sounds} sounds"
        return f"Inverted({self.method}, {sounds} of {self.samples} samples, {len(self.timesteps)} steps)"

    @property
    def sounds(self) -> int:
        """The number of sounds, each with `waveforms` rows."""
        return self.latents.shape[1] // self.waveforms

    def to(self, device: torch.device | str) -> Inverted:
        """A copy whose tensors are on a device; the pipeline moves what it needs by itself."""
        moved: Any = {
            name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        return dataclasses.replace(self, **moved)

    def check_batch(self, batch: int, unet: Any) -> None:
        """Raise ValueError unless there is a prompt for each sound, and the UNet takes the latents."""
        if batch != self.latents.shape[1]:
            raise ValueError(
                f"inverted has {self.sounds} sounds for {batch // self.waveforms} prompts; pass one prompt, "
                "or one per sound"
            )
        channels = setting(unet, "in_channels")
        if channels not in (None, self.latents.shape[2]):
            raise ValueError(
                f"inverted has latents of {self.latents.shape[2]} channels, and this checkpoint {channels}; "
                "use the pipeline that made it"
            )

    def run(self, scheduler: Any, skip: float, device: torch.device) -> tuple[Replay, Start]:
        """The sampler of an edit, and how its run begins.

        Args:
            scheduler: the pipeline's.
            skip: the share of the steps that is left out, from 0 to 1.
            device: where the edit runs.

        Raises:
            ValueError: the scheduler has another noise schedule or prediction type.
        """
        sampler = inversion_sampler(scheduler, list(self.timesteps), device)
        for name in SCHEDULE:
            if sampler.config[name] != self.settings[name]:
                raise ValueError(
                    f"inverted was made with {name} = {quoted(self.settings[name])}, but pipe.scheduler has "
                    f"{quoted(sampler.config[name])}; use the pipeline that made it"
                )
        begin = round(skip * len(self.timesteps))
        residuals = None if self.residuals is None else self.residuals[begin:].to(device)
        return Replay(sampler, residuals), Start(self.latents[begin].to(device), begin)


class Replay:
    """A sampler for `denoise` that repeats an inverted run from one of its steps on.

    It is used for one run.

    Args:
        sampler: DDIM, after `set_timesteps`.
        residuals: of the remaining steps, (N - begin, B, ...); None to run DDIM.
    """

    order = 1
    init_noise_sigma = 1.0

    def __init__(self, sampler: DDIMScheduler, residuals: Tensor | None):
        self.timesteps = sampler.timesteps
        self._sampler = sampler
        self._residuals: Iterator[Tensor] | None = None if residuals is None else iter(residuals)

    def scale_model_input(self, sample: Tensor, timestep: Tensor) -> Tensor:
        """The UNet's input: the sample itself."""
        return sample

    def step(self, model_output: Tensor, timestep: Tensor, sample: Tensor) -> Any:
        """One step: mean and residual, (B, channels, T/4, F/4) each."""
        if self._residuals is None:
            return self._sampler.step(model_output, timestep, sample)
        mean = ddpm_mean(self._sampler, model_output, timestep, sample)
        return SimpleNamespace(prev_sample=mean + next(self._residuals))


def check_inverted(inverted: Any, skip: Any, waveforms: int, others: Mapping[str, Any]) -> float | None:
    """Check what a caller passes to edit inverted sounds.

    Args:
        inverted: `Inverted` or None.
        skip: see `Inverted.run`; that of SKIP if None.
        waveforms: candidates per prompt.
        others: the arguments, by name, that the inversion settles; they must be None.

    Returns:
        `skip`; None without `inverted`.

    Raises:
        TypeError, ValueError: an argument that cannot be used; the message names it.
    """
    if inverted is None:
        if skip is not None:
            raise ValueError("skip goes with inverted, what pipe.invert returns, which is missing")
        return None
    if not isinstance(inverted, Inverted):
        raise TypeError(f"inverted must be what pipe.invert returns, got {quoted(inverted)}")
    for name, value in others.items():
        if value is not None:
            raise ValueError(f"{name} does not go with inverted, which settles it; leave it out")
    if waveforms != inverted.waveforms:
        raise ValueError(
            f"num_waveforms_per_prompt is {waveforms}, but inverted has {inverted.waveforms} for each sound; "
            "pass the same number to pipe.invert"
        )
    skip = SKIP[inverted.method] if skip is None else skip
    check_skip(skip)
    return float(skip)


def inversion_sampler(scheduler: Any, steps: int | list[int] | None, device: torch.device) -> DDIMScheduler:
    """The DDIM sampler of an inversion, with the noise schedule of a pipeline's sampler.

    Args:
        scheduler: the pipeline's.
        steps: their number, or the timesteps; DDIM's default number, 200, if None.
        device: of its timesteps.

    Raises:
        ValueError: the scheduler has no config.
    """
    # Clipping the estimate of the sound is meant for pixels, and cannot be inverted.
    sampler = DDIMScheduler.from_config(
        as_sampler("ddim", scheduler).config, clip_sample=False, thresholding=False
    )
    if not isinstance(steps, list):
        sampler.set_timesteps(sampler.default_num_inference_steps if steps is None else steps)
        steps = sampler.timesteps.tolist()
    # Given timesteps: each step then ends at the next one, also if their number does not divide T.
    sampler.set_timesteps(timesteps=steps, device=device)
    return sampler


def guided_predictor(
    unet: nn.Module,
    conditioning: Conditioning,
    guidance_scale: float,
    around: Around | None = None,
) -> Predict:
    """The UNet's output with guidance, as a function of latents and timestep; both are (B, ...).

    Args:
        unet: this package's, or any module that is called like diffusers'.
        conditioning: what the UNet attends to; with guidance, 2 B rows.
        guidance_scale: the weight w of guidance.
        around: see `denoise`.
    """
    predict = predictor(unet, conditioning)
    predict = predict if around is None else around(predict)
    if not conditioning.guided:
        return predict
    return lambda latents, t: guide(predict(latents, t), guidance_scale)


def ddpm_mean(sampler: DDIMScheduler, output: Tensor, t: Tensor, sample: Tensor) -> Tensor:
    """The mean of a DDPM step, (B, channels, T/4, F/4): DDIM with eta = 1, without noise."""
    return sampler.step(output, t, sample, eta=1.0, variance_noise=torch.zeros_like(sample)).prev_sample


def invert_ddpm(
    predict: Predict,
    sampler: DDIMScheduler,
    clean: Tensor,
    generator: Generators = None,
    progress: Callable[[], object] = lambda: None,
) -> tuple[Tensor, Tensor]:
    """Edit-friendly DDPM inversion.

    Args:
        predict: the UNet's output, with guidance if there is any.
        sampler: see `inversion_sampler`.
        clean: the sounds' latents, (B, channels, T/4, F/4), float32.
        generator: draws the noise; a list has one for each of the B sounds.
        progress: called after each step.

    Returns:
        `latents` and `residuals` as in `Inverted`.
    """
    drawn = [
        sampler.add_noise(clean, randn(clean.shape, generator, clean.device, clean.dtype), t)
        for t in sampler.timesteps
    ]
    latents, residuals = [drawn[0]], []
    for t, target in zip(sampler.timesteps, [*drawn[1:], clean], strict=True):
        mean = ddpm_mean(sampler, predict(latents[-1], t), t, latents[-1])
        residuals.append(target - mean)
        # Not the target itself, but what a run computes: rounding then does not add up over its steps.
        latents.append(mean + residuals[-1])
        progress()
    return torch.stack([*latents[:-1], clean]), torch.stack(residuals)


def invert_ddim(
    predict: Predict,
    sampler: DDIMScheduler,
    clean: Tensor,
    progress: Callable[[], object] = lambda: None,
) -> tuple[Tensor, Tensor]:
    """DDIM inversion, and a run from its noise to measure the error.

    Args:
        predict: the UNet's output, with guidance if there is any.
        sampler: see `inversion_sampler`.
        clean: the sounds' latents, (B, channels, T/4, F/4), float32.
        progress: called after each evaluation of the UNet.

    Returns:
        `latents` and `error` as in `Inverted`.

    Raises:
        ValueError: a step that cannot be inverted.
    """
    latents = [clean]
    zero, one = torch.zeros_like(clean), torch.ones_like(clean)
    for t in sampler.timesteps.flip(0):
        x = latents[-1]
        # For a given output, a step is factor * x + offset.
        factor = sampler.step(zero, t, one).prev_sample
        if not bool((factor != 0).all()):
            raise ValueError(
                "method 'ddim' cannot invert this scheduler's last step, which does not depend on its input "
                "(prediction_type 'sample', set_alpha_to_one); use method='ddpm'"
            )
        noisier = x
        for _ in range(ITERATIONS):
            offset = sampler.step(predict(noisier, t), t, zero).prev_sample
            noisier = (x - offset) / factor
            progress()
        latents.append(noisier)
    latents.reverse()
    again = latents[0]
    for t in sampler.timesteps:
        again = sampler.step(predict(again, t), t, again).prev_sample
        progress()
    error = (again - clean).flatten(1).norm(dim=1) / clean.flatten(1).norm(dim=1)
    return torch.stack(latents), error


def invert(
    predict: Predict,
    sampler: DDIMScheduler,
    clean: Tensor,
    method: str,
    generator: Generators = None,
    progress: Callable[[], object] = lambda: None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Invert sounds.

    Args:
        predict: see `guided_predictor`.
        sampler: see `inversion_sampler`.
        clean: the sounds' latents, (B, channels, T/4, F/4), float32.
        method: one of METHODS.
        generator: for "ddpm"; see `invert_ddpm`.
        progress: called after each evaluation of the UNet.

    Returns:
        `latents`, `residuals` and `error` as in `Inverted`.

    Raises:
        ValueError: a step that cannot be inverted.
    """
    if method == "ddim":
        latents, error = invert_ddim(predict, sampler, clean, progress)
        return latents, None, error
    return *invert_ddpm(predict, sampler, clean, generator, progress), None
