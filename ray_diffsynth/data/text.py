"""The text of files that people write: metadata, captions, prompts."""

from __future__ import annotations

import codecs

from ray_diffsynth.data.placeholders import looks_like_lfs_pointer, wrong_content
from ray_diffsynth.data.warnings import warn
from ray_diffsynth.errors import UserError

_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32", "UTF-32"),  # before UTF-16, whose mark is its beginning
    (codecs.BOM_UTF32_BE, "utf-32", "UTF-32"),
    (codecs.BOM_UTF16_LE, "utf-16", "UTF-16"),
    (codecs.BOM_UTF16_BE, "utf-16", "UTF-16"),
)


class TextError(UserError, ValueError):
    """A file that is no text; the message follows the file's name: "is not UTF-8 …"."""


def decode_text(path: str, data: bytes) -> str:
    """The text of a file, UTF-8 with or without a byte order mark; UTF-16 and UTF-32 by theirs, of which is warned.

    Raises TextError, whose message goes on after the file's name.
    """
    if looks_like_lfs_pointer(data):
        raise TextError(f"is {wrong_content(data)}")
    for mark, encoding, name in _MARKS:
        if data.startswith(mark):
            try:
                text = data.decode(encoding)
            except UnicodeDecodeError as error:
                raise TextError(f"is not whole {name} (byte {error.start}); save it as UTF-8") from error
            warn("file_form", path, f"{name}, read as such; UTF-8 is usual")
            return text
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise TextError(f"is not UTF-8 (line {line}, byte {error.start}); save it as UTF-8") from error
    if text.count("\0") * 3 > len(text):
        raise TextError("looks like UTF-16 without a byte order mark (NUL characters between); save it as UTF-8")
    return text
