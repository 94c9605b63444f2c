"""Who liked an item, as words that a captioner can learn to see.

Items that the same users like are near each other in the positive pointwise mutual information of co-likes (Levy &
Goldberg 2014), discounted where it rests on few users (Pantel & Lin 2002). Its truncated SVD, on the unit sphere, is
clustered by k-means; a cluster is a *taste word*, and it ends the captions of its items:

    an action film from the 1990s liked with taste3
    mug, red, small, single, on wood liked with taste3 and well liked and rarely seen

An item with too few likes has no such words: who likes it is unknown, which is not the same as nobody.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import numpy as np
from scipy import sparse
from sklearn.cluster import KMeans
from sklearn.decomposition import TruncatedSVD
from sklearn.preprocessing import normalize

from sightline.errors import ConfigError, DataError

__all__ = ["behaviour_words", "split_behaviour", "with_behaviour"]

DIMENSIONS = 16  # of the embedding; 8 are too few, 32 no better (docs/log.md)
DISCOUNT = 5.0  # common likers at which a co-like counts half
LIKING = ("little liked", "fairly liked", "well liked")  # terciles of the share of shows that were liked
REACH = ("rarely seen", "often seen", "widely seen")  # terciles of the number of shows
_WORDS = re.compile(
    rf"(?:^| )liked with (?P<taste>taste\d+)"
    rf"(?: and (?P<liking>{'|'.join(LIKING)}))?(?: and (?P<reach>{'|'.join(REACH)}))?$"
)


def behaviour_words(
    user: np.ndarray, item: np.ndarray, label: np.ndarray, *, items: np.ndarray | Sequence[int], clusters: int,
    min_likes: int, seed: int, terciles: bool = False,
) -> dict[int, str]:  # fmt: skip
    """item → its words, for those of `items` that at least `min_likes` users liked together with others.

    Args:
        user, item: ids int64 [rows]; label: {0, 1} [rows]. Only rows that may be fitted on: nothing is held back here.
        items: ids that words are for; rows of other items are not looked at.
        clusters: taste words; `taste1` is the commonest.
        terciles: also say how well liked and how widely seen an item is, compared to the others.

    Raises:
        ConfigError: fewer than two clusters, or a support below one like.
        DataError: arrays of unequal lengths, or fewer items with support than clusters.
    """
    if clusters < 2 or min_likes < 1:
        raise ConfigError(
            f"taste words: expected at least 2 clusters of items with at least 1 like, got {clusters} and {min_likes}"
        )
    if not len(user) == len(item) == len(label):
        raise DataError(
            f"taste words: expected user, item and label of equal length, got {len(user)}, {len(item)}, {len(label)}"
        )
    ids = np.unique(np.asarray(items, np.int64))
    ours = np.isin(item, ids)
    who, where = np.unique(user[ours], return_inverse=True)
    row, liked = np.searchsorted(ids, item[ours]), label[ours] > 0
    likes = sparse.csr_matrix((np.ones(liked.sum()), (row[liked], where[liked])), shape=(len(ids), len(who)))
    likes.data[:] = 1  # liked twice is liked
    enough = np.flatnonzero(np.diff(likes.indptr) >= min_likes)
    together = _discounted_pmi(likes[enough])
    known = np.diff(together.indptr) > 0
    if known.sum() < clusters:
        raise DataError(
            f"taste words: expected at least {clusters} items that {min_likes} users or more liked together with "
            f"others, found {known.sum()}; ask for fewer clusters or less support"
        )
    svd = TruncatedSVD(min(DIMENSIONS, int(known.sum())), random_state=seed)
    places = normalize(svd.fit_transform(together[known][:, known]))
    found, support = enough[known], np.diff(likes.indptr)[enough[known]]
    cluster = KMeans(clusters, n_init=4, random_state=seed).fit_predict(places, sample_weight=np.sqrt(support))
    by_size = np.argsort(np.argsort(-np.bincount(cluster, minlength=clusters), kind="stable"))
    words = {int(ids[i]): f"liked with taste{1 + by_size[c]}" for i, c in zip(found, cluster, strict=True)}
    if terciles:
        shows = np.bincount(row, minlength=len(ids))[found]
        share = np.bincount(row, liked, minlength=len(ids))[found] / shows
        for phrases, value in ((LIKING, share), (REACH, shows)):
            third = np.searchsorted(np.quantile(value, [1 / 3, 2 / 3]), value)
            words = {i: f"{text} and {phrases[at]}" for (i, text), at in zip(words.items(), third, strict=True)}
    return words


def with_behaviour(texts: Mapping[int, str], words: Mapping[int, str]) -> dict[int, str]:
    """item → its caption, followed by its taste words where it has any."""
    return {item: f"{text} {words[item]}" if item in words else text for item, text in texts.items()}


def split_behaviour(caption: str) -> tuple[str, tuple[tuple[str, str], ...]]:
    """What a caption says of looks, and the (slot, value) pairs of its taste words.

    >>> split_behaviour("a drama film liked with taste3 and well liked")
    ('a drama film', (('taste', 'taste3'), ('liking', 'well liked')))
    """
    match = _WORDS.search(caption)
    if match is None:
        return caption, ()
    return caption[: match.start()], tuple((slot, value) for slot, value in match.groupdict().items() if value)


def _discounted_pmi(likes: sparse.csr_matrix) -> sparse.csr_matrix:
    """Likes {0, 1} [items, users] → [items, items], max(0, log(p(i, j) / p(i) p(j))) · n / (n + DISCOUNT) where n users
    like both, 0 on the diagonal."""
    common = (likes @ likes.T).tocoo()
    other = common.row != common.col
    row, column, count = common.row[other], common.col[other], common.data[other]
    marginal = np.bincount(row, count, minlength=likes.shape[0])
    pmi = np.log(count * count.sum() / (marginal[row] * marginal[column])) * count / (count + DISCOUNT)
    kept = pmi > 0
    return sparse.csr_matrix((pmi[kept], (row[kept], column[kept])), shape=common.shape)
