"""`<cache>/warnings.json`: the warnings about rows when they were encoded (a caption that was cut, …).

A run that reuses rows repeats their warnings; a reader of the cache does not need them. They are stored by key, and
keys are content addresses, so they hold for any manifest beside them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

from ray_diffsynth import storage
from ray_diffsynth.cache.errors import UnreadableError
from ray_diffsynth.data.warnings import DESCRIPTIONS

WARNINGS_FILE = "warnings.json"

RowWarnings = tuple[tuple[str, str], ...]
"""(kind, detail) of each warning of a row, sorted."""


def parse_row_warnings(value: object) -> RowWarnings:
    """`RowWarnings` from JSON; what is of no known kind (another version's) or no such thing is left out."""
    pairs = value if isinstance(value, list | tuple) else ()
    good = (p for p in pairs if isinstance(p, list | tuple) and len(p) == 2 and all(isinstance(t, str) for t in p))
    return tuple(sorted({(kind, detail) for kind, detail in good if kind in DESCRIPTIONS}))


def write_warnings(cache: str, by_group: Mapping[str, Mapping[str, RowWarnings]]) -> None:
    """Write group -> key -> warnings of the row; without any no file is written. Raises OSError."""
    path = storage.join(cache, WARNINGS_FILE)
    content = {group: rows for group, rows in by_group.items() if rows}
    if content:
        storage.write_bytes_atomic(path, json.dumps(content, sort_keys=True, ensure_ascii=False).encode())
    else:
        storage.remove(path)


def read_warnings(cache: str) -> dict[str, dict[str, RowWarnings]]:
    """What `write_warnings` wrote; empty where there is nothing, or nothing that can be used.

    Raises UnreadableError when it cannot be read just now.
    """
    path = storage.join(cache, WARNINGS_FILE)
    try:
        content = json.loads(storage.read_bytes(path))
    except (FileNotFoundError, ValueError, RecursionError):
        return {}
    except OSError as error:
        raise UnreadableError(path, error) from error
    groups = content.items() if isinstance(content, dict) else ()
    return {
        group: {key: pairs for key, value in rows.items() if (pairs := parse_row_warnings(value))}
        for group, rows in groups
        if isinstance(rows, dict)
    }
