"""Data sets: generate, import, validate."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from sightline.commands.options import pairs

app = typer.Typer(name="data", no_args_is_help=True, help="Generate, import and validate data sets.")


@app.command("generate")
def generate_data(
    out: Annotated[Path, typer.Option(help="Folder of the data set.")] = Path("artifacts/data/synthetic"),
    items: Annotated[int, typer.Option(help="Images and videos.")] = 8500,
    users: Annotated[int, typer.Option()] = 1200,
    sessions_per_user: Annotated[int, typer.Option(help="Slates of ten impressions each.")] = 32,
    video_share: Annotated[float, typer.Option()] = 0.2,
    seed: Annotated[int, typer.Option(min=0, help="The same seed gives the same data.")] = 0,
) -> None:
    """Generate a catalogue of images and videos with a log of impressions; prints its best possible AUC."""
    from catalogue.synthetic import SyntheticConfig, generate

    config = SyntheticConfig(
        items=items, users=users, sessions_per_user=sessions_per_user, video_share=video_share, seed=seed
    )
    record = generate(out, config)
    typer.echo(
        f"{out}: {items} items, {record['rows']} impressions, click rate {record['click_rate']:.3f}; best possible AUC "
        f"after the cut {record['auc_bayes']:.4f}, on items created after it {record['auc_bayes_cold']:.4f}"
    )


@app.command("import-movielens")
def import_movielens(
    folder: Annotated[Path, typer.Argument(help="Folder with ratings.csv, movies.csv and posters/.")],
    out: Annotated[Path, typer.Option(help="Folder of the data set.")] = Path("artifacts/data/movielens"),
    positive_rating: Annotated[float, typer.Option(help="Lowest rating whose label is 1.")] = 4.0,
) -> None:
    """Import MovieLens ratings and posters."""
    from catalogue import importers

    _imported(out, importers.import_movielens(folder, out, positive_rating=positive_rating))


class EmojiStyle(StrEnum):
    openmoji = "openmoji"
    twemoji = "twemoji"


@app.command("import-emoji")
def import_emoji(
    folder: Annotated[Path, typer.Argument(help="Folder with emoji.csv, openmoji/ and twemoji/.")],
    out: Annotated[Path, typer.Option(help="Folder of the data set.")] = Path("artifacts/data/emoji"),
    style: Annotated[EmojiStyle, typer.Option(help="Whose drawings.")] = EmojiStyle.openmoji,
) -> None:
    """Import emoji with their annotations."""
    from catalogue import importers

    _imported(out, importers.import_emoji(folder, out, style=style.value))


@app.command("import")
def import_table(
    items: Annotated[Path, typer.Argument(help="Items, .csv or .parquet.")],
    out: Annotated[Path, typer.Option(help="Folder of the data set.")] = Path("artifacts/data/imported"),
    media: Annotated[
        Path | None, typer.Option(help="Folder of the media files; by default that of ITEMS.")
    ] = None,
    interactions: Annotated[Path | None, typer.Option(help="Interactions, .csv or .parquet.")] = None,
    item_column: Annotated[
        list[str] | None,
        typer.Option(help="NAME=COLUMN: where item_id, media, created_at or text is called otherwise."),
    ] = None,
    interaction_column: Annotated[
        list[str] | None,
        typer.Option(help="NAME=COLUMN for user_id, item_id, timestamp, label, context_<name>."),
    ] = None,
) -> None:
    """Import tables of any origin with a folder of media."""
    from catalogue import importers

    record = importers.import_table(
        items,
        out,
        media_folder=media,
        interactions_file=interactions,
        item_columns=pairs("--item-column", item_column, "COLUMN"),
        interaction_columns=pairs("--interaction-column", interaction_column, "COLUMN"),
    )
    _imported(out, record)


@app.command("validate")
def validate_data(folder: Annotated[Path, typer.Argument(help="Folder of the data set.")]) -> None:
    """Check a data set; print what is in it as JSON."""
    from sightline.schema import validate

    typer.echo(json.dumps(validate(folder), indent=1))


def _imported(out: Path, record: dict[str, Any]) -> None:
    """Report files that had to be left out, then check and describe what was written."""
    for rejected in record["rejected_media"]:
        typer.echo("item {item_id}: {file} left out: {reason}".format(**rejected), err=True)
    validate_data(out)
