"""The trained VAE's latents of the library, which GPT-2 and the UNet learn, and their channels' weights."""

from __future__ import annotations

import torch
from torch import Tensor
from tqdm.auto import tqdm

from audioldm2 import VAE
from audioldm2.training.cache import cached
from scripts.tiny.data.library import Library
from scripts.tiny.run import Run

PREDICTION_VARIANCE = 0.05  # rough variance of the error of a predicted latent


@torch.no_grad()
def encode_modes(vae: VAE, library: Library, count: int, run: Run) -> Tensor:
    """The modes of the first `count` sounds' latents, unscaled: (count, 8, 40, 16) float32 on the CPU."""
    batches = tqdm(torch.arange(count).split(8), desc="Encoding sounds", disable=None)
    return torch.cat([vae.encode(library.mels(rows).to(run.device)).mode().cpu() for rows in batches])


@torch.no_grad()
def library_latents(library: Library, run: Run) -> Tensor:
    """The modes of all sounds' latents by the trained VAE, unscaled: (n, 8, 40, 16) float32 on the CPU.

    They are cached in the run's folder until the VAE or the library changes.
    """
    folder = run.checkpoint / "vae"

    def encode() -> dict[str, Tensor]:
        vae = VAE.from_pretrained(folder, device=run.device)
        return {"latents": encode_modes(vae, library, len(library), run)}

    files = [path.read_bytes() for path in sorted(folder.iterdir())]
    mels = library.mels(torch.arange(len(library))).numpy()
    return cached(run.folder / "latents.safetensors", [*files, mels.tobytes()], encode)["latents"]


@torch.no_grad()
def channel_weights(vae: VAE, library: Library, run: Run) -> Tensor:
    """How much a squared error in each channel of the scaled latents should count, (C, 1, 1), with mean 1.

    That is the reciprocal of the variance of the VAE's posterior in the channel plus the variance of a
    prediction. A few channels carry the sound, with a posterior as narrow as 0.05 of their spread; most say
    nothing, and an error there is no more audible than the VAE's own noise (posterior collapse: Lucas et al.
    2019, arXiv 1911.02469). The squared change of the decoded spectrogram follows that reciprocal from
    channel to channel.
    """
    batches = torch.arange(min(64, len(library))).split(8)
    variances = [vae.encode(library.mels(rows).to(run.device)).log_variance.exp() for rows in batches]
    posterior = torch.cat(variances).mean((0, 2, 3)) * vae.config.scaling_factor**2
    weights = 1 / (posterior + PREDICTION_VARIANCE)
    return (weights / weights.mean()).view(-1, 1, 1)
