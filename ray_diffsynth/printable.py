"""Text of others (captions, file names, messages) as it can stand on a terminal and in a page."""

from __future__ import annotations


def printable(text: str, keep: str = "") -> str:
    r"""`text` with what does not print (control characters, half surrogate pairs, …) as escapes such as `\x00`.

    Without them a name could clear the terminal, hide a line, or make a page that no parser takes. `keep`: characters
    that stay as they are.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in keep else c.encode("unicode_escape").decode() for c in text)
