"""Captions of movies: a fixed grammar from genres and decade, and its inverse."""

from __future__ import annotations

import re
from collections.abc import Iterable

__all__ = ["movie_caption", "movie_slots", "release_year"]

_YEAR = re.compile(r"\((\d{4})(?:[-–]\d{0,4})?\)\s*$")
_CAPTION = re.compile(r"^an? (?:(?P<genres>\S.*?) )?film(?: from the (?P<decade>\d{4}s))?$")


def release_year(title: str) -> int | None:
    """Year in brackets at the end of a title; the first one of a series' range.

    >>> [release_year(title) for title in ("Toy Story (1995)", "Fawlty Towers (1975-1979)", "Hyena Road")]
    [1995, 1975, None]
    """
    match = _YEAR.search(title)
    return int(match[1]) if match else None


def movie_caption(genres: Iterable[str], year: int | None) -> str | None:
    """Caption of a movie, None if neither genres nor year are known.

    >>> movie_caption(["Thriller", "Action"], 1995)
    'an action and thriller film from the 1990s'
    """
    names = sorted({name.lower() for name in genres})
    if not names and year is None:
        return None
    listed = " and ".join(filter(None, [", ".join(names[:-1]), *names[-1:]]))
    words = f"{listed} film" if listed else "film"
    article = "an" if words[0] in "aeiou" else "a"
    return f"{article} {words}" + (f" from the {year // 10 * 10}s" if year is not None else "")


def movie_slots(caption: str) -> set[tuple[str, str]]:
    """(slot, value) pairs of a caption; none for text outside the grammar.

    >>> sorted(movie_slots("an action and thriller film from the 1990s"))
    [('decade', '1990s'), ('genre', 'action'), ('genre', 'thriller')]
    """
    match = _CAPTION.match(caption.strip())
    if match is None:
        return set()
    genres = re.split(r", | and ", match["genres"]) if match["genres"] else []
    return {("genre", name) for name in genres} | (
        {("decade", match["decade"])} if match["decade"] else set()
    )
