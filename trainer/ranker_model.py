"""The ranker: TorchRec's DLRM over ids, context, item tokens and the user's token profile."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor, PoolingType
from torchrec.models.dlrm import DLRM

from sightline.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class RankerShape:
    """Everything that fixes the ranker's parameters.

    `item_tokens` and `user_profile` switch the two content feature groups: with both off this is the ids-only
    arm.
    """

    users: int  # rows, fallback row 0 included
    items: int
    context: dict[str, int]  # name → cardinality
    token_rows: int
    dense: int
    dim: int = 16
    item_tokens: bool = True
    user_profile: bool = True
    bottom: tuple[int, ...] = (32,)
    top: tuple[int, ...] = (64, 32)

    def __post_init__(self) -> None:
        for name in ("users", "items", "token_rows", "dense", "dim"):
            if getattr(self, name) < 1:
                raise ConfigError(f"ranker {name} is {getattr(self, name)}; expected at least 1")

    @property
    def features(self) -> list[str]:
        """Names of the sparse features in the order of FEATURES' rows."""
        names = ["user", "item", *(f"context_{name}" for name in self.context)]
        return names + ["item_tokens"] * self.item_tokens + ["profile"] * self.user_profile

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> RankerShape:
        return cls(**{**values, "bottom": tuple(values["bottom"]), "top": tuple(values["top"])})


def new_ranker(shape: RankerShape, seed: int) -> DLRM:
    """A DLRM with fresh weights. Item tokens and profile share one table, so liking a look is liking its words."""
    torch.manual_seed(seed)
    token_features = ["item_tokens"] * shape.item_tokens + ["profile"] * shape.user_profile
    tables = [("user", shape.users, ["user"]), ("item", shape.items, ["item"])]
    tables += [(f"context_{name}", rows, [f"context_{name}"]) for name, rows in shape.context.items()]
    if token_features:
        tables.append(("tokens", shape.token_rows, token_features))
    collection = EmbeddingBagCollection(
        tables=[
            EmbeddingBagConfig(
                name=name, num_embeddings=rows, embedding_dim=shape.dim, feature_names=features,
                pooling=PoolingType.SUM,
            )
            for name, rows, features in tables
        ],
        is_weighted=True,  # ids weigh 1, an item's n tokens 1/√n each, profile tokens their share
    )  # fmt: skip
    with torch.no_grad():
        for bag in collection.embedding_bags.values():
            nn.init.normal_(bag.weight, std=0.3)
    return DLRM(
        embedding_bag_collection=collection,
        dense_in_features=shape.dense,
        dense_arch_layer_sizes=[*shape.bottom, shape.dim],
        over_arch_layer_sizes=[*shape.top, 1],
    )


def jagged(shape: RankerShape, batch: dict[str, Tensor]) -> KeyedJaggedTensor:
    """Padded dense ids → one weighted KeyedJaggedTensor; id 0 of token features is padding and is left out.

    Args:
        batch: user_index, item_index int64 [B]; context int64 [B, C]; item_tokens int64 [B, L];
            profile_tokens int64 [B, K]; profile_weights FP32 [B, K].
    """
    values, weights, lengths = [], [], []

    def add(ids: Tensor, weight: Tensor, keep: Tensor) -> None:
        values.append(ids[keep])
        weights.append(weight[keep])
        lengths.append(keep.sum(1))

    for ids in (batch["user_index"], batch["item_index"], *batch["context"].unbind(1)):
        column = ids[:, None]
        add(column, torch.ones_like(column, dtype=torch.float32), torch.ones_like(column, dtype=torch.bool))
    if shape.item_tokens:
        add(batch["item_tokens"], item_weights(batch["item_tokens"]), batch["item_tokens"] > 0)
    if shape.user_profile:
        add(batch["profile_tokens"], batch["profile_weights"], batch["profile_tokens"] > 0)
    return KeyedJaggedTensor(
        keys=shape.features, values=torch.cat(values), weights=torch.cat(weights), lengths=torch.cat(lengths)
    )


def item_weights(tokens: Tensor) -> Tensor:
    """int64 [B, L] → FP32 [B, L]: 1/√n for the n tokens that are there, 0 for padding.

    √n keeps the pooled vector's size apart from the caption's length; with a mean its products with user
    vectors start so small that training sat on a plateau for epochs (docs/log.md).
    """
    there = (tokens > 0).float()
    return there / there.sum(1, keepdim=True).clamp(min=1).sqrt()


class EmbedGraph(nn.Module):
    """`embed`: ids → FEATURES FP32 [B, F, D], from the tables of a trained DLRM, on padded dense inputs."""

    def __init__(self, model: DLRM, shape: RankerShape) -> None:
        super().__init__()
        bags = model.sparse_arch.embedding_bag_collection.embedding_bags
        self.tables = nn.ParameterDict({name: bag.weight.detach().clone() for name, bag in bags.items()})
        self.shape = shape

    def forward(
        self, user_index: Tensor, item_index: Tensor, context: Tensor, item_tokens: Tensor,
        profile_tokens: Tensor, profile_weights: Tensor,
    ) -> Tensor:  # fmt: skip
        rows = [self.tables["user"][user_index[:, 0]], self.tables["item"][item_index[:, 0]]]
        for i, (name, cardinality) in enumerate(self.shape.context.items()):
            # As in training: a value beyond the table counts as the last one, and fails no one's request.
            rows.append(self.tables[f"context_{name}"][context[:, i].clamp(0, cardinality - 1)])
        if self.shape.item_tokens:
            rows.append((self.tables["tokens"][item_tokens] * item_weights(item_tokens)[..., None]).sum(1))
        if self.shape.user_profile:
            weights = profile_weights * (profile_tokens > 0)
            rows.append((self.tables["tokens"][profile_tokens] * weights[..., None]).sum(1))
        return torch.stack(rows, 1)


class ScoreGraph(nn.Module):
    """`score`: FEATURES FP32 [B, F, D] and DENSE FP32 [B, n] → SCORE FP32 [B, 1], a probability."""

    def __init__(self, model: DLRM) -> None:
        super().__init__()
        self.bottom, self.interact, self.top = model.dense_arch, model.inter_arch, model.over_arch

    def forward(self, features: Tensor, dense: Tensor) -> Tensor:
        interactions = self.interact(dense_features=self.bottom(dense), sparse_features=features)
        return torch.sigmoid(self.top(interactions))
