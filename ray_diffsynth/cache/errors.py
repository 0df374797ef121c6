"""The error of a cache, apart from the modules that need torch."""

from __future__ import annotations

from collections.abc import Sequence

from ray_diffsynth.errors import UserError
from ray_diffsynth.program import command
from ray_diffsynth.storage import join


class CacheError(UserError):
    """A cache that is absent, damaged, or not the one that is asked for; the message says what to do."""


class AbsentError(CacheError):
    """A file that the manifest names is not there."""


class UnreadableError(CacheError):
    """A file could not be read just now (rights, network, a failing disk), which says nothing about its content."""

    def __init__(self, path: str, error: Exception) -> None:
        super().__init__(
            f"{path} cannot be read ({type(error).__name__}: {error}); look at the rights, the disk or the network, "
            "then run this again"
        )


class VersionError(CacheError):
    """A cache, or a file of one, that another version of this program wrote."""

    def __init__(self, path: str, version: object, mine: int) -> None:
        newer = isinstance(version, int) and version > mine
        whose = "a newer ray_diffsynth: upgrade" if newer else "another version of ray_diffsynth: use that one"
        super().__init__(
            f"{path} has version {version}, this program reads version {mine}; it was written by {whose}, or "
            "preprocess into another --output_path"
        )
        self.version = version


SHOWN = 3
"""Names of missing files that an error gives."""


class MissingFilesError(CacheError):
    """Files that are not in `<cache>/<folder>`; `wanted` is how many the cache names there."""

    def __init__(self, cache: str, folder: str, absent: Sequence[str], wanted: int) -> None:
        names = ", ".join(absent[:SHOWN]) + (", …" if len(absent) > SHOWN else "")
        super().__init__(
            f"{len(absent)} of the {wanted} files of {join(cache, folder)} are absent: {names}. If this is a copy of a "
            f"cache, copy it again (its manifest.json last); else {repair_advice(cache)}"
        )


def repair_advice(cache: str) -> str:
    """The end of an error about damage."""
    repair = f"{command('cache')} repair {cache}"
    return f"run `{repair}`, then {command('preprocess')} again: it encodes only what is lost"
