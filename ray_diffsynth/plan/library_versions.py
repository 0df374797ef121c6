"""The versions of the libraries whose code computes what is cached, as they count in its keys."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from importlib.metadata import PackageNotFoundError, version

AGREEING: Mapping[str, Collection[Collection[str]]] = {
    "av": (("18.1",),),
    "diffusers": (("0.42",),),
    "ftfy": (("6.3",),),
    "pillow": (("13.0",),),
    "tokenizers": (("0.23",),),
    "torch": (("2.13",),),
    "transformers": (("5.23",),),
}
"""Library -> sets of minor versions that are known to compute the same values, and so count as the first of them.

The golden test of the families (tests/families/test_golden_keys.py) shows whether a further one does. A version that
does not stand here counts by itself.
"""


def counted_version(library: str) -> str:
    """The minor version, `2.13`, that the installed one counts as; `absent` where it is not installed."""
    try:
        minor = ".".join(version(library).partition("+")[0].split(".")[:2])
    except PackageNotFoundError:
        return "absent"
    return next((list(same)[0] for same in AGREEING.get(library, ()) if minor in same), minor)
