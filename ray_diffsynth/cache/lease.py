"""One writer per output folder: a lease file with a heartbeat, so that two attempts cannot harm each other.

Whether a holder on another machine is alive is seen by watching whether its lease changes, not by the time in it.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from ray_diffsynth.cache.errors import CacheError, UnreadableError
from ray_diffsynth.storage import create_new, is_remote, join, read_bytes, remove, write_bytes_atomic

logger = logging.getLogger(__name__)

LEASE = "lease.json"
BEAT_SECONDS = 5.0
STALE_SECONDS = 60.0
"""A lease that does not change for this long is taken over."""
SETTLE_SECONDS = 1.0
"""How long to wait after a lease was replaced, in case that another attempt replaces it at the same time."""


def _read(path: str) -> bytes | None:
    """The lease file; None where there is none. Raises OSError and what the store raises."""
    try:
        return read_bytes(path)
    except (FileNotFoundError, NotADirectoryError):
        return None


def _parse(content: bytes) -> dict[str, Any]:
    """What a lease says; nothing for one that is half written (on a file system without hard links)."""
    try:
        lease = json.loads(content)
    except ValueError:
        return {}
    return lease if isinstance(lease, dict) else {}


def owner(folder: str) -> str | None:
    """Which attempt has the lease of a folder: a name that no other attempt has; None where nobody has it.

    Raises OSError and what the store raises when it cannot be read.
    """
    current = _read(join(folder, LEASE))
    found: str | None = None if current is None else _parse(current).get("owner")
    return found


def _is_local(lease: Mapping[str, Any]) -> bool:
    """Whether its holder runs, or ran, on this machine since it was started."""
    return lease.get("host") == socket.gethostname() and lease.get("boot") == _boot_id()


def _ended(lease: Mapping[str, Any]) -> bool:
    """True for a process of this machine that is gone, or dead and only not yet waited for by its parent."""
    pid = lease.get("pid")
    if not _is_local(lease) or type(pid) is not int or pid <= 0:
        return False
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return True
    except PermissionError:
        pass  # another user's process, which may be dead and not waited for like any other
    return _is_zombie(pid)


def _is_zombie(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            state = file.read().rpartition(b")")[2].split()[0]  # behind the name, which may hold anything
    except (OSError, IndexError):
        return False
    return state in (b"Z", b"X")


def _stated_time(lease: Mapping[str, Any]) -> float:
    stated = lease.get("time")
    return float(stated) if isinstance(stated, int | float) else 0.0


def _boot_id() -> str:
    """Tells this boot of this machine from any other (containers may share host names and process ids)."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="utf-8") as file:
            return f"{file.read().strip()}-{os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return socket.gethostname()


Ended = Callable[[Mapping[str, Any]], bool]
"""Whether a lease's holder is known to be gone, by what its lease says."""


class Lease:
    """The right to write to a folder (a cache, or the output path of a training), while it is held.

    As a context manager it gives back at the end what `acquire` took.
    """

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self.path = join(folder, LEASE)
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._mine: dict[str, Any] = {"owner": uuid.uuid4().hex, "host": socket.gethostname(), "boot": _boot_id()}
        self._mine["pid"] = os.getpid()

    def content(self) -> bytes:
        """The lease file as of now."""
        return json.dumps({**self._mine, "time": time.time()}).encode()

    def held(self) -> bool:
        """Whether the lease file is this holder's. Raises OSError and what the store raises when it cannot be read."""
        return bool(owner(self.folder) == self._mine["owner"])

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, *_: object) -> None:
        if self._thread is not None:
            self._stop.set()
            self._thread.join()
            _release(self)

    def acquire(self, place: Mapping[str, str] | None = None, ended: Ended = lambda lease: False) -> None:
        """Take it. Raises CacheError naming the holder when another live attempt has it.

        place: where this process runs, for the `ended` of others, which tells of a lease whether its holder is gone.
        Where neither that nor this machine can tell, this watches STALE_SECONDS for a sign of life.
        """
        if place:
            self._mine["place"] = dict(place)
        _acquire(self, ended)
        self._thread = threading.Thread(target=self.keep_alive, args=(self._stop,), name="cache-lease", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raise CacheError if another attempt has taken the folder over."""
        try:
            held = self.held()
        except OSError as error:
            raise UnreadableError(self.path, error) from error
        if not held:
            raise CacheError(
                f"{self.folder} was taken over by another attempt while this one was silent for more than "
                f"{STALE_SECONDS:g} s; nothing is lost, run this one again when that has ended"
            )

    def keep_alive(self, stop: threading.Event) -> None:
        """Write the lease again and again until `stop`, or until it is seen to be another's.

        A failure to read or write is no reason to end: the next beat may succeed.
        """
        while not stop.wait(BEAT_SECONDS):
            try:
                if not self.held():
                    logger.warning("%s is another attempt's now; this one ends at its next check", self.path)
                    return
                write_bytes_atomic(self.path, self.content())
            except Exception as error:  # an object store's client raises much beside OSError
                logger.warning("no sign of life could be left in %s (%s); trying again", self.path, error)


def _busy(lease: Lease, holder: Mapping[str, Any]) -> CacheError:
    return CacheError(
        f"{lease.folder} is being written by process {holder.get('pid')} on {holder.get('host')}; wait for it or "
        f"end it. If it is gone, its lease ends {STALE_SECONDS:g} s after its last sign of life"
    )


def _watch(lease: Lease, before: bytes, ended: Ended) -> bytes | None:
    """Wait until the holder's silence is long enough, or it is known to have ended; the lease as it stands then.

    None if it was given back.

    Raises CacheError as soon as it shows a sign of life.
    """
    holder = _parse(before)
    logger.warning(
        "%s has a lease of process %s on %s; watching for %g s whether that one is alive",
        *(lease.folder, holder.get("pid"), holder.get("host"), STALE_SECONDS),
    )
    end = time.monotonic() + STALE_SECONDS
    while (left := end - time.monotonic()) > 0 and not ended(holder):
        time.sleep(min(BEAT_SECONDS / 2, left))
        now = _read(lease.path)
        if now is None:
            return None
        if now != before:
            raise _busy(lease, _parse(now))
    return before


def _acquire(lease: Lease, ended: Ended) -> None:
    before = _read(lease.path)
    if before is not None and not (_ended(holder := _parse(before)) or ended(holder)):
        # By the clock of this machine, so it needs no watching.
        if _is_local(holder) and 0 <= time.time() - _stated_time(holder) <= STALE_SECONDS:
            raise _busy(lease, holder)
        before = _watch(lease, before, ended)
    if before is not None and _read(lease.path) == before:
        remove(lease.path)
    created = create_new(lease.path, lease.content())
    if before is not None or is_remote(lease.path):
        # Another attempt may have removed or replaced what was just written: the one whose lease stays has the folder.
        time.sleep(SETTLE_SECONDS)
    # Not by the result of `create_new` alone: a put that is sent twice, since its answer was lost, finds its own file.
    if not lease.held():
        raise CacheError(
            f"{lease.folder} was taken by another attempt at the same moment; run this one again when that has ended"
            + ("" if created else f" (see {lease.path})")
        )


@contextmanager
def lease(folder: str) -> Iterator[Lease]:
    """Hold `folder` for writing. Raises CacheError naming the holder when another live attempt has it."""
    with Lease(folder) as mine:
        mine.acquire()
        yield mine


def _release(lease: Lease) -> None:
    """Remove the lease; when that fails it ends by itself, and what was done with the cache is done."""
    try:
        if lease.held():
            remove(lease.path)
    except Exception as error:
        logger.warning("%s could not be removed (%s); it ends %g s from now", lease.path, error, STALE_SECONDS)
