"""Loading checkpoints: all file formats and key names give the same numbers, in any dtype."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import diffusers
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch.nn.utils import parametrize

from audioldm2 import AudioLDM2Pipeline
from audioldm2.checkpoints.errors import CheckpointError
from audioldm2.checkpoints.formats import PARTS
from audioldm2.checkpoints.tensors import _WINDOW_BYTES, weights_file
from tests.checkpoints.files import (
    COMPUTED,
    REFERENCES,
    State,
    edit_json,
    load,
    rewrite,
    same_state,
    stem,
    waveform,
    weights,
    write_bin,
    write_safetensors,
)
from tests.helpers import run_python
from tests.reference import assert_close, randomize

WEIGHT_NAMES = {  # of one part of each library
    "unet": ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin"),
    "vocoder": ("model.safetensors", "pytorch_model.bin"),
}


# --- formats


def write_legacy_bin(folder: Path, part: str, state: State) -> None:
    torch.save(state, folder / f"{stem(part, 'bin')}.bin", _use_new_zipfile_serialization=False)


def write_sharded_bin(folder: Path, part: str, state: State) -> None:
    names = sorted(state)
    places = {}
    for number in (1, 2, 3):
        shard = f"{stem(part, 'bin')}-0000{number}-of-00003.bin"
        held = names[number - 1 :: 3]
        torch.save({name: state[name] for name in held}, folder / shard)
        places |= dict.fromkeys(held, shard)
    index = {"metadata": {"total_size": 0}, "weight_map": places}
    (folder / f"{stem(part, 'bin')}.bin.index.json").write_text(json.dumps(index))


def write_transposed_bin(folder: Path, part: str, state: State) -> None:
    """Tensors that are not contiguous, which torch.save preserves."""
    write_bin(folder, part, {name: t.mT.contiguous().mT if t.dim() > 1 else t for name, t in state.items()})


@pytest.mark.parametrize("write", [write_bin, write_legacy_bin, write_sharded_bin, write_transposed_bin])
def test_bin_files_load_to_the_same_tensors(checkpoint, stages, write):
    for part in PARTS:
        rewrite(checkpoint, part, write)
        loaded = load(checkpoint, part)
        same_state(loaded, stages[part])
        assert all(tensor.is_contiguous() for tensor in loaded.state_dict().values())


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_shards_of_the_libraries_load_to_the_same_tensors(random_checkpoint, stages, tmp_path, variant):
    for part, reference in REFERENCES.items():
        model = reference.from_pretrained(random_checkpoint / part)
        limit = weights(random_checkpoint, part).stat().st_size // 3
        model.save_pretrained(tmp_path / part, max_shard_size=limit, variant=variant)
        names = {path.name for path in (tmp_path / part).iterdir()}
        assert weights_file(names, variant).endswith(f".index.{variant}.json" if variant else ".index.json")
        assert len([name for name in names if name.endswith(".safetensors")]) >= 2
        same_state(load(tmp_path, part, variant=variant), stages[part])
        if variant:
            with pytest.raises(CheckpointError, match=r"has (no )?weights"):
                load(tmp_path, part)


def test_shards_in_bin_of_diffusers_load_to_the_same_tensors(random_checkpoint, stages, tmp_path):
    model = diffusers.AutoencoderKL.from_pretrained(random_checkpoint / "vae")
    model.save_pretrained(tmp_path / "vae", max_shard_size="80KB", safe_serialization=False)
    assert len(list((tmp_path / "vae").glob("*.bin"))) >= 2
    same_state(load(tmp_path, "vae"), stages["vae"])


@pytest.mark.parametrize("part", WEIGHT_NAMES)
def test_the_variant_is_read_and_only_the_variant(checkpoint, part):
    safe, binary = WEIGHT_NAMES[part]
    with pytest.raises(CheckpointError, match=r"has no weights of the variant 'fp16'; leave out variant"):
        load(checkpoint, part, variant="fp16")
    state = load_file(checkpoint / part / safe)
    halves = {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in state.items()}
    torch.save(halves, checkpoint / part / binary.replace(".bin", ".fp16.bin"))
    from_bin = load(checkpoint, part, variant="fp16")
    save_file(halves, checkpoint / part / safe.replace(".safetensors", ".fp16.safetensors"))
    from_safetensors = load(checkpoint, part, variant="fp16")
    assert {p.dtype for p in from_safetensors.parameters()} == {torch.float16}
    same_state(from_bin, from_safetensors)
    assert {p.dtype for p in load(checkpoint, part).parameters()} == {torch.float32}


@pytest.mark.parametrize("part", WEIGHT_NAMES)
def test_safetensors_are_preferred_to_bin(checkpoint, stages, part):
    _, binary = WEIGHT_NAMES[part]
    (checkpoint / part / binary).write_bytes(b"never read")
    same_state(load(checkpoint, part), stages[part])


@pytest.mark.parametrize(
    ("names", "variant", "chosen"),
    [
        ({"model.safetensors", "pytorch_model.bin"}, None, "model.safetensors"),
        ({"model.safetensors", "model.safetensors.index.json"}, None, "model.safetensors"),
        ({"model.safetensors.index.json", "pytorch_model.bin"}, None, "model.safetensors.index.json"),
        ({"pytorch_model.bin.index.json"}, None, "pytorch_model.bin.index.json"),
        ({"model.fp16.safetensors"}, None, None),
        ({"model.safetensors"}, "fp16", None),
        ({"model.safetensors.index.fp16.json"}, "fp16", "model.safetensors.index.fp16.json"),
        ({"diffusion_pytorch_model.fp16.bin"}, "fp16", "diffusion_pytorch_model.fp16.bin"),
        ({"flax_model.msgpack", "config.json"}, None, None),
    ],
)
def test_which_file_is_read(names, variant, chosen):
    assert weights_file(names, variant) == chosen


# --- key names of older and newer releases


def old_vae(state: State) -> State:
    spelling = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}

    def old(name: str) -> str:
        return re.sub(r"\.to_(q|k|v|out\.0)\.", lambda m: spelling[m.group()], name)

    return {old(name): tensor for name, tensor in state.items()}


def t5_with(*names: str) -> Callable[[State], State]:
    def rename(state: State) -> State:
        words = {"shared.weight", "encoder.embed_tokens.weight"}
        (embedding,) = {name: t for name, t in state.items() if name in words}.values()
        others = {name: t for name, t in state.items() if name not in words}
        return others | {name: embedding.clone() for name in names}

    return rename


def t5_whole(state: State) -> State:
    extra = {
        "decoder.embed_tokens.weight": torch.zeros(160, 20),
        "decoder.block.0.layer.1.EncDecAttention.q.weight": torch.zeros(24, 20),
        "decoder.final_layer_norm.weight": torch.zeros(20),
        "lm_head.weight": torch.zeros(160, 20),
    }
    return state | extra


def gpt2_head(state: State) -> State:
    """As older releases saved GPT2LMHeadModel."""
    masks = {}
    for layer in range(2):
        masks[f"transformer.h.{layer}.attn.bias"] = torch.ones(1, 1, 80, 80).tril()
        masks[f"transformer.h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    named = {f"transformer.{name}": tensor for name, tensor in state.items()}
    return named | masks | {"lm_head.weight": state["wte.weight"].clone()}


def gpt2_masks(state: State) -> State:
    return state | {"h.0.attn.bias": torch.ones(1, 1, 80, 80).tril().to(torch.uint8)}


def gpt2_without_words(state: State) -> State:
    return {name: tensor for name, tensor in state.items() if name != "wte.weight"}


CLAP_BUFFERS = {
    "text_model.embeddings.position_ids": torch.arange(66)[None],
    "text_model.embeddings.token_type_ids": torch.zeros(1, 66, dtype=torch.int64),
    "audio_model.audio_encoder.layers.0.blocks.0.attention.self.relative_position_index": torch.zeros(
        64, 64, dtype=torch.int64
    ),
    "audio_model.audio_encoder.batch_norm.num_batches_tracked": torch.tensor(7),
}


def clap_with_buffers(state: State) -> State:
    return state | CLAP_BUFFERS


def clap_without_buffers(state: State) -> State:
    return {name: tensor for name, tensor in state.items() if not name.endswith(COMPUTED)}


SPELLINGS: list[tuple[str, Callable[[State], State]]] = [
    ("vae", old_vae),
    ("text_encoder_2", t5_with("shared.weight")),
    ("text_encoder_2", t5_with("encoder.embed_tokens.weight")),
    ("text_encoder_2", t5_with("shared.weight", "encoder.embed_tokens.weight")),
    ("text_encoder_2", t5_whole),
    ("language_model", gpt2_head),
    ("language_model", gpt2_masks),
    ("language_model", gpt2_without_words),
    ("text_encoder", clap_with_buffers),
    ("text_encoder", clap_without_buffers),
]


@pytest.mark.parametrize(("part", "respell"), SPELLINGS)
@pytest.mark.parametrize("write", [write_safetensors, write_bin])
def test_other_key_names_load_to_the_same_tensors(checkpoint, stages, part, respell, write):
    before = set(load_file(weights(checkpoint, part)))

    def respelled(folder: Path, name: str, state: State) -> None:
        new = respell(state)
        assert set(new) != before or respell in (SPELLINGS[1][1], clap_with_buffers, clap_without_buffers)
        write(folder, name, new)

    rewrite(checkpoint, part, respelled)
    same_state(load(checkpoint, part), stages[part])


def weight_normed(checkpoint: Path, old_names: bool) -> State:
    """Random weight-normalized weights of the vocoder; the checkpoint gets the equivalent plain ones."""
    model = transformers.SpeechT5HifiGan.from_pretrained(checkpoint / "vocoder")
    model.apply_weight_norm()
    randomize(model, seed=5)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert any(name.endswith("weight.original0") for name in state)
    for module in model.modules():
        if parametrize.is_parametrized(module):
            parametrize.remove_parametrizations(module, "weight")
    write_safetensors(checkpoint / "vocoder", "vocoder", dict(model.state_dict()))
    if old_names:
        renamed = {
            "parametrizations.weight.original0": "weight_g",
            "parametrizations.weight.original1": "weight_v",
        }
        state = {re.sub("|".join(renamed), lambda m: renamed[m.group()], n): t for n, t in state.items()}
    return state


@pytest.mark.parametrize("old_names", [False, True])
def test_weight_norm_is_folded_with_either_key_names(checkpoint, old_names):
    normed = weight_normed(checkpoint, old_names)
    plain = load(checkpoint, "vocoder")
    write_safetensors(checkpoint / "vocoder", "vocoder", normed)
    folded = load(checkpoint, "vocoder")
    for name, tensor in plain.state_dict().items():
        assert_close(folded.state_dict()[name], tensor, 1e-6)


def test_an_old_checkpoint_sounds_the_same(checkpoint):
    """With all other key names and formats at once."""
    expected = waveform(checkpoint)
    for part, respell in (
        ("vae", old_vae),
        ("text_encoder_2", t5_with("encoder.embed_tokens.weight")),
        ("language_model", gpt2_head),
        ("text_encoder", clap_with_buffers),
    ):
        rewrite(checkpoint, part, lambda folder, name, state, r=respell: write_bin(folder, name, r(state)))
    edit_json(checkpoint / "language_model" / "config.json", architectures=["GPT2LMHeadModel"])
    rewrite(checkpoint, "unet", write_sharded_bin)
    rewrite(checkpoint, "projection_model", write_legacy_bin)
    # Up to rounding: the alignment of the weights in memory decides which kernels a CPU uses.
    assert_close(waveform(checkpoint), expected, 1e-5)
    assert expected.abs().max() > 0.01


# --- dtype


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_stages_load_in_the_dtype_asked_for(random_checkpoint, stages, dtype):
    for part in PARTS:
        loaded = load(random_checkpoint, part, dtype=dtype)
        kept = set()
        for name, parameter in loaded.named_parameters():
            exact = stages[part].get_parameter(name)
            assert torch.equal(parameter, exact.to(parameter.dtype)), name
            if parameter.dtype != dtype:
                assert parameter.dtype == torch.float32
                kept.add(name)
        if part == "text_encoder_2" and dtype == torch.float16:
            assert kept == {f"blocks.{layer}.feed_forward.down.weight" for layer in range(2)}
        else:
            assert not kept
        floats = [buffer for buffer in loaded.buffers() if buffer.is_floating_point()]
        assert {buffer.dtype for buffer in floats} <= {dtype}


def test_no_dtype_keeps_that_of_the_file(checkpoint):
    for part, dtype in (("unet", torch.bfloat16), ("vae", torch.float16), ("vocoder", torch.float64)):
        rewrite(
            checkpoint,
            part,
            lambda folder, name, state, d=dtype: write_safetensors(
                folder, name, {n: t.to(d) for n, t in state.items()}
            ),
        )
        assert {p.dtype for p in load(checkpoint, part).parameters()} == {dtype}
        assert {p.dtype for p in load(checkpoint, part, dtype=torch.float32).parameters()} == {torch.float32}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_converting_a_pipeline_equals_loading_it_in_the_dtype(random_checkpoint, dtype):
    loaded = AudioLDM2Pipeline.from_pretrained(random_checkpoint, torch_dtype=dtype)
    turned = AudioLDM2Pipeline.from_pretrained(random_checkpoint).to(dtype)
    moved = AudioLDM2Pipeline.from_pretrained(random_checkpoint).to("cpu", dtype)
    assert loaded.dtype == turned.dtype == moved.dtype == dtype
    for part, stage in loaded.stages.items():
        same_state(turned.stages[part], stage)
        same_state(moved.stages[part], stage)


@pytest.mark.parametrize("dtype", ["int8", torch.int8, torch.float8_e4m3fn])
def test_an_unsupported_dtype_is_refused(random_checkpoint, dtype):
    with pytest.raises(ValueError, match=r"torch_dtype = .* is not supported; use one of torch\.float32, "):
        AudioLDM2Pipeline.from_pretrained(random_checkpoint, torch_dtype=dtype)


@pytest.mark.parametrize("device", ["gpu", "cuda:99"])
def test_a_missing_device_is_refused(random_checkpoint, device):
    with pytest.raises(ValueError, match=f"device '?{device}") as caught:
        AudioLDM2Pipeline.from_pretrained(random_checkpoint, device=device)
    assert "\n" not in str(caught.value)


# --- memory

MEASURE = """
import sys
from pathlib import Path
import torch
from audioldm2.checkpoints.folder import load_stage
from audioldm2.checkpoints.formats import PARTS

def kilobytes(field):
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1])

folder, small, dtype = Path(sys.argv[1]), Path(sys.argv[2]), getattr(torch, sys.argv[3])
load_stage(small, PARTS["unet"][0], dtype)  # so that imports and their memory are not counted
Path("/proc/self/clear_refs").write_text("5")  # resets the peak
before = kilobytes("VmRSS")
stage = load_stage(folder, PARTS["unet"][0], dtype)
loading = kilobytes("VmHWM") - before
touched = sum(parameter.float().sum() if parameter.numel() < 2**20 else parameter.sum(dtype=torch.float32)
              for parameter in stage.parameters())
assert torch.isfinite(touched)
print(loading, kilobytes("VmHWM") - before, sum(p.nbytes for p in stage.parameters()) // 1024)
"""


@pytest.fixture(scope="module")
def big_unet(random_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A UNet of about 300 MB."""
    folder = tmp_path_factory.mktemp("big")
    config = json.loads((random_checkpoint / "unet" / "config.json").read_text())
    config.update(
        block_out_channels=[128, 256, 384], norm_num_groups=32, cross_attention_dim=[[None, 256, 512]] * 3
    )
    (folder / "config.json").write_text(json.dumps(config))
    form = PARTS["unet"][0]
    with torch.device("meta"):
        stage = form.stage(form.config.from_dict(config))
    stage.to_empty(device="cpu")
    with torch.no_grad():
        for number, parameter in enumerate(stage.parameters()):
            parameter.fill_(0.001 * (number % 7))
    stage.save_pretrained(folder)
    return folder


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's /proc to measure")
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_loading_peaks_at_the_size_of_the_stage(big_unet, random_checkpoint, dtype):
    result = run_python("-c", MEASURE, big_unet, random_checkpoint / "unet", dtype)
    loading, peak, size = map(int, result.stdout.split())
    file = (big_unet / "diffusion_pytorch_model.safetensors").stat().st_size // 1024
    assert file > 150 * 1024, "too small to be meaningful"
    if dtype == "float32":
        assert abs(size - file) < 0.01 * file
        assert loading <= 1.1 * size
        assert size <= peak <= 1.1 * size
    else:
        # Besides the stage, the window of the file that is being read is in memory.
        assert 0.99 * size <= loading <= 1.1 * (size + _WINDOW_BYTES // 1024)
        assert peak < file
