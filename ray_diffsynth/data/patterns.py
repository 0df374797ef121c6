"""Several files by one text: names between commas, braces (`{000..146}`, `{train,test}`) and `*`, `?`, `[…]`."""

from __future__ import annotations

import fnmatch
import glob
import posixpath
import re
from collections.abc import Iterator

from ray_diffsynth import storage
from ray_diffsynth.data.formats import DatasetError

MAX_FILES = 1_000_000
"""Most names that braces may stand for."""
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d{1,18})\.\.(\d{1,18})")
_MAGIC = re.compile(r"[*?\[]")


def is_pattern(text: str) -> bool:
    """Whether a text may stand for several files."""
    return "," in text or bool(_MAGIC.search(text)) or bool(_BRACES.search(text))


def split_list(text: str) -> list[str]:
    """The entries between commas, those within braces apart."""
    parts, depth, begin = [], 0, 0
    for at, character in enumerate(text):
        depth += (character == "{") - (character == "}")
        if character == "," and depth <= 0:
            parts.append(text[begin:at])
            begin = at + 1
    return [part.strip() for part in (*parts, text[begin:]) if part.strip()]


def expand_braces(text: str) -> list[str]:
    """Every name that a text with braces stands for, in order; numbers keep the width of the first.

    Raises DatasetError for more than `MAX_FILES`, or a range that goes down.
    """
    found = [text]
    while any(_BRACES.search(name) for name in found):
        longer: list[str] = []
        for name in found:
            place = _BRACES.search(name)
            if place is None:
                longer.append(name)
                continue
            for part in _alternatives(text, place[1]):
                longer.append(name[: place.start()] + part + name[place.end() :])
                if len(longer) > MAX_FILES:
                    raise DatasetError(f"{text} stands for more than {MAX_FILES} files; check its braces")
        found = longer
    return found


def _alternatives(text: str, inside: str) -> Iterator[str]:
    numbers = _RANGE.fullmatch(inside)
    if numbers is None:
        yield from inside.split(",")
        return
    first, last = int(numbers[1]), int(numbers[2])
    if last < first:
        raise DatasetError(f"{text}: the range {{{inside}}} goes down; write the smaller number first")
    width = len(numbers[1])
    yield from (f"{number:0{width}d}" for number in range(first, last + 1))


def matching(pattern: str) -> list[str]:
    """The files that a pattern with `*`, `?` or `[…]` matches, sorted; the text itself where it has none of these."""
    if not _MAGIC.search(pattern):
        return [pattern]
    if not storage.is_remote(pattern):
        return sorted(path for path in glob.glob(storage.local_path(pattern)) if not storage.is_folder(path))
    folder, _, name = pattern.rpartition("/")
    if _MAGIC.search(folder):
        raise DatasetError(f"{pattern}: of a URL only the file's name may have *, ? or [ ]; write the folder as it is")
    names = storage.list_files(folder)
    return [posixpath.join(folder, found) for found in names if fnmatch.fnmatchcase(found, name)]
