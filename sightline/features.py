"""A release's features: which versions of items and users its ranker reads, and the ones that it is published with.

    features/items.parquet, features/users.parquet    what training knew of them, as `sightline store load` reads it
    lookup/1/ranker.json                              the versions, and how profiles are made

Items have one version per captioner and token spec. Their token ids mean something to every ranker of that token spec:
it can read versions of other captioners when its own has nothing of an item. Users have one version per ranker, because
a profile leans on the log that the ranker was trained on.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np

from sightline.errors import ReleaseError, StoreError
from sightline.profile import ProfileConfig
from sightline.schema import open_parquet
from sightline.store import FeatureStore, Items, ItemSchema, Schema, UserSchema
from sightline.store.transfer import load
from sightline.tokens import TokenSpec

__all__ = ["FEATURES", "HISTORY", "Versions", "carry_over", "item_schema", "seed", "user_schema"]

FEATURES = "features"  # folder of a ranker, and of a release
HISTORY = 64  # events of a user that are kept
_PROBED = 64
_CAPTIONER = 40  # letters of a captioner's version in a name; its schema has all of it


def item_schema(captioner: str, token_spec: str, length: int) -> ItemSchema:
    """Of items that this captioner described, under a token spec of `length` ids per item."""
    name = re.sub(r"[^A-Za-z0-9._-]", "-", captioner)[:_CAPTIONER]
    return ItemSchema(version=f"{name}-{token_spec}", token_spec=token_spec, captioner=captioner, tokens=length)


def user_schema(ranker: str, token_spec: str, profile: ProfileConfig) -> UserSchema:
    """Of users as this ranker's profiles describe them."""
    return UserSchema(version=ranker, token_spec=token_spec, profile=profile.length, history=HISTORY)


@dataclass(frozen=True, kw_only=True)
class Versions:
    """What a ranker reads."""

    items: ItemSchema
    users: UserSchema
    profile: ProfileConfig

    @classmethod
    def read(cls, folder: Path) -> Self:
        """From a folder with `ranker.json`. Raises ReleaseError if it is not there, or not of a ranker."""
        path = folder / "ranker.json"
        try:
            return cls.of(json.loads(path.read_text()))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ReleaseError(
                f"{path}: expected the JSON of a trained ranker: {error!r}; build a release of one, or name another"
            ) from error

    @classmethod
    def of(cls, document: dict[str, Any]) -> Self:
        """From the content of `ranker.json`."""
        profile, spec = ProfileConfig(**document["profile"]), document["token_spec_version"]
        return cls(
            items=item_schema(document["captioner_version"], spec, document["token_length"]),
            users=user_schema(document["version"], spec, profile), profile=profile,
        )  # fmt: skip

    def accept(self, store: FeatureStore) -> list[str]:
        """Item versions of the store that the ranker can read, its own first, then those registered under other
        captioners. Its own is registered if it is not yet.
        """
        store.register(self.items)
        return [self.items.version] + [
            schema.version for schema in store.schemas()
            if schema.kind == "item" and schema.token_spec == self.items.token_spec
            and schema.version != self.items.version
        ]  # fmt: skip


def seed(release_dir: Path, store: FeatureStore, advance: Callable[[int], object] = lambda rows: None) -> None:
    """Load a release's features into a store, unless it has their versions; goes on where an earlier load stopped.

    A version that is there stays as it is: it has been kept up to date since.
    """
    versions = Versions.read(release_dir / "model_repository" / "lookup" / "1")
    for schema, name in ((versions.items, "items"), (versions.users, "users")):
        path = release_dir / FEATURES / f"{name}.parquet"
        if not _is_there(store, schema, path):
            load(store, path, advance)


def carry_over(
    store: FeatureStore, versions: Versions, spec: TokenSpec, advance: Callable[[int], object] = lambda rows: None
) -> dict[str, int]:
    """Tokenize what other captioners said of items by this ranker's token spec, so that it can read these items until
    its own captioner has described them. Items that it can read already stay as they are; repeat an interrupted call.

    Args:
        spec: of `versions`.
        advance: hears of records.

    Returns:
        Item version that was written → records.

    Raises StoreError for damaged records (`sightline store verify`), TokenSpecError for malformed captions.
    """
    own, written = versions.items, dict[str, int]()
    if own.token_spec != spec.version:
        raise ReleaseError(f"token spec {spec.version}: expected {own.token_spec}, that of the ranker")
    accept = versions.accept(store)
    others = [schema for schema in store.schemas() if schema.kind == "item" and schema.token_spec != own.token_spec]
    for schema in others:
        target = item_schema(schema.captioner, own.token_spec, own.tokens)
        for rows in store.scan(schema):
            ids = np.array([identity for identity, *_ in rows], np.int64)
            new = np.flatnonzero(store.read_items(ids, accept).version < 0)
            details = store.read_details(ids[new], [schema.version])
            there = [(identity, one) for identity, one in zip(ids[new].tolist(), details, strict=True) if one]
            if len(there) < len(new):
                raise StoreError(f"{schema.space}: a record is damaged; `sightline store verify` lists all of them")
            if there:
                captions = [one.caption for _, one in there]
                store.register(target)
                store.write_items(target.version, Items(
                    ids=np.array([identity for identity, _ in there], np.int64), tokens=spec.encode_batch(captions),
                    captions=captions, media_hashes=[one.media_hash for _, one in there],
                ))  # fmt: skip
                written[target.version] = written.get(target.version, 0) + len(there)
            advance(len(rows))
        accept = versions.accept(store)
    return written


def _is_there(store: FeatureStore, schema: Schema, path: Path) -> bool:
    """Registered, no load under way, and some of the file's last rows can be read."""
    if schema not in store.schemas() or any(name.startswith(f"{schema.space}:") for name in store.marks()):
        return False
    with open_parquet(path, "a Parquet file of features") as file:
        groups = file.num_row_groups
        last = file.read_row_group(groups - 1, columns=["id"])["id"].to_pylist()[-_PROBED:] if groups else []
    if schema.kind == "item":
        return not last or bool((store.read_items(last, [schema.version]).version == 0).any())
    return not last or any(store.read_user(user, [schema.version]).record for user in last)
