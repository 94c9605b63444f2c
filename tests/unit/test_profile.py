"""User token profiles: weights, order, and no look into the future."""

from __future__ import annotations

import numpy as np
import pytest

from sightline.errors import ConfigError
from sightline.profile import ProfileConfig, UserProfiles

ROWS = range(1, 100)


def tokens(*ids: int) -> np.ndarray:
    return np.array(ids, dtype=np.int64)


def test_only_positives_enter_and_recent_ones_weigh_more():
    profiles = UserProfiles(ProfileConfig(length=4, half_life=1.0), ROWS)
    profiles.observe(1, tokens(5, 0), strength=1.0)
    profiles.observe(1, tokens(9), strength=-1.0)
    profiles.observe(1, tokens(6, 200), strength=1.0)  # 200 is outside of the profile's rows
    read = profiles.read(1)
    assert read.tokens.tolist() == [6, 5, 0, 0]
    assert read.weights == pytest.approx([2 / 3, 1 / 3, 0, 0])
    assert read.dense[:2] == pytest.approx(np.log1p([3, 2]))
    assert read.dense[2] == pytest.approx((2 + 10 * 0.2) / (3 + 10))


def test_reading_does_not_change_anything_and_users_are_apart():
    profiles = UserProfiles(ProfileConfig(length=2), ROWS)
    profiles.observe(1, tokens(3), strength=1.0)
    before = profiles.read(1)
    profiles.read(2)
    profiles.observe(2, tokens(4), strength=1.0)
    after = profiles.read(1)
    assert before.tokens.tolist() == after.tokens.tolist() == [3, 0]
    assert list(profiles) == [1, 2]


def test_stranger_has_the_prior():
    stranger = UserProfiles(ProfileConfig(length=2, prior_rate=0.3), ROWS).read(77)
    assert not stranger.tokens.any()
    assert not stranger.weights.any()
    assert stranger.dense == pytest.approx([0, 0, 0.3])


def test_ties_go_to_the_smaller_id():
    profiles = UserProfiles(ProfileConfig(length=2), ROWS)
    profiles.observe(1, tokens(9, 4, 7), strength=1.0)
    assert profiles.read(1).tokens.tolist() == [4, 7]


def test_long_histories_stay_finite_and_equal_the_direct_formula():
    config = ProfileConfig(length=8, half_life=3.0)
    profiles = UserProfiles(config, ROWS)
    rng = np.random.default_rng(0)
    history = rng.integers(1, 20, (500, 3))
    for row in history:
        profiles.observe(1, row, strength=1.0)
    age = np.arange(len(history))[::-1]
    direct = np.bincount(history.ravel(), np.repeat(0.5 ** (age / 3.0), 3), minlength=20)
    best = np.argsort(-direct, kind="stable")[:8]
    read = profiles.read(1)
    assert read.tokens.tolist() == best.tolist()
    assert read.weights == pytest.approx(direct[best] / direct[best].sum(), rel=1e-5)


def test_dislikes_are_a_profile_of_their_own():
    profiles = UserProfiles(ProfileConfig(length=3, half_life=1.0), ROWS)
    likes_alone = UserProfiles(ProfileConfig(length=3, half_life=1.0), ROWS)
    for ids, strength in (((5,), 1.0), ((9,), -1.0), ((5, 8), -1.0), ((6,), 1.0), ((7,), 0.0)):
        profiles.observe(1, tokens(*ids), strength=strength)
        if strength > 0:
            likes_alone.observe(1, tokens(*ids), strength=strength)
    read = profiles.read(1)
    assert read.negative_tokens.tolist() == [5, 8, 9]
    assert read.negative_weights == pytest.approx([0.4, 0.4, 0.2])
    # Dislikes neither age likes nor take from them; an event of strength 0 is counted and nothing else.
    assert read.tokens.tolist() == likes_alone.read(1).tokens.tolist() == [6, 5, 0]
    assert (read.weights == likes_alone.read(1).weights).all()
    assert read.dense[:2] == pytest.approx(np.log1p([5, 2]))


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_strength_times_recency(sign):
    """Against the direct formula Σ |strength| · 2^(−age / half-life), on histories that are read now and then."""
    config = ProfileConfig(length=6, half_life=5.0)
    profiles = UserProfiles(config, ROWS)
    rng = np.random.default_rng(1)
    history, strength = rng.integers(1, 30, (300, 4)), rng.uniform(0.1, 2.0, 300)
    for event, (row, size) in enumerate(zip(history, strength, strict=True)):
        profiles.observe(1, row, strength=sign * size)
        if event % 7:
            continue
        age = np.arange(event + 1)[::-1]
        share = np.repeat(strength[: event + 1] * 0.5 ** (age / 5.0), 4)
        direct = np.bincount(history[: event + 1].ravel(), share, minlength=30)
        best = np.argsort(-direct, kind="stable")[:6]
        best = best[direct[best] > 0]
        read = profiles.read(1)
        found = (read.tokens, read.weights) if sign > 0 else (read.negative_tokens, read.negative_weights)
        assert found[0][: len(best)].tolist() == best.tolist()
        assert found[1][: len(best)] == pytest.approx(direct[best] / direct[best].sum(), rel=1e-5)


def test_likes_of_strength_1_give_the_numbers_that_they_always_gave():
    profiles = UserProfiles(ProfileConfig(length=4, half_life=3.0), ROWS)
    rng = np.random.default_rng(7)
    for row, liked in zip(rng.integers(1, 12, (60, 3)), rng.uniform(size=60) < 0.4, strict=True):
        profiles.observe(1, row, strength=1.0 if liked else -1.0)
    read = profiles.read(1)
    assert read.tokens.tolist() == [5, 11, 7, 3]
    assert read.weights.tolist() == [0.4015502333641052, 0.2636791169643402, 0.197459414601326, 0.13731124997138977]
    assert read.dense.tolist() == [4.110873699188232, 3.044522523880005, 0.3142857253551483]


@pytest.mark.parametrize("bad", [{"length": 0}, {"half_life": 0.0}, {"prior_rate": 1.5}])
def test_bad_configuration(bad):
    with pytest.raises(ConfigError, match="expected"):
        ProfileConfig(**bad)
