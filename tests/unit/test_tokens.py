"""Token specs: pure, versioned, disjoint, every family; and hypothesis tries to break them."""

from __future__ import annotations

import hashlib
import json
import pickle

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from catalogue.attributes import Attributes, caption_slots
from catalogue.movies import movie_slots
from sightline import token_batch
from sightline.annotation import Annotated
from sightline.errors import TokenSpecError
from sightline.token_families import KINDS as ALL
from sightline.token_families import PRIME, Family, normalise
from sightline.tokens import TokenSpec
from tests.fake_triton import Request, load_model

CAPTIONS = ["mug, striped red, small", "mug, blue, large, on grass", "shoe, red, large"] * 2
KINDS = ("word", "bigram", "trigram")
TEXT = st.text(st.characters(exclude_characters="\x1f", exclude_categories=["Cs"]), max_size=80)


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


@given(TEXT)
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


def digest(token):
    return int.from_bytes(hashlib.blake2b(token.encode(), digest_size=8).digest(), "little")


@given(st.lists(st.integers(1, PRIME - 1), min_size=6, max_size=6), st.text(max_size=9))
@example([PRIME - 1] * 6, "")
def test_hashes_equal_pythons_unlimited_integers(seeds, token):
    family = Family(kind="trigram", rows=997, hashes=(tuple(seeds[:2]), tuple(seeds[2:4])))
    x = digest(token)
    expected = [(a * x + b) % PRIME % 997 for a, b in family.hashes]
    assert family.hashed([token, token + "!"])[0].tolist() == expected
    pairs = Family(kind="bigram", rows=997, hashes=(tuple(seeds[:3]), tuple(seeds[3:])))
    expected = [(a * digest("mug") + c * digest("ｒed") + b) % PRIME % 997 for a, c, b in pairs.hashes]
    assert pairs.hashed(["mug ｒed", "ｒed mug"])[0].tolist() == expected


# --- batches ----------------------------------------------------------------------------------------

NOTED = [
    Annotated("mug, striped red, small", (3, 1, 4), {"mug": 9, "red": 2}, ("mug, red", "a red cup")).to_text(),
    Annotated("shoe, red, large, on grass", (3, 1, 5), {"shoe": 7, "red": 2}, ("shoe, red",)).to_text(),
    Annotated("mug, blue, set of two", (3, 2), {"mug": 9}, ("mug, on grass", "mug", "a mug")).to_text(),
]
NOTES = st.builds(
    lambda *parts: Annotated(*parts).to_text(),
    TEXT, st.lists(st.integers(0, 9), max_size=3),
    st.dictionaries(st.sampled_from(["mug", "red", "Ünder"]), st.integers(0, 9)), st.lists(TEXT, max_size=3),
)  # fmt: skip
# Few different words make repeated ones, repeated trigrams and texts that are cut at the spec's length.
ODD = ("mug", "red", "aaaa", "ba\0b", "ßtraße", "ﬁre", "Ǆ", ",", "\n", "_", "２")
WORDY = st.lists(st.sampled_from(ODD), max_size=30)


def every_family(length, rows):
    return TokenSpec.fit(NOTED * 2, families=ALL, rows=rows, length=length, seed=1)


@settings(deadline=None)
@given(
    st.lists(st.one_of(TEXT, NOTES, WORDY.map(" ".join)), max_size=40),
    st.integers(1, 300), st.sampled_from([1, 7, 4096]), st.permutations(ALL),
)  # fmt: skip
def test_batch_equals_single(texts, length, rows, order):
    fitted = every_family(length, rows)
    spec = TokenSpec(length=length, families=tuple(sorted(fitted.families, key=lambda f: order.index(f.kind))))
    texts = [*texts, *(f"text {i}" for i in range(token_batch.SMALL + 1)), "", *texts[:3]]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(token_batch, "CHUNK", 7)
        patch.setattr(token_batch, "BLOCK", 23)
        batch = spec.encode_batch(texts)
    np.testing.assert_array_equal(batch, np.stack([spec.encode(text) for text in texts]))
    assert batch.dtype == np.int64


@given(st.lists(st.lists(st.sampled_from(["set", "of", "two", "mugs", "mug", "on", "grass", "ßet"])), max_size=30))
def test_phrases_of_a_batch_are_those_of_one(spoken):
    phrases = ("set of two", "set of", "of two", "two mugs", "mug", "two mugs on grass")
    spec = TokenSpec(length=5, families=(Family(kind="slot", vocabulary=phrases, rows=len(phrases)),))
    texts = [*(" ".join(words) for words in spoken), *(f"set of two mugs on {i}" for i in range(token_batch.SMALL + 1))]
    np.testing.assert_array_equal(spec.encode_batch(texts), np.stack([spec.encode(text) for text in texts]))


def test_rows_behind_many_repetitions_are_found():
    spec = TokenSpec.fit(["mug shoe red", "red shoe mug"], families=["word", "trigram"], rows=64, length=4)
    texts = [f"{'mug ' * n} shoe red {n}" for n in range(1, 400, 9)]
    batch = spec.encode_batch(texts)
    np.testing.assert_array_equal(batch, np.stack([spec.encode(text) for text in texts]))
    assert all(set(spec.ids_of("word")) <= set(row) for row in batch.tolist())


def test_batches_of_nothing_and_of_one(spec):
    assert spec.encode_batch([]).shape == (0, 40)
    assert (spec.encode_batch(CAPTIONS[:1])[0] == spec.encode(CAPTIONS[0])).all()
    blank = [" " * n for n in range(50)]
    assert not spec.encode_batch(blank).any()


def test_a_malformed_text_is_refused_by_one_and_by_many(spec):
    with pytest.raises(TokenSpecError, match="field 'q 3' is none"):
        spec.encode("mug\x1fq 3")
    with pytest.raises(TokenSpecError, match="field 'q 3' is none"):
        spec.encode_batch([*map(str, range(50)), "mug\x1fq 3"])


# --- families ---------------------------------------------------------------------------------------


def tokens_of(spec, kind, text):
    return [token.text for token in spec.tokens(text) if token.kind == kind]


def test_every_family_has_its_tokens():
    spec = every_family(64, 512)
    text = Annotated("Mug, red", (3, 1), {"Mug": 9, "red": 5}, ("red mug red", "a red cup", "red")).to_text()
    expected = {
        "word": ["mug", "red"], "bigram": ["mug red"], "trigram": [" mu", "mug", "ug ", " re", "red", "ed "],
        "semantic": ["3", "3 1"], "confidence": ["mug 9", "red 5"],
        "sample": ["red 1", "mug 0", "a 0", "cup 0"],  # red: 3 samples, bin 2–3; the others once
    }  # fmt: skip
    for kind, tokens in expected.items():
        assert tokens_of(spec, kind, text) == tokens
    rows = {token.text: token.rows for token in spec.tokens(text) if token.kind == "confidence"}
    assert len(rows["mug 9"]) == len(rows["red 5"]) == 1  # all levels of a word, seen or not
    assert sum(family.rows for family in spec.families) == spec.rows - 1
    assert {row for token in spec.tokens(text) for row in token.rows} == set(spec.encode(text).tolist()) - {0}


@pytest.mark.parametrize("kind", ALL)
def test_each_family_works_alone(kind):
    spec = TokenSpec.fit(NOTED * 2, families=[kind], rows=64, length=32)
    ids = spec.encode_batch(NOTED)
    assert ids.any(axis=1).all()
    assert set(ids[ids > 0].tolist()) <= set(spec.ids_of(kind))
    assert len({tuple(row) for row in ids.tolist()}) == len(NOTED)  # each tells these three apart
    assert spec.encode(NOTED[0].partition("\x1f")[0]).any() == (kind not in ("semantic", "confidence", "sample"))


def test_codes_share_what_they_begin_with():
    spec = TokenSpec.fit(NOTED, families=["semantic"], rows=4096, length=8)
    near, far = (set(spec.encode(Annotated("", codes).to_text()).tolist()) for codes in ((3, 1, 9), (4, 1, 4)))
    own = set(spec.encode(NOTED[0]).tolist())
    assert len(own & near - {0}) == 4  # 3 and 3 1, two rows each
    assert not own & far - {0}


def test_slots_of_a_grammar_are_its_phrases():
    looks = [
        Attributes(object=o, colour=c, pattern=p, size="small", count=n, setting="at night", motion="moving left")
        for o in ("mug", "bag") for c in ("red", "blue") for p in ("plain", "striped") for n in ("single", "set of two")
    ]  # fmt: skip
    captions = [look.caption() for look in looks]
    spec = TokenSpec.fit(captions, families=["slot"], slots=caption_slots, length=12)
    for look, caption in zip(looks, captions, strict=True):
        said = {value for _, value in look.slots()} - {"plain"}  # plain is what no word says
        assert set(tokens_of(spec, "slot", caption)) == said
    movies = ["an action and film-noir film from the 1990s", "a film-noir film from the 1980s"] * 2
    spec = TokenSpec.fit(movies, families=["slot"], slots=movie_slots, length=12)
    assert spec.families[0].vocabulary == ("film noir", "1980s", "1990s", "action")
    assert np.count_nonzero(spec.encode(movies[0])) == 3


def test_phrases_are_found_by_frequency():
    rng = np.random.default_rng(0)
    captions = [
        f"{rng.choice(['mug', 'bag'])} {rng.choice(['red', 'blue'])} {rng.choice(['set of two', 'traffic light'])}"
        for _ in range(400)
    ]
    spec = TokenSpec.fit(captions, families=["slot"], length=12)
    assert {"set of two", "traffic light", "mug", "red"} <= set(spec.families[0].vocabulary)
    assert not {"mug red", "bag blue", "red set"} & set(spec.families[0].vocabulary)  # free combinations
    assert tokens_of(spec, "slot", "Red mug, set of two, of two!") == ["red", "mug", "set of two", "of two"]
    assert tokens_of(spec, "slot", "red dragon") == ["red", "dragon"]  # unknown, so without a row
    assert np.count_nonzero(spec.encode("red dragon")) == 1


def test_subwords_come_from_the_spec_alone(tmp_path):
    captions = ["blueberry cake", "strawberry cake", "raspberry bluebird"] * 3
    spec = TokenSpec.fit(captions, families=["subword"], length=24, pieces=24)
    assert TokenSpec.fit(captions, families=["subword"], length=24, pieces=24).version == spec.version
    spec.save(tmp_path / "spec.json")
    again = TokenSpec.load(tmp_path / "spec.json")
    assert (again.encode("bluestraw pie") == spec.encode("bluestraw pie")).all()
    assert (pickle.loads(pickle.dumps(spec)).encode("bluestraw") == spec.encode("bluestraw")).all()
    assert spec.encode("berrybird").any()  # no caption has this word, but its pieces are known
    from trainer.captioner_model import train_tokenizer

    captioner = train_tokenizer(captions, vocab_size=400)
    given_one = TokenSpec.fit(captions, families=["subword"], length=24, tokenizer=captioner.to_str())
    assert given_one.version != spec.version
    pieces = [piece for word in ("blueberry", "cake") for piece in captioner.encode(word).tokens[1:]]  # without <s>
    assert tokens_of(given_one, "subword", captions[0]) == pieces


def test_specs_of_format_1_keep_their_version():
    # Version and ids that this document had when there were only words, bigrams and trigrams.
    document = {
        "format": 1, "normalisation": "nfkc-casefold-words", "length": 9,
        "families": [
            {"kind": "word", "vocabulary": ["mug", "red"], "rows": 2, "hashes": []},
            {"kind": "trigram", "vocabulary": None, "rows": 5, "hashes": [[1, 2], [3, 4]]},
        ],
    }  # fmt: skip
    spec = TokenSpec.model_validate(document)
    assert spec.version == "a26ca47b3557"
    assert spec.encode("red ox").tolist() == [2, 4, 6, 5, 3, 0, 0, 0, 0]


def test_names_of_rows(spec):
    words = spec.ids_of("word")
    assert spec.name_of(words[0]) == ("word", spec.families[0].vocabulary[0])
    assert spec.name_of(spec.ids_of("bigram")[3]) == ("bigram", "#3")
    for row in (0, spec.rows):
        with pytest.raises(TokenSpecError, match=f"row {row}: expected 1"):
            spec.name_of(row)


# --- statistics -------------------------------------------------------------------------------------


def test_statistics_of_a_vocabulary():
    spec = TokenSpec.fit(CAPTIONS, families=["word", "bigram"], rows=4096, length=2)
    found = spec.statistics(["mug red xylophone", "xylophone", "mug red xylophone", ""])
    word = found.families["word"]
    assert (word.rows, word.used_rows, word.distinct) == (len(spec.ids_of("word")), 2, 3)
    assert word.token_coverage == 4 / 7
    assert word.caption_coverage == 2 / 4
    assert word.ids == 4 / 4
    assert (word.full_collisions, word.partial_collisions, word.truncated) == (0, 0, 0)
    assert (found.captions, found.truncated, found.families["bigram"].truncated) == (4, 0.5, 0.5)


def test_statistics_count_collisions():
    # One hash, to 2 rows: every token shares its only one. Two rows of a large table: hardly any does.
    small = TokenSpec(length=8, families=(Family(kind="bigram", rows=2, hashes=((1, 1, 0),)),))
    captions = [f"a{i} b{i}" for i in range(50)]
    crowded = small.statistics(captions).families["bigram"]
    assert (crowded.full_collisions, crowded.partial_collisions, crowded.used_rows) == (1, 1, 2)
    large = TokenSpec.fit(CAPTIONS, families=["bigram"], rows=1000).statistics(captions).families["bigram"]
    assert large.full_collisions == 0
    # 50 tokens on 100 of 1000 rows: one of the other 98 shares a row with about 2 · 98 / 1000 of the tokens.
    assert 0 < large.partial_collisions < 0.4
    nothing = small.statistics([])
    assert (nothing.captions, nothing.truncated, nothing.families["bigram"].ids) == (0, 0, 0)


def test_hashes_are_multiply_mod():
    family = Family(kind="bigram", rows=1000, hashes=((1, 2, 0), (PRIME - 1, 1, 5)))
    spec = TokenSpec(length=4, families=(family,))
    first, second = spec.encode("a b")[:2]
    # A multiplier of p - 1 is one of -1.
    x, y = digest("a"), digest("b")
    assert first == 1 + (x + 2 * y) % PRIME % 1000
    assert second == 1 + (5 + y - x) % PRIME % 1000
    assert set(spec.encode("b a").tolist()) != set(spec.encode("a b").tolist())


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
        ({"families": [{"kind": "trigram", "rows": 3, "hashes": [[0, 0]]}]}, "hash seeds of 1 multipliers 0 < a < p"),
        ({"families": [{"kind": "bigram", "rows": 3, "hashes": [[1, 1]]}]}, "hash seeds of 2 .* fit the spec again"),
        ({"families": [{"kind": "bigram", "rows": 1, "vocabulary": ["a b"]}]}, "pairs of words have no vocabulary"),
        ({"families": [{"kind": "subword", "rows": 1, "vocabulary": ["a"]}]}, "expected a tokenizer"),
        ({"families": [{"kind": "word", "rows": 1, "vocabulary": ["a"], "tokenizer": "{}"}]}, "for no other family"),
        ({"families": [{"kind": "subword", "rows": 1, "vocabulary": ["a"], "tokenizer": "{"}]}, "not a tokenizer"),
        ({"families": [{"kind": "slot", "rows": 3, "hashes": [[1, 0]]}]}, "phrases"),
        ({"families": [{"kind": "word", "rows": 1, "vocabulary": ["a"]}] * 2}, "expected each once"),
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
    with pytest.raises(TokenSpecError, match=r"family confidence: .* leave the family out"):
        TokenSpec.fit(CAPTIONS, families=["confidence"])
    with pytest.raises(TokenSpecError, match="family 'emoji': expected some of word"):
        TokenSpec.fit(CAPTIONS, families=["emoji"])
    with pytest.raises(TokenSpecError, match="each once"):
        TokenSpec.fit(CAPTIONS, families=["bigram", "bigram"])
    with pytest.raises(TokenSpecError, match="not a tokenizer"):
        TokenSpec.fit(CAPTIONS, families=["subword"], tokenizer="{}")


# --- served -----------------------------------------------------------------------------------------


def test_the_tokenize_model_answers_rows_and_refuses_only_the_malformed_request(tmp_path):
    spec = every_family(24, 64)
    (tmp_path / "1").mkdir()
    spec.save(tmp_path / "1" / "token_spec.json")
    model = load_model("model_repository/tokenize/1/model.py").TritonPythonModel()
    model.initialize({"model_repository": str(tmp_path), "model_version": "1"})

    def request(*captions: bytes) -> Request:
        return Request(["ITEM_TOKENS"], CAPTION=np.array(captions, dtype=object)[:, None])

    good = [request(NOTED[0].encode(), b"mug"), request(b"red \xff")]
    whole = model.execute(good)
    assert [answer.error for answer in whole] == [None, None]
    expected = [spec.encode_batch([NOTED[0], "mug"]), spec.encode_batch(["red \ufffd"])]
    for answer, ids in zip(whole, expected, strict=True):
        np.testing.assert_array_equal(answer.tensors["ITEM_TOKENS"], ids)
    mixed = model.execute([good[0], request(b"mug\x1fs one"), good[1]])
    assert "field 's one' is none" in mixed[1].error.message
    assert mixed[1].error.code == "INVALID_ARG"
    for answer, ids in zip(mixed[::2], expected, strict=True):
        np.testing.assert_array_equal(answer.tensors["ITEM_TOKENS"], ids)


@pytest.mark.parametrize("beside", ["word", "slot", "trigram"])
def test_levels_of_a_word_are_amounts_of_the_word(beside):
    spec = TokenSpec.fit(NOTED * 2, families=[beside, "confidence"], length=32)
    levels = spec.ids_of("confidence")
    first = {spec.name_of(row)[1].rpartition(" ")[0]: row for row in levels if spec.name_of(row)[1].endswith(" 1")}
    others = spec.families[0].vocabulary or ()
    assert len(first) > 1
    assert beside == "trigram" or set(first) & set(others)
    for row in levels:
        word, _, level = spec.name_of(row)[1].rpartition(" ")
        assert spec.amount[row] == pytest.approx(int(level) / 3)
        assert spec.base[row] == (1 + others.index(word) if word in others else first[word])
    rest = np.arange(levels[0])
    assert (spec.base[rest] == rest).all()
    assert (spec.amount[rest] == np.minimum(rest, 1)).all()
    base, amount = spec.amounts_of("confidence")
    assert not base[rest].any()
    assert not amount[rest].any()
    assert (base[levels.start :] == spec.base[levels.start :]).all()


def test_a_confidence_vocabulary_without_all_levels_is_refused():
    spec = TokenSpec.fit(NOTED * 2, families=["confidence"], length=32)
    document = spec.model_dump(mode="json")
    vocabulary = document["families"][0]["vocabulary"]
    document["families"][0] |= {"vocabulary": vocabulary[:-1], "rows": len(vocabulary) - 1}
    with pytest.raises(ValidationError, match="`word 1` … `word 9`"):
        TokenSpec.model_validate(document)
