"""`sightline …`: thin verbs over the rooms. Heavy imports happen inside the verbs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from sightline.errors import SightlineError

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
                  help="Let a recommender see its items.")
data = typer.Typer(no_args_is_help=True, help="Generate, import and validate data sets.")
train = typer.Typer(no_args_is_help=True, help="Train the captioner and the ranker.")
release = typer.Typer(no_args_is_help=True, help="List, verify and roll back releases.")
app.add_typer(data, name="data")
app.add_typer(train, name="train")
app.add_typer(release, name="release")

# --- data -----------------------------------------------------------------------------------------

# --- train ----------------------------------------------------------------------------------------

# --- build and release ------------------------------------------------------------------------------

# --- serve and rank -------------------------------------------------------------------------------


def main() -> None:
    """Entry point: errors that Sightline raises on purpose end in one line and exit code 1."""
    try:
        app()
    except SightlineError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
