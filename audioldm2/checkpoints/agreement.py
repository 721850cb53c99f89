"""Checking that the parts of a checkpoint work, and work together.

Each part is checked against its own files when it is loaded. What is checked here would otherwise fail in the
first generation, deep inside a stage: widths that differ between parts, token ids without an embedding,
settings of a scheduler that give no numbers. Each error names the file.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from audioldm2.arguments import MAX_LENGTH_IN_S
from audioldm2.audio.clap_features import ClapFeatureExtractor
from audioldm2.checkpoints.errors import CheckpointError
from audioldm2.models.clap import ClapModel, max_text_tokens
from audioldm2.models.gpt2 import GPT2
from audioldm2.models.hifigan import HifiGan
from audioldm2.models.projection import NUM_ADDED_VECTORS, ProjectionModel
from audioldm2.models.t5 import T5Encoder
from audioldm2.models.unet import UNet
from audioldm2.models.vae import VAE
from audioldm2.models.vits import VitsTextEncoder
from audioldm2.quoting import one_line

PROBE_STEPS = 8  # of the sampling run that a scheduler is tried with
PROBE_TEXTS = ("", "Rain falls, and a bell rings: é ☃")
# The embeddings that the speech checkpoints' text encoder has at least: one of them is the end token, 182.
MIN_VITS_VOCABULARY = 183


def check_parts(folder: Path, parts: Mapping[str, Any]) -> None:
    """Check that the parts of a pipeline fit together. Parts of other packages are not checked.

    Args:
        folder: the checkpoint's, for the error message.
        parts: by their names in model_index.json.

    Raises:
        CheckpointError: a part does not fit. The message names its file and key, and those that it has to
            fit.
    """
    _Agreement(folder, parts).check()


class _Agreement:
    """The checks of `check_parts`. A part is None here if it is missing or of another package's class."""

    def __init__(self, folder: Path, parts: Mapping[str, Any]):
        def own(name: str, *classes: type) -> Any:
            part = parts.get(name)
            return part if isinstance(part, classes) else None

        self.folder = folder
        self.clap = own("text_encoder", ClapModel)
        self.text_encoder_2 = own("text_encoder_2", T5Encoder, VitsTextEncoder)
        self.projection = own("projection_model", ProjectionModel)
        self.gpt2 = own("language_model", GPT2)
        self.unet = own("unet", UNet)
        self.vae = own("vae", VAE)
        self.vocoder = own("vocoder", HifiGan)
        self.extractor = own("feature_extractor", ClapFeatureExtractor)
        self.tokenizer, self.tokenizer_2 = parts.get("tokenizer"), parts.get("tokenizer_2")

    def check(self) -> None:
        self._check_text_widths()
        self._check_latents()
        self._check_sound()
        self._check_ranking()
        self._check_tokens()

    def _refuse(self, name: str, what: str) -> None:
        raise CheckpointError(f"{self.folder / name / 'config.json'}: {what}")

    def _equal(self, name: str, key: str, value: int, other: str, other_key: str, expected: int) -> None:
        if value != expected:
            fits = f"{self.folder / other / 'config.json'}: {other_key} = {expected}"
            self._refuse(name, f"{key} = {value} does not fit {fits}")

    def _check_text_widths(self) -> None:
        projection, encoder, gpt2 = self.projection, self.text_encoder_2, self.gpt2
        key = "d_model" if isinstance(encoder, T5Encoder) else "hidden_size"
        states = None if encoder is None else (key, getattr(encoder.config, key))
        if projection is not None:
            config, part = projection.config, "projection_model"
            if self.clap is not None:
                width = self.clap.config.projection_dim
                self._equal(
                    part, "text_encoder_dim", config.text_encoder_dim, "text_encoder", "projection_dim", width
                )
            if states is not None:
                width = config.text_encoder_1_dim
                self._equal(part, "text_encoder_1_dim", width, "text_encoder_2", *states)
                learned = config.use_learned_position_embedding is not None
                if learned != isinstance(encoder, VitsTextEncoder):
                    what = "use_learned_position_embedding goes with VITS as text_encoder_2, and only with it"
                    self._refuse(part, what)
            if gpt2 is not None:
                width, n_embd = config.langauge_model_dim, gpt2.config.n_embd
                self._equal(part, "langauge_model_dim", width, "language_model", "n_embd", n_embd)
        for name, width, first in _context_widths(self.unet):
            if first and gpt2 is not None:
                self._equal("unet", name, width, "language_model", "n_embd", gpt2.config.n_embd)
            elif not first and states is not None:
                self._equal("unet", name, width, "text_encoder_2", *states)

    def _check_latents(self) -> None:
        unet, vae, vocoder = self.unet, self.vae, self.vocoder
        if unet is not None:
            channels = unet.config.in_channels
            self._equal("unet", "out_channels", unet.config.out_channels, "unet", "in_channels", channels)
            if vae is not None:
                latents = vae.config.latent_channels
                self._equal("unet", "in_channels", channels, "vae", "latent_channels", latents)
        if vae is not None:
            for key in ("in_channels", "out_channels"):
                if getattr(vae.config, key) != 1:
                    self._refuse("vae", f"{key} = {getattr(vae.config, key)}; a spectrogram has 1 channel")
            if vocoder is not None and vocoder.config.model_in_dim % vae.downsampling:
                self._refuse(
                    "vocoder",
                    f"model_in_dim = {vocoder.config.model_in_dim} must be a multiple of {vae.downsampling}, "
                    f"by which the VAE of {self.folder / 'vae' / 'config.json'} reduces it",
                )

    def _check_sound(self) -> None:
        if self.unet is None or self.vae is None or self.vocoder is None:
            return
        size = self.unet.config.sample_size
        size = size[0] if isinstance(size, tuple) else size
        if size is not None:
            seconds = size * self.vae.downsampling * self.vocoder.hop_length
            seconds /= self.vocoder.config.sampling_rate
            if seconds > MAX_LENGTH_IN_S:
                self._refuse("unet", f"sample_size = {size} stands for a sound of {seconds:.0f} seconds")

    def _check_ranking(self) -> None:
        """A warning only, because everything but the ranking of candidates works."""
        if self.clap is None or self.extractor is None:
            return
        audio, config = self.clap.config.audio_config, self.extractor.config
        frames = config.max_samples // config.hop_length + 1
        misfits = []
        if config.feature_size != audio.num_mel_bins:
            misfits.append(f"feature_size = {config.feature_size}, not num_mel_bins = {audio.num_mel_bins}")
        if frames > self.clap.audio.frames:
            misfits.append(
                f"hop_length = {config.hop_length} for {frames} frames, not {self.clap.audio.frames}"
            )
        if misfits:
            path = self.folder / "feature_extractor" / "preprocessor_config.json"
            warnings.warn(f"CLAP cannot rank sounds: {path} has {'; '.join(misfits)}", stacklevel=5)

    def _check_tokens(self) -> None:
        if self.clap is not None and self.tokenizer is not None:
            config = self.clap.config.text_config
            limit = max_text_tokens(config)
            if limit < 1:
                self._refuse("text_encoder", "max_position_embeddings leaves no position for a token")
            check_tokenizer(self.folder / "tokenizer", self.tokenizer, config.vocab_size, limit)
        encoder, tokenizer = self.text_encoder_2, self.tokenizer_2
        if encoder is None or tokenizer is None or self.gpt2 is None or self.projection is None:
            return
        gpt2 = self.gpt2.config
        limit = gpt2.n_positions - NUM_ADDED_VECTORS - (gpt2.max_new_tokens - 1)
        path = self.folder / "tokenizer_2"
        if isinstance(encoder, T5Encoder):
            if limit < 1:
                self._refuse("language_model", "n_positions leaves no position besides max_new_tokens")
            check_tokenizer(path, tokenizer, encoder.config.vocab_size, limit)
            return
        positions = self.projection.config.max_seq_length
        if positions is not None and not tokenizer.model_max_length == positions <= limit:
            self._refuse(
                "projection_model",
                f"max_seq_length = {positions} must be the model_max_length of {path} and at most {limit}, "
                "which GPT-2's n_positions leave",
            )
        if encoder.config.vocab_size < MIN_VITS_VOCABULARY:
            self._refuse("text_encoder_2", f"vocab_size must be at least {MIN_VITS_VOCABULARY}")
        # VITS's tokenizer has a token for unknown letters, which it leaves out, and which needs no embedding.
        _check_vocabulary(path, tokenizer, encoder.config.vocab_size, unused=tokenizer.unk_token)


def _context_widths(unet: UNet | None) -> Iterator[tuple[str, int, bool]]:
    """What the UNet's transformers attend to: the key, the width, and whether it is GPT-2's vectors."""
    if unet is None:
        return
    config = unet.config
    for level, kinds in enumerate(zip(config.down_block_types, config.up_block_types[::-1], strict=True)):
        # The middle block belongs to the last level, and attends in any case.
        if any("CrossAttn" in kind for kind in kinds) or level == len(config.block_out_channels) - 1:
            for index, width in enumerate(config.attends_to(level) or ()):
                if width is not None:
                    yield f"cross_attention_dim[{level}][{index}]", width, index <= 1


# --- tokenizers


def check_tokenizer(folder: Path, tokenizer: Any, vocab_size: int, limit: int) -> None:
    """Check that a tokenizer works, and that each of its tokens has an embedding.

    Args:
        folder: the tokenizer's, for the error message.
        tokenizer: one of transformers'.
        vocab_size: the number of embeddings.
        limit: the most tokens that its stage takes.

    Raises:
        CheckpointError: a token has no embedding, or the tokenizer does not work. The message names the
            folder.
    """
    _check_vocabulary(folder, tokenizer, vocab_size)
    limit = min(limit, tokenizer.model_max_length)
    with tokenizer_errors(folder):
        # As prompts are tokenized. Special tokens need not be in the vocabulary.
        single = [tokenizer(text).input_ids for text in PROBE_TEXTS]
        tokens = tokenizer(list(PROBE_TEXTS), padding=True, max_length=limit, truncation=True)
        rows = [*single, *tokens.input_ids]
        found = torch.tensor(tokens.input_ids).shape == torch.tensor(tokens.attention_mask).shape
        found = found and all(0 <= token < vocab_size for row in rows for token in row)
    if not found or not all(rows) or len(tokens.input_ids[0]) > limit:
        raise CheckpointError(
            f"{folder}: the tokenizer does not turn texts into 1 to {limit} token ids below {vocab_size}, "
            "the number of embeddings"
        )


def _check_vocabulary(folder: Path, tokenizer: Any, vocab_size: int, unused: str | None = None) -> None:
    with tokenizer_errors(folder):
        # The vocabulary of VITS's tokenizer ends at its size, even if its ids do not.
        vocabulary = {**tokenizer.get_vocab(), **getattr(tokenizer, "encoder", {})}
        ids = (index for token, index in vocabulary.items() if token != unused)
        highest = max(ids, default=0)
    if highest >= vocab_size:
        raise CheckpointError(
            f"{folder}: the tokenizer has token {highest}, but there are embeddings for {vocab_size} only"
        )


@contextmanager
def tokenizer_errors(folder: Path, verb: str = "used") -> Iterator[None]:
    """Turn the errors of a tokenizer, for which transformers documents no classes, into CheckpointErrors."""
    try:
        yield
    except BaseException as error:
        # Panics of the tokenizers library, which is written in Rust, are not subclasses of Exception.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise CheckpointError(f"{folder}: the tokenizer cannot be {verb}: {one_line(error)}") from error


# --- schedulers


def check_scheduler(scheduler: Any) -> None:
    """Try a scheduler in a short sampling run.

    Raises:
        ValueError: the run fails, leaves the training steps, or gives numbers that are not finite.
    """
    total = len(scheduler.betas)
    steps = max(1, min(PROBE_STEPS, total // 2 - 1))
    default = min(getattr(scheduler, "default_num_inference_steps", steps), max(1, total // 2 - 1))
    trial = copy.deepcopy(scheduler)
    sample = torch.linspace(-1, 1, 4, device="cpu", dtype=torch.float32).reshape(1, 1, 2, 2)
    try:
        trial.set_timesteps(default)
        in_training = all(0 <= timestep < total for timestep in trial.timesteps.tolist())
        with torch.random.fork_rng(devices=[]):
            trial.set_timesteps(steps)
            for timestep in trial.timesteps:
                output = 0.5 * trial.scale_model_input(sample, timestep)
                sample = trial.step(output, timestep, sample).prev_sample
    except Exception as error:
        raise ValueError(f"sampling fails with these settings: {one_line(error)}") from error
    if not in_training:
        raise ValueError(f"sampling visits timesteps beyond the {total} of training; look at steps_offset")
    if not sample.isfinite().all():
        raise ValueError(
            "sampling gives no finite numbers with these settings; look at beta_start, beta_end and "
            "num_train_timesteps"
        )
