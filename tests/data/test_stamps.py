"""The stamps of many files by listings of an S3-compatible server: the same as one by one, and few requests."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import fsspec
import pytest

from ray_diffsynth import storage
from ray_diffsynth.data import media, stamps
from ray_diffsynth.data.stamps import listed_stamps
from ray_diffsynth.storage import s3
from tests.faulty_proxy import FaultyProxy
from tests.s3_server import s3_server

COUNT, PAGE = 300, 20
"""Objects, and how many the server lists in an answer, which are 1,000 elsewhere."""
PATHS = [f"s3://lab/data/{number % 3}/{number:04d}.png" for number in range(COUNT)]


@pytest.fixture(scope="module")
def store() -> Iterator[FaultyProxy]:
    """A proxy before a server with these objects, beside as many of another prefix."""
    patch = pytest.MonkeyPatch()
    patch.setenv("MOTO_S3_DEFAULT_MAX_KEYS", str(PAGE))
    with s3_server() as environment, FaultyProxy(environment["AWS_ENDPOINT_URL"]) as between:
        for name, value in {**environment, "AWS_ENDPOINT_URL": between.url, "AWS_MAX_ATTEMPTS": "1"}.items():
            patch.setenv(name, value)
        fsspec.filesystem("s3", use_listings_cache=False).clear_instance_cache()
        fsspec.filesystem("s3", use_listings_cache=False).mkdir("lab")
        others = [path.replace("/data/", "/before/") for path in PATHS[:100]]
        with ThreadPoolExecutor(8) as threads:
            list(threads.map(lambda path: storage.write_bytes_atomic(path, path.encode()), [*PATHS, *others]))
        yield between
        fsspec.filesystem("s3", use_listings_cache=False).clear_instance_cache()
    patch.undo()


@pytest.fixture(autouse=True)
def asked(store: FaultyProxy, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """Method and path of each request; a listing is a GET of the bucket."""
    monkeypatch.setattr(media, "PAUSE_SECONDS", 0.0)
    store.fail("", 503, 0)
    store.seen.clear()
    return store.seen


def listings(asked: Sequence[tuple[str, str]]) -> int:
    return sum(path.strip("/") == "lab" for _, path in asked)


pytestmark = pytest.mark.slow


def test_a_listing_tells_the_stamps_of_many(asked: list[tuple[str, str]]) -> None:
    found = dict(listed_stamps([*PATHS[::-1], "/a/local.png", "s3://lab/data/1/absent.png", "memory://a/b.png"]))
    assert found.keys() == set(PATHS)
    assert listings(asked) == len(asked) <= COUNT / PAGE + 1
    # The same value as a question for one file, and as its content comes with.
    for path in PATHS[::50]:
        assert found[path] == storage.stamp(path) == storage.read_stamped(path)[1]
    before = found[PATHS[7]]
    storage.write_bytes_atomic(PATHS[7], PATHS[7][::-1].encode())
    try:
        assert dict(listed_stamps(PATHS))[PATHS[7]] != before
    finally:
        storage.write_bytes_atomic(PATHS[7], PATHS[7].encode())


def test_parts_side_by_side(asked: list[tuple[str, str]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stamps, "FEWEST_IN_PART", 50)
    assert dict(listed_stamps(PATHS)).keys() == set(PATHS)
    assert len(asked) <= COUNT / PAGE + 2 * stamps.LISTINGS


def test_what_is_not_wanted_is_not_listed(asked: list[tuple[str, str]]) -> None:
    """Few files of many: each listing begins at the next of them, and where that is worth little none is made."""
    few = sorted(PATHS)[:: COUNT // 5]
    found = dict(listed_stamps(few))
    assert len(asked) == 1 and found.keys() <= set(few)
    asked.clear()
    # Two runs of files far from each other: what lies between them is not listed.
    apart = [*sorted(PATHS)[:20], *sorted(PATHS)[-20:]]
    assert dict(listed_stamps(apart)).keys() == set(apart) and len(asked) <= 4


def test_members_have_their_archives(asked: list[tuple[str, str]]) -> None:
    members = [storage.member_path(f"{PATHS[0]}.tar", (512 * number, 9), "a.png") for number in range(40)]
    storage.write_bytes_atomic(f"{PATHS[0]}.tar", b"x")
    asked.clear()
    found = dict(listed_stamps(members))
    assert len(asked) == 1 and found == {member: storage.stamp(member) for member in members}
    fsspec.filesystem("s3").rm_file(f"{PATHS[0]}.tar")


def test_a_listing_that_fails_is_tried_again_then_left(
    store: FaultyProxy, asked: list[tuple[str, str]], caplog: pytest.LogCaptureFixture
) -> None:
    store.fail("lab", 503, media.READ_ATTEMPTS - 1)
    assert len(dict(listed_stamps(PATHS))) == COUNT and store.left == 0
    for fault, times in ((503, media.READ_ATTEMPTS), (403, 1)):
        asked.clear()
        store.fail("lab", fault, 10**6)
        with caplog.at_level(logging.WARNING):
            assert dict(listed_stamps(PATHS)) == {} and len(asked) == times
        assert "each file is asked for alone" in caplog.text
        caplog.clear()


def test_a_store_of_another_order_is_asked_no_more_than_for_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """As S3's directory buckets: what is not found in an answer is asked for alone; nothing is mistaken."""
    keys = sorted(path.removeprefix("s3://lab/") for path in PATHS)
    calls: list[str] = []

    class Unsorted:
        def call_s3(self, method: str, **options: Any) -> dict[str, Any]:
            calls.append(options["StartAfter"])
            mixed = sorted(keys, key=lambda key: key[::-1])
            return {
                "IsTruncated": True,
                "Contents": [{"Key": key, "Size": 1, "ETag": f'"{key}"'} for key in mixed[:20]],
            }

    monkeypatch.setattr(storage, "filesystem", lambda path: (Unsorted(), "lab"))
    found = dict(listed_stamps(PATHS))
    assert len(calls) <= COUNT and all(
        stamp == f'1-"{path.removeprefix("s3://lab/")}"' for path, stamp in found.items()
    )


class Bucket:
    """As gcsfs: a folder's listing has the versions of its files."""

    def __init__(self) -> None:
        self.listed: list[str] = []

    def ls(self, folder: str, detail: bool) -> list[dict[str, Any]]:
        self.listed.append(folder)
        return [{"name": f"{folder}/{number}.png", "size": 5, "etag": f"v{number}"} for number in range(200)]


def test_of_other_stores_whole_folders(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where most of their files are wanted, or so it seems by their number."""
    bucket = Bucket()
    monkeypatch.setattr(storage, "filesystem", lambda path: (bucket, path.partition("://")[2]))
    many = [f"gs://lab/many/{number}.png" for number in range(150)]
    found = dict(listed_stamps([*many, *(f"gs://lab/few/{number}.png" for number in range(5))]))
    assert found == {path: f"5-v{number}" for number, path in enumerate(many)} and bucket.listed == ["lab/many"]


def test_versions_with_and_without_quotes_are_one() -> None:
    same = {storage.stamp_of({"size": 3, "ETag": tag}) for tag in ('"abc"', "abc", 'W/"abc"')}
    assert same == {'3-"abc"'} and storage.stamp_of({"size": 3}) == ""


def test_one_get_reads_content_and_version(asked: list[tuple[str, str]], monkeypatch: pytest.MonkeyPatch) -> None:
    data, stamp = storage.read_stamped(PATHS[0])
    assert data == PATHS[0].encode() and asked == [("GET", PATHS[0].removeprefix("s3:/"))]
    assert stamp == storage.stamp(PATHS[0])
    asked.clear()
    assert storage.read_bytes(PATHS[1]) == PATHS[1].encode() and len(asked) == 1
    # A large one comes in parts.
    monkeypatch.setattr(s3, "PARALLEL_BYTES", 10)
    assert storage.read_stamped(PATHS[0]) == (data, stamp)
    with pytest.raises(FileNotFoundError):
        storage.read_stamped("s3://lab/absent.png")
    assert os.environ["AWS_ENDPOINT_URL"]


def test_which_names_are_there_is_one_request(asked: list[tuple[str, str]], store: FaultyProxy) -> None:
    for name in ("metadata.csv", "metadata.csv.bak", "metadata.tsv/a.png"):
        storage.write_bytes_atomic(f"s3://lab/names/{name}", b"x")
    wanted, there = ["metadata.tsv", "metadata.json", "metadata.csv"], ["metadata.tsv", "metadata.csv"]
    asked.clear()
    assert storage.existing("s3://lab/names", wanted) == there == storage.existing("s3://lab/names/", wanted)
    assert len(asked) == 2 and storage.existing("s3://lab/absent", wanted) == []
    # Where so many begin alike that one answer does not tell all, each is asked for.
    for number in range(PAGE + 1):
        storage.write_bytes_atomic(f"s3://lab/names/metadata.{number}", b"x")
    asked.clear()
    assert storage.existing("s3://lab/names", wanted) == there and len(asked) > 3
    # What may not be listed too.
    store.fail("lab", 403, 1)
    assert storage.existing("s3://lab/names", ["metadata.csv"]) == ["metadata.csv"] and store.left == 0
