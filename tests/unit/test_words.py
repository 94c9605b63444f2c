"""Word levels: the definition, number by number, and files that are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sightline.errors import ConfigError
from sightline.words import WordHead


def saved(folder: Path, **change: Any) -> Path:
    """words.npz of four words on one frame of width 4: a word's logit is its own feature."""
    arrays = {
        "words": np.array(["▁red", "mug", "▁blue", ","]), "rate": np.full(4, 0.09, np.float32),
        "weight": np.eye(4, dtype=np.float32), "bias": np.zeros(4, np.float32), "frames": np.array(1),
    }  # fmt: skip
    np.savez(folder / "words.npz", **arrays | change)
    return folder


def head(folder: Path, **change: Any) -> WordHead:
    made = WordHead.from_pretrained(saved(folder, **change))
    assert made is not None
    return made


def logit(p: float) -> float:
    return float(np.log(p / (1 - p)))


@pytest.mark.parametrize(
    ("ratio", "level"),
    [(0.2, 0), (1, 0), (1.16, 0), (1.17, 1), (1.49, 1), (1.51, 2), (2, 3), (3, 6), (3.83, 8), (3.84, 9), (9, 9)],
)
def test_a_level_is_thirds_above_the_usual_share(tmp_path: Path, ratio: float, level: int) -> None:
    """rate + 0.01 is 0.1, so a probability of 0.1 · ratio; -50 is a word that nothing speaks for."""
    features = np.array([[logit(0.1 * ratio), -50, -50, -50]], np.float32)
    assert head(tmp_path)([features]) == [{"red": level} if level else {}]


def test_words_are_cleaned_and_pieces_of_one_word_count_once(tmp_path: Path) -> None:
    features = np.full((1, 4), logit(0.3), np.float32)
    assert head(tmp_path)([features]) == [{"red": 6, "mug": 6, "blue": 6}], "a comma is no word"
    twice = head(tmp_path, words=np.array(["▁red", "red", "▁", "<0x0A>"]))
    assert twice([np.array([[logit(0.2), logit(0.3), 9, 9]], np.float32)]) == [{"red": 6}]
    assert twice([np.array([[logit(0.3), -50, 9, 9]], np.float32)]) == [{"red": 6}]


def test_frames_are_read_in_order_and_repeated_to_the_heads_number(tmp_path: Path) -> None:
    """A head of three frames that gives each word the feature of one frame: first, middle, last, and the middle."""
    weight = np.zeros((4, 3 * 2), np.float32)
    weight[[0, 1, 2, 3], [0, 2, 4, 3]] = 1
    three = head(tmp_path, words=np.array(["a", "b", "c", "d"]), weight=weight, frames=np.array(3))
    video = np.array([[logit(0.2), 0], [9, 9], [logit(0.3), logit(0.4)], [9, 9], [-50, 9]], np.float32)
    assert three([video]) == [{"a": 3, "b": 6, "d": 9}]
    assert three([video[:1]]) == [{"a": 3, "b": 3, "c": 3, "d": 9}], "a picture is a still video"
    assert three([video[[0, 4]]]) == [{"a": 3, "b": 3, "d": 9}]


def test_items_do_not_depend_on_their_batch(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    wide = head(
        tmp_path, weight=random.normal(0, 0.05, (4, 3 * 700)).astype(np.float32), frames=np.array(3),
        words=np.array(["a", "b", "c", "d"]),
    )  # fmt: skip
    items = [random.normal(0, 1, (n, 700)).astype(np.float32) for n in (1, 4, 3, 1, 2) * 5]
    together = wide(items)
    assert together == [wide([item])[0] for item in items]
    assert len({tuple(one.items()) for one in together}) > 20


def test_no_file_is_no_head(tmp_path: Path) -> None:
    assert WordHead.from_pretrained(tmp_path) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bias": np.zeros(3, np.float32)}, r"4 words and 1 frames, but rate, bias and weight of \[\(4,\), \(3,\)"),
        ({"frames": np.array(3)}, "4 words and 3 frames"),
        ({"frames": np.array(0)}, "4 words and 0 frames"),
        ({"weight": np.zeros(4, np.float32)}, r"expected \[words\], \[words\] and \[words, frames · width\]"),
        ({"words": np.array(["red", None, "mug", "x"], dtype=object)}, "expected words, rate, weight, bias and frames"),
    ],
)
def test_arrays_that_do_not_belong_together_are_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        head(tmp_path, **change)


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path) / "words.npz"
    whole = path.read_bytes()
    for damaged in (b"", b"no archive", whole[: len(whole) // 2], whole.replace(b"rate.npy", b"rat1.npy")):
        path.write_bytes(damaged)
        with pytest.raises(ConfigError, match=r"words\.npz: expected words, rate.*Train the captioner again"):
            WordHead.from_pretrained(tmp_path)


def test_features_of_another_tower_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="made for a vision tower of width 4, this one has 5"):
        head(tmp_path)([np.zeros((1, 5), np.float32)])
