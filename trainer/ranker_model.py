"""Rankers on TorchRec: ids, context, the item's tokens, the user's token profiles and a content vector → logits.

    ids ─ tables ─┐                      ┌ dlrm, din  pairwise products
    tokens ───────┼─ FEATURES [B, F, D] ─┤ dcnv2      low-rank cross network  ├─ MLP ─ logits [B, tasks]
    vector ───────┘                      └ deepfm     factorisation machine   ┘

`din` is `dlrm` whose profiles are pooled by attention to the item. Left of FEATURES is the served model `embed`, right
of it `score`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import comb
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor, PoolingType
from torchrec.models.dlrm import DenseArch, InteractionArch, InteractionDCNArch, OverArch
from torchrec.modules.crossnet import LowRankCrossNet
from torchrec.modules.deepfm import DeepFM, FactorizationMachine
from torchrec.modules.mlp import MLP

from sightline.errors import ConfigError

Tokens = tuple[np.ndarray, np.ndarray]  # base int64 [rows], amount FP32 [rows]: `TokenSpec.base`, `.amount`
MODELS = ("dlrm", "dcnv2", "deepfm", "din")
TABLE_STD = 0.3
CROSS_LAYERS = 2

# Feature of token ids → its group in RankerShape, and the names of its ids and weights in a batch.
TOKEN_FEATURES = {
    "item_tokens": ("item_tokens", "item_tokens", None),
    "profile": ("user_profile", "profile_tokens", "profile_weights"),
    "profile_negative": ("user_negative", "profile_negative_tokens", "profile_negative_weights"),
}
PROFILE_INPUTS = ("profile_tokens", "profile_weights", "profile_negative_tokens", "profile_negative_weights")


@dataclass(frozen=True, kw_only=True)
class RankerShape:
    """Everything that fixes a ranker's parameters.

    Feature groups are switched by `ids`, `item_tokens`, `user_profile`, `user_negative`, by the names in `context`
    and by `item_vector`, the length V of a frozen content vector (0: none).
    """

    users: int  # rows, fallback row 0 included
    items: int
    context: dict[str, int]  # name → cardinality
    token_rows: int
    dense: int
    model: str = "dlrm"  # one of MODELS
    dim: int = 16
    ids: bool = True
    item_tokens: bool = True
    user_profile: bool = True
    user_negative: bool = False
    item_vector: int = 0
    token_weights: bool = False  # learn a weight per token for the pooled item tokens
    tasks: int = 1  # logits; the first is the one that is served
    table_std: float = TABLE_STD  # of fresh table rows; rows that training seldom sees keep about that much noise
    bottom: tuple[int, ...] = (32,)
    top: tuple[int, ...] = (64, 32)

    def __post_init__(self) -> None:
        if self.model not in MODELS:
            raise ConfigError(f"ranker model is {self.model!r}; expected one of {', '.join(MODELS)}")
        for name in ("users", "items", "token_rows", "dense", "dim", "tasks"):
            if getattr(self, name) < 1:
                raise ConfigError(f"ranker {name} is {getattr(self, name)}; expected at least 1")
        if self.item_vector < 0:
            raise ConfigError(f"ranker item_vector is {self.item_vector}; expected a length, 0 for none")
        if self.token_weights and not self.item_tokens:
            raise ConfigError("ranker token_weights is on without item_tokens; expected tokens to weigh")
        if not self.features:
            raise ConfigError("every feature group of the ranker is off; expected at least one")

    @property
    def id_features(self) -> dict[str, int]:
        """Features of one id per example → rows of their tables."""
        context = {f"context_{name}": rows for name, rows in self.context.items()}
        return ({"user": self.users, "item": self.items} if self.ids else {}) | context

    @property
    def token_features(self) -> list[str]:
        """Features of many ids per example. They share one table, so liking a look is liking its words."""
        return [name for name, (group, _, _) in TOKEN_FEATURES.items() if getattr(self, group)]

    @property
    def attention(self) -> list[str]:
        """Profiles that are pooled by attention; without item tokens there is nothing to compare them with."""
        profiles = [name for name in self.token_features if name != "item_tokens"]
        return profiles if self.model == "din" and self.item_tokens else []

    @property
    def sequential(self) -> bool:
        """Are tokens looked up one by one, and not pooled inside of the lookup?"""
        return bool(self.attention) or self.token_weights

    @property
    def features(self) -> list[str]:
        """Names in the order of FEATURES' rows."""
        return [*self.id_features, *self.token_features, *["item_vector"] * bool(self.item_vector)]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> RankerShape:
        return cls(**{**values, "bottom": tuple(values["bottom"]), "top": tuple(values["top"])})


class Ranker(nn.Module):
    """Batch → logits FP32 [B, tasks].

    The batch is a dict of tensors: user_index, item_index int64 [B]; context int64 [B, C]; item_tokens int64 [B, L];
    profile_tokens, profile_negative_tokens int64 [B, K] with profile_weights, profile_negative_weights FP32 [B, K];
    item_vector FP32 [B, V]; dense FP32 [B, n]. Token id 0 is padding. Groups that are off are not read.

    `tokens` says of which row each token id is an amount, and how much; without it, of itself and 1.
    """

    def __init__(self, shape: RankerShape, tokens: Tokens | None = None) -> None:
        super().__init__()
        self.shape = shape
        tables = [(name, rows, [name]) for name, rows in shape.id_features.items()]
        if shape.token_features and not shape.sequential:
            tables.append(("tokens", shape.token_rows, shape.token_features))
        # Ids weigh 1, an item's n tokens 1/√n each, profile tokens the user's affinity.
        self.bags = _collection(tables, shape.dim, weighted=True) if tables else None
        # Every id of a sequence is a bag of its own: TorchRec fuses bags on a CPU, and no EmbeddingCollection.
        sequence = [("tokens", shape.token_rows, ["tokens"])]
        self.sequences = _collection(sequence, shape.dim, weighted=False) if shape.sequential else None
        for table in self.tables().values():
            nn.init.normal_(table, std=shape.table_std)
        self.features = FeatureArch(shape, tokens)
        self.score = ScoreArch(shape)

    def tables(self) -> dict[str, nn.Parameter]:
        """Table → FP32 [rows, D]."""
        collections = [collection for collection in (self.bags, self.sequences) if collection is not None]
        return {name: bag.weight for one in collections for name, bag in one.embedding_bags.items()}

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        tokens = self.features.tokens(batch)
        pooled: dict[str, Tensor] = {}
        rows: dict[str, Tensor] = {}
        if self.bags is not None:
            pooled = self.bags(self._bags_of(batch, tokens)).to_dict()
        if self.sequences is not None:
            # Padding is looked up, too: its weights are 0, and every example keeps its place.
            every = [ids for ids, _ in tokens.values()]
            values = torch.cat([ids.flatten() for ids in every])
            each = KeyedJaggedTensor(keys=["tokens"], values=values, lengths=torch.ones_like(values))
            found = self.sequences(each).to_dict()["tokens"].split([ids.numel() for ids in every])
            rows = {name: one.view(*ids.shape, -1) for name, one, ids in zip(tokens, found, every, strict=True)}
        return self.score(self.features(pooled, rows, tokens, batch.get("item_vector")), batch["dense"])

    def _bags_of(self, batch: dict[str, Tensor], tokens: dict[str, tuple[Tensor, Tensor]]) -> KeyedJaggedTensor:
        columns = [batch["user_index"], batch["item_index"]] if self.shape.ids else []
        columns += list(batch["context"].unbind(1)) if self.shape.context else []
        one = torch.ones(sum(map(len, columns)), dtype=torch.float32)
        values, weights, lengths = columns, [one], [one.long()]
        if not self.shape.sequential:
            for ids, weight in tokens.values():
                there = weight != 0  # padding is left out
                at = there.flatten().nonzero()[:, 0]
                values.append(ids.flatten()[at])
                weights.append(weight.flatten()[at])
                lengths.append(there.sum(1))
        keys = [*self.shape.id_features, *([] if self.shape.sequential else self.shape.token_features)]
        return KeyedJaggedTensor(
            keys=keys, values=torch.cat(values), weights=torch.cat(weights), lengths=torch.cat(lengths)
        )


def _collection(tables: list[tuple[str, int, list[str]]], dim: int, *, weighted: bool) -> EmbeddingBagCollection:
    """Tables (name, rows, features), summed within an example."""
    return EmbeddingBagCollection(
        tables=[
            EmbeddingBagConfig(
                name=name, num_embeddings=rows, embedding_dim=dim, feature_names=features, pooling=PoolingType.SUM
            )
            for name, rows, features in tables
        ],
        is_weighted=weighted,
    )


def new_ranker(shape: RankerShape, seed: int, tokens: Tokens | None = None) -> Ranker:
    """A ranker with fresh weights."""
    torch.manual_seed(seed)
    return Ranker(shape, tokens)


def item_weights(amounts: Tensor) -> Tensor:
    """Amounts of an item's tokens FP32 [B, L], 0 for padding → their weights: amounts over the root of their sum.

    Of n whole tokens each weighs 1/√n. The root keeps the pooled vector's size apart from the caption's length; with a
    mean its products with user vectors start so small that training sat on a plateau for epochs (docs/log.md).
    """
    return amounts / amounts.sum(1, keepdim=True).clamp(min=1).sqrt()


def weighted_sum(weights: Tensor, rows: Tensor) -> Tensor:
    """[B, n], [B, n, D] → [B, D]; the rows may be one row's for all, [1, n, D]."""
    return torch.matmul(weights[:, None], rows)[:, 0]


class FeatureArch(nn.Module):
    """What lies between tables and FEATURES: weights of tokens, attention, the content vector's projection."""

    def __init__(self, shape: RankerShape, tokens: Tokens | None = None) -> None:
        super().__init__()
        self.shape = shape
        if shape.token_features:
            rows = np.arange(shape.token_rows)
            base, amount = tokens or (rows, np.minimum(rows, 1).astype(np.float32))
            self.register_buffer("token_base", torch.as_tensor(base))
            self.register_buffer("token_amount", torch.as_tensor(amount))
        # OmniSearchSage (arXiv 2404.16260), section 3: e = Σ_x w_x · E[x]; 1 at first, the plain sum.
        self.token_weight = nn.Parameter(torch.ones(shape.token_rows)) if shape.token_weights else None
        self.attention = nn.ModuleDict({name: Attention(shape.dim) for name in shape.attention})
        self.vector = (
            nn.Sequential(nn.LayerNorm(shape.item_vector), nn.Linear(shape.item_vector, shape.dim))
            if shape.item_vector
            else None
        )

    def tokens(
        self, batch: dict[str, Tensor], names: Sequence[str] | None = None
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """Token feature, all or those named → ids int64 [B, n], weights FP32 [B, n], 0 for padding."""
        found = {}
        for name in self.shape.token_features if names is None else names:
            _, ids, weights = TOKEN_FEATURES[name]
            tokens = batch[ids]
            weight = item_weights(self.token_amount[tokens]) if weights is None else batch[weights] * (tokens > 0)
            if name == "item_tokens" and self.token_weight is not None:
                weight = weight * self.token_weight[tokens]
            found[name] = self.token_base[tokens], weight
        return found

    def forward(
        self, pooled: dict[str, Tensor], rows: dict[str, Tensor], tokens: dict[str, tuple[Tensor, Tensor]],
        item_vector: Tensor | None,
    ) -> Tensor:  # fmt: skip
        """FEATURES FP32 [B, F, D], of everything that `vectors` takes."""
        done = self.vectors(pooled, rows, tokens, item_vector)
        return torch.stack([done[name] for name in self.shape.features], 1)

    def vectors(
        self, pooled: dict[str, Tensor], rows: dict[str, Tensor], tokens: dict[str, tuple[Tensor, Tensor]],
        item_vector: Tensor | None = None,
    ) -> dict[str, Tensor]:  # fmt: skip
        """Feature → FP32 [B, D], for the features that there is something of.

        Args:
            pooled: features that are pooled already, FP32 [B, D].
            rows: the others' table rows, FP32 [B, n, D].
            tokens: ids and weights, as `tokens` gives them.
        """
        done = dict(pooled)
        for name in rows:
            if name not in self.attention:
                done[name] = weighted_sum(tokens[name][1], rows[name])
        for name, pool in self.attention.items():
            if name in rows:
                done[name] = pool(done["item_tokens"], rows[name], tokens[name][1])
        if self.vector is not None and item_vector is not None:
            done["item_vector"] = self.vector(item_vector)
        return done


class Attention(nn.Module):
    """Deep Interest Network's local activation unit (Zhou et al. 2018, arXiv 1706.06978, equation 3).

    A small MLP compares each profile token with the item; the profile's own weights are the prior:
    w'_k ∝ w_k · exp(MLP(e_k, q, e_k · q)). It starts as the plain weighted profile. The paper's fourth input, e_k − q,
    is a linear layer's of the first two. Other than in the paper the weights keep their sum.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        # The first layer in two parts: that of the item is computed once for all of a profile.
        self.key, self.item = nn.Linear(2 * dim, 2 * dim), nn.Linear(dim, 2 * dim, bias=False)
        self.out = nn.Linear(2 * dim, 1)
        nn.init.zeros_(self.out.weight)

    def forward(self, query: Tensor, keys: Tensor, weights: Tensor) -> Tensor:
        """FP32 [B, D], [B, K, D], [B, K] → [B, D]; zeros for a row whose weights are all 0.

        Keys and weights may be one profile's for all rows, [1, K, D] and [1, K].
        """
        alone, together = self.key.weight.split(keys.shape[2], 1)
        pairs = F.linear(keys, alone, self.key.bias) + F.linear(keys * query[:, None], together)
        score = self.out(torch.relu(pairs + self.item(query)[:, None]))[..., 0]
        score = score.masked_fill(weights == 0, -1e4)
        attended = weights * (score - score.amax(1, keepdim=True)).exp()
        scale = weights.sum(1, keepdim=True) / attended.sum(1, keepdim=True).clamp(min=1e-6)
        return weighted_sum(attended * scale, keys)


class ScoreArch(nn.Module):
    """FEATURES FP32 [B, F, D] and DENSE FP32 [B, n] → logits FP32 [B, tasks].

    dlrm, din  TorchRec's DLRM (Naumov et al. 2019, arXiv 1906.00091): pairwise products, then an MLP
    dcnv2      TorchRec's low-rank cross network (Wang et al. 2021, arXiv 2008.13535) of rank a quarter, then an MLP
    deepfm     factorisation machine beside an MLP over the same vectors (Guo et al. 2017, arXiv 1703.04247)
    """

    def __init__(self, shape: RankerShape) -> None:
        super().__init__()
        count, width = len(shape.features), (len(shape.features) + 1) * shape.dim
        self.bottom = DenseArch(shape.dense, [*shape.bottom, shape.dim])
        self.inter: nn.Module
        if shape.model == "dcnv2":
            cross = LowRankCrossNet(in_features=width, num_layers=CROSS_LAYERS, low_rank=max(1, width // 4))
            self.inter, inputs = InteractionDCNArch(count, cross), width
        elif shape.model == "deepfm":
            self.inter, inputs = DeepFMArch(width, shape.top), shape.top[-1] + 1
        else:
            self.inter, inputs = InteractionArch(count), shape.dim + comb(count + 1, 2)
        deep = shape.model == "deepfm"  # has its MLP already
        self.top = nn.Linear(inputs, shape.tasks) if deep else OverArch(inputs, [*shape.top, shape.tasks])

    def forward(self, features: Tensor, dense: Tensor) -> Tensor:
        return self.top(self.inter(dense_features=self.bottom(dense), sparse_features=features))


class DeepFMArch(nn.Module):
    """DeepFM's two parts. TorchRec's factorisation machine sums over all numbers of its input; given one dimension
    of all vectors at a time, as here, the sum over dimensions is the paper's Σ_{i<j} ⟨v_i, v_j⟩ (equation 2). The
    first-order term is left to the deep part, as in TorchRec's SimpleDeepFMNN.
    """

    def __init__(self, width: int, layers: tuple[int, ...]) -> None:
        super().__init__()
        self.deep = DeepFM(MLP(width, list(layers), activation="relu"))
        self.pairs = FactorizationMachine()

    def forward(self, dense_features: Tensor, sparse_features: Tensor) -> Tensor:
        """FP32 [B, D], [B, F, D] → [B, layers[-1] + 1]."""
        vectors = torch.cat([dense_features[:, None], sparse_features], 1)
        by_dimension = vectors.transpose(1, 2).reshape(-1, vectors.shape[1])
        pairs = self.pairs([by_dimension]).reshape(-1, vectors.shape[2]).sum(1, keepdim=True)
        return torch.cat([self.deep([vectors]), pairs], 1)


class EmbedGraph(nn.Module):
    """`embed`: ids → FEATURES FP32 [B, F, D], from the tables of a trained ranker, on padded dense inputs."""

    def __init__(self, model: Ranker) -> None:
        super().__init__()
        self.tables = nn.ParameterDict({name: table.detach().clone() for name, table in model.tables().items()})
        self.features, self.shape = model.features, model.shape

    def forward(
        self, user_index: Tensor, item_index: Tensor, context: Tensor, item_tokens: Tensor, profile_tokens: Tensor,
        profile_weights: Tensor, profile_negative_tokens: Tensor, profile_negative_weights: Tensor,
        item_vector: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """As `Ranker` takes them, but user_index, item_index int64 [B, 1]."""
        profiles = profile_tokens, profile_weights, profile_negative_tokens, profile_negative_weights
        batch = {"item_tokens": item_tokens} | dict(zip(PROFILE_INPUTS, profiles, strict=True))
        tokens = self.features.tokens(batch)
        pooled = self.of_item(item_index) | self.of_user(user_index, context)
        return self.features(pooled, self.rows(tokens), tokens, item_vector)

    def of_item(self, item_index: Tensor) -> dict[str, Tensor]:
        """int64 [B, 1] → rows of ids FP32 [B, D] by feature."""
        return {"item": self.tables["item"][item_index[:, 0]]} if self.shape.ids else {}

    def of_user(self, user_index: Tensor, context: Tensor) -> dict[str, Tensor]:
        """int64 [B, 1], int64 [B, C] → rows of ids FP32 [B, D] by feature."""
        found = {"user": self.tables["user"][user_index[:, 0]]} if self.shape.ids else {}
        for i, (name, cardinality) in enumerate(self.shape.context.items()):
            # As in training: a value beyond the table counts as the last one, and fails no one's request.
            at = context[:, i].clamp(0, cardinality - 1)
            found[f"context_{name}"] = self.tables[f"context_{name}"][at]
        return found

    def rows(self, tokens: dict[str, tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
        """Rows FP32 [B, n, D] of the ids that `FeatureArch.tokens` gives."""
        return {name: self.tables["tokens"][ids] for name, (ids, _) in tokens.items()}


class ScoreGraph(nn.Module):
    """`score`: FEATURES FP32 [B, F, D] and DENSE FP32 [B, n] → SCORE FP32 [B, 1], the first task's probability."""

    def __init__(self, model: Ranker) -> None:
        super().__init__()
        self.score = model.score

    def forward(self, features: Tensor, dense: Tensor) -> Tensor:
        return torch.sigmoid(self.score(features, dense)[:, :1])
