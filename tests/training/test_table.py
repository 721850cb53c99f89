"""Tables of sound files and captions: their formats, and one line for each mistake."""

from __future__ import annotations

from pathlib import Path

import pytest

from audioldm2.training.table import Item, hold_out, read_table


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two files that exist."""
    for name in ("a.wav", "b, c.wav"):
        (tmp_path / name).write_bytes(b"RIFF")
    return tmp_path


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("t.csv", 'file_name,caption\na.wav,A door\n\n"b, c.wav"," rain, hail "\n'),
        ("t.csv", '\ufeffcaption,license,path\nA door,CC0,a.wav\n"rain, hail",,"b, c.wav"\n'),
        ("t.tsv", "audio\ttext\na.wav\tA door\nb, c.wav\train, hail\n"),
        (
            "t.jsonl",
            '{"file": "a.wav", "prompt": "A door"}\n\n{"file": "b, c.wav", "text": "rain, hail", "x": 1}\n',
        ),
        ("metadata.csv", 'file_name,text\na.wav,A door\n"b, c.wav","rain, hail"\n'),
        (
            "metadata.jsonl",
            '{"file_name": "a.wav", "text": "A door"}\n{"path":"b, c.wav","text":"rain, hail"}',
        ),
    ],
)
def test_every_format_is_read(folder: Path, name: str, text: str) -> None:
    (folder / name).write_text(text, encoding="utf-8")
    source = folder if name.startswith("metadata") else folder / name
    found = [(item.path, item.caption) for item in read_table(source)]
    assert found == [(folder / "a.wav", "A door"), (folder / "b, c.wav", "rain, hail")]


def test_absolute_paths_are_kept(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    table = tmp_path_factory.mktemp("elsewhere") / "t.csv"
    table.write_text(f"file,caption\n{folder / 'a.wav'},A door\n")
    assert read_table(str(table)) == [Item(folder / "a.wav", "A door", f"{table}:2")]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("t.txt", "a.wav", r"t\.txt: unknown type of table; use \.csv"),
        ("t.csv", "", r"t\.csv has no rows"),
        ("t.csv", "file,caption\n", r"t\.csv has no rows"),
        ("t.csv", "file\na.wav\n", r"t\.csv:2: there is no caption; .* caption, text, prompt"),
        ("t.csv", "caption\nA door\n", r"t\.csv:2: there is no file_name; .* audio, path"),
        ("t.csv", "file,caption\na.wav, \n", r"t\.csv:2: caption must be a text, got ' '"),
        ("t.csv", "file,caption\na.wav\n", r"t\.csv:2: the row has 1 cells, and the header 2$"),
        ("t.csv", "file,caption\na.wav,rain, hail\n", r"the row has 3 cells, and the header 2; quote a cell"),
        ("t.csv", "file,caption\na.wav,x\nd.wav,y\n", r"t\.csv:3: there is no file .*d\.wav"),
        ("t.csv", 'file,"caption\n', r"t\.csv: the first line, which names the columns, is broken"),
        ("t.csv", 'file,caption\n"a.wav,x\n', r"t\.csv:2: .*end of data"),
        ("t.csv", b"file,caption\na.wav,\xff\n", r"t\.csv is not UTF-8 text"),
        ("t.jsonl", '{"file": "a.wav", "caption": 3}', r"t\.jsonl:1: caption must be a text, got 3"),
        ("t.jsonl", "a door", r"t\.jsonl:1: not JSON: "),
        ("t.jsonl", '["a.wav", "a door"]', r"t\.jsonl:1: each line is a JSON object, got \['a\.wav'"),
    ],
)
def test_a_mistake_is_one_line(folder: Path, name: str, text: str | bytes, message: str) -> None:
    (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=message) as error:
        read_table(folder / name)
    assert "\n" not in str(error.value)


def test_a_missing_table_and_a_folder_without_one(folder: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_table(folder / "none.csv")
    with pytest.raises(ValueError, match=r"has no metadata\.csv"):
        read_table(folder)


def test_a_file_is_held_out_with_all_of_its_captions() -> None:
    items = [Item(Path(f"{i // 2}.wav"), f"caption {i}", "") for i in range(40)]
    kept, held = hold_out(items, 0.1, seed=0)
    assert sorted([*kept, *held]) == sorted(items)
    assert len(held) == 4
    assert not {item.path for item in kept} & {item.path for item in held}
    assert hold_out(items, 0.1, seed=0) == (kept, held) != hold_out(items, 0.1, seed=1)
    assert hold_out(items, 0.0, seed=0) == (items, [])
    assert len(hold_out(items, 0.001, seed=0)[1]) == 2  # one file
    with pytest.raises(ValueError, match="none of 1 files to train on"):
        hold_out(items[:2], 0.1, seed=0)
