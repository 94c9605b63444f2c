"""Options that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sightline.errors import ConfigError

Data = Annotated[Path, typer.Option("--data", help="Folder of the data set.")]
Captions = Annotated[Path, typer.Option(help="What `sightline caption` wrote.")]
Name = Annotated[str, typer.Option("--release", help="Release id.")]
Releases = Annotated[Path, typer.Option("--releases", help="Folder of the releases.")]
Port = Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")]
STORE, QUEUE = "artifacts/features", "artifacts/queue"
Store = Annotated[
    str,
    typer.Option(
        "--store", envvar="SIGHTLINE_STORE",
        help="A folder (LMDB), redis://host:port/db, or rediss://… for TLS; docs/store.md has the options. A password "
        "may stand in SIGHTLINE_STORE_PASSWORD.",
    ),
]  # fmt: skip
Queue = Annotated[
    str,
    typer.Option("--queue", envvar="SIGHTLINE_QUEUE", help="A folder, redis://host:port/db, or rediss://… for TLS."),
]
_GALLERY_HELP = "A folder (LMDB and FAISS), http(s)://… for Milvus, a file *.db for Milvus Lite."
GALLERY = "artifacts/gallery"
GalleryOption = Annotated[
    str | None,
    typer.Option("--gallery", envvar="SIGHTLINE_GALLERY", help=f"Serve `retrieve` from it. {_GALLERY_HELP}"),
]
Gallery = Annotated[str, typer.Option("--gallery", envvar="SIGHTLINE_GALLERY", help=_GALLERY_HELP)]
DATA, CAPTIONER, RANKER, CAPTIONS, RELEASES = (
    Path("artifacts") / name for name in ("data/synthetic", "captioner", "ranker", "captions.parquet", "releases")
)


def pairs(flag: str, values: list[str] | None, what: str) -> dict[str, str]:
    """Options like NAME=COLUMN, where `what` is COLUMN. Raises ConfigError where one of the two is missing."""
    found = dict(value.partition("=")[::2] for value in values or [])
    for name, value in found.items():
        if not name or not value:
            raise ConfigError(f"{flag}: expected NAME={what}, got {name!r}")
    return found
