"""User token profiles: affinities, order, and no look into the future."""

from __future__ import annotations

import numpy as np
import pytest

from sightline.errors import ConfigError, DataError
from sightline.profile import Affinities, Profile, ProfileConfig, UserProfiles, UserState

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


def bits(profile: Profile) -> list[bytes]:
    return [value.tobytes() for value in vars(profile).values()]


@pytest.mark.parametrize("half_life", [400.0, 1.0], ids=["slow", "rescaled"])
def test_a_state_goes_on_from_its_bytes_as_if_nothing_had_happened(half_life):
    """In every bit, also where sums are rescaled in between, and where tokens come after it that are new."""
    rng = np.random.default_rng(5)
    whole, parts = new(half_life=half_life, length=20), new(half_life=half_life, length=20)
    for event in range(400):
        row = rng.integers(0, 20 + event // 5, 5)
        for profiles in (whole, parts):
            profiles.observe(1, row, strength=float(np.sin(event)))
        if rng.random() < 0.3:
            parts = new(half_life=half_life, length=20)
            parts.restore(1, whole.dump(1))
            assert parts.dump(1) == whole.dump(1)
        assert bits(parts.read(1)) == bits(whole.read(1))
    assert parts.dump(1) == whole.dump(1)


def test_a_state_is_56_bytes_and_20_per_token():
    profiles = new()
    assert profiles.dump(1) == UserState().to_bytes()
    assert len(profiles.dump(1)) == 56
    profiles.observe(1, tokens(5, 7, 0), strength=1.0)
    profiles.observe(1, tokens(5, 9), strength=1.0)
    assert len(profiles.dump(1)) == 56 + 3 * 20
    profiles.restore(2, UserState().to_bytes())
    assert bits(profiles.read(2)) == bits(profiles.read(3))


def test_one_implementation_for_a_user_and_for_all_of_them():
    config = ProfileConfig(length=3)
    affinities, state, profiles = Affinities(config, BASE, AMOUNT), UserState(), UserProfiles(config, BASE, AMOUNT)
    for item in range(1, 30):
        affinities.observe(state, tokens(item, item % 4 + 50), strength=(-1.0) ** item)
        profiles.observe(8, tokens(item, item % 4 + 50), strength=(-1.0) ** item)
    assert state.to_bytes() == profiles.dump(8)
    assert bits(affinities.read(state)) == bits(profiles.read(8))


def test_damaged_states_are_refused():
    profiles = new()
    profiles.observe(1, tokens(5, 7), strength=0.5)
    good = profiles.dump(1)
    for bad, message in (
        (b"", "expected a header of 56 bytes, got 0 bytes"),
        (good[:50], "got 50 bytes"),
        (b"SLfr" + good[4:], "first bytes: expected b'SLup', got b'SLfr'"),
        (good[:4] + b"\2" + good[5:], "layout: expected 1, got 2"),
        (good[:-1], "size: expected 96, got 95"),
        (good + b"x", "size: expected 96, got 97"),
    ):
        with pytest.raises(DataError, match=message):
            UserState.from_bytes(bad)
    for place in range(16, len(good)):
        bad = good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :]
        with pytest.raises(DataError, match="user state: checksum"):
            UserState.from_bytes(bad)
    with pytest.raises(DataError, match="user state"):
        profiles.restore(1, good[:-3])
    assert profiles.dump(1) == good
