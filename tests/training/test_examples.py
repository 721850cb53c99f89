"""The examples in the docstrings of the losses run and show what they say."""

from __future__ import annotations

import doctest
from importlib import import_module

import pytest
import torch


@pytest.mark.parametrize(
    ("module", "examples"), {"adversarial": 4, "autoencoder": 5, "clap": 3, "vocoder": 3}.items()
)
def test_the_examples_of_a_module_run(module: str, examples: int) -> None:
    torch.manual_seed(0)
    found = import_module(f"audioldm2.training.{module}")
    names = {**vars(torch.nn.functional), **vars(found), "torch": torch}
    result = doctest.testmod(found, extraglobs=names)
    assert (result.failed, result.attempted >= examples) == (0, True)
