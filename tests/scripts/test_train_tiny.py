"""The trainers of CLAP, T5 and the language of audio: two steps of each, on a library of eight sounds."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from audioldm2.checkpoints.formats import PARTS
from scripts.tiny import loop as training
from scripts.tiny.data import tokenizers
from scripts.tiny.data.captions import caption
from scripts.tiny.data.library import Library, load_library, make_library
from scripts.tiny.data.sounds import draw_scene
from scripts.tiny.loop import Run
from scripts.tiny.sizes import SIZES
from scripts.tiny.stages import (
    clap as train_clap,
    language as train_language,
    ranking as train_ranking,
    t5 as train_t5,
)

# Each stage's trainer, its module and the parts that it writes.
STAGES: dict[str, tuple[ModuleType, Callable[[Library, Run], None], tuple[str, ...]]] = {
    "clap": (train_clap, train_clap.train_clap, ("text_encoder",)),
    "t5": (train_t5, train_t5.train_t5, ("text_encoder_2",)),
    "language": (train_language, train_language.train_language, ("projection_model", "language_model")),
    "ranking": (train_ranking, train_ranking.train_ranking, ("text_encoder",)),
}


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Library:
    """Eight sounds."""
    return load_library(tmp_path_factory.mktemp("library"), 8, 0)


@pytest.fixture(scope="session")
def untrained(library: Library, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tokenizers, and every part as it is before training, for later stages to build on."""
    folder = tmp_path_factory.mktemp("untrained")
    run = Run(folder)
    tokenizers.write_tokenizers(library, run)
    torch.manual_seed(0)
    for name, (form, *_) in PARTS.items():
        form.stage(form.config.from_dict(SIZES[name])).eval().save_pretrained(run.checkpoint / name)
    return folder


@pytest.fixture(autouse=True)
def _measured_on_little(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_clap, "ROUNDS", 1)
    monkeypatch.setattr(train_language, "UNSEEN", 2)
    monkeypatch.setattr(train_ranking, "ROUNDS", 1)
    monkeypatch.setattr(train_ranking, "UNSEEN", 2)


@pytest.fixture
def folder(untrained: Path, tmp_path: Path) -> Path:
    """A copy of `untrained`."""
    return Path(shutil.copytree(untrained, tmp_path / "run"))


def _weights(folder: Path, parts: tuple[str, ...]) -> Iterator[tuple[str, torch.Tensor]]:
    for part in parts:
        for path in sorted((folder / "checkpoint" / part).glob("*.safetensors")):
            yield from ((f"{part}.{name}", tensor) for name, tensor in sorted(load_file(path).items()))


def _kill(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("stage", STAGES)
def test_two_steps_move_the_weights_and_a_killed_run_goes_on(
    stage: str, library: Library, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, trainer, parts = STAGES[stage]
    whole, killed = folder, Path(shutil.copytree(folder, folder.with_name("killed")))
    before: dict[str, torch.Tensor] = {}
    after: dict[str, torch.Tensor] = {}

    def watched(name: str, trained: torch.nn.Module, *rest: object, **options: object) -> None:
        before.update(copy.deepcopy(dict(trained.named_parameters())))
        training.train(name, trained, *rest, **options)
        after.update(trained.named_parameters())

    with monkeypatch.context() as patch:
        patch.setattr(module, "train", watched)
        trainer(library, Run(whole, steps=2, batch=4))
    assert [name for name in before if torch.equal(before[name], after[name])] == []
    assert (whole / "plots" / f"{stage}.png").is_file()
    for part in parts:
        PARTS[part][0].stage.from_pretrained(whole / "checkpoint" / part)

    with monkeypatch.context() as patch:
        patch.setattr(training, "SAVE_EVERY", 0.0)
        patch.setattr(training, "plot", _kill)  # which comes after the first step's saving
        with pytest.raises(KeyboardInterrupt):
            trainer(library, Run(killed, steps=2, batch=4))
    trainer(library, Run(killed, steps=2, batch=4))
    pairs = zip(_weights(whole, parts), _weights(killed, parts), strict=True)
    assert [name for (name, a), (_, b) in pairs if not torch.equal(a, b)] == []


def test_ranking_leaves_what_clap_says_of_texts(library: Library, folder: Path) -> None:
    before = dict(_weights(folder, ("text_encoder",)))
    train_ranking.train_ranking(library, Run(folder, steps=2, batch=4))
    for name, after in _weights(folder, ("text_encoder",)):
        assert torch.equal(before[name], after) == ("audio" not in name.lower()), name


def test_a_killed_ranking_keeps_what_it_generated(
    library: Library, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, training_set = Run(folder, steps=2, batch=4), list(range(len(library)))
    made: list[list[int]] = []

    def watched(pipe: object, sounds: Library, rows: torch.Tensor, run: Run) -> dict[str, torch.Tensor]:
        made.append(sorted(rows.tolist()) if sounds is library else [])
        return both_sides(pipe, sounds, rows, run)

    both_sides = train_ranking.both_sides
    monkeypatch.setattr(train_ranking, "both_sides", watched)
    with monkeypatch.context() as patch:
        patch.setattr(train_ranking, "train", _kill)
        with pytest.raises(KeyboardInterrupt):
            train_ranking.train_ranking(library, run)
    assert made == [training_set]
    train_ranking.train_ranking(library, run)
    assert made == [training_set, []]  # only what is unseen


def test_pictures_are_moved_in_time_and_level() -> None:
    pictures = torch.arange(20.0).view(1, 20, 1).repeat(200, 1, 3)  # dB
    moved = pictures.clone()
    train_ranking.move(moved, torch.Generator().manual_seed(0))
    louder = moved.amin((1, 2))
    shifts = moved[:, 0, 0].sub(louder).round()  # of frames, the value that has come to the beginning
    assert {*shifts.tolist()} == {float(-shift % 20) for shift in range(-8, 9)}
    assert -2 <= louder.min() < -1.8
    assert 1.8 < louder.max() <= 2
    for before, after, shift, by in zip(pictures, moved, shifts.long().tolist(), louder, strict=True):
        torch.testing.assert_close(after, before.roll(-shift, 0) + by)


def test_both_tokenizers_read_every_letter(untrained: Path) -> None:
    for tokenizer in tokenizers.read_tokenizers(Run(untrained)):
        ids = tokenizer("A JAZZY xylophone, quickly; 16 vague owls!").input_ids
        assert tokenizer.unk_token_id not in ids
        assert len(tokenizer("a loud bell").input_ids) < len(tokenizer("q zzxy vvkw").input_ids)


def test_a_changed_library_leaves_the_tokenizers_alone(untrained: Path, folder: Path) -> None:
    """Encoders have learnt with them: the same words must keep their numbers."""
    tokenizers.write_tokenizers(Library([], [["zebra crossing"]], np.empty(0), np.empty(0)), Run(folder))
    for name in ("tokenizer", "tokenizer_2"):
        before = (untrained / "checkpoint" / name / "tokenizer.json").read_bytes()
        assert (folder / "checkpoint" / name / "tokenizer.json").read_bytes() == before


def test_varied_captions_keep_their_words_of_content() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        text = caption(draw_scene(rng), rng)
        words = {w.strip(".").lower() for w in text.split()} - tokenizers.SMALL
        assert words <= {w.strip(".").lower() for w in tokenizers.varied(text, rng).split()}


def test_only_the_same_scene_counts_as_belonging_together(library: Library) -> None:
    numbers = train_clap.scene_numbers(library.scenes)
    for i, a in enumerate(library.scenes):
        for j, b in enumerate(library.scenes):
            assert (numbers[i] == numbers[j]) == (a == b)


def test_contrastive_loss_is_least_where_scenes_agree() -> None:
    clap = train_clap.ClapModel(train_clap.ClapConfig.from_dict(SIZES["text_encoder"]))
    same = torch.tensor([[True, False, True], [False, True, False], [True, False, True], [False] * 3])
    axes = torch.eye(64)
    losses = [
        train_clap.contrastive_loss(clap, text, text[:3], same)
        for text in (axes[[0, 1, 0, 2]], axes[[0, 1, 0, 0]], axes[[0, 1, 2, 3]])
    ]
    assert losses[0] < min(losses[1:])


def test_twins_differ_in_one_thing() -> None:
    rng = np.random.default_rng(0)
    for _ in range(100):
        scene = draw_scene(rng)
        louder, other = train_clap.twins(scene, rng)
        assert louder.sounds == scene.sounds
        assert louder.loudness != scene.loudness
        assert other.loudness == scene.loudness
        assert other.sounds[0] != scene.sounds[0]
        assert other.sounds[1:] == scene.sounds[1:]


def test_pictures_are_kept_until_the_library_is_another(library: Library, tmp_path: Path) -> None:
    path = tmp_path / "pictures.npy"
    first = np.array(train_clap.clap_features(library, path))
    made = path.stat().st_mtime_ns
    assert np.array_equal(train_clap.clap_features(library, path), first)
    assert path.stat().st_mtime_ns == made
    others = train_clap.clap_features(make_library(8, seed=1), path)
    assert others.shape == first.shape
    assert not np.array_equal(others, first)


def test_disturbed_pictures_keep_their_levels() -> None:
    pictures = torch.full((4, 256, 64), -20.0)
    train_clap.disturb(pictures, torch.Generator().manual_seed(0))
    assert (pictures.mean(dim=(1, 2)) + 20).abs().max() < 2.5


def test_language_of_audio_is_the_mean_of_an_eighth_of_the_time_and_pairs_of_frequencies() -> None:
    latents = torch.randn(2, 8, 40, 16)
    heard = train_language.language_of_audio(latents, 8)
    assert heard.shape == (2, 8, 64)
    pairs = latents[1, :, 10:15].mean(dim=1).view(8, 8, 2).mean(dim=2)
    torch.testing.assert_close(heard[1, 2], pairs.flatten())


def test_facts_are_places_in_the_lists() -> None:
    scene = train_t5.Scene((train_t5.draw_scene(np.random.default_rng(0), "bell").sounds[0],), "soft")
    front, behind, loudness = train_t5.facts([scene])[:, 0].tolist()
    assert train_t5.SOUNDS[front] == ("bell", "")
    assert (train_t5.BEHIND[behind], train_t5.LOUDNESS[loudness]) == ("", "soft")
