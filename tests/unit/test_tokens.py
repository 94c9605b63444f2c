"""Token specs: pure, versioned, disjoint; and hypothesis tries to break them."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sightline.errors import TokenSpecError
from sightline.tokens import PRIME, Family, TokenSpec, normalise

CAPTIONS = ["mug, striped red, small", "mug, blue, large, on grass", "shoe, red, large"] * 2
KINDS = ("word", "bigram", "trigram")


@pytest.fixture(scope="module")
def spec() -> TokenSpec:
    return TokenSpec.fit(CAPTIONS, families=KINDS, rows=64, length=40, seed=3)


def test_ids_of_a_known_caption(spec):
    words = dict(zip(spec.families[0].vocabulary, spec.ids_of("word"), strict=True))
    ids = spec.encode("Mug,  RED")
    assert ids[:2].tolist() == [words["mug"], words["red"]]
    assert set(ids[2:4].tolist()) <= set(spec.ids_of("bigram"))  # "mug red", hashed twice
    assert ids.dtype == np.int64
    assert ids.shape == (40,)


def test_unknown_words_have_no_word_id_but_hashed_families_see_them(spec):
    ids = set(spec.encode("xylophone").tolist()) - {0}
    assert not ids & set(spec.ids_of("word"))
    assert ids <= set(spec.ids_of("trigram"))
    assert ids


def test_empty_caption_is_padding(spec):
    assert not spec.encode("").any()
    assert not spec.encode(" ,;! ").any()


def test_families_are_disjoint_and_fill_the_table(spec):
    ranges = [set(spec.ids_of(kind)) for kind in KINDS]
    assert set.union(*ranges) == set(range(1, spec.rows))
    assert sum(map(len, ranges)) == spec.rows - 1


@given(st.text(max_size=80))
def test_encode_is_pure_and_in_range(text):
    spec = TokenSpec.fit(CAPTIONS, families=KINDS, rows=16, length=12)
    again = TokenSpec.model_validate_json(json.dumps(spec.model_dump(mode="json")))
    ids = spec.encode(text)
    assert (ids == spec.encode(text)).all()
    assert (ids == again.encode(text)).all()  # what was remembered of other captions changes nothing
    assert ids.min() >= 0
    assert ids.max() < spec.rows
    used = ids[ids > 0]
    assert len(set(used.tolist())) == len(used)
    assert not ids[len(used) :].any()  # padding stands at the end only
    assert normalise(normalise(text)) == normalise(text)


def test_batch_equals_single(spec):
    batch = spec.encode_batch(CAPTIONS)
    assert (batch == np.stack([spec.encode(caption) for caption in CAPTIONS])).all()


def test_hashes_are_multiply_mod():
    family = Family(kind="bigram", rows=1000, hashes=((1, 0), (PRIME - 1, 5)))
    spec = TokenSpec(length=4, families=(family,))
    first, second = spec.encode("a b")[:2]
    # a = 1, b = 0 leaves x mod p mod rows; a = p - 1 is -x mod p.
    import hashlib

    x = int.from_bytes(hashlib.blake2b(b"a b", digest_size=8).digest(), "little")
    assert first == 1 + x % PRIME % 1000
    assert second == 1 + (5 - x) % PRIME % 1000


def test_version_names_the_content(spec, tmp_path):
    spec.save(tmp_path / "spec.json")
    again = TokenSpec.load(tmp_path / "spec.json")
    assert again.version == spec.version
    assert TokenSpec.fit(CAPTIONS, families=KINDS, rows=64, length=40, seed=4).version != spec.version


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"format": 2}, "format"),
        ({"length": 0}, "length"),
        ({"families": []}, "families"),
        ({"families": [{"kind": "word", "rows": 3, "vocabulary": ["a"]}]}, "1 words but 3 rows"),
        ({"families": [{"kind": "word", "rows": 3}]}, "either a vocabulary or hashes"),
        ({"families": [{"kind": "bigram", "rows": 3, "hashes": [[0, 0]]}]}, "hash seeds"),
        ({"colour": "red"}, "colour"),
    ],
)
def test_invalid_specs_are_refused(spec, tmp_path, change, said):
    path = tmp_path / "spec.json"
    path.write_text(json.dumps({**spec.model_dump(mode="json"), **change}))
    with pytest.raises(TokenSpecError, match=said):
        TokenSpec.load(path)


def test_missing_spec_and_hopeless_captions_are_refused(tmp_path):
    with pytest.raises(TokenSpecError, match=r"nothing\.json"):
        TokenSpec.load(tmp_path / "nothing.json")
    with pytest.raises(TokenSpecError, match="at least 2 times"):
        TokenSpec.fit(["all", "words", "differ"])
