"""The stamps of many source files at once: by listings instead of a question each."""

from __future__ import annotations

import logging
import posixpath
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from queue import SimpleQueue

from ray_diffsynth import storage
from ray_diffsynth.data.media import with_retries
from ray_diffsynth.data.sorted_texts import SortedTexts
from ray_diffsynth.errors import UserError
from ray_diffsynth.storage import s3

logger = logging.getLogger(__name__)

LISTINGS = 4
"""Listings of one bucket at a time, each of a part of its keys."""
FEWEST_IN_PART = 20_000
"""Files of such a part, if there are several."""
FEWEST_LISTED = 8
"""Wanted files that an answer of a listing is worth: where there are fewer, each of the next is asked for alone."""
PASSED_OVER = 256
"""How many are."""
FEWEST_IN_FOLDER = 64
"""Files for which a whole folder is listed, of a store that does not list from a key on."""
_S3 = re.compile(r"s3a?://[^/]+/")
_LISTED = re.compile(r"(s3a?|gc?s)://[^/?]+/[^?]+")
"""Files of stores whose listings tell the same version as a question for the file alone."""

_Stamps = list[tuple[str, str]]
_Listing = Callable[[], Iterator[_Stamps]]


def listed_stamps(paths: Iterable[str]) -> Iterator[tuple[str, str]]:
    """(path, stamp) of files that listings tell of, each once, in no order; `storage.stamp` would say the same.

    On S3 that is a request for up to 1,000 files, and never more requests than files. A file that is not there, local,
    on a store that lists no versions, may not be listed, or lies among many that are not wanted, is left out: it is to
    be asked for alone. Members of archives have their archive's.
    """
    alone, members = SortedTexts.of(paths, [_listed_file, _listed_member])
    yield from _listed(alone)
    archives = []
    at = 0
    while at < len(members):
        archives.append(_archive(members[at]))
        at = members.range_of(f"{archives[-1]}/@")[1]
    for archive, stamp in _listed(SortedTexts([archives])):
        for path in members.between(*members.range_of(f"{archive}/@")):
            member = storage.member_of(path)
            assert member is not None
            yield path, storage.member_stamp(member, stamp)


def _listed_file(path: str) -> bool:
    return bool(_LISTED.fullmatch(path)) and storage.member_of(path) is None


def _listed_member(path: str) -> bool:
    member = storage.member_of(path)
    return member is not None and bool(_LISTED.fullmatch(member.archive))


def _archive(path: str) -> str:
    member = storage.member_of(path)
    assert member is not None
    return member.archive


def _listed(paths: SortedTexts) -> Iterator[tuple[str, str]]:
    """Of files that are no members."""
    listings: list[_Listing] = []
    folders: dict[str, list[str]] = defaultdict(list)
    at = 0
    while at < len(paths):
        if bucket := _S3.match(paths[at]):
            end = paths.range_of(bucket[0])[1]
            size = max(FEWEST_IN_PART, -(-(end - at) // LISTINGS))
            listings += [
                partial(_of_part, bucket[0], paths, start, min(start + size, end)) for start in range(at, end, size)
            ]
            at = end
        else:
            folders[posixpath.dirname(paths[at])].append(paths[at])
            at += 1
    for folder, wanted in folders.items():
        if len(wanted) >= FEWEST_IN_FOLDER:
            listings.append(partial(_of_folder, folder, wanted))
    yield from _side_by_side(listings)


def _of_part(bucket: str, paths: SortedTexts, at: int, end: int) -> Iterator[_Stamps]:
    fs, name = storage.filesystem(bucket)
    prefix = s3.common_folder(*(path.removeprefix(bucket) for path in (paths[at], paths[end - 1])))
    while at < end:
        keys = [path.removeprefix(bucket) for path in paths.between(at, min(at + s3.PAGE, end))]
        look = with_retries(f"{bucket}{keys[0]}", partial(s3.look_from, fs, name.rstrip("/"), prefix, keys))
        yield [(f"{bucket}{key}", storage.stamp_of(info)) for key, info in look.found.items()]
        at += look.next + (PASSED_OVER if len(look.found) < FEWEST_LISTED else 0)


def _of_folder(folder: str, places: Sequence[str]) -> Iterator[_Stamps]:
    fs, inner = storage.filesystem(folder)
    entries = with_retries(folder, lambda: fs.ls(inner, detail=True))
    infos = {posixpath.basename(entry["name"]): entry for entry in entries}
    names = ((place, posixpath.basename(place)) for place in places)
    yield [(place, storage.stamp_of(infos[name])) for place, name in names if name in infos]


def _side_by_side(listings: Sequence[_Listing]) -> Iterator[tuple[str, str]]:
    """What the listings give, some at a time. One that fails ends early, with a warning."""
    answers: SimpleQueue[_Stamps | Exception | None] = SimpleQueue()

    def run(listing: _Listing) -> None:
        try:
            for stamps in listing():
                answers.put(stamps)
            answers.put(None)
        except Exception as error:
            answers.put(error)

    with ThreadPoolExecutor(LISTINGS) as pool:
        for listing in listings:
            pool.submit(run, listing)
        left = len(listings)
        while left:
            answer = answers.get()
            if isinstance(answer, list):
                yield from answer
                continue
            left -= 1
            if isinstance(answer, UserError):
                logger.warning("each file is asked for alone, since they cannot be listed: %s", answer)
            elif answer is not None:
                raise answer
