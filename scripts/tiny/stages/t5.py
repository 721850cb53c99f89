"""Train a miniature T5 encoder on text alone, so that its states hold what a caption says.

There are two losses. Hidden tokens are predicted from the tokens around them, as in BERT (Devlin et al.
2019, section 3.1; T5 hides spans and predicts them with a decoder, which this checkpoint lacks); the
embedding serves as the output layer. And the facts of the scene are read from the mean of the states by
linear maps that are discarded afterwards: the sounds, their traits and the loudness, which is all this T5
needs to know. Scenes and captions are drawn anew for every batch.

Weights are initialized as T5's (Raffel et al. 2020, in Mesh TensorFlow's code): its attention does not
divide by sqrt(d), so the queries' initial weights are smaller by that factor.
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
from audioldm2.training.loop import train
from scripts.tiny.data.captions import caption
from scripts.tiny.data.library import Library
from scripts.tiny.data.sounds import ALL_SOUNDS, KINDS, Scene, draw_scene
from scripts.tiny.data.tokenizers import read_tokenizers, tokenize, vary_caption
from scripts.tiny.run import Run
from scripts.tiny.sizes import TINY

TRAINING_STEPS, BATCH_SIZE, LEARNING_RATE = 1500, 48, 3e-3
MASK_PROBABILITY = 0.15  # of each token
# The possible facts about a scene: its first sound (of ALL_SOUNDS), its background, its loudness.
BACKGROUND_FACTS = ("", *KINDS)
LOUDNESS_FACTS = ("", "loud", "soft")


class ReadOuts(nn.Module):
    """Linear maps from the mean of a caption's states to the scores of each fact.

    Takes states (B, N, C) and their mask (B, N); returns three tensors (B, choices), one per fact.
    """

    def __init__(self, width: int):
        super().__init__()
        choices = (ALL_SOUNDS, BACKGROUND_FACTS, LOUDNESS_FACTS)
        self.facts = nn.ModuleList(nn.Linear(width, len(options)) for options in choices)

    def forward(self, states: Tensor, mask: Tensor) -> list[Tensor]:
        weights = mask[:, :, None].to(states.dtype)
        mean = (states * weights).sum(dim=1) / weights.sum(dim=1)
        return [fact(mean) for fact in self.facts]


def train_t5(library: Library, run: Run) -> None:
    """Train T5 on captions and write `text_encoder_2`. The library is not used."""
    torch.manual_seed(run.seed)
    t5 = T5Encoder(T5Config.from_dict(TINY["text_encoder_2"]))
    draw_t5_weights(t5)
    read_outs = ReadOuts(t5.config.d_model)
    tokenizer = read_tokenizers(run)[1]

    def loss(generator: torch.Generator) -> dict[str, Tensor]:
        rng = np.random.default_rng(int(torch.randint(2**31, (1,), generator=generator)))
        scenes = [draw_scene(rng) for _ in range(run.batch_or(BATCH_SIZE))]
        texts = [vary_caption(caption(scene, rng), rng) for scene in scenes]
        ids, mask = tokenize(tokenizer, texts, run.device)
        masked = (torch.rand(ids.shape, generator=generator) < MASK_PROBABILITY).to(run.device) & mask.bool()
        states = t5(ids.masked_fill(masked, tokenizer.unk_token_id), mask)
        token_scores = states[masked] @ t5.embed.weight.t() / math.sqrt(t5.config.d_model)
        token_loss = F.cross_entropy(token_scores, ids[masked])
        answers = scene_facts(scenes).to(run.device)
        fact_scores = read_outs(states, mask)
        fact_loss = torch.stack(
            [F.cross_entropy(scores, answer) for scores, answer in zip(fact_scores, answers, strict=True)]
        ).sum()
        return {"loss": fact_loss + 0.5 * token_loss, "facts": fact_loss, "tokens": token_loss}

    stages = nn.ModuleList([t5, read_outs])
    train("t5", stages, loss, run, steps=TRAINING_STEPS, rate=LEARNING_RATE, average=0.995)
    t5.save_pretrained(run.checkpoint / "text_encoder_2")
    accuracy = fact_accuracy(t5, read_outs, tokenizer, 1000)
    print(f"t5: {accuracy:.1%} of the facts are read correctly from held-out captions")


def draw_t5_weights(t5: T5Encoder) -> None:
    """Draw the initial weights, in place."""
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
        kind = name.rpartition(".")[2]
        if kind in scales:
            weight = module.get_parameter("weight")
            nn.init.normal_(weight, std=scales[kind])
            if kind == "qkv":
                weight.data[:inner] *= config.d_kv**-0.5  # the queries


def scene_facts(scenes: Sequence[Scene]) -> Tensor:
    """The facts of B scenes, (3, B): indices into ALL_SOUNDS, BACKGROUND_FACTS and LOUDNESS_FACTS."""
    first = [ALL_SOUNDS.index(scene.sounds[0]) for scene in scenes]
    backgrounds = [scene.sounds[1].kind if len(scene.sounds) > 1 else "" for scene in scenes]
    background = [BACKGROUND_FACTS.index(kind) for kind in backgrounds]
    return torch.tensor([first, background, [LOUDNESS_FACTS.index(scene.loudness) for scene in scenes]])


@torch.no_grad()
def fact_accuracy(t5: T5Encoder, read_outs: ReadOuts, tokenizer: Any, count: int, seed: int = 1) -> float:
    """The share of facts that are read correctly from `count` held-out captions."""
    rng = np.random.default_rng([seed, 2])
    scenes = [draw_scene(rng) for _ in range(count)]
    device = str(t5.embed.weight.device)
    ids, mask = tokenize(tokenizer, [caption(scene, rng, held_out=True) for scene in scenes], device)
    predictions = torch.stack([scores.argmax(dim=1) for scores in read_outs(t5(ids, mask), mask)])
    return float((predictions.cpu() == scene_facts(scenes)).float().mean())
