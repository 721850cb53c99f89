"""What a generation returns: an object, a mapping and a tuple at once, as in diffusers."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Mapping

import numpy as np
import pytest

from audioldm2 import AudioLDM2Pipeline, AudioPipelineOutput
from tests.helpers import HAMMER, RAIN, seeded


def test_an_output_is_an_object_a_mapping_and_a_tuple() -> None:
    audios = np.zeros((2, 5))
    output = AudioPipelineOutput(audios, 16000, np.ones(2))
    assert output.audios is output["audios"] is output[0] is output.get("audios") is audios
    assert (output.sampling_rate, output.scores.tolist()) == (16000, [1.0, 1.0])
    assert [*output.keys()] == ["audios"]
    assert dict(output)["audios"] is dict(**output)["audios"] is next(iter(output.values())) is audios
    assert [name for name, _ in output.items()] == ["audios"]
    assert "audios" in output
    assert "images" not in output
    assert output.get("images", 3) == 3
    (alone,) = output
    assert alone is audios
    assert type(output.to_tuple()) is tuple
    assert len(output) == len(output.to_tuple()) == 1
    assert isinstance(output, tuple)
    assert isinstance(output, Mapping)
    with pytest.raises(KeyError):
        output["images"]
    assert repr(output).startswith("AudioPipelineOutput(audios=ndarray of shape (2, 5), sampling_rate=16000")


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_an_output_can_be_copied(copied) -> None:
    output = copied(AudioPipelineOutput(np.zeros((2, 5)), 22050, np.ones(2)))
    assert output.audios.shape == (2, 5)
    assert (output.sampling_rate, len(output.scores)) == (22050, 2)


@pytest.mark.parametrize("output_type", ["np", "pt"])
def test_scores_are_those_of_the_sounds_in_their_order(pipe: AudioLDM2Pipeline, output_type: str) -> None:
    output = pipe(
        [HAMMER, RAIN],
        num_inference_steps=2,
        audio_length_in_s=0.32,
        num_waveforms_per_prompt=3,
        generator=seeded(),
        output_type=output_type,
    )
    assert type(output.scores) is type(output.audios)
    assert output.scores.shape == (6,)
    for scores in (output.scores[:3], output.scores[3:]):
        assert [*scores] == sorted(scores, reverse=True)
        assert len({float(score) for score in scores}) == 3
    assert output.sampling_rate == 16000
    alone = pipe(HAMMER, num_inference_steps=2, audio_length_in_s=0.32)
    assert alone.scores is None
