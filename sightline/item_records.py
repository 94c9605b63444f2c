"""Captions → what the feature store keeps of items: the one way for the nearline worker and for bulk captioning.

    media ──Captioner──► Reply ──CaptionedItem──► captions by media hash, items by id ──► store
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from sightline.errors import ConfigError, ServingError
from sightline.features import item_schema
from sightline.store import FeatureStore, Items, ItemSchema
from sightline.tokens import TokenSpec

__all__ = ["CaptionedItem", "Captioner", "Recorder", "Reply", "Unavailable", "to_items"]


class Reply(NamedTuple):
    """What a captioner says of one medium."""

    annotation: str = ""
    """Annotated caption (sightline/annotation.py)."""
    error: str = ""
    """Why the medium was rejected; empty where it was not."""
    known: bool = False
    """The caption was there already, in a store."""


Captioner = Callable[[list[bytes]], list[Reply]]
"""Images and videos → an annotated caption for each, or why it was rejected.

Raises Unavailable where it cannot be asked just now, ServingError where it failed on these media.
"""


class Unavailable(ServingError):
    """The captioner is full, starting or gone: nothing is known of the media; ask again later."""


class CaptionedItem(NamedTuple):
    """What a captioner said about an item's media."""

    item_id: int  # 0: not known
    media_hash: str  # SHA-256 in hexadecimal
    annotation: str  # annotated caption (sightline/annotation.py)


def to_items(rows: Sequence[CaptionedItem], spec: TokenSpec) -> Items:
    """Records of the rows with an item id; of several with one id, the last.

    Raises TokenSpecError for an annotation with malformed fields.
    """
    known = {row.item_id: row for row in rows if row.item_id}
    captions = [row.annotation for row in known.values()]
    return Items(
        ids=np.array(list(known), np.int64), tokens=spec.encode_batch(captions), captions=captions,
        media_hashes=[row.media_hash for row in known.values()],
    )  # fmt: skip


class Recorder:
    """Keeps what one captioner said, under its version and a token spec; registers the item version that they make.

    Writing the same again changes nothing.
    """

    def __init__(self, store: FeatureStore, schema: ItemSchema, spec: TokenSpec) -> None:
        """Raises ConfigError for a token spec that is not the schema's, StoreError where the store cannot be used."""
        if schema != item_schema(schema.captioner, spec.version, spec.length):
            raise ConfigError(
                f"{schema.version}: expected the item version of token spec {spec.version} with {spec.length} tokens, "
                f"got one of {schema.token_spec} with {schema.tokens}; take both from one release"
            )
        self.schema, self.spec = schema, spec
        self._store = store
        store.register(schema)
        store.read_captions(schema.captioner, [])  # a name that it cannot keep is refused now

    def write(self, rows: Sequence[CaptionedItem]) -> None:
        """Captions by media hash and records by item id, on return durably; in this order, so that an item whose
        record is there has its caption, too. Raises StoreError, TokenSpecError.
        """
        items = to_items(rows, self.spec)
        self._store.write_captions(self.schema.captioner, {row.media_hash: row.annotation for row in rows})
        if len(items):
            self._store.write_items(self.schema.version, items)
