"""text_encoder: CLAP, which maps texts and sounds into a shared space, where matching ones are close.

    text:   input_ids (B, N), attention_mask (B, N)   ->  text_features (B, P), unit length
    sound:  log-mel spectrogram (B, 1, frames, mels)  ->  audio_features (B, P), unit length

CLAP (Wu et al. 2023, "Large-scale Contrastive Language-Audio Pretraining with Feature Fusion and
Keyword-to-Caption Augmentation", section 3) has two towers. AudioLDM 2 encodes the prompt with the text
tower, as an input of GPT-2, and ranks finished sounds by the cosine similarity of the two towers' features.

* The text tower is RoBERTa (Liu et al. 2019): BERT's encoder, normalized after each sublayer. Positions count
  the tokens that are not padding, from pad_token_id + 1 on.
* The audio tower is HTS-AT, in `models/htsat.py`.

Only the variant without feature fusion is supported (one spectrogram per clip). Dropout, which acts in
training only, is left out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from audioldm2.models.config import check_sizes, known_fields, refuse_unsupported
from audioldm2.models.htsat import HTSAT, HTSATConfig
from audioldm2.models.layers import ACTIVATIONS, activation, attention, mask_bias
from audioldm2.models.stage import Stage

# Keys of the text tower that would change the result, and the values that are supported.
SUPPORTED = {"position_embedding_type": ("absolute",), "hidden_act": tuple(ACTIVATIONS)}


@dataclass(frozen=True)
class ClapTextConfig:
    """Sizes of RoBERTa: the keys of "text_config" in CLAP's config.json, with transformers' defaults."""

    vocab_size: int = 50265
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    max_position_embeddings: int = 514
    type_vocab_size: int = 1
    layer_norm_eps: float = 1e-12
    pad_token_id: int = 1

    def __post_init__(self) -> None:
        check_sizes(self, layers=("num_hidden_layers",), zero=("pad_token_id",), positive=("layer_norm_eps",))
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"num_attention_heads = {self.num_attention_heads} must divide {self.hidden_size}"
            )
        if not isinstance(self.pad_token_id, int) or self.pad_token_id >= self.vocab_size:
            raise ValueError(f"pad_token_id = {self.pad_token_id!r} must be a token id")
        if max_text_tokens(self) < 1:
            raise ValueError(
                f"max_position_embeddings = {self.max_position_embeddings} leaves no position for a token"
            )

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> ClapTextConfig:
        """The config from "text_config"; keys that do not change the result are ignored.

        Raises:
            ValueError: a value that is not supported; the message names the key.
        """
        refuse_unsupported(content, SUPPORTED)
        return cls(**known_fields(cls, content))


@dataclass(frozen=True)
class ClapConfig:
    """Sizes of both towers and of the projections: the keys of CLAP's config.json."""

    text_config: ClapTextConfig = field(default_factory=ClapTextConfig)
    audio_config: HTSATConfig = field(default_factory=HTSATConfig)
    projection_dim: int = 512
    projection_hidden_act: str = "relu"
    logit_scale_init_value: float = 1 / 0.07

    def __post_init__(self) -> None:
        check_sizes(self, positive=("logit_scale_init_value",))

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> ClapConfig:
        """The config from a config.json.

        Args:
            content: the JSON object. Keys of generation and training are ignored, and so are the copies of
                the projection's keys in the towers' configs.

        Raises:
            ValueError: a value that is not supported, such as enable_fusion; the message names the key.
        """
        refuse_unsupported(content, {"projection_hidden_act": tuple(ACTIVATIONS)})
        text = ClapTextConfig.from_dict(content.get("text_config") or {})
        audio = HTSATConfig.from_dict(content.get("audio_config") or {})
        return cls(**{**known_fields(cls, content), "text_config": text, "audio_config": audio})


def max_text_tokens(config: Any) -> int:
    """The most tokens that a text may have: positions are counted from pad_token_id + 1.

    Args:
        config: a `ClapTextConfig`, or transformers' class of that name.
    """
    limit: int = config.max_position_embeddings - config.pad_token_id - 1
    return limit


class Projection(nn.Module):
    """A tower's pooled state (B, C) -> features of unit length (B, P): two linear layers, then x / |x|."""

    def __init__(self, width: int, config: ClapConfig):
        super().__init__()
        self.activation = activation(config.projection_hidden_act)
        self.inner = nn.Linear(width, config.projection_dim)
        self.outer = nn.Linear(config.projection_dim, config.projection_dim)

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(self.outer(self.activation(self.inner(x))), dim=-1)


class TextBlock(nn.Module):
    """Self-attention and feed-forward, each with a residual connection and then a norm (post-norm).

    (B, N, C) -> (B, N, C), with an attention bias broadcast to (B, heads, N, N).
    """

    def __init__(self, config: ClapTextConfig):
        super().__init__()
        width = config.hidden_size
        self.heads = config.num_attention_heads
        self.activation = activation(config.hidden_act)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.attention_norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.up = nn.Linear(width, config.intermediate_size)
        self.down = nn.Linear(config.intermediate_size, width)
        self.feed_forward_norm = nn.LayerNorm(width, eps=config.layer_norm_eps)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        x = self.attention_norm(x + self.out(attention(q, k, v, self.heads, bias=bias)))
        out: Tensor = self.feed_forward_norm(x + self.down(self.activation(self.up(x))))
        return out


class ClapTextTower(nn.Module):
    """RoBERTa, its pooler and the projection: token ids and mask (B, N) -> features (B, P).

    The pooler is a layer on the state of the first token.
    """

    def __init__(self, config: ClapConfig):
        super().__init__()
        text = config.text_config
        width = text.hidden_size
        self.pad_token_id = text.pad_token_id
        self.max_tokens = max_text_tokens(text)
        self.words = nn.Embedding(text.vocab_size, width, padding_idx=text.pad_token_id)
        self.positions = nn.Embedding(text.max_position_embeddings, width, padding_idx=text.pad_token_id)
        self.token_types = nn.Embedding(text.type_vocab_size, width)
        self.embedding_norm = nn.LayerNorm(width, eps=text.layer_norm_eps)
        self.blocks = nn.ModuleList(TextBlock(text) for _ in range(text.num_hidden_layers))
        self.pooler = nn.Linear(width, width)
        self.projection = Projection(width, config)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """See `ClapModel.text_features`."""
        if input_ids.dim() != 2 or input_ids.shape != attention_mask.shape:
            raise ValueError(
                f"input_ids and attention_mask must both be (batch, tokens); their shapes are "
                f"{tuple(input_ids.shape)} and {tuple(attention_mask.shape)}"
            )
        if input_ids.shape[1] > self.max_tokens:
            raise ValueError(
                f"{input_ids.shape[1]} tokens are too many for CLAP; the limit is {self.max_tokens}"
            )
        is_token = (input_ids != self.pad_token_id).long()
        positions = is_token.cumsum(dim=1) * is_token + self.pad_token_id
        x = self.words(input_ids) + self.token_types.weight[0] + self.positions(positions)  # (B, N, C)
        x = self.embedding_norm(x)
        bias = mask_bias(attention_mask, x.dtype, torch.finfo(x.dtype).min)
        for block in self.blocks:
            x = block(x, bias)
        features: Tensor = self.projection(torch.tanh(self.pooler(x[:, 0])))
        return features


class ClapAudioTower(HTSAT):
    """HTS-AT and the projection: log-mel spectrograms (B, 1, frames, mels) -> features (B, P)."""

    def __init__(self, config: ClapConfig):
        super().__init__(config.audio_config)
        self.projection = Projection(config.audio_config.hidden_size, config)

    def forward(self, input_features: Tensor) -> Tensor:
        """See `ClapModel.audio_features`."""
        features: Tensor = self.projection(super().forward(input_features))
        return features


class ClapModel(Stage[ClapConfig]):
    """CLAP: features of texts and of sounds in a shared space, and their similarity.

    The features have unit length: the dot product of a text's and a sound's is their cosine similarity.

    Args:
        config: sizes, kept as `clap.config`. `ClapConfig()` has transformers' defaults, smaller than
            AudioLDM 2's.

    Attributes:
        text: the text tower.
        audio: the audio tower.
        logit_scale_t: logarithm of the learned scale (inverse temperature) of the contrastive loss over
            texts.
        logit_scale_a: the same for the loss over sounds.

    Example:
        >>> clap = ClapModel.from_pretrained("tiny", subfolder="text_encoder")  # or "cvssp/audioldm2"
        >>> input_ids = torch.tensor([[0, 57, 31, 2], [0, 44, 2, 1]])  # from RoBERTa's tokenizer
        >>> text = clap.text_features(input_ids, attention_mask=input_ids != 1)
        >>> spectrograms = torch.randn(3, 1, 200, 64)  # from a ClapFeatureExtractor
        >>> sound = clap.audio_features(spectrograms)
        >>> text.shape, sound.shape
        (torch.Size([2, 64]), torch.Size([3, 64]))
        >>> similarity = text @ sound.T  # 2 texts, 3 sounds; from -1 to 1
    """

    def __init__(self, config: ClapConfig):
        super().__init__()
        self.config = config
        self.text = ClapTextTower(config)
        self.audio = ClapAudioTower(config)
        self.logit_scale_a = nn.Parameter(torch.tensor(math.log(config.logit_scale_init_value)))
        self.logit_scale_t = nn.Parameter(torch.tensor(math.log(config.logit_scale_init_value)))

    def text_features(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Encode texts.

        Args:
            input_ids: token ids of RoBERTa's tokenizer, (B, N) with N at most `clap.text.max_tokens`.
            attention_mask: (B, N), 1 or True for tokens and 0 for padding.

        Returns:
            (B, projection_dim), each of unit length.

        Raises:
            ValueError: the shapes differ or are not (B, N), or there are too many tokens.
        """
        features: Tensor = self.text(input_ids, attention_mask)
        return features

    def audio_features(self, input_features: Tensor) -> Tensor:
        """Encode sounds.

        Args:
            input_features: log-mel spectrograms as `ClapFeatureExtractor` makes them, (B, 1, frames, mels);
                fewer than spec_size² / mels frames are stretched to that many.

        Returns:
            (B, projection_dim), each of unit length.

        Raises:
            ValueError: another shape, or too many frames.
        """
        features: Tensor = self.audio(input_features)
        return features

    def logits(self, text_features: Tensor, audio_features: Tensor) -> tuple[Tensor, Tensor]:
        """The scaled cosine similarities that the contrastive loss is computed from.

        Args:
            text_features: (T, P), from `text_features`.
            audio_features: (A, P), from `audio_features`.

        Returns:
            (T, A), each text's logits over the sounds, and (A, T), each sound's logits over the texts.
        """
        cosine = text_features @ audio_features.t()
        return cosine * self.logit_scale_t.exp(), cosine.t() * self.logit_scale_a.exp()

    def forward(self, input_ids: Tensor, attention_mask: Tensor, input_features: Tensor) -> Tensor:
        """How well each of T texts matches each of A sounds: scaled cosine similarities, (T, A).

        Args:
            input_ids: (T, N), see `text_features`.
            attention_mask: (T, N).
            input_features: (A, 1, frames, mels), see `audio_features`.

        Raises:
            ValueError: a shape that does not fit.
        """
        text, audio = self.text_features(input_ids, attention_mask), self.audio_features(input_features)
        return self.logits(text, audio)[0]
