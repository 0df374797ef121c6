"""What S3 tells in one answer and fsspec in several: an object with its version; the versions of many objects."""

from __future__ import annotations

import time
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import fsspec

PAGE = 1000
"""Objects of which one answer to a listing tells at most."""
PARALLEL_BYTES = 64 << 20
"""Larger objects are fetched in parts, side by side."""


@dataclass(frozen=True, slots=True)
class Look:
    """What one request of a listing tells of some keys: of each that is there its `size` and `ETag`.

    `next`: index of the first key that it tells nothing of.
    """

    found: Mapping[str, Mapping[str, Any]]
    next: int


def is_s3(fs: fsspec.AbstractFileSystem) -> bool:
    """Whether it is s3fs's file system."""
    return "s3" in ({fs.protocol} if isinstance(fs.protocol, str) else fs.protocol)


def get_object(fs: fsspec.AbstractFileSystem, inner: str) -> tuple[bytes, dict[str, Any]]:
    """The object, and its `size` and `ETag`, by one request (a large one by more). Raises OSError."""
    from fsspec.asyn import sync
    from s3fs.core import S3_RETRYABLE_ERRORS

    bucket, key, version = fs.split_path(inner)
    place = {"Bucket": bucket, "Key": key, **({"VersionId": version} if version else {})}
    for attempt in range(1, fs.retries + 1):
        answer = fs.call_s3("get_object", **place)
        info = {"size": answer["ContentLength"], "ETag": answer.get("ETag"), "LastModified": answer.get("LastModified")}
        try:
            if info["size"] > PARALLEL_BYTES:
                break
            return bytes(sync(fs.loop, answer["Body"].read)), info
        except S3_RETRYABLE_ERRORS:  # the connection ended within the body: the client tries only its beginning again
            if attempt == fs.retries:
                raise
            time.sleep(min(0.1 * 1.7**attempt, 15))
        finally:
            answer["Body"].close()
    return bytes(fs.cat_file(inner)), info


def look_from(fs: fsspec.AbstractFileSystem, bucket: str, prefix: str, keys: Sequence[str]) -> Look:
    """What a listing from the first key on, of up to 1,000 objects, tells of the sorted keys. Raises OSError.

    What lies before that key is not listed, however much it is. `prefix`: with which all of them begin.
    """
    answer = fs.call_s3("list_objects_v2", Bucket=bucket, Prefix=prefix, StartAfter=_before(keys[0]))
    listed = {each["Key"]: each for each in answer.get("Contents", [])}
    end = len(keys)
    if answer.get("IsTruncated") and listed:
        # An answer that ends before the key (of a store with another order) tells nothing of it.
        end = max(bisect_right(keys, max(listed)), 1)
    infos = {key: listed[key] for key in keys[:end] if key in listed}
    return Look({key: {**info, "size": info["Size"]} for key, info in infos.items()}, end)


def names_in(fs: fsspec.AbstractFileSystem, folder: str, beginning: str) -> set[str] | None:
    """Names that begin so, of the files and folders in a folder, by one request; None if it does not tell all."""
    bucket, key, _ = fs.split_path(folder)
    folder = f"{key.rstrip('/')}/" if key else ""
    try:
        answer = fs.call_s3("list_objects_v2", Bucket=bucket, Prefix=folder + beginning, Delimiter="/")
    except PermissionError:
        return None
    if answer.get("IsTruncated"):
        return None
    found = [each["Key"] for each in answer.get("Contents", [])]
    found += [each["Prefix"].rstrip("/") for each in answer.get("CommonPrefixes", [])]
    return {name.removeprefix(folder) for name in found}


def _before(key: str) -> str:
    """A string shortly before a key in the order of listings, which begin behind it."""
    last = ord(key[-1])
    return f"{key[:-1]}{chr(last - 1)}~" if ord("!") < last <= ord("~") else key[:-1]


def common_folder(first: str, last: str) -> str:
    """The longest prefix that ends with "/" of two keys, and so of all that lie between them."""
    same = 0
    for a, b in zip(first, last, strict=False):
        if a != b:
            break
        same += 1
    return first[: first.rfind("/", 0, same) + 1]
