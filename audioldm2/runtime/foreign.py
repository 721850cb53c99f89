"""Parts of a pipeline that are not from this package: wrappers, and modules of diffusers and transformers.

The pipeline calls every part through `adapted(name, part)`, which has the interface of this package's stage
of that name. A part that has this interface is returned as it is. Anything else is called by keyword and its
output is unwrapped; docs/replacing-parts.md lists what each part must provide. A part that lacks
something raises one TypeError that names both, before anything runs.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from audioldm2.quoting import quoted


def unwrapped(part: Any) -> Any:
    """The module inside torch.compile's, DataParallel's and DistributedDataParallel's wrappers."""
    while True:
        if isinstance(part, nn.DataParallel | nn.parallel.DistributedDataParallel):
            part = part.module
        # torch.compile's class; importing it would import PyTorch's compiler.
        elif type(part).__module__.startswith("torch._dynamo.") and hasattr(part, "_orig_mod"):
            part = part._orig_mod
        else:
            return part


def adapted(name: str, part: Any) -> Any:
    """A part with the interface of this package's stage of that name.

    Args:
        name: the part's name in the pipeline, such as "unet".
        part: this package's, or one that can take its place (docs/replacing-parts.md).

    Returns:
        `part` itself if it has the interface, otherwise an adapter whose other attributes are the part's.

    Raises:
        TypeError: the part cannot take this place; the message names what it lacks.
    """
    adapter = _ADAPTERS[name]
    lacks = adapter.lacks(part, unwrapped(part))
    if lacks:
        raise TypeError(
            f"{name} is of class {type(part).__name__}, which cannot take that place: it lacks {lacks}; "
            "docs/replacing-parts.md lists what each part must provide"
        )
    return part if adapter.fits(part) else adapter(part)


def outputs(name: str, output: Any) -> list[Tensor]:
    """The tensors that a module returned, alone, in a tuple or in a mapping.

    Args:
        name: the part's name in the pipeline, for the error message.
        output: what it returned.

    Raises:
        TypeError: there is no tensor in it.
    """
    if isinstance(output, Mapping):
        output = tuple(output.values())
    tensors = [output] if isinstance(output, Tensor) else output
    if not isinstance(tensors, list | tuple) or not tensors or not isinstance(tensors[0], Tensor):
        raise TypeError(f"{name} returned {quoted(output)}; it must return a tensor, alone or first")
    return list(tensors)


def config_of(part: Any) -> Any:
    """A part's config, or that of the module in its wrappers; None if there is none."""
    while getattr(part, "config", None) is None:
        inner = unwrapped(part)
        if inner is part:  # not one of the known wrappers, but any module with a single child
            children = [*part.children()] if isinstance(part, nn.Module) else []
            if len(children) != 1:
                return None
            inner = children[0]
        part = inner
    return part.config


def setting(part: Any, name: str, default: Any = None) -> Any:
    """An entry of a part's config, also if the part is wrapped; `default` if it has none."""
    return getattr(config_of(part), name, default)


def trained_rows(unet: Any) -> int | None:
    """The length of the latents that a UNet was trained on, in rows (T/4); None if it does not say."""
    size = setting(unet, "sample_size")
    rows: int | None = size[0] if isinstance(size, Sequence) else size
    return rows


def _is_from_transformers(part: Any) -> bool:
    """Whether a part has the interface of transformers' models, whose `generate` returns token ids."""
    return hasattr(unwrapped(part), "main_input_name")


class Adapter:
    """A part behind the interface of this package's stage; a subclass adds the stage's methods.

    Args:
        part: the part, perhaps inside wrappers.
    """

    methods: tuple[str, ...] = ()  # what this package's stage has, and the pipeline uses
    settings: tuple[str, ...] = ()  # entries that the part's config must have

    def __init__(self, part: Any):
        self.part = part

    def __getattr__(self, name: str) -> Any:
        if name == "part":  # while being copied
            raise AttributeError(name)
        if name == "config":
            return config_of(self.part)
        return getattr(self.part, name) if hasattr(self.part, name) else getattr(unwrapped(self.part), name)

    @classmethod
    def fits(cls, part: Any) -> bool:
        """Whether a part needs no adapter."""
        return all(hasattr(part, name) for name in cls.methods)

    @classmethod
    def lacks(cls, part: Any, inner: Any) -> str | None:
        """What a part would need to be adapted, for an error message; None if it has everything."""
        if not callable(part):
            return "a forward method"
        missing = [name for name in cls.settings if setting(part, name) is None]
        return f"config.{', config.'.join(missing)}" if missing else cls._lacks(inner)

    @classmethod
    def _lacks(cls, inner: Any) -> str | None:
        return None


class ForeignClap(Adapter):
    """CLAP: `text_features` and `audio_features`, from transformers' `get_text_features` and its like."""

    methods = ("text_features", "audio_features")

    @classmethod
    def _lacks(cls, inner: Any) -> str | None:
        for kind in ("text", "audio"):
            if not (hasattr(inner, f"{kind}_features") or hasattr(inner, f"get_{kind}_features")):
                return f"the method {kind}_features or get_{kind}_features"
        return None

    def text_features(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self._features("text", input_ids=input_ids, attention_mask=attention_mask)

    def audio_features(self, input_features: Tensor) -> Tensor:
        return self._features("audio", input_features=input_features)

    def _features(self, kind: str, **inputs: Tensor) -> Tensor:
        inner = unwrapped(self.part)
        method = getattr(inner, f"{kind}_features", None) or getattr(inner, f"get_{kind}_features")
        output = method(**inputs)
        # transformers 5 returns the whole output of the tower, its features as `pooler_output`.
        output = getattr(output, "pooler_output", output)
        return F.normalize(outputs("text_encoder", output)[0], dim=-1)


class ForeignEncoder(Adapter):
    """The second text encoder: token ids and mask (B, M) -> states (B, M, width)."""

    @classmethod
    def fits(cls, part: Any) -> bool:
        return False  # also our own may be inside a wrapper that returns something else

    def __call__(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        part, config = self.part, config_of(self.part)
        inputs = {"attention_mask": attention_mask}
        if _is_from_transformers(part) and getattr(config, "model_type", None) == "vits":
            part = unwrapped(part).text_encoder
            inputs["padding_mask"] = attention_mask[:, :, None]
        elif hasattr(unwrapped(part), "decoder") and hasattr(unwrapped(part), "get_encoder"):
            part = unwrapped(part).get_encoder()
        # The token ids by position, as diffusers passes them, so that hooks see them among their inputs.
        states = outputs("text_encoder_2", part(input_ids, **inputs))[0]
        if states.dim() != 3 or states.shape[:2] != input_ids.shape:
            raise ValueError(
                f"text_encoder_2 returned {tuple(states.shape)} for {tuple(input_ids.shape)} token ids; it "
                "should return one state for each token, (B, M, width)"
            )
        return states


class ForeignProjection(Adapter):
    """The projection model: two encoders' states and masks -> one sequence and its mask."""

    settings = ("text_encoder_1_dim",)

    @classmethod
    def fits(cls, part: Any) -> bool:
        return False

    def __call__(
        self, hidden_states: Tensor, hidden_states_1: Tensor, attention_mask: Tensor, attention_mask_1: Tensor
    ) -> tuple[Tensor, Tensor]:
        output = self.part(
            hidden_states=hidden_states,
            hidden_states_1=hidden_states_1,
            attention_mask=attention_mask,
            attention_mask_1=attention_mask_1,
        )
        found = outputs("projection_model", output)
        if len(found) != 2:
            raise TypeError(
                f"projection_model returned {len(found)} tensors; it must return a sequence and a mask"
            )
        return found[0], found[1]


class ForeignGPT2(Adapter):
    """GPT-2: `generate`, for a module that returns the states of a sequence of vectors."""

    methods = ("generate", "config")

    @classmethod
    def fits(cls, part: Any) -> bool:
        return super().fits(part) and not _is_from_transformers(part)

    def generate(
        self, inputs_embeds: Tensor, attention_mask: Tensor | None = None, max_new_tokens: int | None = None
    ) -> Tensor:
        inner = unwrapped(self.part)
        if hasattr(inner, "generate") and not _is_from_transformers(inner):
            generated: Tensor = inner.generate(inputs_embeds, attention_mask, max_new_tokens)
            return generated
        new = max_new_tokens or setting(self.part, "max_new_tokens", 8)
        total = inputs_embeds.shape[1] + new - 1
        limit = setting(self.part, "n_positions", total)
        if total > limit:
            raise ValueError(f"max_new_tokens = {new} needs {total} positions; this GPT-2 has {limit}")
        if attention_mask is None:
            attention_mask = inputs_embeds.new_ones(inputs_embeds.shape[:2], dtype=torch.long)
        # Keys and values are not cached: the sequence is short, and caches differ between versions.
        for _ in range(new):
            output = self.part(
                inputs_embeds=inputs_embeds, attention_mask=attention_mask, **self._options(inner)
            )
            hidden = getattr(output, "hidden_states", None)
            states = hidden[-1] if hidden else outputs("language_model", output)[0]
            if states.shape != inputs_embeds.shape:
                raise ValueError(
                    f"language_model returned states of shape {tuple(states.shape)} for a sequence of shape "
                    f"{tuple(inputs_embeds.shape)}"
                )
            inputs_embeds = torch.cat([inputs_embeds, states[:, -1:].to(inputs_embeds)], dim=1)
            attention_mask = F.pad(attention_mask, (0, 1), value=1)
        return inputs_embeds[:, -new:]

    @staticmethod
    def _options(inner: Any) -> dict[str, bool]:
        """With a language-model head, the first output is the logits; the states must be requested."""
        if not _is_from_transformers(inner):
            return {}
        return {"output_hidden_states": True, "use_cache": False, "return_dict": True}


class ForeignUNet(Adapter):
    """The UNet; `sampling.denoise` calls it as diffusers does unless it has the method `contexts`."""

    @classmethod
    def _lacks(cls, inner: Any) -> str | None:
        parameters = inspect.signature(getattr(inner, "forward", inner)).parameters
        takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        if takes_any or {"encoder_hidden_states", "contexts"} & parameters.keys():
            return None
        return "a forward method that takes encoder_hidden_states"

    @classmethod
    def fits(cls, part: Any) -> bool:
        return True


class ForeignVAE(Adapter):
    """The VAE: `decode` returns the spectrogram, and `encode` the distribution of the latents."""

    methods = ("decode", "encode", "decode_in_chunks", "downsampling", "config")
    settings = ("scaling_factor", "latent_channels")

    @classmethod
    def _lacks(cls, inner: Any) -> str | None:
        if not hasattr(inner, "decode"):
            return "the method decode"
        if not hasattr(inner, "downsampling") and setting(inner, "block_out_channels") is None:
            return "downsampling, the number of mel frames per latent"
        return None

    @property
    def downsampling(self) -> int:
        own: int | None = getattr(unwrapped(self.part), "downsampling", None)
        return 2 ** (len(setting(self.part, "block_out_channels")) - 1) if own is None else own

    def decode(self, latents: Tensor) -> Tensor:
        return outputs("vae", unwrapped(self.part).decode(latents))[0]

    def decode_in_chunks(self, latents: Tensor, rows: int) -> Tensor:
        in_chunks = getattr(unwrapped(self.part), "decode_in_chunks", None)
        return self.decode(latents) if in_chunks is None else outputs("vae", in_chunks(latents, rows))[0]

    def encode(self, mel: Tensor) -> Any:
        inner = unwrapped(self.part)
        if not hasattr(inner, "encode"):
            raise TypeError(f"vae is of class {type(inner).__name__}, which has no method encode")
        output = inner.encode(mel)
        return getattr(output, "latent_dist", output)


class ForeignVocoder(Adapter):
    """The vocoder: log-mel spectrograms (B, T, F) -> waveforms (B, samples)."""

    methods = ("in_chunks", "hop_length", "config")
    settings = ("sampling_rate", "model_in_dim")

    @classmethod
    def fits(cls, part: Any) -> bool:
        return super().fits(part) and not _is_from_transformers(part)

    @classmethod
    def _lacks(cls, inner: Any) -> str | None:
        if not hasattr(inner, "hop_length") and setting(inner, "upsample_rates") is None:
            return "hop_length, the number of samples per mel frame"
        return None

    @property
    def hop_length(self) -> int:
        own: int | None = getattr(unwrapped(self.part), "hop_length", None)
        return math.prod(setting(self.part, "upsample_rates")) if own is None else own

    def __call__(self, mel: Tensor) -> Tensor:
        return outputs("vocoder", self.part(mel))[0]

    def in_chunks(self, mel: Tensor) -> Tensor:
        in_chunks: Callable[[Tensor], Tensor] | None = getattr(unwrapped(self.part), "in_chunks", None)
        return self(mel) if in_chunks is None else in_chunks(mel)


class ForeignFeatureExtractor(Adapter):
    """CLAP's log-mel front end: waveforms (B, samples) -> features (B, 1, frames, mels)."""

    @classmethod
    def fits(cls, part: Any) -> bool:
        return not hasattr(part, "model_input_names")  # transformers' have it

    @classmethod
    def _lacks(cls, inner: Any) -> str | None:
        rate = getattr(inner, "sampling_rate", setting(inner, "sampling_rate"))
        return "sampling_rate" if rate is None else None

    def __call__(
        self, waveforms: Tensor, sampling_rate: int, generator: torch.Generator | None = None
    ) -> Tensor:
        # transformers' draws the excerpt of a long sound from NumPy's generator.
        features = self.part(list(waveforms.cpu().numpy()), sampling_rate=sampling_rate, return_tensors="pt")
        input_features: Tensor = features["input_features"]
        return input_features.to(waveforms.device)


_ADAPTERS: dict[str, type[Adapter]] = {
    "text_encoder": ForeignClap,
    "text_encoder_2": ForeignEncoder,
    "projection_model": ForeignProjection,
    "language_model": ForeignGPT2,
    "unet": ForeignUNet,
    "vae": ForeignVAE,
    "vocoder": ForeignVocoder,
    "feature_extractor": ForeignFeatureExtractor,
}
