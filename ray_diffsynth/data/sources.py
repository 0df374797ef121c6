"""Source files whose content is verified to be what was scanned, since what is encoded is stored by that content."""

from __future__ import annotations

import posixpath
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

from ray_diffsynth import storage
from ray_diffsynth.data.media import TRANSIENT, MediaError, SourceChanged, bytes_hash, content_hash, fetch, source_stamp


def verified_bytes(path: str, digest: str | None) -> bytes:
    """The file's bytes, whose content hash is `digest` (None: any).

    Raises MediaError; SourceChanged when it is another file now; StoreFailure when its store fails.
    """
    if digest is None:
        return fetch(path)
    with _missing_as_changed(path):
        data = fetch(path)
        if bytes_hash(data) == digest:
            return data
        # A cell of a Parquet file as it was a moment ago: see `storage.read_bytes`.
        if storage.member_of(path) and bytes_hash(data := fetch(path, source_stamp(path))) == digest:
            return data
    raise _changed(path)


@contextmanager
def verified_file(path: str, digest: str | None) -> Iterator[str]:
    """A path to read the file by, in parts, whose content hash is `digest` (None: any). Errors as `verified_bytes`.

    A local file stays where it is; a remote one is copied to a temporary file, so that it is fetched once.
    """
    if digest is None:
        yield path
    elif storage.is_remote(path):
        with _copied(path, lambda: _missing_as_changed(path)) as (place, found):
            if found != digest:
                raise _changed(path)
            yield place
    else:
        with _missing_as_changed(path):
            before = _stamp(path)
            found = content_hash(path)
        if found != digest:
            raise _changed(path)
        try:
            yield path
        finally:
            # Also where the decoder failed: it may have met the new content.
            if _stamp(path) != before:
                raise _changed(path)


@contextmanager
def hashed_file(path: str) -> Iterator[tuple[str, str]]:
    """A path to read the file by, in parts, and its content hash; a remote file is copied, so that it is fetched once.

    Raises MediaError and StoreFailure.
    """
    if storage.is_remote(path):
        with _copied(path, nullcontext) as copy:
            yield copy
    else:
        yield path, content_hash(path)


@contextmanager
def _copied(path: str, while_fetched: Callable[[], AbstractContextManager[None]]) -> Iterator[tuple[str, str]]:
    """A temporary copy of a file, and its content hash. What a decoder finds in the copy is told of the file."""
    with tempfile.NamedTemporaryFile(suffix=posixpath.splitext(path)[1]) as copy:
        with while_fetched():
            found = content_hash(path, copy.file)
        copy.flush()
        try:
            yield copy.name, found
        except MediaError as error:
            if error.path != copy.name:
                raise
            raise MediaError(path, error.reason) from error


def _changed(path: str, how: str = "it holds something else now") -> SourceChanged:
    return SourceChanged(path, f"changed while the job ran ({how}); run again")


def _stamp(path: str) -> str:
    """As `storage.stamp`; empty for a file that is not there."""
    try:
        return storage.stamp(path)
    except (OSError, ValueError):
        return ""


@contextmanager
def _missing_as_changed(path: str) -> Iterator[None]:
    """Within it, a file that is absent or empty, which it was not when it was scanned, has changed."""
    try:
        yield
    except TRANSIENT:
        raise
    except MediaError as error:
        raise _changed(path, error.reason) from error
