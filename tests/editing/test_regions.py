"""Spans in seconds and bands in hertz, as samples and latents."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from audioldm2 import LogMelConfig
from audioldm2.audio.mel import mel_filter_bank
from audioldm2.editing.regions import Regions, check_bands, check_inside, regions

LOG_MEL = LogMelConfig()  # AudioLDM 2's: 16 kHz, 64 bands, 160 samples a frame
ROW, COLUMNS = 640, 16


def replaced(spans: Any, bands: Any = None, rows: int = 25) -> torch.Tensor:
    return Regions(spans, bands).latents(rows, ROW, LOG_MEL, COLUMNS)


@pytest.mark.parametrize(
    ("keep", "spans"),
    [
        ([(0.0, 2.5)], ((2.5, math.inf),)),
        ((1, 2), ((0.0, 1.0), (2.0, math.inf))),
        ([(3, None), (0, 1)], ((1.0, 3.0),)),
        ([(1, 2), (1.5, 3)], ((0.0, 1.0), (3.0, math.inf))),
        (torch.tensor([[0.5, 1.0]]), ((0.0, 0.5), (1.0, math.inf))),
    ],
)
def test_what_is_not_kept_is_replaced(keep: Any, spans: Any) -> None:
    assert regions(keep, None, None) == Regions(spans)
    if spans:
        again = regions(None, [(start, None if end == math.inf else end) for start, end in spans], None)
        assert again == Regions(spans)


def test_a_band_alone_is_replaced_in_the_whole_sound() -> None:
    assert regions(None, None, None) is None
    assert regions(None, None, (4000, 8000)) == Regions(((0.0, math.inf),), ((4000.0, 8000.0),))
    both = regions(None, (1, 2), [(100, 200), (150, 300)])
    assert both == Regions(((1.0, 2.0),), ((100.0, 300.0),))


def test_a_latent_is_replaced_if_a_part_of_it_is() -> None:
    """A row is 40 ms."""
    assert replaced(((0.08, 0.12),))[:, 0].nonzero()[:, 0].tolist() == [2]
    assert replaced(((0.081, 0.082),))[:, 0].nonzero()[:, 0].tolist() == [2]
    assert replaced(((0.079, 0.121),))[:, 0].nonzero()[:, 0].tolist() == [1, 2, 3]
    assert replaced(((0.9, math.inf),)).all(dim=1).nonzero()[:, 0].tolist() == [22, 23, 24]
    assert replaced(((0.0, 0.00001),)).sum() == COLUMNS


@pytest.mark.parametrize("hertz", [150.0, 900.0, 2000.0, 4000.0, 7500.0])
def test_a_band_is_the_columns_whose_mel_filters_hear_it(hertz: float) -> None:
    filters = mel_filter_bank(1024, 64, 16000, 0, 8000)
    loudest = int(filters[round(hertz * 1024 / 16000)].argmax()) // 4
    mask = replaced(((0.0, math.inf),), ((hertz, hertz + 1),))
    assert loudest in mask[0].nonzero()[:, 0].tolist()
    assert mask[0].sum() <= 2
    assert bool((mask == mask[0]).all())


def test_times_are_whole_samples() -> None:
    """4.1 times 16000 is a little less than 65600 in floating point."""
    assert Regions(((0.0, 4.1), (4.5, math.inf))).times(80000, 16000) == [(0, 65600), (72000, 80000)]
    assert Regions(((0.5, 0.5000001),)).times(80000, 16000) == [(8000, 8001)]
    assert Regions(((6.0, 7.0),)).times(80000, 16000) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (((0, 1), (1, 2), None), "keep and replace"),
        (([], None, None), "keep must be pairs"),
        ((None, 2.0, None), "replace must be pairs"),
        ((None, [(2, 1)], None), r"replace has the pair \(2, 1\)"),
        ((None, [(-1, 1)], None), "replace has the pair"),
        ((None, [(math.nan, 1)], None), "replace has the pair"),
        ((None, [(0, 1, 2)], None), "replace must be pairs"),
        ((None, "0-1", None), "replace must be pairs"),
        ((None, None, (4000, None)), "replace_band has the pair"),
        ((None, None, (True, 5)), "replace_band has the pair"),
    ],
)
def test_bad_regions_are_one_error(arguments: tuple[Any, Any, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        regions(*arguments)


def test_regions_outside_of_the_sound_are_errors() -> None:
    check_inside("keep", [(0, 5.005), (1, None)], 5.0)
    with pytest.raises(ValueError, match="keep has the span from 2 to 6 s, but the sound is 5 s long"):
        check_inside("keep", [(0, 1), (2, 6)], 5.0)
    with pytest.raises(ValueError, match="replace has the span from 5 s on, but"):
        check_inside("replace", (5, None), 5.0)
    check_bands([(4000, 8000)], LOG_MEL)
    with pytest.raises(ValueError, match="replace_band has 4000 to 9000 Hz"):
        check_bands([(4000, 9000)], LOG_MEL)
    with pytest.raises(ValueError, match="replace_band has 4 to 8 Hz, which is narrower than a mel band"):
        check_bands([(4, 8)], LOG_MEL)
