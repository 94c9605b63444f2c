"""What a command needs to embed a catalogue's items: media, encoder, how often items were asked for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from sightline.content import LocalEncoder
from sightline.errors import MediaError
from sightline.release import read_manifest
from sightline.schema import MediaReader, read_items, stream_interactions

__all__ = ["Catalogue", "VersionedEncoder", "open_encoder"]


class VersionedEncoder(Protocol):
    """A `sightline.content.Encoder` that knows whose it is."""

    version: str
    width: int

    def __call__(self, media: Sequence[bytes]) -> list[NDArray[np.float32] | MediaError]: ...


class Catalogue(Mapping[int, "bytes | None"]):
    """The media of a data set by item; raises DataError for an item that it does not have."""

    def __init__(self, folder: Path) -> None:
        items = read_items(folder)
        self._folder, self._reader = folder, MediaReader(folder, items)
        self.ids: NDArray[np.int64] = items["item_id"].to_numpy().astype(np.int64)

    def __getitem__(self, item: int) -> bytes | None:
        return self._reader[item]

    def __iter__(self) -> Iterator[int]:
        return iter(self.ids.tolist())

    def __len__(self) -> int:
        return len(self.ids)

    def popularity(self) -> Mapping[int, float] | None:
        """Interactions per item; None where the data set has none."""
        if not (self._folder / "interactions.parquet").is_file():
            return None
        found = Counter[int]()
        for batch in stream_interactions(self._folder, 1 << 17):
            found.update(batch["item_id"].to_pylist())
        return found


@contextmanager
def open_encoder(release_dir: Path, url: str | None) -> Iterator[VersionedEncoder]:
    """The vision tower of a release: that of the server at `url` (gRPC), or in this process.

    Raises ReleaseError for a folder that is no release, ServingError where another one is served.
    """
    read_manifest(release_dir)
    if url is None:
        yield LocalEncoder(release_dir)
        return
    from serving.encoder import ServedEncoder

    with ServedEncoder(url, release_dir) as encoder:
        yield encoder
