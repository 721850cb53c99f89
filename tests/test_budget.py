"""How much memory a long generation takes, counted on tensors without data: the GPU's bar, without a GPU."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from audioldm2.models import PARTS
from scripts.sizes import BASE

GIB = 2**30
FRAMES = 15_000  # 150 s
CANDIDATES = 4


class Live(TorchDispatchMode):
    """Counts the bytes of all tensors that are alive, and the most that there were."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.known:
                    self.known.add(storage._cdata)
                    self.now += storage.nbytes()
                    self.peak = max(self.peak, self.now)
                    weakref.finalize(storage, self._gone, storage._cdata, storage.nbytes())
        return result

    def _gone(self, key: int, count: int) -> None:
        self.known.discard(key)
        self.now -= count


@pytest.fixture(scope="module")
def stages() -> Iterator[dict[str, torch.nn.Module]]:
    """The base checkpoint's stages at float16, without data."""
    with torch.device("meta"), torch.no_grad():
        yield {
            name: form.stage(form.config.from_dict(BASE[name])).half() for name, (form, *_) in PARTS.items()
        }


@pytest.fixture(autouse=True)
def attention_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention takes no memory but its result, as the kernels of a GPU do it."""
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda q, k, v, **_: torch.empty_like(q))


def peak(call: Callable[[], Any]) -> float:
    with torch.no_grad(), Live() as live:
        call()
    return live.peak / GIB


def half(*shape: int) -> torch.Tensor:
    return torch.empty(*shape, dtype=torch.float16, device="meta")


def test_150_s_with_4_candidates_fit_in_16_gib(stages: dict[str, Any]):
    weights = sum(p.nbytes for stage in stages.values() for p in stage.parameters()) / GIB
    unet, sides = stages["unet"], 2 * CANDIDATES
    conditions = half(sides, 8, 768), half(sides, 32, 1024), torch.ones(sides, 32, device="meta")
    contexts = unet.contexts(*conditions)
    time = unet.time_embedding(torch.zeros(1, device="meta"))
    latents = half(CANDIDATES, 8, FRAMES // 4, 16)
    peaks = {
        "unet": peak(lambda: unet.denoise(latents, time, contexts)),
        "vae": peak(lambda: stages["vae"].decode_in_chunks(half(1, 8, FRAMES // 4, 16))),
        "vocoder": peak(lambda: stages["vocoder"].in_chunks(half(1, FRAMES, 64))),
    }
    assert 1.5 < weights < 3
    assert weights + max(peaks.values()) < 8, peaks  # half of the bar: allocators and kernels take some, too
    assert peaks["unet"] > 1, "nothing was counted"


def test_chunks_take_less_and_a_longer_sound_little_more(stages: dict[str, Any]):
    vae, vocoder = stages["vae"], stages["vocoder"]
    assert peak(lambda: vae.decode_in_chunks(half(1, 8, FRAMES // 4, 16))) < 0.7 * peak(
        lambda: vae.decode(half(1, 8, FRAMES // 4, 16))
    )
    whole = peak(lambda: vocoder(half(1, FRAMES, 64)))
    assert peak(lambda: vocoder.in_chunks(half(1, FRAMES, 64))) < 0.1 * whole
    assert peak(lambda: vocoder.in_chunks(half(1, 4 * FRAMES, 64))) < 0.15 * whole  # most is the result
