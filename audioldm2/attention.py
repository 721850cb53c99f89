"""What the UNet attends to while it denoises: the words of the prompt, and GPT-2's vectors.

Every cross-attention computes, for each position of its feature map and each head, weights over the tokens of
its condition (Vaswani et al. 2017, eq. 1),

    weights = softmax(q k^T / sqrt(d) + bias),

which are 0 for padding and sum to 1. `record_attention` computes them again from the queries and keys of each
step, and keeps their mean over the heads and over the frequencies of the feature map: how much each token
matters at each time of the sound.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from torch import Tensor, nn

from audioldm2.arguments import as_texts, check_choice, check_count
from audioldm2.conditioning import tokenize
from audioldm2.models.layers import CrossAttention, Transformer
from audioldm2.models.unet import UNet

CONDITIONS = ("t5", "gpt2")
WORD_START = "▁"  # SentencePiece's mark of a piece that begins a word


class Word(NamedTuple):
    """A word of a prompt, and which of its tokens it is made of."""

    text: str
    tokens: tuple[int, ...]


@dataclass(frozen=True)
class AttentionLayer:
    """One cross-attention of a UNet.

    Attributes:
        name: of the module in the UNet, as `unet.get_submodule(name)` takes it.
        level: the level that it belongs to, such as "down 2", "middle" or "up 0".
        condition: what it attends to, "t5" (the words) or "gpt2" (the vectors).
    """

    name: str
    level: str
    condition: str


class AttentionRecord:
    """The weights that `record_attention` recorded.

    Each call of the UNet adds an entry: with most samplers, one for each step.

    Attributes:
        layers: the UNet's cross-attentions, in the order in which they run.
        timesteps: of each call; that of the first row, if the rows have different ones.
        seconds: duration of the latents, whose last frames may be cut off the sound; 0 if nothing was
            recorded.
    """

    def __init__(self, pipe: Any, layers: Sequence[AttentionLayer]):
        self.layers = tuple(layers)
        self.timesteps: list[float] = []
        self.seconds = 0.0
        self._pipe = pipe
        self._weights: dict[str, list[Tensor]] = {layer.name: [] for layer in layers}
        self._tokens: Tensor | None = None  # (B,), how many of T5's are not padding

    def __len__(self) -> int:
        return len(self.timesteps)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self.layers)} layers, {len(self)} steps, {self.seconds:g} s)"

    def clear(self) -> None:
        """Forget what was recorded, for example between two generations in one `with` block."""
        self.timesteps.clear()
        self.seconds, self._tokens = 0.0, None
        for weights in self._weights.values():
            weights.clear()

    def weights(self, layer: str | AttentionLayer) -> Tensor:
        """The weights of one layer.

        Args:
            layer: an entry of `layers`, or its name.

        Returns:
            (steps, B, time, tokens) for B sounds, float32, on the CPU. They sum to 1 over the tokens. `time`
            is the height of the layer's feature map, which covers the whole sound.

        Raises:
            ValueError: there is no such layer, nothing was recorded, or generations of different sizes.
        """
        name = layer.name if isinstance(layer, AttentionLayer) else layer
        check_choice("layer", name, [known.name for known in self.layers])
        found = self._weights[name]
        if not found:
            raise ValueError("no attention was recorded; run the pipeline in `with record_attention(pipe)`")
        if len({weights.shape for weights in found}) > 1:
            raise ValueError("generations of different sizes were recorded; call clear() between them")
        return torch.stack(found)

    def mean(
        self, condition: str, layers: Sequence[str | AttentionLayer] | None = None, step: int | None = None
    ) -> Tensor:
        """The mean over layers and steps.

        Args:
            condition: "t5" (the words) or "gpt2" (the vectors).
            layers: which of the layers with this condition; all by default.
            step: which step, from 0; negative numbers count from the end. The mean over all by default.

        Returns:
            (B, time, tokens), with the time resolution of the finest of the layers.

        Raises:
            IndexError: there is no such step.
            ValueError: an argument that cannot be used, or as in `weights`.
        """
        check_choice("condition", condition, CONDITIONS)
        known = [layer for layer in self.layers if layer.condition == condition]
        if layers is not None:
            names = [layer.name if isinstance(layer, AttentionLayer) else layer for layer in layers]
            for name in names:
                check_choice(f"layer that attends to {condition}", name, [layer.name for layer in known])
            known = [layer for layer in known if layer.name in names]
        if not known:
            raise ValueError(f"there is no layer that attends to {condition} to average")
        found = [self.weights(layer) for layer in known]
        found = [weights.mean(0) if step is None else weights[step] for weights in found]
        finest = max(weights.shape[1] for weights in found)
        return torch.stack([_with_length(weights, finest) for weights in found]).mean(0)

    def tokens(self, sound: int = 0) -> int:
        """The number of T5's tokens, without padding, that a sound was generated from.

        Args:
            sound: which of the B sounds, from 0.

        Raises:
            ValueError: nothing was recorded, or there is no such sound.
        """
        if self._tokens is None:
            raise ValueError("no attention to words was recorded")
        check_count("sound", sound, lowest=0, highest=len(self._tokens) - 1)
        return int(self._tokens[sound])

    def words(self, prompt: str, sound: int = 0) -> list[Word]:
        """The words of a prompt, and which of T5's tokens each of them is made of.

        Args:
            prompt: what the sound was generated from.
            sound: which of the B sounds, from 0.

        Returns:
            The words in their order; the last is the end token, "</s>". Punctuation belongs to the word
            before it. A word's weight is the sum of its tokens' weights.

        Raises:
            ValueError: nothing was recorded, the sound's prompt has another number of tokens, or the second
                tokenizer does not mark where words begin.
        """
        (text,) = as_texts("prompt", [prompt], empty=True)
        count = self.tokens(sound)
        tokenizer = self._pipe.tokenizer_2
        ids, _ = tokenize(self._pipe, tokenizer, [text])
        pieces: list[str] = tokenizer.convert_ids_to_tokens(ids[0].tolist())
        if len(pieces) != count:
            raise ValueError(
                f"prompt has {len(pieces)} tokens, but sound {sound} was generated from a text of {count}; "
                "pass its own prompt"
            )
        specials = set(tokenizer.all_special_tokens) - {tokenizer.unk_token}
        words: list[tuple[str, list[int]]] = []
        for index, piece in enumerate(pieces):
            begins = piece.startswith(WORD_START) or piece in specials
            if not begins and not words:
                raise ValueError(
                    f"{type(tokenizer).__name__} does not mark where words begin, as T5's tokenizer does"
                )
            if begins:
                words.append(("", []))
            words[-1] = (words[-1][0] + piece.removeprefix(WORD_START), [*words[-1][1], index])
        return [Word(text, tuple(tokens)) for text, tokens in words]


@contextmanager
def record_attention(pipe: Any) -> Iterator[AttentionRecord]:
    """Record the weights of the UNet's cross-attentions while the pipeline generates.

    The sound is the same to the bit. Recording needs the time of a second cross-attention in each layer, and
    keeps (B, time, tokens) numbers for each layer and step. With guidance, only the prompts' rows are kept,
    not those of the negative prompts.

    Run one generation in the block, or call the record's `clear` between two of them.

    Args:
        pipe: a pipeline with this package's UNet, not compiled.

    Yields:
        The record. It is filled while the pipeline runs, and can be used after the block.

    Raises:
        TypeError: `pipe.unet`, or one of its cross-attentions, is not this package's.
        ValueError: the UNet is compiled, or has no cross-attention; in a generation, feature caching is on.

    Example:
        >>> with record_attention(pipe) as attention:
        ...     output = pipe("A bell over rain", **pipe.recommended)
        >>> attention.mean("t5").shape  # (sounds, time, tokens)
        torch.Size([1, 10, 6])
        >>> [word.text for word in attention.words("A bell over rain")]
        ['A', 'bell', 'over', 'rain', '</s>']
    """
    unet = pipe.unet
    if not isinstance(unet, UNet):
        raise TypeError(
            f"record_attention needs this package's UNet; pipe.unet is of class {type(unet).__name__}"
        )
    if any(module._compiled_call_impl is not None for module in unet.modules()):
        raise ValueError(
            "record_attention cannot look into a compiled UNet; use a pipeline whose UNet is not compiled"
        )
    recorder = _Recorder(pipe, unet)
    with ExitStack() as hooks:
        recorder.attach(hooks)
        yield recorder.record


def attention_maps(q: Tensor, k: Tensor, heads: int, bias: Tensor | None = None) -> Iterator[Tensor]:
    """The weights of multi-head attention, head by head: softmax(q k^T / sqrt(d) + bias).

    Args:
        q: queries, (B, N, heads · d).
        k: keys, (B, M, heads · d).
        heads: number of heads.
        bias: of the condition's mask, (B, 1, 1, M); None attends to all.

    Yields:
        (B, N, M) for each head, in float32 or better.
    """
    dtype = torch.promote_types(q.dtype, torch.float32)
    q, k = (rearrange(x, "b n (h d) -> h b n d", h=heads).to(dtype) for x in (q, k))
    for q_head, k_head in zip(q, k, strict=True):
        scores = q_head @ k_head.transpose(-1, -2) / q_head.shape[-1] ** 0.5
        yield torch.softmax(scores if bias is None else scores + bias[:, 0].to(dtype), dim=-1)


class _Target(NamedTuple):
    """A cross-attention to record, and the transformer that it is in."""

    layer: AttentionLayer
    transformer: Transformer
    attention: CrossAttention


def _targets(unet: UNet) -> Iterator[_Target]:
    """The cross-attentions of a UNet, in the order in which they run."""
    downs = [(f"down.{i}", level) for i, level in enumerate(unet.down)]
    ups = [(f"up.{i}", level) for i, level in enumerate(unet.up)]
    for path, level in (*downs, ("middle", unet.middle), *ups):
        for index, transformer in enumerate(level.transformers):
            if transformer.context_width is None:
                continue
            condition = "gpt2" if level.attends_to_gpt2(index) else "t5"
            for number, block in enumerate(transformer.blocks):
                name = f"{path}.transformers.{index}.blocks.{number}.cross_attention"
                layer = AttentionLayer(name, path.replace(".", " "), condition)
                yield _Target(layer, transformer, block.cross_attention)


class _Recorder:
    """The hooks that fill a record. What a call of the UNet gave is added once the call has finished."""

    def __init__(self, pipe: Any, unet: UNet):
        self.pipe = pipe
        self.unet = unet
        self.targets = list(_targets(unet))
        if not self.targets:
            raise ValueError("record_attention needs a UNet with cross-attention; pipe.unet has none")
        for layer, _, module in self.targets:
            if not isinstance(module, CrossAttention):
                raise TypeError(
                    f"record_attention needs this package's CrossAttention; {layer.name} of pipe.unet is of "
                    f"class {type(module).__name__}"
                )
        self.record = AttentionRecord(pipe, [target.layer for target in self.targets])
        # Of the current call of the UNet:
        self.sounds = 0  # how many of the rows to keep, the last ones; 0 outside of a call
        self.timestep = self.seconds = 0.0
        self.tokens: Tensor | None = None
        self.weights: dict[str, Tensor] = {}

    def attach(self, hooks: ExitStack) -> None:
        """Add the hooks, and have `hooks` remove them."""
        handles = [
            self.unet.register_forward_pre_hook(_in_this_thread(self._begin), with_kwargs=True),
            self.unet.register_forward_hook(_in_this_thread(self._end), always_call=True),
        ]
        for layer, transformer, module in self.targets:
            state: dict[str, Any] = {}
            before = _in_this_thread(partial(self._before_transformer, state))
            queries = _in_this_thread(partial(self._after_queries, state))
            after = _in_this_thread(partial(self._after_attention, layer, state))
            handles += [
                transformer.register_forward_pre_hook(before),
                module.q.register_forward_hook(queries),
                module.register_forward_hook(after),
            ]
        for handle in handles:
            hooks.callback(handle.remove)

    def _begin(self, unet: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = _UNET_SIGNATURE.bind(unet, *args, **kwargs).arguments
        if given.get("level") is not None:
            raise ValueError("record_attention needs all levels at every step; pass feature_cache=False")
        sample, contexts = given["sample"], given.get("contexts")
        rows = contexts.rows if contexts is not None else len(given["encoder_hidden_states"])
        # With guidance, the latents come once for both halves of the conditions, of which the second is cond.
        self.sounds = len(sample) if rows == 2 * len(sample) else rows
        self.timestep = float(torch.as_tensor(given["timestep"]).flatten()[0])
        vae, vocoder = self.pipe.part("vae"), self.pipe.part("vocoder")
        frames = sample.shape[2] * vae.downsampling
        self.seconds = frames * vocoder.hop_length / vocoder.config.sampling_rate
        self.tokens, self.weights = None, {}

    def _before_transformer(self, state: dict[str, Any], _: nn.Module, args: tuple[Any, ...]) -> None:
        state["height"] = args[0].shape[2]

    def _after_queries(self, state: dict[str, Any], _: nn.Module, args: Any, output: Tensor) -> None:
        state["q"] = output

    @torch.no_grad()
    def _after_attention(
        self, layer: AttentionLayer, state: dict[str, Any], module: Any, args: tuple[Any, ...], _: Tensor
    ) -> None:
        q = state.pop("q")
        if not self.sounds:  # a recomputation for gradients (checkpointing), not a call of the UNet
            return
        _, kv, bias = args
        q, k = q[-self.sounds :], kv.chunk(2, dim=-1)[0][-self.sounds :]
        bias = None if bias is None else bias[-self.sounds :]
        total: Any = 0
        for weights in attention_maps(q, k, module.heads, bias):
            total = total + reduce(weights, "b (t f) m -> b t m", "mean", t=state["height"])
        self.weights[layer.name] = (total / module.heads).float().cpu()
        if layer.condition == "t5":
            count = k.shape[1]
            kept = torch.full((len(k),), count) if bias is None else (bias[:, 0, 0] == 0).sum(-1)
            self.tokens = kept.cpu()

    def _end(self, unet: nn.Module, args: Any, output: Any) -> None:
        complete = self.sounds and len(self.weights) == len(self.targets)
        self.sounds = 0
        if complete:
            record = self.record
            record.timesteps.append(self.timestep)
            record.seconds, record._tokens = self.seconds, self.tokens
            for name, weights in self.weights.items():
                record._weights[name].append(weights)


_UNET_SIGNATURE = inspect.signature(UNet.forward)


def _in_this_thread(hook: Callable[..., None]) -> Callable[..., None]:
    """A hook that does nothing in other threads, which may be generating with the same UNet."""
    thread = threading.get_ident()

    def call(*args: Any, **kwargs: Any) -> None:
        if threading.get_ident() == thread:
            hook(*args, **kwargs)

    return call


def _with_length(weights: Tensor, length: int) -> Tensor:
    """Weights (B, T, M) repeated along the time to (B, length, M)."""
    stretched = F.interpolate(rearrange(weights, "b t m -> b m t"), size=length, mode="nearest")
    return rearrange(stretched, "b m t -> b t m")
