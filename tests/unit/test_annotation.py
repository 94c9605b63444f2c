"""Annotated captions: what goes into the string comes out again, and nothing else is taken for a field."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sightline.annotation import Annotated, plain
from sightline.errors import TokenSpecError

TEXT = st.text(st.characters(exclude_characters="\x1f"))


def test_the_documented_form() -> None:
    note = Annotated("a red mug", (17, 203, 9), {"action": 7, "thriller": 3}, ("a red cup",))
    text = "a red mug\x1fs 17 203 9\x1fc action 7\x1fc thriller 3\x1fx a red cup"
    assert note.to_text() == text
    assert Annotated.parse(text) == note
    assert plain(text) == "a red mug"


@given(
    TEXT, st.lists(st.integers(0, 10**18 - 1)), st.dictionaries(TEXT.filter(bool), st.integers(0, 9)), st.lists(TEXT)
)
def test_round_trip(caption: str, codes: list[int], confidences: dict[str, int], samples: list[str]) -> None:
    note = Annotated(caption, codes, confidences, samples)
    again = Annotated.parse(note.to_text())
    assert again == note
    assert list(again.confidences) == list(confidences)
    assert plain(note.to_text()) == caption


@given(TEXT)
def test_a_plain_text_is_a_caption_without_fields(text: str) -> None:
    assert Annotated.parse(text) == Annotated(text)
    assert Annotated(text).to_text() == plain(text) == text


@given(st.text(st.sampled_from("\x1fscx 0179"), max_size=24))
def test_what_is_not_refused_is_written_back_as_it_was(text: str) -> None:
    try:
        note = Annotated.parse(text)
    except TokenSpecError:
        return
    fields = text.split("\x1f")[1:]
    assert sorted(note.to_text().split("\x1f")[1:]) == sorted(fields)  # fields of one kind keep their order


@pytest.mark.parametrize("field", [
    "", "q 3", "s", "s ", "s 1  2", "s -1", "s 01", "s 1 ", "s ١", "s " + "9" * 5000, "c", "c red", "c  7", "c red 10",
    "c red x", "x", "xa", "S 1", " s 1",
])  # fmt: skip
def test_malformed_fields_are_refused(field: str) -> None:
    with pytest.raises(TokenSpecError, match="expected `s` and codes"):
        Annotated.parse(f"a mug\x1f{field}")


@pytest.mark.parametrize("fields", [["s 1", "s 2"], ["c red 1", "c red 2"]])
def test_fields_that_are_there_twice_are_refused(fields: list[str]) -> None:
    with pytest.raises(TokenSpecError, match="is none"):
        Annotated.parse("\x1f".join(["a mug", *fields]))


@pytest.mark.parametrize("parts", [
    ("a\x1fb",), ("a", (), {"b\x1f": 1}), ("a", (), {}, ["\x1f"]), ("a", (-1,)), ("a", (10**18,)), ("a", (), {"b": 10}),
    ("a", (), {"": 1}),
])  # fmt: skip
def test_what_cannot_be_written_is_refused(parts: tuple) -> None:
    with pytest.raises(TokenSpecError, match="expected"):
        Annotated(*parts)
