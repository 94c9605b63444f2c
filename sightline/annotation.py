"""What a captioner knows beyond its best caption, as one string.

The served contract is CAPTION BYTES, and tokenising is a pure function string → ids. So everything else that tokens
are made of travels behind the caption, in fields after U+001F (unit separator):

    a red mug ␟s 17 203 9 ␟c red 7 ␟c mug 3 ␟x a red cup          (without the spaces before ␟)

    s   codes of the item's semantic id, coarse to fine; at most once
    c   a word and the bin of its confidence, 0 … 9; once per word
    x   a further sampled caption

A text without U+001F is a caption without fields. One that has fields says exactly what `to_text` writes: anything
else is refused, because a token lost in silence is a feature lost in silence.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from sightline.errors import TokenSpecError

__all__ = ["SEPARATOR", "Annotated", "plain"]

SEPARATOR = "\x1f"
_CODES = re.compile(r"(?:0|[1-9][0-9]{0,17})(?: (?:0|[1-9][0-9]{0,17}))*")
_CONFIDENCE = re.compile(r"(.+) ([0-9])", re.DOTALL)


def plain(text: str) -> str:
    """The caption that a person sees: `text` without its fields.

    >>> plain("a red mug\\x1fs 17 203")
    'a red mug'
    """
    return text.partition(SEPARATOR)[0]


@dataclass(frozen=True)
class Annotated:
    """A caption with what else is known of it; `Annotated.parse(a.to_text()) == a` for every `a`.

    Raises:
        TokenSpecError: a text holds U+001F, a code is out of range, a bin is not 0 … 9, or a word is empty.
    """

    caption: str
    codes: Sequence[int] = ()
    """Of the semantic id, coarse to fine."""
    confidences: Mapping[str, int] = field(default_factory=dict)
    """Word → bin, 0 … 9."""
    samples: Sequence[str] = ()
    """Further captions sampled for the same item."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "codes", tuple(self.codes))
        object.__setattr__(self, "samples", tuple(self.samples))
        for text in (self.caption, *self.confidences, *self.samples):
            if SEPARATOR in text:
                raise TokenSpecError(f"{text!r}: expected a text without U+001F, which separates fields; take it out")
        if not all(0 <= code < 10**18 for code in self.codes):
            raise TokenSpecError(f"semantic id {list(self.codes)}: expected codes from 0 to below 10^18")
        for word, level in self.confidences.items():
            if not word or not 0 <= level <= 9:
                raise TokenSpecError(f"confidence of {word!r} is {level}: expected a word and a bin of 0 … 9")

    def to_text(self) -> str:
        """As one string, fields in the order s, c, x."""
        fields = ["s " + " ".join(map(str, self.codes))] if self.codes else []
        fields += [f"c {word} {level}" for word, level in self.confidences.items()]
        return SEPARATOR.join([self.caption, *fields, *(f"x {sample}" for sample in self.samples)])

    @classmethod
    def parse(cls, text: str) -> Annotated:
        """Inverse of `to_text`.

        Raises:
            TokenSpecError: a field is unknown, malformed or there twice; the message shows it.
        """
        caption, *fields = text.split(SEPARATOR)
        codes: tuple[int, ...] = ()
        confidences: dict[str, int] = {}
        samples: list[str] = []
        for one in fields:
            name, _, value = one.partition(" ")
            if name == "s" and not codes and _CODES.fullmatch(value):
                codes = tuple(map(int, value.split(" ")))
            elif name == "c" and (match := _CONFIDENCE.fullmatch(value)) and match[1] not in confidences:
                confidences[match[1]] = int(match[2])
            elif name == "x" and one[1:2] == " ":
                samples.append(value)
            else:
                raise TokenSpecError(
                    f"caption {caption!r}: field {one!r} is none; expected `s` and codes (once), `c`, a word and a bin "
                    "of 0 … 9 (once per word), or `x` and a caption; a caption itself has no U+001F"
                )
        return cls(caption, codes, confidences, samples)
