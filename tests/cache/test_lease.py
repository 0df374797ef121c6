"""Two attempts on one output: the second is refused, a dead one's lease is taken over."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ray_diffsynth.cache import lease as lease_module
from ray_diffsynth.cache.lease import LEASE, lease
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


def test_a_silent_holder_on_another_machine_is_waited_for_then_replaced(tmp_path: Path) -> None:
    other = {"owner": "x", "host": "elsewhere", "boot": "b", "pid": 1, "time": time.time() - 30}
    (tmp_path / LEASE).write_text(json.dumps(other))
    with pytest.raises(CacheError, match="elsewhere"), lease(str(tmp_path)):
        raise AssertionError("a lease 30 s old was taken")
    (tmp_path / LEASE).write_text(json.dumps({**other, "time": time.time() - lease_module.STALE_SECONDS - 1}))
    with lease(str(tmp_path)):
        pass


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
