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
_S3 = re.compile(r"(s3a?)://([^/]+)/([^?]+)")
_BY_FOLDER = re.compile(r"gc?s://")
"""Stores whose listings tell the same version as a question for the file alone."""

_Stamps = list[tuple[str, str]]
_Listing = Callable[[], Iterator[_Stamps]]


def listed_stamps(paths: Iterable[str]) -> Iterator[tuple[str, str]]:
    """(path, stamp) of files that listings tell of, each once, in no order; `storage.stamp` would say the same.

    On S3 that is a request for up to 1,000 files, and never more requests than files. A file that is not there, local,
    on a store that lists no versions, may not be listed, or lies among many that are not wanted, is left out: it is to
    be asked for alone. Members of archives have their archive's.
    """
    members: dict[str, list[str]] = defaultdict(list)
    alone: set[str] = set()
    for path in paths:
        if storage.is_remote(path):
            if member := storage.member_of(path):
                members[member.archive].append(path)
            else:
                alone.add(path)
    for place, stamp in _listed(sorted(alone | members.keys())):
        if place in alone:
            yield place, stamp
        for path in members.get(place, ()):
            member = storage.member_of(path)
            assert member is not None
            yield path, storage.member_stamp(member, stamp)


def _listed(places: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Of files that are no members, sorted."""
    listings: list[_Listing] = []
    keys: dict[str, list[str]] = defaultdict(list)
    folders: dict[str, list[str]] = defaultdict(list)
    for place in places:
        if found := _S3.fullmatch(place):
            keys[f"{found[1]}://{found[2]}"].append(found[3])
        elif _BY_FOLDER.match(place):
            folders[posixpath.dirname(place)].append(place)
    for bucket, wanted in keys.items():
        size = max(FEWEST_IN_PART, -(-len(wanted) // LISTINGS))
        listings += [partial(_of_part, bucket, wanted[at : at + size]) for at in range(0, len(wanted), size)]
    for folder, wanted in folders.items():
        if len(wanted) >= FEWEST_IN_FOLDER:
            listings.append(partial(_of_folder, folder, wanted))
    yield from _side_by_side(listings)


def _of_part(bucket: str, keys: Sequence[str]) -> Iterator[_Stamps]:
    fs, name = storage.filesystem(bucket)
    at = 0
    while at < len(keys):
        look = with_retries(f"{bucket}/{keys[at]}", partial(s3.look_from, fs, name, keys, at))
        yield [(f"{bucket}/{key}", storage.stamp_of(info)) for key, info in look.found.items()]
        at = look.next + (PASSED_OVER if len(look.found) < FEWEST_LISTED else 0)


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
