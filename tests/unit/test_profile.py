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
    profiles.observe(1, tokens(5, 0), positive=True)
    profiles.observe(1, tokens(9), positive=False)
    profiles.observe(1, tokens(6, 200), positive=True)  # 200 is outside of the profile's rows
    read = profiles.read(1)
    assert read.tokens.tolist() == [6, 5, 0, 0]
    assert read.weights == pytest.approx([2 / 3, 1 / 3, 0, 0])
    assert read.dense[:2] == pytest.approx(np.log1p([3, 2]))
    assert read.dense[2] == pytest.approx((2 + 10 * 0.2) / (3 + 10))


def test_reading_does_not_change_anything_and_users_are_apart():
    profiles = UserProfiles(ProfileConfig(length=2), ROWS)
    profiles.observe(1, tokens(3), positive=True)
    before = profiles.read(1)
    profiles.read(2)
    profiles.observe(2, tokens(4), positive=True)
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
    profiles.observe(1, tokens(9, 4, 7), positive=True)
    assert profiles.read(1).tokens.tolist() == [4, 7]


def test_long_histories_stay_finite_and_equal_the_direct_formula():
    config = ProfileConfig(length=8, half_life=3.0)
    profiles = UserProfiles(config, ROWS)
    rng = np.random.default_rng(0)
    history = rng.integers(1, 20, (500, 3))
    for row in history:
        profiles.observe(1, row, positive=True)
    age = np.arange(len(history))[::-1]
    direct = np.bincount(history.ravel(), np.repeat(0.5 ** (age / 3.0), 3), minlength=20)
    best = np.argsort(-direct, kind="stable")[:8]
    read = profiles.read(1)
    assert read.tokens.tolist() == best.tolist()
    assert read.weights == pytest.approx(direct[best] / direct[best].sum(), rel=1e-5)


@pytest.mark.parametrize("bad", [{"length": 0}, {"half_life": 0.0}, {"prior_rate": 1.5}])
def test_bad_configuration(bad):
    with pytest.raises(ConfigError, match="expected"):
        ProfileConfig(**bad)
