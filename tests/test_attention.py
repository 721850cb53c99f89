"""The recorded weights of the UNet's cross-attentions."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from audioldm2 import AudioLDM2Pipeline, record_attention
from audioldm2.attention import AttentionRecord, attention_maps
from tests.helpers import load_pipeline, noise, seeded

PROMPTS = ["A bell over rain", "A slow drum beat, then a long, very high xylophone"]
TOKENS = 22  # of the second
SECONDS = 0.96  # 8 latent rows, which the UNet halves twice


@pytest.fixture(scope="module")
def tiny() -> AudioLDM2Pipeline:
    return load_pipeline("tiny")


def generate(pipe: AudioLDM2Pipeline, **arguments: Any) -> Any:
    """Two candidates of each of two prompts, two steps, with guidance."""
    arguments = {"num_waveforms_per_prompt": 2, "guidance_scale": 2.0, **arguments}
    return pipe(
        PROMPTS,
        num_inference_steps=2,
        audio_length_in_s=SECONDS,
        generator=seeded(),
        output_type="latent",
        **arguments,
    ).audios


@pytest.fixture(scope="module")
def recorded(tiny: AudioLDM2Pipeline) -> tuple[AttentionRecord, dict[str, list[Any]], Tensor]:
    """A record, what each cross-attention was called with and returned, and the latents."""
    calls: dict[str, list[Any]] = {}
    with record_attention(tiny) as record:
        handles = [
            tiny.unet.get_submodule(layer.name).register_forward_hook(
                lambda module, args, output, name=layer.name: calls.setdefault(name, []).append(
                    (*args, output)
                )
            )
            for layer in record.layers
        ]
        latents = generate(tiny)
    for handle in handles:
        handle.remove()
    return record, calls, latents


def test_every_cross_attention_is_a_layer(tiny: AudioLDM2Pipeline, recorded: Any) -> None:
    record = recorded[0]
    names = [name for name, _ in tiny.unet.named_modules() if name.endswith(".cross_attention")]
    assert sorted(layer.name for layer in record.layers) == sorted(names)
    assert [layer.level for layer in record.layers] == ["down 2"] * 2 + ["middle"] * 2 + ["up 0"] * 4
    widths = {"gpt2": 128, "t5": 96}
    for layer in record.layers:
        module = tiny.unet.get_submodule(layer.name)
        assert module.kv.in_features == widths[layer.condition]


def test_weights_are_the_mean_over_heads_and_frequencies_of_the_prompts_rows(
    tiny: AudioLDM2Pipeline, recorded: Any
) -> None:
    record, calls, _ = recorded
    assert len(record) == 2
    assert record.seconds == pytest.approx(8 * 4 * 512 / 16000)
    for layer in record.layers:
        module = tiny.unet.get_submodule(layer.name)
        weights = record.weights(layer)
        tokens = {"t5": TOKENS, "gpt2": 8}[layer.condition]
        assert weights.shape == (2, 4, 2, tokens)
        for step, (x, kv, bias, _) in enumerate(calls[layer.name]):
            batch, positions, width = x.shape  # 4 sounds, uncond before cond
            assert (batch, positions % 2) == (8, 0)
            q = (x.double() @ module.q.weight.double().T).view(batch, positions, 4, -1)
            k = kv.double()[..., :width].view(batch, tokens, 4, -1)
            scores = torch.einsum("bnhd,bmhd->bhnm", q, k) / (width // 4) ** 0.5
            if bias is not None:
                scores = scores.masked_fill(bias < 0, -torch.inf)
            maps = scores.softmax(-1).view(batch, 4, 2, positions // 2, tokens)
            torch.testing.assert_close(weights[step].double(), maps.mean((1, 3))[4:], atol=2e-6, rtol=0)


def test_the_modules_output_follows_from_the_full_maps(tiny: AudioLDM2Pipeline, recorded: Any) -> None:
    record, calls, _ = recorded
    for layer in record.layers:
        module: Any = tiny.unet.get_submodule(layer.name)
        x, kv, bias, output = calls[layer.name][-1]
        k, v = kv.chunk(2, dim=-1)
        with torch.no_grad():
            maps = attention_maps(module.q(x), k, module.heads, bias)
            heads = [w @ v_head for w, v_head in zip(maps, v.chunk(module.heads, dim=-1), strict=True)]
            torch.testing.assert_close(module.out(torch.cat(heads, dim=-1)), output, atol=1e-5, rtol=1e-5)


def test_weights_sum_to_1_and_padding_gets_none(recorded: Any) -> None:
    record = recorded[0]
    for layer in record.layers:
        weights = record.weights(layer)
        torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]), atol=1e-5, rtol=0)
        if layer.condition == "t5":
            assert (weights[:, :2, :, 6:] == 0).all(), "the first prompt has 6 tokens"
            assert (weights[:, 2:, :, :].amax((0, 2)) > 0).all()
    mean = record.mean("t5")
    assert mean.shape == (4, 2, TOKENS)
    torch.testing.assert_close(mean.sum(-1), torch.ones(4, 2))
    t5 = [layer for layer in record.layers if layer.condition == "t5"]
    torch.testing.assert_close(
        record.mean("t5", layers=t5[1:3], step=-1),
        (record.weights(t5[1])[-1] + record.weights(t5[2].name)[-1]) / 2,
    )


def test_the_sound_is_the_same_to_the_bit_and_no_hook_stays(tiny: AudioLDM2Pipeline, recorded: Any) -> None:
    def hooks() -> int:
        kinds = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_always_called")
        return sum(len(getattr(m, kind)) for m in tiny.unet.modules() for kind in kinds)

    assert hooks() == 0
    assert torch.equal(generate(tiny), recorded[2])

    def fail(*_: Any) -> None:
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"), record_attention(tiny) as record:  # noqa: PT012
        assert hooks() > 0
        generate(tiny, num_waveforms_per_prompt=1, callback=fail)
    assert hooks() == 0
    assert len(record) == 1, "the first step was complete"
    assert record.weights(record.layers[0]).shape == (1, 2, 2, 8)


def test_without_guidance_all_rows_are_kept(tiny: AudioLDM2Pipeline) -> None:
    with record_attention(tiny) as record:
        generate(tiny, guidance_scale=1.0, num_waveforms_per_prompt=1)
        assert record.weights(record.layers[1]).shape == (2, 2, 2, TOKENS)
        record.clear()
        assert len(record) == 0
        tiny.unet(noise(1, 8, 16, 16), 500, noise(1, 8, 128), noise(1, 3, 96))
        tiny.unet(noise(1, 8, 32, 16), 400, noise(1, 8, 128), noise(1, 3, 96))
    assert record.timesteps == [500, 400]
    with pytest.raises(ValueError, match=r"different sizes were recorded; call clear\(\)"):
        record.weights(record.layers[0])
    record.clear()
    with pytest.raises(ValueError, match="no attention was recorded; run the pipeline in"):
        record.mean("gpt2")


def test_tokens_are_joined_to_words(tiny: AudioLDM2Pipeline, recorded: Any) -> None:
    record = recorded[0]
    words = record.words(PROMPTS[0])
    assert [word.text for word in words] == ["A", "bell", "over", "rain", "</s>"]
    assert [word.tokens for word in words] == [(0,), (1,), (2, 3), (4,), (5,)]
    words = record.words(PROMPTS[1], sound=3)
    assert " ".join(word.text for word in words) == PROMPTS[1] + " </s>"
    assert [token for word in words for token in word.tokens] == list(range(TOKENS))
    with pytest.raises(ValueError, match="prompt has 22 tokens, but sound 1 was generated from a text of 6"):
        record.words(PROMPTS[1], sound=1)
    with pytest.raises(ValueError, match="sound must be an integer from 0 to 3, got 4"):
        record.words(PROMPTS[0], sound=4)


def test_what_cannot_be_recorded_is_refused(
    tiny: AudioLDM2Pipeline, recorded: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(unet: Any, error: type[Exception], message: str) -> None:
        pipe = copy.copy(tiny)
        pipe.unet = unet
        with pytest.raises(error, match=message), record_attention(pipe):
            raise AssertionError("not refused")

    refused(nn.Linear(1, 1), TypeError, "needs this package's UNet; pipe.unet is of class Linear")
    compiled = copy.deepcopy(tiny.unet)
    monkeypatch.setattr(torch, "compile", lambda call: call)  # the compiler itself takes seconds to import
    compiled.middle.compile()
    refused(compiled, ValueError, "cannot look into a compiled UNet")
    other = copy.deepcopy(tiny.unet)
    other.middle.transformers[1].blocks[0].cross_attention = nn.Identity()
    refused(
        other, TypeError, r"middle.transformers.1.blocks.0.cross_attention of pipe.unet is of class Ident"
    )
    record = recorded[0]
    with pytest.raises(ValueError, match=r"layer must be one of down\.2.*; got 'nothing'"):
        record.weights("nothing")
    with pytest.raises(ValueError, match="layer that attends to t5 must be one of"):
        record.mean("t5", layers=[record.layers[0]])
    with pytest.raises(ValueError, match="condition must be one of t5, gpt2; got 'clap'"):
        record.mean("clap")
