"""The stages of training, one module each. `STAGES` lists them in the order in which they run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from audioldm2.checkpoints.formats import TOKENIZERS
from scripts.tiny.data.library import Library
from scripts.tiny.data.tokenizers import write_tokenizers
from scripts.tiny.run import Run
from scripts.tiny.stages import clap, decoder, language, ranking, t5, unet, vae, vocoder


@dataclass(frozen=True)
class TrainingStage:
    """A stage of training.

    Attributes:
        name: what --stages calls it.
        train: trains on a library and writes the trained parts into the run's checkpoint.
        needs: the parts of the checkpoint that it reads.
        writes: the parts that it trains.
        steps: number of training steps.
        help: what it learns, in one line.
    """

    name: str
    train: Callable[[Library, Run], None]
    needs: frozenset[str]
    writes: frozenset[str]
    steps: int
    help: str


_TOKENIZERS = frozenset(TOKENIZERS)
_ENCODERS = _TOKENIZERS | {"vae", "text_encoder", "text_encoder_2"}
_CONDITIONS = _ENCODERS | {"projection_model", "language_model"}

STAGES = (
    TrainingStage(
        "tokenizers",
        write_tokenizers,
        needs=frozenset(),
        writes=_TOKENIZERS,
        steps=0,
        help="both vocabularies, from the captions",
    ),
    TrainingStage(
        "vae",
        vae.train_vae,
        needs=frozenset(),
        writes=frozenset({"vae"}),
        steps=vae.TRAINING_STEPS,
        help="log-mel spectrograms to latents and back",
    ),
    TrainingStage(
        "decoder",
        decoder.train_decoder,
        needs=frozenset({"vae"}),
        writes=frozenset({"vae"}),
        steps=decoder.TRAINING_STEPS,
        help="the VAE's decoder alone, on noisy latents",
    ),
    TrainingStage(
        "clap",
        clap.train_clap,
        needs=frozenset({"tokenizer"}),
        writes=frozenset({"text_encoder"}),
        steps=clap.TRAINING_STEPS,
        help="which captions and sounds belong together",
    ),
    TrainingStage(
        "t5",
        t5.train_t5,
        needs=frozenset({"tokenizer_2"}),
        writes=frozenset({"text_encoder_2"}),
        steps=t5.TRAINING_STEPS,
        help="what a caption says, from text alone",
    ),
    TrainingStage(
        "language",
        language.train_language,
        needs=_ENCODERS,
        writes=frozenset({"projection_model", "language_model"}),
        steps=language.TRAINING_STEPS,
        help="projection and GPT-2: captions to the language of audio",
    ),
    TrainingStage(
        "vocoder",
        vocoder.train_vocoder,
        needs=frozenset({"vae"}),
        writes=frozenset({"vocoder"}),
        steps=vocoder.TRAINING_STEPS,
        help="log-mel spectrograms to waveforms",
    ),
    TrainingStage(
        "unet",
        unet.train_unet,
        needs=_CONDITIONS,
        writes=frozenset({"unet"}),
        steps=unet.TRAINING_STEPS,
        help="noisy latents to latents; about three of the five hours",
    ),
    TrainingStage(
        "ranking",
        ranking.train_ranking,
        needs=_CONDITIONS | {"vocoder", "unet"},
        writes=frozenset({"text_encoder"}),
        steps=ranking.TRAINING_STEPS,
        help="CLAP's audio tower alone, to rank generated sounds",
    ),
)
