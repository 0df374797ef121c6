"""An archive that is open for its headers or its directory: by ranges, so that nothing of its images is fetched."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import IO, cast

from ray_diffsynth import storage
from ray_diffsynth.data.formats import DatasetError
from ray_diffsynth.data.media import MediaError, with_retries
from ray_diffsynth.storage.ranged import RangedFile, opened_ranges


@contextmanager
def opened_archive(path: str, kind: str) -> Iterator[tuple[IO[bytes], int]]:
    """(the file, its size in bytes). Raises DatasetError where it is absent, MediaError where it may not be read.

    Reading it raises StoreFailure where its store fails each time.
    """
    with ExitStack() as stack:
        try:
            size = with_retries(path, partial(storage.file_size, path))
            read = with_retries(path, lambda: stack.enter_context(opened_ranges(path)))
        except MediaError as error:
            check_there(path, kind, error)
            raise
        file = RangedFile(lambda start, count: with_retries(path, partial(read, start, count)), size)
        yield cast("IO[bytes]", file), size


def check_there(path: str, kind: str, error: Exception) -> None:
    """Raise DatasetError if an archive's error is that it is absent."""
    if isinstance(error.__cause__, FileNotFoundError):
        raise DatasetError(f"the {kind} {path} does not exist; check --dataset_base_path") from error
