"""Prompts to what the UNet attends to (Liu et al. 2023, "AudioLDM 2", figure 1, the left half).

    text --CLAP--> one vector (B, 512) ----+
         --Flan-T5--> states (B, M, 1024) -+--projection--> (B, M + 5, 768) --GPT-2--> vectors (B, 8, 768)

The UNet attends to GPT-2's vectors and to T5's states; CLAP's vector also ranks the finished sounds.

Prompts and negative prompts go through the encoders as one batch. For T5 they are padded to the length M of
the longest prompt, and negative prompts are cut to it (as in diffusers). M matters: padding takes positions
in GPT-2, so the same prompt gives slightly different vectors next to a longer one.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from einops import repeat
from torch import Tensor

from audioldm2.arguments import as_negatives, as_texts
from audioldm2.guidance import UNCONDITIONAL, check_unconditional
from audioldm2.models.clap import max_text_tokens
from audioldm2.models.projection import NUM_ADDED_VECTORS
from audioldm2.runtime.foreign import setting
from audioldm2.runtime.precision import stage_dtype
from audioldm2.tensors import check_finite, check_tensor
from audioldm2.words import WordWeights, token_weights, word_weights_of

Text = str | Sequence[str]

# VITS's tokenizer adds no end-of-sequence token; the speech checkpoints were trained with this one.
VITS_END_TOKEN = 182


class Encoders(Protocol):
    """What `condition` needs from a pipeline: its tokenizers, and its stages ready to run."""

    tokenizer: Any
    tokenizer_2: Any
    text_encoder: Any
    text_encoder_2: Any
    projection_model: Any
    language_model: Any

    @property
    def device(self) -> torch.device: ...

    def running(self, name: str) -> AbstractContextManager[Any]: ...

    def progress(self, description: str, total: int) -> Any: ...


class Encoded(NamedTuple):
    """The outputs of the encoders for B texts."""

    states: Tensor  # T5's, (B, M, 1024)
    mask: Tensor  # (B, M), 1 for tokens and 0 for padding
    vectors: Tensor  # GPT-2's, (B, 8, 768)


@dataclass(frozen=True)
class Conditioning:
    """What denoising and ranking need from the encoded prompts.

    With guidance, the first half of the rows is unconditional (from the negative prompts).

    Attributes:
        t5_states: (rows, M, 1024).
        t5_mask: (rows, M), 1 for tokens and 0 for padding.
        gpt2_vectors: (rows, 8, 768).
        guided: whether the first half of the rows is unconditional.
        clap: CLAP's embeddings of the prompts, (prompts, 512); None if embeddings replaced the prompts and
            this was not one of them.
    """

    t5_states: Tensor
    t5_mask: Tensor
    gpt2_vectors: Tensor
    guided: bool
    clap: Tensor | None

    @property
    def batch(self) -> int:
        """The number of sounds to generate."""
        return len(self.t5_states) // (2 if self.guided else 1)

    def without_guidance(self) -> Conditioning:
        """The conditional half of the rows."""
        half = -self.batch
        return Conditioning(
            self.t5_states[half:], self.t5_mask[half:], self.gpt2_vectors[half:], False, self.clap
        )


@dataclass(frozen=True)
class PromptInputs:
    """Prompts or negative prompts as a caller passes them: texts, or the embeddings that replace them.

    Attributes:
        name: "prompt" or "negative_prompt", for error messages.
        text: one or several; None if embeddings are given.
        states: the second encoder's, (B, M, width), instead of a text.
        vectors: GPT-2's, (B, 8, width), instead of a text.
        mask: of the states, (B, M); all ones by default.
        clap: CLAP's, (B, 512), of unit length, to rank the candidates of given embeddings; None does not.
        word_weights: see `audioldm2.words`.
    """

    name: str
    text: Text | None
    states: Tensor | None = None
    vectors: Tensor | None = None
    mask: Tensor | None = None
    clap: Tensor | None = None
    word_weights: WordWeights | None = None

    def embeddings(self) -> Encoded | None:
        """The embeddings, checked; None if there are none.

        Raises:
            TypeError: one that is not a tensor.
            ValueError: embeddings together with a text, one of two missing, numbers that cannot be used, or
                shapes that do not fit together.
        """
        prefix = self.name.removesuffix("prompt")
        names = [f"{prefix}prompt_embeds", f"{prefix}generated_prompt_embeds", f"{prefix}attention_mask"]
        states, vectors, mask = self.states, self.vectors, self.mask
        if states is None and vectors is None and mask is None:
            if self.clap is not None:
                raise ValueError("clap_embeds goes with prompt_embeds; CLAP encodes the prompt itself")
            return None
        if self.text is not None:
            raise ValueError(f"pass {self.name} or its embeddings ({', '.join(names)}), not both")
        if states is None or vectors is None:
            raise ValueError(f"{names[0]} and {names[1]} go together; one is missing")
        check_tensor(names[0], states, "(B, N, width)")
        check_tensor(names[1], vectors, "(B, 8, width)")
        if mask is None:
            mask = torch.ones(states.shape[:2], dtype=torch.long, device=states.device)
        check_tensor(names[2], mask, "(B, N)", floating=False)
        if len(states) != len(vectors) or mask.shape != states.shape[:2]:
            raise ValueError(
                f"{names[0]} {tuple(states.shape)}, {names[1]} {tuple(vectors.shape)} and {names[2]} "
                f"{tuple(mask.shape)} do not match; they should be (B, N, width), (B, 8, width) and (B, N)"
            )
        if self.word_weights is not None:
            raise ValueError("word_weights goes with prompt; of prompt_embeds, scale the rows of the words")
        if self.clap is not None:
            check_tensor("clap_embeds", self.clap, "(B, width)")
            if len(self.clap) != len(states):
                raise ValueError(f"{len(self.clap)} clap_embeds for {len(states)} prompt_embeds")
        return Encoded(states, mask, vectors)


def _fitting(pipe: Encoders, inputs: PromptInputs) -> Encoded | None:
    """The embeddings that replace a text, of the widths that the pipeline's encoders have."""
    encoded = inputs.embeddings()
    if encoded is None:
        return None
    prefix = inputs.name.removesuffix("prompt")
    widths = [
        (f"{prefix}prompt_embeds", encoded.states, "projection_model", "text_encoder_1_dim"),
        (f"{prefix}generated_prompt_embeds", encoded.vectors, "language_model", "n_embd"),
    ]
    if inputs.clap is not None:
        widths.append(("clap_embeds", inputs.clap, "projection_model", "text_encoder_dim"))
    for name, x, part, key in widths:
        width = setting(getattr(pipe, part), key)
        if width is not None and x.shape[-1] != width:
            raise ValueError(
                f"{name} has shape {tuple(x.shape)}; its width must be this checkpoint's, {width}"
            )
    return encoded


def _check_unused(uncond: PromptInputs) -> None:
    """Check a negative prompt even though guidance is off, and warn if there is one."""
    if uncond.text is not None:
        as_texts(uncond.name, uncond.text, empty=True)
    if uncond.text or uncond.states is not None:
        warnings.warn(
            "negative_prompt has no effect without guidance; pass a guidance_scale greater than 1",
            stacklevel=2,
        )


def condition(
    pipe: Encoders,
    cond: PromptInputs,
    uncond: PromptInputs,
    guided: bool = True,
    transcription: Text | None = None,
    max_new_tokens: int | None = None,
    waveforms: int = 1,
    unconditional: str = UNCONDITIONAL[0],
) -> Conditioning:
    """Encode prompts, and negative prompts for guidance, in one batch.

    Args:
        pipe: the tokenizers and encoders.
        cond: the prompts.
        uncond: the negative prompts.
        guided: whether guidance needs them; without it they are only checked.
        transcription: the words to speak, for the speech checkpoints.
        max_new_tokens: how many vectors GPT-2 generates; its config's number by default.
        waveforms: number of times that each prompt's rows are repeated.
        unconditional: one of UNCONDITIONAL; "zeros" goes without a negative prompt.

    Returns:
        The conditioning of prompts times `waveforms` sounds.

    Raises:
        ValueError, TypeError: texts or embeddings that cannot be used; the message names the argument.
    """
    cond_encoded = _fitting(pipe, cond)
    uncond_encoded = _fitting(pipe, uncond)
    check_unconditional(unconditional, guided, bool(uncond.text or uncond_encoded is not None))
    if not guided:
        _check_unused(uncond)
        uncond_encoded = None
    prompts: list[str] = []
    negatives: list[str] = []
    tokens_2: list[_SecondTokens] = []
    factors: Tensor | None = None
    warned: set[str] = set()  # texts that both tokenizers cut get one warning
    if cond_encoded is None:
        if cond.text is None:
            raise ValueError("pass prompt, or prompt_embeds and generated_prompt_embeds")
        prompts = as_texts(cond.name, cond.text, empty=True)
        tokens_2 = [_tokenize_second(pipe, prompts, transcription, warned)]
        factors = _word_factors(pipe, cond.word_weights, prompts, tokens_2[0].mask)
    elif transcription is not None:
        check_transcription(transcription, speaks(pipe))
        raise ValueError("transcription goes with prompt; prompt_embeds already contain the words")
    else:
        # A negative text is encoded to as many vectors as the given ones.
        given = cond_encoded.vectors.shape[1]
        if max_new_tokens not in (None, given):
            raise ValueError(
                f"max_new_tokens = {max_new_tokens}, but generated_prompt_embeds has {given} vectors"
            )
        max_new_tokens = given
    if guided and uncond_encoded is None:
        rows, length = (tokens_2[0] if cond_encoded is None else cond_encoded).mask.shape
        negatives = as_negatives(uncond.text, rows)
        tokens_2 = [_tokenize_negatives(pipe, negatives, length, warned), *tokens_2]

    clap = None
    if tokens_2:
        encoded, clap = _encode(pipe, negatives + prompts, tokens_2, max_new_tokens, warned)
        if negatives:
            uncond_encoded = Encoded(*(x[: len(negatives)] for x in encoded))
        if prompts:
            cond_encoded = Encoded(*(x[len(negatives) :] for x in encoded))
    if factors is not None and cond_encoded is not None:
        weighted = (cond_encoded.states.float() * factors).to(cond_encoded.states.dtype)
        cond_encoded = cond_encoded._replace(states=weighted)
    assert cond_encoded is not None
    if unconditional == "zeros" and uncond_encoded is not None:
        uncond_encoded = uncond_encoded._replace(vectors=torch.zeros_like(uncond_encoded.vectors))
    both = [cond_encoded] if uncond_encoded is None else _aligned(uncond_encoded, cond_encoded)
    states, mask, vectors = (
        torch.cat([repeat(x.to(pipe.device), "b ... -> (b n) ...", n=waveforms) for x in parts])
        for parts in zip(*both, strict=True)
    )
    given_clap = None if cond.clap is None else F.normalize(cond.clap.to(pipe.device).float(), dim=-1)
    return Conditioning(
        t5_states=states.to(stage_dtype(pipe.text_encoder_2)),
        t5_mask=mask,
        gpt2_vectors=vectors.to(stage_dtype(pipe.language_model)),
        guided=guided,
        clap=clap[len(negatives) :] if clap is not None and prompts else given_clap,
    )


def _encode(
    pipe: Encoders,
    texts: list[str],
    tokens_2: Sequence[_SecondTokens],
    max_new_tokens: int | None,
    warned: set[str],
) -> tuple[Encoded, Tensor]:
    """Both encoders, the projection and GPT-2; also returns CLAP's embeddings, (B, 512)."""
    with pipe.progress("Encoding text", 4) as bar:
        clap = clap_embeddings(pipe, texts, warned)
        bar.update()
        mask_2 = torch.cat([tokens.mask for tokens in tokens_2])
        spoken = [tokens for tokens in tokens_2 if tokens.ids is not None]
        width = setting(pipe.projection_model, "text_encoder_1_dim")
        states = clap.new_zeros(*mask_2.shape, width)  # (B, M, 1024)
        if spoken:
            with pipe.running("text_encoder_2") as text_encoder_2:
                encoded = text_encoder_2(
                    torch.cat([tokens.ids for tokens in spoken if tokens.ids is not None]),
                    torch.cat([tokens.mask for tokens in spoken]),
                )
            check_finite("text_encoder_2", encoded)
            # The rows without words are the unconditional ones, which come first.
            states = torch.cat([states[: len(states) - len(encoded)].to(encoded), encoded])
        bar.update()
        with pipe.running("projection_model") as projection:
            dtype = stage_dtype(projection)
            clap_mask = mask_2.new_ones(len(clap), 1)
            sequence, sequence_mask = projection(clap[:, None].to(dtype), states.to(dtype), clap_mask, mask_2)
        check_finite("projection_model", sequence)
        bar.update()
        with pipe.running("language_model") as gpt2:
            sequence = sequence.to(stage_dtype(gpt2))
            vectors = gpt2.generate(sequence, sequence_mask, max_new_tokens)  # (B, 8, 768)
        check_finite("language_model", vectors)
        bar.update()
    return Encoded(states, mask_2, vectors), clap


def clap_embeddings(pipe: Any, texts: list[str], warned: set[str] | None = None) -> Tensor:
    """CLAP's embeddings of texts.

    Args:
        pipe: CLAP and its tokenizer: a pipeline, or `audioldm2.metrics.ClapScorer`.
        texts: B texts.
        warned: see `tokenize`.

    Returns:
        (B, 512), of unit length.

    Raises:
        NonFiniteError: CLAP returned numbers that are not finite.
    """
    ids, mask = tokenize(pipe, pipe.tokenizer, texts, warned=warned)
    with pipe.running("text_encoder") as text_encoder:
        clap: Tensor = text_encoder.text_features(input_ids=ids, attention_mask=mask)
    check_finite("text_encoder", clap)
    return clap


def _aligned(uncond: Encoded, cond: Encoded) -> list[Encoded]:
    """`uncond` and `cond` with the same number of T5 states, the shorter one padded and masked."""
    if len(uncond.states) != len(cond.states) or uncond.vectors.shape != cond.vectors.shape:
        raise ValueError(
            f"negative embeddings {tuple(uncond.states.shape)} and {tuple(uncond.vectors.shape)} do not go "
            f"with the prompt's, {tuple(cond.states.shape)} and {tuple(cond.vectors.shape)}"
        )
    length = max(uncond.mask.shape[1], cond.mask.shape[1])

    def padded(one: Encoded) -> Encoded:
        missing = length - one.mask.shape[1]
        return Encoded(F.pad(one.states, (0, 0, 0, missing)), F.pad(one.mask, (0, missing)), one.vectors)

    return [padded(uncond), padded(cond)]


# --- tokens


class _SecondTokens(NamedTuple):
    """Texts as the second encoder reads them, (B, M); ids are None for texts without words."""

    ids: Tensor | None
    mask: Tensor


def speaks(pipe: Encoders) -> bool:
    """Whether this is a speech checkpoint: only their projection model has learned positions."""
    return setting(pipe.projection_model, "use_learned_position_embedding") is not None


def check_transcription(transcription: Text | None, is_speech: bool) -> None:
    """Raise ValueError unless there is a transcription for a speech checkpoint, and none for another one."""
    if transcription is not None and not is_speech:
        raise ValueError("transcription is for the speech checkpoints; this one takes only a prompt")
    if transcription is None and is_speech:
        raise ValueError("this checkpoint speaks: pass transcription, the words to say")


def _tokenize_second(
    pipe: Encoders, prompts: list[str], transcription: Text | None, warned: set[str]
) -> _SecondTokens:
    check_transcription(transcription, speaks(pipe))
    if transcription is None:
        return _SecondTokens(*tokenize(pipe, pipe.tokenizer_2, prompts, warned=warned))
    texts = as_texts("transcription", transcription)
    if len(texts) != len(prompts):
        raise ValueError(f"{len(texts)} transcriptions for {len(prompts)} prompts; give one per prompt")
    ids, mask = tokenize(pipe, pipe.tokenizer_2, texts, pad_to_limit=True, warned=warned)
    # VITS's end token takes the place of each row's first padding, which is 0.
    padding = ids == 0
    first = padding & (padding.cumsum(dim=1) == 1)
    return _SecondTokens(ids.masked_fill(first, VITS_END_TOKEN), mask.masked_fill(first, 1))


def _word_factors(
    pipe: Encoders, word_weights: WordWeights | None, prompts: list[str], mask: Tensor
) -> Tensor | None:
    """What T5's states of the prompts are multiplied by, (B, M, 1); None without weights."""
    weights = word_weights_of(word_weights, prompts)
    if weights is None:
        return None
    if speaks(pipe):
        raise ValueError(
            "word_weights is not for speech checkpoints, whose second encoder reads the transcription"
        )
    rows = [
        token_weights(pipe.tokenizer_2, prompt, of_prompt, mask.shape[1])
        for prompt, of_prompt in zip(prompts, weights, strict=True)
    ]
    return torch.tensor(rows, device=mask.device)[..., None]


def _tokenize_negatives(pipe: Encoders, negatives: list[str], length: int, warned: set[str]) -> _SecondTokens:
    if not speaks(pipe):
        return _SecondTokens(*tokenize(pipe, pipe.tokenizer_2, negatives, length, warned=warned))
    shape = (len(negatives), pipe.tokenizer_2.model_max_length)
    return _SecondTokens(None, torch.zeros(shape, dtype=torch.long, device=pipe.device))


def tokenize(
    pipe: Encoders,
    tokenizer: Any,
    texts: list[str],
    length: int | None = None,
    pad_to_limit: bool = False,
    warned: set[str] | None = None,
) -> tuple[Tensor, Tensor]:
    """Tokenize texts, with a warning for each that is cut off.

    Args:
        pipe: the pipeline, for the number of tokens that its encoders take and for its device.
        tokenizer: one of its two.
        texts: B texts.
        length: pad and cut to this number of tokens; by default, pad to the longest text and cut to the
            limit.
        pad_to_limit: pad to the limit instead.
        warned: texts that need no other warning; those that are cut off are added.

    Returns:
        Token ids and mask, both (B, N); the mask is 1 for tokens and 0 for padding.
    """
    limit = length or token_limit(pipe, tokenizer)
    warned = set() if warned is None else warned
    for text in texts:
        ids = tokenizer(text, verbose=False).input_ids
        if len(ids) > limit and text not in warned:
            warned.add(text)
            kept = tokenizer(text, max_length=limit, truncation=True).input_ids
            # The end token, if there is one, is kept, so the removed tokens are before it.
            start = next((i for i, (a, b) in enumerate(zip(ids, kept, strict=False)) if a != b), limit)
            removed = tokenizer.decode(ids[start : len(ids) - (limit - start)])
            most = f"the prompt's {limit} tokens" if length else f"the {limit} tokens that are read"
            warnings.warn(f"{text!r} is longer than {most}; cut off: {removed!r}", stacklevel=2)
    tokens = tokenizer(
        texts,
        padding="max_length" if length or pad_to_limit else True,
        max_length=limit,
        truncation=True,
    )
    # Not return_tensors="pt", which fails where transformers does not support the installed PyTorch.
    ids = torch.tensor(tokens.input_ids, device=pipe.device)
    return ids, torch.tensor(tokens.attention_mask, device=pipe.device)


def token_count(pipe: Encoders, text: str) -> int:
    """The number of tokens that the second encoder reads of a text, at most its limit."""
    limit = token_limit(pipe, pipe.tokenizer_2)
    return min(len(pipe.tokenizer_2(text, verbose=False).input_ids), limit)


def token_limit(pipe: Encoders, tokenizer: Any) -> int:
    """The most tokens a text may have: the tokenizer's limit, or the number of positions if that is less."""
    limit: int = tokenizer.model_max_length
    if tokenizer is pipe.tokenizer:
        tower = setting(pipe.text_encoder, "text_config")
        return limit if tower is None else min(limit, max_text_tokens(tower))
    positions = setting(pipe.language_model, "n_positions")
    if positions is not None and not speaks(pipe):
        # T5 takes any length, but GPT-2 has a fixed number of positions. All generated vectors but the last
        # take one, too.
        new = setting(pipe.language_model, "max_new_tokens", 8)
        limit = min(limit, positions - NUM_ADDED_VECTORS - (new - 1))
    return limit
