"""Two attempts on one output: the second is refused, a dead one's lease is taken over."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from ray_diffsynth import storage
from ray_diffsynth.cache import lease as lease_module
from ray_diffsynth.cache.lease import LEASE, Lease, lease
from ray_diffsynth.cache.schema import CacheError

HOLDER = """
import sys, time
from ray_diffsynth.cache.lease import lease
with lease(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path: Path):
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline().strip() == "held"
    yield process
    process.kill()
    process.wait()


def test_a_live_holder_keeps_others_out(tmp_path: Path, holder: "subprocess.Popen[str]") -> None:
    with pytest.raises(CacheError, match=f"process {holder.pid}"), lease(str(tmp_path)):
        raise AssertionError("the lease was given twice")
    assert holder.poll() is None


def test_a_killed_holder_leaves_the_cache_free(tmp_path: Path, holder: "subprocess.Popen[str]") -> None:
    holder.kill()
    holder.wait()
    assert (tmp_path / LEASE).exists()
    with lease(str(tmp_path)):
        assert json.loads((tmp_path / LEASE).read_text())["pid"] != holder.pid
    assert not (tmp_path / LEASE).exists()


def watched(*arguments: object) -> None:
    raise AssertionError("a dead holder was waited for")


def test_a_killed_holder_that_nobody_waited_for_is_dead(
    tmp_path: Path, holder: "subprocess.Popen[str]", monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its process id is taken until its parent asks how it ended, which a container's first process may never do."""
    monkeypatch.setattr(lease_module, "_watch", watched)
    os.kill(holder.pid, signal.SIGKILL)
    os.waitid(os.P_PID, holder.pid, os.WEXITED | os.WNOWAIT)  # ended, and left as it is
    os.kill(holder.pid, 0)
    with lease(str(tmp_path)) as mine:
        mine.check()
        assert json.loads((tmp_path / LEASE).read_text())["pid"] == os.getpid()


@pytest.mark.parametrize("content", [{"pid": 2**80, "time": 0}, {"pid": 2**31 - 1, "time": "soon"}])
def test_a_lease_with_numbers_that_no_process_has(
    tmp_path: Path, content: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease_module, "_watch", watched)
    here = {"owner": "x", "host": socket.gethostname(), "boot": lease_module._boot_id()}
    (tmp_path / LEASE).write_text(json.dumps({**here, **content}))
    with lease(str(tmp_path)) as mine:
        mine.check()


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beats and waits of tenths of a second."""
    for name, seconds in (("BEAT_SECONDS", 0.05), ("STALE_SECONDS", 0.6), ("SETTLE_SECONDS", 0.05)):
        monkeypatch.setattr(lease_module, name, seconds)


@pytest.mark.parametrize("content", [{}, {"pid": "7", "time": "soon"}, {"pid": -1, "time": None}])
def test_a_damaged_lease_is_watched(
    tmp_path: Path, content: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    here = {"owner": "x", "host": socket.gethostname(), "boot": lease_module._boot_id()}
    (tmp_path / LEASE).write_text(json.dumps({**here, **content}))
    monkeypatch.setattr(lease_module, "time", clock := Clock())
    with lease(str(tmp_path)) as mine:
        mine.check()
    assert clock.now >= lease_module.STALE_SECONDS


def elsewhere(when: float) -> bytes:
    """A lease of another machine whose clock may be wrong."""
    return json.dumps({"owner": "x", "host": "elsewhere", "boot": "b", "pid": 1, "time": when}).encode()


class Clock:
    """Stands for the module time in the lease's: waiting costs none, and something may happen meanwhile."""

    def __init__(self, meanwhile: Callable[[], object] = lambda: None) -> None:
        self.meanwhile, self.now = meanwhile, 0.0

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.meanwhile()

    def monotonic(self) -> float:
        return self.now

    def time(self) -> float:
        return time.time()


@pytest.mark.parametrize("skew", [-3600.0, 0.0, 3600.0])
def test_a_holder_elsewhere_is_judged_by_its_beats_not_by_its_clock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, skew: float
) -> None:
    path, beats = tmp_path / LEASE, iter(range(1, 100))
    path.write_bytes(elsewhere(skew))
    live = Clock(lambda: path.write_bytes(elsewhere(skew + next(beats))))
    monkeypatch.setattr(lease_module, "time", live)
    with pytest.raises(CacheError, match="process 1 on elsewhere"), lease(str(tmp_path)):
        raise AssertionError("the lease of a live holder was taken")
    assert live.now <= lease_module.BEAT_SECONDS
    # Its silence is waited for: a driver that is started again on another machine goes on.
    monkeypatch.setattr(lease_module, "time", silent := Clock())
    with lease(str(tmp_path)):
        assert json.loads(path.read_bytes())["host"] != "elsewhere"
        assert silent.now == lease_module.STALE_SECONDS + lease_module.SETTLE_SECONDS


def test_a_lease_that_is_given_back_while_it_is_watched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / LEASE).write_bytes(elsewhere(time.time()))
    clock = Clock(lambda: (tmp_path / LEASE).unlink())
    monkeypatch.setattr(lease_module, "time", clock)
    with lease(str(tmp_path)):
        assert json.loads((tmp_path / LEASE).read_bytes())["host"] != "elsewhere"
        assert clock.now <= lease_module.BEAT_SECONDS


def test_a_failed_read_does_not_end_the_heartbeat(tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    failures = 0

    def flaky(path: str) -> bytes:
        nonlocal failures
        if threading.current_thread().name == "cache-lease" and failures < 3:
            failures += 1
            raise OSError(16, "503 SlowDown")
        return storage.read_bytes(path)

    monkeypatch.setattr(lease_module, "read_bytes", flaky)
    with lease(str(tmp_path)) as mine:
        first = (tmp_path / LEASE).read_bytes()
        deadline = time.monotonic() + 10
        while (tmp_path / LEASE).read_bytes() == first:
            assert time.monotonic() < deadline, "no heartbeat after the failures"
            time.sleep(0.05)
        assert failures == 3
        mine.check()


def test_a_lease_that_cannot_be_read_is_an_error_not_a_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: str) -> bytes:
        raise PermissionError(13, "Permission denied")

    with lease(str(tmp_path)) as mine, monkeypatch.context() as patch:
        patch.setattr(lease_module, "read_bytes", refuse)
        with pytest.raises(CacheError, match="cannot be read"):
            mine.check()


def test_the_heartbeat_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease_module, "BEAT_SECONDS", 0.05)
    with lease(str(tmp_path)):
        first = json.loads((tmp_path / LEASE).read_text())["time"]
        deadline = time.monotonic() + 10
        while json.loads((tmp_path / LEASE).read_text())["time"] == first:
            assert time.monotonic() < deadline, "no heartbeat within 10 s"
            time.sleep(0.05)


def test_a_lease_that_was_taken_over_is_noticed(tmp_path: Path) -> None:
    with lease(str(tmp_path)) as mine:
        mine.check()
        (tmp_path / LEASE).write_text(
            json.dumps({"owner": "x", "host": "h", "boot": "b", "pid": 1, "time": time.time()})
        )
        with pytest.raises(CacheError, match="taken over by another attempt"):
            mine.check()
    assert json.loads((tmp_path / LEASE).read_text())["owner"] == "x"


def test_of_many_attempts_at_once_one_gets_it(tmp_path: Path) -> None:
    from concurrent.futures import ThreadPoolExecutor
    from threading import Barrier

    start, end = Barrier(8), Barrier(8)

    def attempt(_: int) -> bool:
        start.wait()
        try:
            with lease(str(tmp_path)):
                end.wait()
                return True
        except CacheError:
            end.wait()
            return False

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(attempt, range(8))) == 1
    assert not (tmp_path / LEASE).exists()


def test_a_holder_that_is_known_to_be_gone_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = {"cluster": "c", "node": "n", "job": "j"}
    (tmp_path / LEASE).write_text(json.dumps({"owner": "x", "host": "elsewhere", "pid": 1, "place": place}))
    monkeypatch.setattr(lease_module, "_watch", watched)
    with Lease(str(tmp_path)) as mine:
        mine.acquire({"cluster": "c", "node": "m", "job": "k"}, lambda lease: lease["place"] == place)
        assert json.loads((tmp_path / LEASE).read_text())["place"]["job"] == "k"
    assert not (tmp_path / LEASE).exists()


def test_a_holder_that_goes_while_it_is_watched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / LEASE).write_bytes(elsewhere(0))
    monkeypatch.setattr(lease_module, "time", clock := Clock())
    with Lease(str(tmp_path)) as mine:
        mine.acquire(ended=lambda lease: clock.now > 7)
        assert 7 < clock.now <= 7 + lease_module.BEAT_SECONDS + lease_module.SETTLE_SECONDS


def test_what_was_not_taken_is_not_given_back(tmp_path: Path) -> None:
    with lease(str(tmp_path)):
        with Lease(str(tmp_path)):
            pass
        with Lease(str(tmp_path)) as second, pytest.raises(CacheError, match="is being written by process"):
            second.acquire()
        assert (tmp_path / LEASE).exists()
