"""Text from data, made safe to look at: cut to a length, and what would move or hide other text made visible."""

from __future__ import annotations

import re
import unicodedata

_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff]")


def visible(text: str, limit: int | None = None) -> str:
    """`text` with control and direction characters spelt out, cut to `limit` characters with a note of the rest.

    Terminal escapes and right-to-left overrides could otherwise reorder or hide what stands beside the text. Line
    breaks and tabs stay. Escaping for HTML is the template's business.
    """
    rest = 0
    if limit is not None and len(text) > limit:
        text, rest = text[:limit].rstrip(), len(text) - limit
    shown = _CONTROLS.sub(_spelt_out, text.replace("\r\n", "\n"))
    return f"{shown} … (+{rest:,} characters)" if rest else shown


def one_line(text: str, limit: int | None = None) -> str:
    """`visible` text with every run of white space as one blank."""
    # Four times the limit is enough of any sane text, and a huge one is not walked through to the end.
    short = text if limit is None or len(text) <= 4 * limit else text[: 4 * limit]
    joined = " ".join(short.split())
    if len(short) < len(text):
        joined += text[len(short) :]
    return visible(joined, limit)


def _spelt_out(match: re.Match[str]) -> str:
    character = match.group()
    name = unicodedata.name(character, "")
    return f"[U+{ord(character):04X}{' ' + name if name else ''}]"
