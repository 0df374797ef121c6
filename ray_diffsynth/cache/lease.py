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
from ray_diffsynth.data.storage import exists, is_remote, join, read_bytes, remove, write_bytes_atomic

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


@contextmanager
def lease(cache: str) -> Iterator[None]:
    """Hold `cache` for writing. Raises CacheError naming the holder when another live attempt has it."""
    path = join(cache, LEASE)
    mine = {"owner": uuid.uuid4().hex, "host": socket.gethostname(), "boot": _boot_id(), "pid": os.getpid()}
    held = _read(path)
    if held is not None and not _dead(held):
        raise CacheError(
            f"{cache} is being written by process {held.get('pid')} on {held.get('host')}; wait for it or end it. "
            f"If it is gone, its lease ends {STALE_SECONDS:g} s after its last sign of life"
        )

    def beat() -> None:
        write_bytes_atomic(path, json.dumps({**mine, "time": time.time()}).encode())

    beat()
    if is_remote(path):
        time.sleep(1.0)  # two attempts that both saw no lease: the one whose write is there afterwards has it
    current = _read(path)
    if current is None or current["owner"] != mine["owner"]:
        raise CacheError(
            f"{cache} was taken by another attempt at the same moment; run this one again when that has ended"
        )
    stop = threading.Event()

    def keep_alive() -> None:
        while not stop.wait(BEAT_SECONDS):
            beat()

    thread = threading.Thread(target=keep_alive, name="cache-lease", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        current = _read(path)
        if current is not None and current["owner"] == mine["owner"]:
            remove(path)
