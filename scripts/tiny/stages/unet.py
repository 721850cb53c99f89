"""The UNet: from noisy latents back to latents, given a caption's conditions (Ho et al. 2020, algorithm 1).

It predicts v = sqrt(abar) eps - sqrt(1 - abar) x_0 (Salimans and Ho 2022, section 4 and appendix D), where
AudioLDM 2 predicts the noise eps. At t = 900 the noise is 99 % of what comes in, and a UNet that is to return
it spends all its precision on a copy: after 2000 steps its squared error of 0.003 there still meant one of
0.2 in x_0, and the caption made no difference to it. Of v, x_0 is nearly all there. Every sampler knows both.

Latents are the VAE's, standardised; conditions are what the pipeline itself makes of the library's captions,
so nothing differs between training and use. In one of ten examples the conditions are those of an empty
prompt, which guidance needs (Ho and Salimans 2022).

Sampling begins at noise alone, where x_0 can only be the mean of all sounds that the caption can mean. One
example in eight is there, and has that mean for its x_0: single sounds would teach the same on average, but
slowly, for what they have of their own is noise to the gradient. Captions are learnt to be read from these.

The library has as many low, middle and high tones together as it has bells. Here each is drawn as often as
bells are: a rising sweep is not learnt from looking at falling ones. What comes out worst is drawn more
often.

Half of what is left has little noise. What is steady, a pitch or a level, is settled there and nowhere else:
an error that is heard (0.05 of the latents' spread) is a small one beside more noise. With timesteps drawn
evenly engines swelled and glides went in steps.

An error in a channel of the latents counts as much as it is heard (train_vae.importance).
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm

from audioldm2 import AudioLDM2Pipeline, DDIMScheduler, UNet
from audioldm2.models.unet import UNetConfig
from scripts.tiny.assemble import pipeline
from scripts.tiny.data.library import Library
from scripts.tiny.loop import Run, train
from scripts.tiny.sizes import SCHEDULER, SIZES
from scripts.tiny.stages.vae import importance, library_latents

STEPS, BATCH, RATE = 30000, 32, 2e-3
GOING_ON = 1.5e-3  # the rate where it begins with trained weights
DROPPED = 0.1  # of the conditions, for guidance
BLIND = 8  # one example in so many is noise alone
PAIRS = 0.3  # the part of the examples in which two sounds are heard
HARD = {"engine": 3, "struck": 3}  # kinds that come out worst, and how many times as often each is drawn
CLEAR = 250  # timesteps; half of the others lie below


@dataclass(frozen=True)
class Conditions:
    """What the encoders say of texts: T5's states (n, M, 96), their mask (n, M), GPT-2's vectors (n, 8, 128).

    `silence` (n,) is the row, further below, of the empty prompt beside each text: padded to its length.
    """

    states: Tensor
    mask: Tensor
    vectors: Tensor
    silence: Tensor

    def of(self, rows: Tensor, device: str) -> tuple[Tensor, Tensor, Tensor]:
        """Vectors, states and mask of some rows, as the UNet takes them.

        As long as the longest text of all, not of these rows: one shape, for which a UNet is compiled once.
        """
        return self.vectors[rows].to(device), self.states[rows].float().to(device), self.mask[rows].to(device)


@torch.no_grad()
def encode_texts(pipe: AudioLDM2Pipeline, texts: list[str]) -> Conditions:
    """The conditions of texts and of the empty prompt, as the pipeline makes them for guidance.

    Only texts of one length are encoded together: beside longer ones they would be padded, which moves the
    places of the vectors that GPT-2 generates.
    """
    lengths = [len(ids) for ids in pipe.tokenizer_2(texts, truncation=True).input_ids]
    pipe.set_progress_bar_config(disable=True)
    width, limit = pipe.text_encoder_2.config.d_model, max(lengths)
    empty = sorted(set(lengths))
    count = len(texts) + len(empty)
    states = torch.zeros(count, limit, width, dtype=torch.float16)
    mask = torch.zeros(count, limit, dtype=torch.long)
    gpt2 = pipe.language_model.config
    vectors = torch.zeros(count, gpt2.max_new_tokens, gpt2.n_embd)
    silence = torch.tensor([len(texts) + empty.index(length) for length in lengths])
    with tqdm(total=len(texts), desc="Encoding captions", disable=None) as bar:
        for length in empty:
            for rows in torch.tensor([i for i, n in enumerate(lengths) if n == length]).split(256):
                batch = [texts[i] for i in rows]
                encoded = pipe.encode_prompt(batch, pipe.device, 1, True, negative_prompt="")
                places = torch.cat([silence[rows], rows])  # the negative side comes first
                for kept, sides in zip((states, mask, vectors), encoded, strict=True):
                    kept[:, : sides.shape[1]][places] = sides.to("cpu", kept.dtype)
                bar.update(len(rows))
    return Conditions(states, mask, vectors, silence)


def scene_means(library: Library, latents: Tensor) -> tuple[Tensor, Tensor]:
    """Mean latents of all sounds, then of each scene: (1 + scenes, C, T, F); and each sound's row, (n,)."""
    place = {scene: i for i, scene in enumerate(dict.fromkeys(library.scenes), 1)}
    rows = torch.tensor([place[scene] for scene in library.scenes])
    means = [latents[rows == i].mean(0) for i in place.values()]
    return torch.stack([latents.mean(0), *means]), rows


def shares(library: Library) -> Tensor:
    """How often to draw each sound, (n,): the single ones so that every kind and trait comes equally often.

    All but those of HARD kinds. Pairs of sounds, of which there are more than single ones, are drawn equally
    often, too: they are PAIRS of what is drawn.
    """
    contents = Counter(scene.sounds for scene in library.scenes)
    often = torch.tensor([1 / contents[scene.sounds] for scene in library.scenes], dtype=torch.float64)
    pair = torch.tensor([len(scene.sounds) > 1 for scene in library.scenes])
    often *= torch.tensor([HARD.get(scene.sounds[0].kind, 1) for scene in library.scenes]).where(~pair, 1)
    for part, here in ((1 - PAIRS, ~pair), (PAIRS, pair)):
        often[here] *= part / often[here].sum()
    return often.float()


def multiscale(predicted: Tensor, wanted: Tensor, weights: Tensor) -> dict[str, Tensor]:
    """The mean squared error, and with it that of means over 2 x 2, 4 x 4 and 8 x 8 cells, as "loss".

    Squares are weighted with `weights` (C, 1, 1).

    A level that is 2 dB off, or swells, is next to nothing in the error of single cells, nearly all of which
    is what no caption says. In means over many cells that cancels out. The best prediction stays the same:
    the mean of what is wanted (Hoogeboom et al. 2023, arXiv 2301.11093, on multiscale losses).
    """
    predicted, wanted = predicted * weights.sqrt(), wanted * weights.sqrt()
    mse = loss = F.mse_loss(predicted, wanted)
    for cells in (2, 4, 8):
        loss = loss + cells**2 / 4 * F.mse_loss(F.avg_pool2d(predicted, cells), F.avg_pool2d(wanted, cells))
    return {"loss": loss, "mse": mse}


def train_unet(library: Library, run: Run) -> None:
    """Train the UNet and save it as `unet`."""
    pipe = pipeline(run)
    texts = sorted({text for captions in library.captions for text in captions})
    place = {text: i for i, text in enumerate(texts)}
    said = torch.tensor([[place[text] for text in captions] for captions in library.captions])
    conditions = encode_texts(pipe, texts)
    latents = library_latents(library, run) * pipe.vae.config.scaling_factor
    means, scenes = scene_means(library, latents)
    often = shares(library)
    weights = importance(pipe.vae, library, run)
    levels = DDIMScheduler(**SCHEDULER).alphas_cumprod.float()  # (1000,), the last is 0: noise alone
    torch.manual_seed(run.seed)
    if run.begin:
        unet = UNet.from_pretrained(run.begin / "unet", torch_dtype=torch.float32)
    else:
        unet = UNet(UNetConfig.from_dict(SIZES["unet"]))
        torch.nn.init.zeros_(unet.conv_out.weight)  # predicts nothing at first (Ho et al. 2020's code)
    predict = torch.compile(unet, dynamic=False) if run.compile else unet

    def loss(generator: torch.Generator) -> dict[str, Tensor]:
        batch = run.size(BATCH)
        rows = torch.multinomial(often, batch, replacement=True, generator=generator)
        words = said[rows, torch.randint(said.shape[1], (batch,), generator=generator)]
        dropped = torch.rand(batch, generator=generator) < DROPPED
        words = torch.where(dropped, conditions.silence[words], words)
        # Spread evenly, so that every step has all levels of noise (Kingma et al. 2021, appendix I.1).
        sighted = batch - batch // BLIND
        spread = 2 * (torch.arange(batch) + torch.rand(1, generator=generator)) / sighted
        times = torch.where(spread < 1, CLEAR * spread, len(levels) * (spread - 1))
        times = times.long().clamp(max=len(levels) - 1)
        clean = latents[rows]  # (B, C, T, F), x_0
        clean[sighted:] = means[torch.where(dropped, 0, scenes[rows])[sighted:]]
        level = levels[times].view(-1, 1, 1, 1)
        signal, spoilt = level.sqrt(), (1 - level).sqrt()
        noise = torch.randn(clean.shape, generator=generator)
        noisy = signal * clean + spoilt * noise
        vectors, states, mask = conditions.of(words, run.device)
        predicted = predict(noisy.to(run.device), times.to(run.device), vectors, states, mask)
        wanted = signal * noise - spoilt * clean
        return multiscale(predicted, wanted.to(run.device), weights)

    rate = GOING_ON if run.begin else RATE
    train("unet", unet, loss, run, steps=STEPS, rate=rate, warmup=200, average=0.999)
    unet.save_pretrained(run.checkpoint / "unet")
