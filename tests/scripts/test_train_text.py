"""The trainers of CLAP, T5, the language of audio and the ranking: two steps of each."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from audioldm2.checkpoints.formats import PARTS, ClapModel
from audioldm2.models.clap import ClapConfig
from audioldm2.training import loop
from scripts.tiny.data.captions import caption
from scripts.tiny.data.library import Library, make_library
from scripts.tiny.data.sounds import ALL_SOUNDS, Scene, Sound, draw_scene
from scripts.tiny.data.tokenizers import FUNCTION_WORDS, read_tokenizers, vary_caption, write_tokenizers
from scripts.tiny.run import Run
from scripts.tiny.sizes import TINY
from scripts.tiny.stages import STAGES, clap, language, ranking, t5

pytestmark = pytest.mark.slow  # long runs of scripts that are not in the wheel

MODULES: dict[str, ModuleType] = {"clap": clap, "t5": t5, "language": language, "ranking": ranking}


@pytest.fixture(scope="session")
def untrained(library: Library, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run with tokenizers and all parts untrained, for later stages to build on."""
    folder = tmp_path_factory.mktemp("untrained")
    run = Run(folder)
    write_tokenizers(library, run)
    torch.manual_seed(0)
    for name, (form, *_) in PARTS.items():
        form.stage(form.config.from_dict(TINY[name])).eval().save_pretrained(run.checkpoint / name)
    return folder


@pytest.fixture
def folder(untrained: Path, tmp_path: Path) -> Path:
    """A copy of `untrained`."""
    return Path(shutil.copytree(untrained, tmp_path / "run"))


def _weights(folder: Path, parts: frozenset[str]) -> Iterator[tuple[str, torch.Tensor]]:
    for part in sorted(parts):
        for path in sorted((folder / "checkpoint" / part).glob("*.safetensors")):
            yield from ((f"{part}.{name}", tensor) for name, tensor in sorted(load_file(path).items()))


def _kill(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("name", MODULES)
def test_two_steps_move_all_weights_and_a_killed_run_resumes(
    name: str, library: Library, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (stage,) = (stage for stage in STAGES if stage.name == name)
    module, trainer, parts = MODULES[name], stage.train, stage.writes
    whole, killed = folder, Path(shutil.copytree(folder, folder.with_name("killed")))
    before: dict[str, torch.Tensor] = {}
    after: dict[str, torch.Tensor] = {}

    def watched(name: str, trained: torch.nn.Module, *rest: object, **options: object) -> None:
        before.update(copy.deepcopy(dict(trained.named_parameters())))
        loop.train(name, trained, *rest, **options)
        after.update(trained.named_parameters())

    with monkeypatch.context() as patch:
        patch.setattr(module, "train", watched)
        trainer(library, Run(whole, steps=2, batch=4))
    assert [name for name in before if torch.equal(before[name], after[name])] == []
    assert (whole / "plots" / f"{name}.png").is_file()
    for part in parts:
        PARTS[part][0].stage.from_pretrained(whole / "checkpoint" / part)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "SAVE_INTERVAL", 0.0)
        patch.setattr(loop, "plot_losses", _kill)  # called after the state of the first step is saved
        with pytest.raises(KeyboardInterrupt):
            trainer(library, Run(killed, steps=2, batch=4))
    trainer(library, Run(killed, steps=2, batch=4))
    pairs = zip(_weights(whole, parts), _weights(killed, parts), strict=True)
    assert [name for (name, a), (_, b) in pairs if not torch.equal(a, b)] == []


def test_ranking_leaves_the_text_tower_unchanged(library: Library, folder: Path) -> None:
    before = dict(_weights(folder, frozenset({"text_encoder"})))
    ranking.train_ranking(library, Run(folder, steps=2, batch=4))
    for name, after in _weights(folder, frozenset({"text_encoder"})):
        assert torch.equal(before[name], after) == ("audio" not in name.lower()), name


def test_a_killed_ranking_keeps_the_sounds_it_generated(
    library: Library, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, training_set = Run(folder, steps=2, batch=4), list(range(len(library)))
    made: list[list[int]] = []

    def watched(pipe: object, sounds: Library, rows: torch.Tensor, run: Run) -> dict[str, torch.Tensor]:
        made.append(sorted(rows.tolist()) if sounds is library else [])
        return make_pairs(pipe, sounds, rows, run)

    make_pairs = ranking.make_pairs
    monkeypatch.setattr(ranking, "make_pairs", watched)
    with monkeypatch.context() as patch:
        patch.setattr(ranking, "train", _kill)
        with pytest.raises(KeyboardInterrupt):
            ranking.train_ranking(library, run)
    assert made == [training_set]
    ranking.train_ranking(library, run)
    assert made == [training_set, []]  # only the unseen sounds


def test_spectrograms_are_shifted_in_time_and_level() -> None:
    before = torch.arange(20.0).view(1, 20, 1).repeat(200, 1, 3)  # dB
    after = before.clone()
    ranking.shift(after, torch.Generator().manual_seed(0))
    louder = after.amin((1, 2))
    shifts = after[:, 0, 0].sub(louder).round()  # in frames: the value that is now at the beginning
    assert {*shifts.tolist()} == {float(-shift % 20) for shift in range(-8, 9)}
    assert -2 <= louder.min() < -1.8
    assert 1.8 < louder.max() <= 2
    for old, new, shift, by in zip(before, after, shifts.long().tolist(), louder, strict=True):
        torch.testing.assert_close(new, old.roll(-shift, 0) + by)


def test_both_tokenizers_read_every_letter(untrained: Path) -> None:
    for tokenizer in read_tokenizers(Run(untrained)):
        ids = tokenizer("A JAZZY xylophone, quickly; 16 vague owls!").input_ids
        assert tokenizer.unk_token_id not in ids
        assert len(tokenizer("a loud bell").input_ids) < len(tokenizer("q zzxy vvkw").input_ids)


def test_existing_tokenizers_are_kept_when_the_library_changes(untrained: Path, folder: Path) -> None:
    """The encoders were trained with their token ids."""
    write_tokenizers(Library([], [["zebra crossing"]], np.empty(0), np.empty(0)), Run(folder))
    for name in ("tokenizer", "tokenizer_2"):
        before = (untrained / "checkpoint" / name / "tokenizer.json").read_bytes()
        assert (folder / "checkpoint" / name / "tokenizer.json").read_bytes() == before


def test_varied_captions_keep_their_content_words() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        text = caption(draw_scene(rng), rng)
        words = {w.strip(".").lower() for w in text.split()} - FUNCTION_WORDS
        assert words <= {w.strip(".").lower() for w in vary_caption(text, rng).split()}


def test_only_equal_scenes_have_the_same_id(library: Library) -> None:
    ids = clap.scene_ids(library.scenes)
    for i, a in enumerate(library.scenes):
        for j, b in enumerate(library.scenes):
            assert (ids[i] == ids[j]) == (a == b)


def test_the_contrastive_loss_is_lowest_if_equal_scenes_have_equal_features() -> None:
    model = ClapModel(ClapConfig.from_dict(TINY["text_encoder"]))
    positives = torch.tensor([[True, False, True], [False, True, False], [True, False, True], [False] * 3])
    axes = torch.eye(64)
    losses = [
        clap.contrastive_loss(model, text, text[:3], positives)
        for text in (axes[[0, 1, 0, 2]], axes[[0, 1, 0, 0]], axes[[0, 1, 2, 3]])
    ]
    assert losses[0] < min(losses[1:])


def test_hard_negatives_differ_in_one_thing() -> None:
    rng = np.random.default_rng(0)
    for _ in range(100):
        scene = draw_scene(rng)
        louder, other = clap.hard_negatives(scene, rng)
        assert louder.sounds == scene.sounds
        assert louder.loudness != scene.loudness
        assert other.loudness == scene.loudness
        assert other.sounds[0] != scene.sounds[0]
        assert other.sounds[1:] == scene.sounds[1:]


def test_claps_spectrograms_are_cached_until_the_library_changes(library: Library, tmp_path: Path) -> None:
    path = tmp_path / "spectrograms.npy"
    first = np.array(clap.clap_spectrograms(library, path))
    written = path.stat().st_mtime_ns
    assert np.array_equal(clap.clap_spectrograms(library, path), first)
    assert path.stat().st_mtime_ns == written
    others = clap.clap_spectrograms(make_library(8, seed=1), path)
    assert others.shape == first.shape
    assert not np.array_equal(others, first)


def test_corrupted_spectrograms_keep_their_levels() -> None:
    spectrograms = torch.full((4, 256, 64), -20.0)
    clap.corrupt(spectrograms, torch.Generator().manual_seed(0))
    assert (spectrograms.mean(dim=(1, 2)) + 20).abs().max() < 2.5


def test_language_of_audio_is_the_mean_of_an_eighth_of_the_time_and_pairs_of_frequencies() -> None:
    latents = torch.randn(2, 8, 40, 16)
    vectors = language.pool_latents(latents, 8)
    assert vectors.shape == (2, 8, 64)
    pairs = latents[1, :, 10:15].mean(dim=1).view(8, 8, 2).mean(dim=2)
    torch.testing.assert_close(vectors[1, 2], pairs.flatten())


def test_facts_are_indices_into_the_lists() -> None:
    scenes = [Scene((Sound("bell"),), "soft"), Scene((Sound("tone", "low"), Sound("rain")))]
    for scene, (sound, background, loudness) in zip(scenes, t5.scene_facts(scenes).T.tolist(), strict=True):
        assert ALL_SOUNDS[sound] == scene.sounds[0]
        assert t5.BACKGROUND_FACTS[background] == (scene.sounds[1].kind if len(scene.sounds) > 1 else "")
        assert t5.LOUDNESS_FACTS[loudness] == scene.loudness
