"""One writer per cache: a lease file with a heartbeat, so that two attempts on one output cannot harm each other."""

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ray_diffsynth.cache.errors import CacheError
from ray_diffsynth.data.storage import create_new, exists, is_remote, join, read_bytes, remove, write_bytes_atomic

LEASE = "lease.json"
BEAT_SECONDS = 5.0
STALE_SECONDS = 60.0
"""A lease whose holder has been silent for this long is taken over."""


def _read(path: str) -> dict[str, Any] | None:
    if not exists(path):
        return None
    try:
        lease: dict[str, Any] = json.loads(read_bytes(path))
        return lease
    except (OSError, ValueError):
        return None  # removed, or half written on a store without atomic puts


def _dead(lease: dict[str, Any]) -> bool:
    """True if the holder surely ended: a process of this machine that is gone, or one that is silent for too long."""
    if lease.get("host") == socket.gethostname() and lease.get("boot") == _boot_id():
        try:
            os.kill(int(lease["pid"]), 0)
        except ProcessLookupError:
            return True
        except PermissionError:
            return False
    return time.time() - float(lease.get("time", 0)) > STALE_SECONDS


def _boot_id() -> str:
    """Tells this boot of this machine from any other (containers may share host names and process ids)."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return f"{file.read().strip()}-{os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return socket.gethostname()


class Lease:
    """A held lease. `check` raises CacheError once another attempt has taken the cache over."""

    def __init__(self, cache: str) -> None:
        self.cache = cache
        self.path = join(cache, LEASE)
        self._mine = {"owner": uuid.uuid4().hex, "host": socket.gethostname(), "boot": _boot_id(), "pid": os.getpid()}

    def content(self) -> bytes:
        """The lease file as of now."""
        return json.dumps({**self._mine, "time": time.time()}).encode()

    def held(self) -> bool:
        """Whether the lease file is this holder's."""
        current = _read(self.path)
        return current is not None and current["owner"] == self._mine["owner"]

    def check(self) -> None:
        if not self.held():
            raise CacheError(
                f"{self.cache} was taken over by another attempt while this one was silent for more than "
                f"{STALE_SECONDS:g} s; nothing is lost, run this one again when that has ended"
            )


def _acquire(lease: Lease) -> None:
    before = _read(lease.path)
    if before is not None and not _dead(before):
        raise CacheError(
            f"{lease.cache} is being written by process {before.get('pid')} on {before.get('host')}; wait for it or "
            f"end it. If it is gone, its lease ends {STALE_SECONDS:g} s after its last sign of life"
        )
    if before is not None:
        remove(lease.path)
    created = create_new(lease.path, lease.content())
    if created and (before is not None or is_remote(lease.path)):
        # Another attempt may have removed or replaced what was just written: the one whose lease stays has the cache.
        time.sleep(1.0)
    if not created or not lease.held():
        raise CacheError(
            f"{lease.cache} was taken by another attempt at the same moment; run this one again when that has ended"
        )


@contextmanager
def lease(cache: str) -> Iterator[Lease]:
    """Hold `cache` for writing. Raises CacheError naming the holder when another live attempt has it."""
    mine = Lease(cache)
    _acquire(mine)
    stop = threading.Event()

    def keep_alive() -> None:
        while not stop.wait(BEAT_SECONDS) and mine.held():
            write_bytes_atomic(mine.path, mine.content())

    thread = threading.Thread(target=keep_alive, name="cache-lease", daemon=True)
    thread.start()
    try:
        yield mine
    finally:
        stop.set()
        thread.join()
        if mine.held():
            remove(mine.path)
