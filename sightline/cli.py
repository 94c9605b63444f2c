"""`sightline …`: the commands of `sightline.commands` as one program."""

from __future__ import annotations

import sys

import typer

from sightline.commands import backfill, build, caption, data, demo, evaluate, events, nearline, serve, store, train
from sightline.errors import SightlineError

INTERRUPTED = 130  # Typer's exit code for Ctrl-C, which it says nothing about

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Let a recommender see its items.",
)
for group in (data, store, train, caption, build, serve, events, nearline, backfill, evaluate, demo):
    app.add_typer(group.app)


def main() -> None:
    """Entry point: errors that Sightline raises on purpose, and the system's own, end in one line and exit code 1."""
    try:
        app()
    except SystemExit as end:
        if end.code == INTERRUPTED:
            print("interrupted", file=sys.stderr)
        raise
    except SightlineError as error:
        sys.exit(f"error: {error}")
    except OSError as error:  # a path that cannot be read or written, a full disk
        sys.exit(f"error: {error.filename}: {error.strerror}" if error.filename else f"error: {error}")


if __name__ == "__main__":
    main()
