"""The examples in the stages' docstrings run and show what they say."""

from __future__ import annotations

import doctest
from importlib import import_module

import pytest
import torch

STAGES = {
    "clap": "ClapModel",
    "t5": "T5Encoder",
    "vits": "VitsTextEncoder",
    "projection": "ProjectionModel",
    "gpt2": "GPT2",
    "unet": "UNet",
    "vae": "VAE",
    "hifigan": "HifiGan",
}


@pytest.mark.parametrize(("module", "name"), STAGES.items())
def test_the_example_of_a_stage_runs(module: str, name: str) -> None:
    stage_class = getattr(import_module(f"audioldm2.models.{module}"), name)
    test = doctest.DocTestParser().get_doctest(
        stage_class.__doc__, {**vars(import_module(f"audioldm2.models.{module}"))}, name, None, 0
    )
    assert len(test.examples) >= 3
    torch.manual_seed(0)
    output: list[str] = []
    result = doctest.DocTestRunner(verbose=False).run(test, out=output.append)
    assert result.failed == 0, "".join(output)
    assert any(example.want for example in test.examples), "it shows no result"


@pytest.mark.parametrize(("module", "name"), STAGES.items())
def test_the_help_of_a_stage_says_how_it_is_loaded(module: str, name: str) -> None:
    stage_class = getattr(import_module(f"audioldm2.models.{module}"), name)
    assert "from_pretrained" in stage_class.__doc__ or "with random weights" in stage_class.__doc__
    for method in (stage_class.from_pretrained, stage_class.save_pretrained, stage_class.forward):
        assert method.__doc__, method
    assert "subfolder" in stage_class.from_pretrained.__doc__
