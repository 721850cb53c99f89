"""File names for any prompt."""

from __future__ import annotations

import pytest
from hypothesis import given, strategies as st

from audioldm2.batch.names import MAX_BYTES, distinct, file_name, split_name


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("A dog barks", "A-dog-barks"),
        ("../../etc/passwd", "etc-passwd"),
        ("C:\\temp\\a", "C-temp-a"),
        ("", "sound"),
        ("🎵 ???", "sound"),
        (".hidden.", "hidden"),
        ("CON", "_CON"),
        ("aux.noise", "_aux.noise"),
        ("Дождь  雨", "Дождь-雨"),
        ("a\nb\0c", "a-b-c"),
        ("x" * 300, "x" * MAX_BYTES),
        ("雨" * 300, "雨" * (MAX_BYTES // 3)),
    ],
)
def test_names_of_prompts(text: str, name: str) -> None:
    assert file_name(text, spaces="-") == name


@given(st.text())
def test_every_text_has_a_name_that_is_valid_everywhere(text: str) -> None:
    name = file_name(text)
    assert 0 < len(name.encode()) <= MAX_BYTES
    assert name == name.strip(" .")
    assert not set(name) & set('/\\:*?"<>|\0\n\r\t')
    assert file_name(name) == name


@given(st.lists(st.sampled_from(["rain", "Rain", "rain-2", "bell", "ＲＡＩＮ"]), max_size=12))
def test_names_are_made_distinct_in_any_case(names: list[str]) -> None:
    found = distinct(names)
    assert len({name.casefold() for name in found}) == len(names)
    assert all(name.startswith(wanted) for name, wanted in zip(found, names, strict=True))


def test_distinct_names_are_numbered() -> None:
    assert distinct(["a", "A", "a-2", "b", "a"]) == ["a", "A-2", "a-2-2", "b", "a-3"]


def test_the_suffix_of_a_sound_file_is_split_off() -> None:
    assert split_name("dog.FLAC") == ("dog", ".flac")
    assert split_name("dog.v2") == ("dog.v2", "")
    assert split_name("dog") == ("dog", "")
