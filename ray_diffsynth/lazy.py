"""Names that a package exports and imports on first use, so that who needs one of them does not load torch for all."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any


def importer(package: str, homes: Mapping[str, str]) -> Callable[[str], Any]:
    """The `__getattr__` of `package`.

    homes: exported name -> the module below `package` that has it; ``module:name`` where it has another name there.
    """

    def find(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        module, _, inner = homes[name].partition(":")
        return getattr(import_module(f"{package}.{module}"), inner or name)

    return find
