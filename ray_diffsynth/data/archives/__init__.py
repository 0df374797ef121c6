"""Archives by the ending of their names. A kind is one function and one line of `ARCHIVES`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ray_diffsynth.data.archives.tars import read_tars
from ray_diffsynth.data.archives.zips import read_zips
from ray_diffsynth.data.formats import RawTable

__all__ = ["ARCHIVES"]

ARCHIVES: dict[str, Callable[[str, Sequence[str], str, str], RawTable]] = {".tar": read_tars, ".zip": read_zips}
"""By the ending of a file's name, in lower case: what reads the samples of such archives.

A reader gets the dataset's folder, the archives' names relative to it, the column of the images and that of the
captions.
"""
