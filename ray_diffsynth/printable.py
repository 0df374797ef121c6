"""Text of others (captions, file names, messages) as it can stand on a terminal and in a page."""

from __future__ import annotations

import re

_UNPRINTABLE = re.compile(
    r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]"
)
"""Control characters, line separators, changes of the direction of writing, half surrogate pairs, no characters."""


def printable(text: str, keep: str = "") -> str:
    r"""`text` with what does not print as escapes such as `\x00`; what joins letters and emoji stays.

    Without them a name could clear the terminal, hide a line, or make a page that no parser takes. `keep`: characters
    that stay as they are.
    """
    return _UNPRINTABLE.sub(lambda found: found[0] if found[0] in keep else _escaped(found[0]), text)


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")
