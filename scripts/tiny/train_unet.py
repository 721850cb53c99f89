"""The UNet: which noise is in latents, given a caption's conditions (Ho et al. 2020, eq. 14).

Latents are the VAE's, scaled to variance 1; conditions are what the pipeline itself makes of the library's
captions, so nothing differs between training and use. In one of ten examples the conditions are those of an
empty prompt, which guidance needs (Ho and Salimans 2022). Examples are weighted by min(SNR, 5) / SNR: what is
easy, little noise, does not crowd out what is hard (Hang et al. 2023, section 3.4).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm

from audioldm2 import AudioLDM2Pipeline, DDIMScheduler, UNet
from audioldm2.models.unet import UNetConfig
from scripts.tiny.assemble import pipeline
from scripts.tiny.data import Library
from scripts.tiny.sizes import SCHEDULER, SIZES
from scripts.tiny.train_vae import library_latents
from scripts.tiny.training import Run, train

STEPS = 4400
BATCH = 16
DROPPED = 0.1  # of the conditions, for guidance
LARGEST_SNR = 5.0


@dataclass(frozen=True)
class Conditions:
    """What is said of texts: T5's states (n, M, 96), their mask (n, M), GPT-2's vectors (n, 8, 128)."""

    states: Tensor
    mask: Tensor
    vectors: Tensor

    def of(self, rows: Tensor, device: str) -> tuple[Tensor, Tensor, Tensor]:
        """Vectors, states and mask of some texts, as the UNet takes them; no longer than the longest."""
        mask = self.mask[rows]
        length = int(mask.sum(1).max())
        states = self.states[rows, :length].float()
        return self.vectors[rows].to(device), states.to(device), mask[:, :length].to(device)


@torch.no_grad()
def encode_texts(pipe: AudioLDM2Pipeline, texts: list[str]) -> Conditions:
    """The conditions of texts, as the pipeline makes them."""
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    width, limit = pipe.text_encoder_2.config.d_model, pipe.tokenizer_2.model_max_length
    states = torch.zeros(len(texts), limit, width, dtype=torch.float16)
    mask = torch.zeros(len(texts), limit, dtype=torch.long)
    vectors = []
    for start in tqdm(range(0, len(texts), 256), desc="Encoding captions", disable=None):
        rows = order[start : start + 256]
        # As negative prompts, which may be empty; they come first. As long as the longest, which is there twice.
        negative = [texts[i] for i in rows]
        prompts = [max(negative, key=lambda text: len(pipe.tokenizer_2(text).input_ids))] * len(rows)
        encoded = pipe.encode_prompt(prompts, pipe.device, 1, True, negative_prompt=negative)
        t5, t5_mask, gpt2 = (side[: len(rows)] for side in encoded)
        states[rows, : t5.shape[1]] = t5.half().cpu()
        mask[rows, : t5.shape[1]] = t5_mask.long().cpu()
        vectors.append(gpt2.cpu())
    return Conditions(states, mask, torch.cat(vectors)[torch.tensor(order).argsort()])


def train_unet(library: Library, run: Run) -> None:
    """Train the UNet and save it as `unet`."""
    pipe = pipeline(run)
    texts = sorted({text for captions in library.captions for text in captions})
    place = {text: i for i, text in enumerate(texts)}
    said = torch.tensor([[place[text] for text in captions] for captions in library.captions])
    conditions = encode_texts(pipe, [*texts, ""])  # the last is what guidance turns away from
    latents = library_latents(library, run) * pipe.vae.config.scaling_factor
    levels = DDIMScheduler(**SCHEDULER).alphas_cumprod.float()  # (1000,)
    snr = levels / (1 - levels)
    weights = snr.clamp(max=LARGEST_SNR) / snr
    torch.manual_seed(run.seed)
    unet = UNet(UNetConfig.from_dict(SIZES["unet"]))
    torch.nn.init.zeros_(unet.conv_out.weight)  # predicts nothing at first (Ho et al. 2020's code)

    def loss(generator: torch.Generator) -> dict[str, Tensor]:
        batch = run.size(BATCH)
        rows = library.draw(batch, generator)
        words = said[rows, torch.randint(said.shape[1], (batch,), generator=generator)]
        words[torch.rand(batch, generator=generator) < DROPPED] = len(texts)
        times = torch.randint(len(levels), (batch,), generator=generator)
        noise = torch.randn(latents[rows].shape, generator=generator)
        level = levels[times].view(-1, 1, 1, 1)
        noisy = level.sqrt() * latents[rows] + (1 - level).sqrt() * noise
        vectors, states, mask = conditions.of(words, run.device)
        predicted = unet(noisy.to(run.device), times.to(run.device), vectors, states, mask)
        errors = F.mse_loss(predicted, noise.to(run.device), reduction="none").mean((1, 2, 3))
        return {"loss": (weights[times].to(run.device) * errors).mean(), "error": errors.mean()}

    train("unet", unet, loss, run, steps=STEPS, rate=2e-3, warmup=200, average=0.998)
    unet.save_pretrained(run.checkpoint / "unet")
