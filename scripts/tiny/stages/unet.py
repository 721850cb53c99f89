"""Train the UNet: from noisy latents back to latents, given a caption (Ho et al. 2020, algorithm 1).

- **Prediction.** The UNet predicts v = sqrt(abar) eps - sqrt(1 - abar) x_0 (Salimans and Ho 2022, section 4
  and appendix D); AudioLDM 2 predicts the noise eps. At t = 900, noise is 99 % of the input, and a UNet that
  has to return it spends its precision on copying: after 2000 steps, its squared error of 0.003 there still
  meant one of 0.2 in x_0, and the caption made no difference. There v is, but for its sign, nearly x_0. Every
  sampler supports both.
- **Conditions.** They are exactly what the pipeline makes of the library's captions. One in ten examples gets
  those of the empty prompt, for guidance (Ho and Salimans 2022).
- **Pure noise.** Sampling starts from pure noise, where the best x_0 is the mean of all sounds that fit the
  caption. One example in eight is pure noise, with that mean as its x_0: single sounds would teach the same
  on average, but slowly, because what is particular to each is noise in the gradient. These examples are
  what teaches the UNet to read captions.
- **Balance.** The library has as many low, middle and high tones together as bells. Here each kind with each
  trait is drawn equally often, except for the kinds that came out worst, which are drawn more often.
- **Little noise.** Half of the other examples have little noise. Steady properties, a pitch or a level, are
  settled there: an audible error (0.05 of the latents' spread) is small compared with more noise. With
  uniformly drawn timesteps, engines swelled and glides moved in steps.
- **Weights.** An error in a channel of the latents counts by how audible it is (`latents.channel_weights`).
"""

from __future__ import annotations

from collections import Counter

import torch
import torch.nn.functional as F
from torch import Tensor

from audioldm2 import DDIMScheduler, UNet
from audioldm2.models.unet import UNetConfig
from audioldm2.schedulers.noise_schedule import mix_noise
from audioldm2.training.conditions import encode_texts
from audioldm2.training.loop import train
from audioldm2.training.losses import diffusion_target, drop_conditions
from scripts.tiny.assemble import pipeline
from scripts.tiny.data.library import Library
from scripts.tiny.run import Run
from scripts.tiny.sizes import SCHEDULER, TINY
from scripts.tiny.stages.latents import channel_weights, library_latents

TRAINING_STEPS, BATCH_SIZE, LEARNING_RATE = 30000, 32, 2e-3
CONTINUED_LEARNING_RATE = 1.5e-3  # for a UNet that is trained already
UNCOND_PROBABILITY = 0.1  # of the empty prompt in place of the caption, for guidance
PURE_NOISE_EVERY = 8  # one example in this many is pure noise
TWO_SOUND_SHARE = 0.3  # of the examples
OVERSAMPLED_KINDS = {"engine": 3, "struck": 3}  # came out worst, and are drawn this many times as often
LOW_NOISE_TIMESTEPS = 250  # half of the examples that are not pure noise are drawn below this timestep


def scene_means(library: Library, latents: Tensor) -> tuple[Tensor, Tensor]:
    """Mean latents of all sounds, then of each scene: (1 + scenes, C, T, F); and each sound's row, (n,)."""
    row_of = {scene: i for i, scene in enumerate(dict.fromkeys(library.scenes), 1)}
    rows = torch.tensor([row_of[scene] for scene in library.scenes])
    means = [latents[rows == i].mean(0) for i in row_of.values()]
    return torch.stack([latents.mean(0), *means]), rows


def sampling_weights(library: Library) -> Tensor:
    """How often to draw each sound, (n,), with sum 1.

    Single sounds are weighted so that every kind with every trait is drawn equally often, except
    `OVERSAMPLED_KINDS`; pairs of sounds so that every pair is, and makes up `TWO_SOUND_SHARE` in all.
    """
    contents = Counter(scene.sounds for scene in library.scenes)
    weights = torch.tensor([1 / contents[scene.sounds] for scene in library.scenes], dtype=torch.float64)
    pair = torch.tensor([len(scene.sounds) > 1 for scene in library.scenes])
    factors = torch.tensor([OVERSAMPLED_KINDS.get(scene.sounds[0].kind, 1) for scene in library.scenes])
    weights *= factors.where(~pair, 1)
    for share, chosen in ((1 - TWO_SOUND_SHARE, ~pair), (TWO_SOUND_SHARE, pair)):
        weights[chosen] *= share / weights[chosen].sum()
    return weights.float()


def multiscale_loss(predicted: Tensor, target: Tensor, weights: Tensor) -> dict[str, Tensor]:
    """The mean squared error of single cells, and of means over 2 x 2, 4 x 4 and 8 x 8 cells.

    A level that is 2 dB off, or swells, hardly shows in the error of single cells, most of which no caption
    can explain; in means over many cells that part cancels out. The best prediction stays the same, the mean
    of the targets (multiscale loss: Hoogeboom et al. 2023, arXiv 2301.11093).

    Args:
        predicted: (B, C, T, F).
        target: the same shape.
        weights: of the squares in each channel, (C, 1, 1).

    Returns:
        "loss", the sum over all scales, and "mse", that of single cells.
    """
    predicted, target = predicted * weights.sqrt(), target * weights.sqrt()
    mse = loss = F.mse_loss(predicted, target)
    for cells in (2, 4, 8):
        loss = loss + cells**2 / 4 * F.mse_loss(F.avg_pool2d(predicted, cells), F.avg_pool2d(target, cells))
    return {"loss": loss, "mse": mse}


def train_unet(library: Library, run: Run) -> None:
    """Train with all other parts but the vocoder and write `unet`."""
    pipe = pipeline(run)
    texts = sorted({text for captions in library.captions for text in captions})
    row_of = {text: i for i, text in enumerate(texts)}
    caption_rows = torch.tensor([[row_of[text] for text in captions] for captions in library.captions])
    conditions = encode_texts(pipe, texts)
    latents = library_latents(library, run) * pipe.vae.config.scaling_factor
    means, mean_rows = scene_means(library, latents)
    sound_weights = sampling_weights(library)
    weights = channel_weights(pipe.vae, library, run)
    abar = DDIMScheduler(**SCHEDULER).alphas_cumprod.float()  # (1000,), the last is 0: pure noise
    torch.manual_seed(run.seed)
    if run.begin:
        unet = UNet.from_pretrained(run.begin / "unet", torch_dtype=torch.float32)
    else:
        unet = UNet(UNetConfig.from_dict(TINY["unet"]))
        torch.nn.init.zeros_(unet.conv_out.weight)  # predicts 0 at first (Ho et al. 2020's code)
    predict = torch.compile(unet, dynamic=False) if run.compile else unet

    def loss(generator: torch.Generator) -> dict[str, Tensor]:
        batch = run.batch_or(BATCH_SIZE)
        rows = torch.multinomial(sound_weights, batch, replacement=True, generator=generator)
        column = torch.randint(caption_rows.shape[1], (batch,), generator=generator)
        captions = caption_rows[rows, column]
        text_rows = drop_conditions(captions, conditions.uncond, UNCOND_PROBABILITY, generator)
        uncond = text_rows != captions
        # Timesteps are spread evenly, so every step has all levels of noise (Kingma et al. 2021,
        # appendix I.1). `spread` runs from 0 to 1 over the low-noise examples and from 1 to 2 over the
        # others; the rest are pure noise.
        noisy_count = batch - batch // PURE_NOISE_EVERY
        spread = 2 * (torch.arange(batch) + torch.rand(1, generator=generator)) / noisy_count
        timesteps = torch.where(spread < 1, LOW_NOISE_TIMESTEPS * spread, len(abar) * (spread - 1))
        timesteps = timesteps.long().clamp(max=len(abar) - 1)
        clean = latents[rows]  # (B, C, T, F), x_0
        clean[noisy_count:] = means[torch.where(uncond, 0, mean_rows[rows])[noisy_count:]]
        noise = torch.randn(clean.shape, generator=generator)
        noisy = mix_noise(clean, noise, abar[timesteps])
        vectors, states, mask = conditions.select(text_rows, run.device)
        predicted = predict(noisy.to(run.device), timesteps.to(run.device), vectors, states, mask)
        target = diffusion_target(SCHEDULER["prediction_type"], clean, noise, abar[timesteps])  # v
        return multiscale_loss(predicted, target.to(run.device), weights)

    rate = CONTINUED_LEARNING_RATE if run.begin else LEARNING_RATE
    train("unet", unet, loss, run, steps=TRAINING_STEPS, rate=rate, warmup=200, average=0.999)
    unet.save_pretrained(run.checkpoint / "unet")
