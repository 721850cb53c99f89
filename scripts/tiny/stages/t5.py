"""Train the T5 encoder in miniature, on text alone, to hold in its states what a caption says.

Two losses. Hidden tokens are guessed from those around them, as in BERT (Devlin et al. 2019, section 3.1; T5
hides spans and leaves the guessing to a decoder, which there is none of here); the embedding reads them out.
And the facts of the scene are read from the mean of the states, by linear maps that are thrown away: the
sounds, their traits and the loudness, which is all the world that this Flan-T5 knows. Scenes and captions are
drawn anew for every batch.

The weights begin as T5's do (Raffel et al. 2020, in Mesh TensorFlow's code): its attention does not divide by
sqrt(d), so the queries' weights begin that much smaller.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from audioldm2.models import T5Encoder
from audioldm2.models.t5 import T5Config
from scripts.tiny.data.captions import caption
from scripts.tiny.data.library import Library
from scripts.tiny.data.sounds import KINDS, Scene, draw_scene
from scripts.tiny.data.tokenizers import read_tokenizers, tokenize, varied
from scripts.tiny.loop import Run, train
from scripts.tiny.sizes import SIZES

STEPS, BATCH, RATE = 1500, 48, 3e-3
HIDDEN = 0.15  # the part of the tokens that are to be guessed
# What a scene may say of the sound in front, the one behind it, and both.
SOUNDS = [(kind, trait) for kind, traits in KINDS.items() for trait in traits or ("",)]
BEHIND = ("", *KINDS)
LOUDNESS = ("", "loud", "soft")


class ReadOuts(nn.Module):
    """Linear maps from a caption's mean state, (B, C), to scores of what is so: three of (B, choices)."""

    def __init__(self, width: int):
        super().__init__()
        self.facts = nn.ModuleList(nn.Linear(width, len(of)) for of in (SOUNDS, BEHIND, LOUDNESS))

    def forward(self, states: Tensor, mask: Tensor) -> list[Tensor]:
        kept = mask[:, :, None].to(states.dtype)
        mean = (states * kept).sum(dim=1) / kept.sum(dim=1)
        return [fact(mean) for fact in self.facts]


def train_t5(library: Library, run: Run) -> None:
    """Train on captions and write `text_encoder_2` into the run's checkpoint."""
    torch.manual_seed(run.seed)
    t5 = T5Encoder(T5Config.from_dict(SIZES["text_encoder_2"]))
    begin_as_t5(t5)
    read_outs = ReadOuts(t5.config.d_model)
    tokenizer = read_tokenizers(run)[1]

    def loss(generator: torch.Generator) -> dict[str, Tensor]:
        rng = np.random.default_rng(int(torch.randint(2**31, (1,), generator=generator)))
        scenes = [draw_scene(rng) for _ in range(run.size(BATCH))]
        texts = [varied(caption(scene, rng), rng) for scene in scenes]
        ids, mask = tokenize(tokenizer, texts, run.device)
        hidden = (torch.rand(ids.shape, generator=generator) < HIDDEN).to(run.device) & mask.bool()
        states = t5(ids.masked_fill(hidden, tokenizer.unk_token_id), mask)
        scores = states[hidden] @ t5.embed.weight.t() / math.sqrt(t5.config.d_model)
        words = F.cross_entropy(scores, ids[hidden])
        answers = facts(scenes).to(run.device)
        guesses = read_outs(states, mask)
        said = torch.stack([F.cross_entropy(g, a) for g, a in zip(guesses, answers, strict=True)]).sum()
        return {"loss": said + 0.5 * words, "facts": said, "words": words}

    train("t5", nn.ModuleList([t5, read_outs]), loss, run, steps=STEPS, rate=RATE, average=0.995)
    t5.save_pretrained(run.checkpoint / "text_encoder_2")
    read = accuracy(t5, read_outs, tokenizer, 1000)
    print(f"t5: {read:.1%} of the facts are read from captions in unseen wordings")


def begin_as_t5(t5: T5Encoder) -> None:
    """Draw the first weights."""
    config = t5.config
    width, inner = config.d_model, config.num_heads * config.d_kv
    scales = {
        "qkv": width**-0.5,
        "out": inner**-0.5,
        "gate": width**-0.5,
        "gated": width**-0.5,
        "up": width**-0.5,
        "down": config.d_ff**-0.5,
        "table": width**-0.5,
        "embed": 1.0,
    }
    for name, module in t5.named_modules():
        scale = scales.get(name.rpartition(".")[2])
        if scale is not None:
            nn.init.normal_(module.weight, std=scale)
    for block in t5.blocks:
        block.attention.qkv.weight.data[:inner] *= config.d_kv**-0.5  # the queries


def facts(scenes: Sequence[Scene]) -> Tensor:
    """What the read-outs should say of scenes: (3, B), places in SOUNDS, BEHIND and LOUDNESS."""
    front = [SOUNDS.index((scene.sounds[0].kind, scene.sounds[0].trait)) for scene in scenes]
    behind = [BEHIND.index(scene.sounds[1].kind if len(scene.sounds) > 1 else "") for scene in scenes]
    return torch.tensor([front, behind, [LOUDNESS.index(scene.loudness) for scene in scenes]])


@torch.no_grad()
def accuracy(t5: T5Encoder, read_outs: ReadOuts, tokenizer: Any, count: int, seed: int = 1) -> float:
    """The part of the facts that is read rightly from captions in a wording that training never used."""
    rng = np.random.default_rng([seed, 2])
    scenes = [draw_scene(rng) for _ in range(count)]
    device = str(t5.embed.weight.device)
    ids, mask = tokenize(tokenizer, [caption(scene, rng, held_out=True) for scene in scenes], device)
    guesses = torch.stack([guess.argmax(dim=1) for guess in read_outs(t5(ids, mask), mask)])
    return float((guesses.cpu() == facts(scenes)).float().mean())
