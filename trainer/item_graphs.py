"""One user and many items: the ranker as two graphs, of which one has run before the request comes.

    items   ITEM_INDEX, ITEM_TOKENS ──► ITEM_FEATURES [N, W]     once per item and release
    rank    user, context, profiles ──► user's vectors  ┐
            ITEM_FEATURES ──► items' vectors [N, I, D]  ┴─► SCORES [N]     per request

Both are the arithmetic of `EmbedGraph` and `ScoreGraph` in another order, so scores are the same but for rounding. The
user's side is computed for one row instead of N.

A DLRM gains once more. Its first layer is linear in the pairwise products. With the user's vectors v_u, dense included,
and an item's vectors x_i, the products ⟨v_u, x_i⟩ with their weights w_ui are

    Σ_u Σ_i w_ui ⟨v_u, x_i⟩ = Σ_i ⟨Σ_u w_ui v_u, x_i⟩,

linear in x. The matrix of the inner sums and what the user's own products add are computed once per request; each item
then costs one product with that matrix, where it cost (F + 1)² D for all products and the first layer on top. Products
of an item's own vectors are part of ITEM_FEATURES.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sightline.errors import ReleaseError
from trainer.ranker_model import PROFILE_INPUTS, EmbedGraph, Ranker, RankerShape

__all__ = ["ItemGraph", "RankGraph", "item_features"]

Vectors = dict[str, Tensor]
TokenWeights = dict[str, tuple[Tensor, Tensor]]
ITEM_SIDE = ("item", "item_tokens", "item_vector")


def item_features(shape: RankerShape) -> list[str]:
    """The features that an item has for every user, in the order of FEATURES.

    Raises ReleaseError for a ranker without any: it would give all items of a request one score.
    """
    found = [name for name in shape.features if name in ITEM_SIDE]
    if not found:
        raise ReleaseError(
            "the ranker reads nothing of an item; expected ids, item_tokens or item_vector among its features"
        )
    return found


def _fused(shape: RankerShape) -> bool:
    return shape.model == "dlrm"


class ItemGraph(nn.Module):
    """`items`: ITEM_INDEX int64 [N, 1], ITEM_TOKENS int64 [N, L], perhaps ITEM_VECTOR FP32 [N, V] → ITEM_FEATURES.

    FP32 [N, W]: W is I · D numbers of the item's vectors, and for a DLRM the products of its pairs of vectors.
    """

    def __init__(self, model: Ranker) -> None:
        super().__init__()
        self.embed, self.shape = EmbedGraph(model), model.shape
        self.names = item_features(model.shape)

    def forward(self, item_index: Tensor, item_tokens: Tensor, item_vector: Tensor | None = None) -> Tensor:
        names = [name for name in self.names if name == "item_tokens"]
        tokens = self.embed.features.tokens({"item_tokens": item_tokens}, names)
        pooled = self.embed.of_item(item_index)
        done = self.embed.features.vectors(pooled, self.embed.rows(tokens), tokens, item_vector)
        vectors = torch.stack([done[name] for name in self.names], 1)  # [N, I, D]
        columns = [vectors.flatten(1)]
        if _fused(self.shape) and len(self.names) > 1:
            products = torch.bmm(vectors, vectors.transpose(1, 2))
            columns += [products[:, i, j, None] for i, j in _pairs(len(self.names))]
        return torch.cat(columns, 1)


class RankGraph(nn.Module):
    """`rank`: one user, context and N items' features → SCORES FP32 [N], the first task's probabilities.

    user_index int64 [1, 1]; context int64 [1, C]; profiles' tokens int64 and weights FP32 [1, K]; dense FP32 [1, n];
    item_features FP32 [N, W].
    """

    def __init__(self, model: Ranker) -> None:
        super().__init__()
        self.embed, self.score, self.shape = EmbedGraph(model), model.score, model.shape
        self.items = item_features(model.shape)
        self.users = [name for name in model.shape.features if name not in self.items]
        if _fused(model.shape):
            self._split_first_layer()

    def _split_first_layer(self) -> None:
        first, *self.rest = (layer for layer in self.score.top.modules() if isinstance(layer, nn.Linear))
        dim, size = self.shape.dim, len(self.shape.features) + 1
        place = {"dense": 0} | {name: 1 + at for at, name in enumerate(self.shape.features)}
        column = torch.zeros(size, size, dtype=torch.long)
        for at, (i, j) in enumerate(_pairs(size)):
            column[i, j] = column[j, i] = dim + at
        user, item = (torch.tensor([place[name] for name in names]) for names in (["dense", *self.users], self.items))
        weight = first.weight.detach()  # [H, D + pairs]
        self.register_buffer("of_dense", weight[:, :dim].clone())
        upper = torch.ones(len(user), len(user)).triu(1)  # each pair once
        self.register_buffer("of_user", (weight[:, column[user[:, None], user[None]]] * upper).flatten(1))  # [H, U · U]
        self.register_buffer("of_both", weight[:, column[item[:, None], user[None]]].transpose(0, 1).flatten(0, 1))
        self.register_buffer("of_item", weight[:, [column[item[i], item[j]] for i, j in _pairs(len(item))]])
        self.register_buffer("bias", first.bias.detach().clone())

    def forward(
        self, user_index: Tensor, context: Tensor, profile_tokens: Tensor, profile_weights: Tensor,
        profile_negative_tokens: Tensor, profile_negative_weights: Tensor, dense: Tensor, item_features: Tensor,
    ) -> Tensor:  # fmt: skip
        profiles = profile_tokens, profile_weights, profile_negative_tokens, profile_negative_weights
        names = [name for name in self.shape.token_features if name not in self.items]
        tokens = self.embed.features.tokens(dict(zip(PROFILE_INPUTS, profiles, strict=True)), names)
        pooled, rows = self.embed.of_user(user_index, context), self.embed.rows(tokens)
        score = self._fused if _fused(self.shape) else self._stacked
        logits = score(pooled, rows, tokens, dense, item_features)
        return torch.sigmoid(logits[:, 0])

    def _fused(self, pooled: Vectors, rows: Vectors, tokens: TokenWeights, dense: Tensor, items: Tensor) -> Tensor:
        done = self.embed.features.vectors(pooled, rows, tokens)
        own = self.score.bottom(dense)  # [1, D]
        users = torch.stack([own, *(done[name] for name in self.users)], 1)[0]  # [U, D]
        bias = self.bias + self.of_dense @ own[0] + self.of_user @ (users @ users.T).flatten()  # [H]
        hidden = len(self.bias)
        by_item = (self.of_both @ users).reshape(-1, hidden, self.shape.dim)  # [I, H, D]
        matrix = by_item.transpose(0, 1).reshape(hidden, -1)
        if len(self.items) > 1:
            matrix = torch.cat([matrix, self.of_item], 1)  # [H, W]
        values = items @ matrix.T + bias
        for layer in self.rest:
            values = layer(torch.relu(values))
        return values

    def _stacked(self, pooled: Vectors, rows: Vectors, tokens: TokenWeights, dense: Tensor, items: Tensor) -> Tensor:
        vectors = items.reshape(len(items), len(self.items), self.shape.dim)
        its = dict(zip(self.items, vectors.unbind(1), strict=True))
        done = self.embed.features.vectors(pooled | its, rows, tokens)
        count = len(items)
        features = torch.stack([done[name].expand(count, -1) for name in self.shape.features], 1)
        return self.score(features, dense.expand(count, -1))


def _pairs(count: int) -> list[tuple[int, int]]:
    """(i, j) with i < j, in the order of torch.triu_indices."""
    return [(i, j) for i in range(count) for j in range(i + 1, count)]
