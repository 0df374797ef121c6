"""What is a URL and what a local path. Imports nothing, so that the command line can ask too."""

from __future__ import annotations

import re

_SCHEME = re.compile(r"^[A-Za-z][A-Za-z0-9+.\-]*(::|://)")


def is_remote(path: str) -> bool:
    """True for a URL of anything but a local file."""
    return bool(_SCHEME.match(path)) and not path.startswith(("file://", "local://"))
