"""User token profiles: affinities, order, and no look into the future."""

from __future__ import annotations

import numpy as np
import pytest

from sightline.errors import ConfigError
from sightline.profile import ProfileConfig, UserProfiles

BASE, AMOUNT = np.arange(100), np.ones(100, np.float32)
FOREVER = 1e12


def tokens(*ids: int) -> np.ndarray:
    return np.array(ids, dtype=np.int64)


def new(base: np.ndarray = BASE, amount: np.ndarray = AMOUNT, **config: float) -> UserProfiles:
    config = {"length": 4, "half_life": FOREVER, "prior_strength": 0.0} | config
    return UserProfiles(ProfileConfig(**config), base, amount)


def affinities(
    history: np.ndarray, strength: np.ndarray, config: ProfileConfig, base: np.ndarray = BASE,
    amount: np.ndarray = AMOUNT,
) -> np.ndarray:  # fmt: skip
    """The formula of the module, event by event: affinity of every token, 0 for those never met."""
    surprise, evidence = np.zeros(len(base)), np.full(len(base), config.prior)
    mood = 0.0
    for event, (row, how) in enumerate(zip(history, strength, strict=True)):
        mean = (strength[:event].sum() + 10 * config.prior_strength) / (event + 10)
        recency = 0.5 ** ((len(history) - 1 - event) / config.half_life)
        for token in row[base[row] > 0]:
            surprise[base[token]] += recency * amount[token] * (how - mean - mood)
            evidence[base[token]] += recency * amount[token]
        mood = 0.9 * mood + 0.1 * (how - mean)
    return surprise / evidence


def both(profile) -> dict[int, float]:
    """Token → signed affinity of both lists."""
    sides = ((profile.tokens, profile.weights, 1), (profile.negative_tokens, profile.negative_weights, -1))
    return {t: s * w for ids, weights, s in sides for t, w in zip(ids.tolist(), weights.tolist(), strict=True) if t}


def test_what_is_better_than_usual_and_what_is_worse():
    profiles = new(prior=1.0)
    profiles.observe(1, tokens(5, 7, 0), strength=1.0)  # surprise 1, mood .1 after it
    profiles.observe(1, tokens(5, 8), strength=-1.0)  # mean 1/11, surprise −12/11 − .1
    read = profiles.read(1)
    assert read.tokens.tolist() == [7, 0, 0, 0]
    assert read.weights == pytest.approx([1 / 2, 0, 0, 0])
    assert read.negative_tokens.tolist() == [8, 5, 0, 0]
    assert read.negative_weights == pytest.approx([(12 / 11 + 0.1) / 2, (1 / 11 + 0.1) / 3, 0, 0])
    assert read.dense == pytest.approx([np.log1p(2), np.log1p(1), 0, 0.09 - 0.1 * 12 / 11])


@pytest.mark.parametrize("half_life", [3.0, 40.0, FOREVER])
def test_equal_to_the_formula_on_long_histories_that_are_read_now_and_then(half_life):
    config = ProfileConfig(length=30, half_life=half_life, prior=2.0, prior_strength=-0.4)
    profiles = UserProfiles(config, BASE, AMOUNT)
    rng = np.random.default_rng(0)
    history, strength = rng.integers(1, 30, (300, 3)), rng.uniform(-1, 1, 300)
    for event, (row, how) in enumerate(zip(history, strength, strict=True)):
        profiles.observe(1, row, strength=how)
        if event % 13 == 0 or event == 299:
            wanted = affinities(history[: event + 1], strength[: event + 1], config)
            found = both(profiles.read(1))
            assert set(found) == set(np.flatnonzero(wanted))
            assert list(found.values()) == pytest.approx(wanted[list(found)], rel=1e-5)


def test_lists_hold_the_strongest_first_and_ties_go_to_the_smaller_id():
    profiles = new(length=2)
    profiles.observe(1, tokens(9, 4, 7), strength=1.0)
    assert profiles.read(1).tokens.tolist() == [4, 7]
    profiles.observe(1, tokens(9), strength=1.0)
    assert profiles.read(1).tokens.tolist() == [9, 4]
    assert not profiles.read(1).negative_tokens.any()


def test_levels_of_a_word_are_amounts_of_one_token():
    base, amount = np.array([0, 1, 1, 1, 4, 0]), np.array([0, 1 / 3, 2 / 3, 1, 1, 1], np.float32)
    rng = np.random.default_rng(3)
    history, strength = rng.integers(0, 6, (40, 2)), rng.uniform(-1, 1, 40)
    profiles = new(base, amount)
    for row, how in zip(history, strength, strict=True):
        profiles.observe(1, row, strength=how)
    wanted = affinities(history, strength, profiles.config, base, amount)
    found = both(profiles.read(1))
    assert set(found) == {1, 4}  # token 5 is part of no profile
    assert [found[1], found[4]] == pytest.approx(wanted[[1, 4]], rel=1e-5)


def test_a_good_session_is_a_mood_and_no_taste():
    """The same user met token 3 in a session taken well and token 4 in one taken badly: that is no affinity."""
    profiles = new(prior=1.0)
    for session in range(20):
        for _ in range(60):
            profiles.observe(1, tokens(3 + session % 2), strength=1.0 - 2 * (session % 2))
    assert max(map(abs, both(profiles.read(1)).values())) < 0.35  # 1 if the mood were left in
    assert profiles.read(1).dense[3] < -0.8  # the last session was a bad one


def test_many_recent_events_forget_the_old_ones_and_stay_finite():
    profiles = new(half_life=1.0)
    profiles.observe(1, tokens(3), strength=1.0)
    for _ in range(500):  # beyond the point where sums are rescaled, several times
        profiles.observe(1, tokens(6), strength=-1.0)
    found = both(profiles.read(1))
    assert abs(found.get(3, 0.0)) < 1e-30
    assert abs(found[6]) < 1


def test_reading_does_not_change_anything_and_users_are_apart():
    profiles = new()
    profiles.observe(1, tokens(3), strength=1.0)
    before = profiles.read(1)
    profiles.read(2)
    profiles.observe(2, tokens(4), strength=1.0)
    assert profiles.read(1) is before
    assert before.tokens.tolist() == [3, 0, 0, 0]
    profiles.observe(1, tokens(5), strength=0.5)
    assert before.tokens.tolist() == [3, 0, 0, 0]  # what was read stays as it was
    assert list(profiles) == [1, 2]


def test_stranger_has_the_prior():
    stranger = new(prior_strength=0.3).read(77)
    assert not stranger.tokens.any()
    assert not stranger.weights.any()
    assert stranger.dense == pytest.approx([0, 0, 0.3, 0])


@pytest.mark.parametrize("bad", [{"length": 0}, {"half_life": 0.0}, {"prior": 0.0}, {"prior_strength": 1.5}])
def test_bad_configuration(bad):
    with pytest.raises(ConfigError, match="expected"):
        ProfileConfig(**bad)
