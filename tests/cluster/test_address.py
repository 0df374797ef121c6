"""Which Ray a job takes: a temporary folder that a local one can use, and addresses at which there is none."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from ray_diffsynth.cluster.address import (
    _IN_SESSION,
    SOCKET_PATH_BYTES,
    ClusterError,
    check_answers,
    temporary_folder,
)
from ray_diffsynth.cluster.session import ray_session
from tests.processes import LOOPBACK, free_ports

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in ("RAY_TMPDIR", "TMPDIR", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("ray.is_initialized", lambda: False)  # though another test of this process has started one
    return monkeypatch


@pytest.fixture
def long(tmp_path: Path) -> Path:
    folder = tmp_path / ("slurm_jobdir" * 5) / "tmp"
    folder.mkdir(parents=True)
    return folder


def test_a_short_folder_is_taken_as_it_is(without: pytest.MonkeyPatch) -> None:
    with temporary_folder() as folder:
        assert folder is None
    with tempfile.TemporaryDirectory(prefix="t", dir="/tmp") as short:
        without.setenv("TMPDIR", short)
        with temporary_folder() as folder:
            assert folder == f"{short}/ray"


@pytest.mark.parametrize("name", ["TMPDIR", "RAY_TMPDIR"])
def test_a_long_folder_gets_a_short_link(name: str, long: Path, without: pytest.MonkeyPatch) -> None:
    without.setenv(name, str(long))
    with temporary_folder() as folder:
        assert folder is not None and len(os.fsencode(folder)) + _IN_SESSION <= SOCKET_PATH_BYTES
        (Path(folder) / "session").mkdir()
        assert (long / "ray" / "session").is_dir(), "what Ray writes lies where the user wants it"
    assert not os.path.lexists(folder) and not Path(folder).parent.exists()
    assert (long / "ray" / "session").is_dir()


def test_bytes_count_and_not_characters(tmp_path: Path, without: pytest.MonkeyPatch) -> None:
    with tempfile.TemporaryDirectory(prefix="猫" * 12, dir="/tmp") as short:
        assert len(short) + len("/ray") + _IN_SESSION <= SOCKET_PATH_BYTES
        without.setenv("TMPDIR", short)
        with temporary_folder() as folder:
            assert folder is not None and not folder.startswith(short)


def test_a_relative_folder_is_made_absolute(tmp_path: Path, without: pytest.MonkeyPatch) -> None:
    without.chdir(tmp_path)
    without.setenv("TMPDIR", "t")
    with temporary_folder() as folder:
        assert folder is not None and os.path.isabs(folder) and os.path.samefile(folder, tmp_path / "t" / "ray")


def test_a_folder_that_cannot_be_made(tmp_path: Path, without: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    without.setenv("TMPDIR", str(tmp_path / "file" / "tmp"))
    with (
        pytest.raises(ClusterError, match=r"below TMPDIR: .*Not a directory.*; set TMPDIR to a folder"),
        temporary_folder(),
    ):
        pass


def test_no_place_for_a_link(long: Path, without: pytest.MonkeyPatch) -> None:
    without.setenv("TMPDIR", str(long))
    without.setattr("ray_diffsynth.cluster.address._SHORT", ("/no_such_folder",))
    told = "TMPDIR is too long .* set RAY_TMPDIR to a folder .* at most 36 bytes"
    with pytest.raises(ClusterError, match=told), temporary_folder():
        pass


def test_an_address_that_does_not_answer(without: pytest.MonkeyPatch) -> None:
    """Told within the time of one connection, and whose address it is."""
    address = f"127.0.0.1:{free_ports(1)[0]}"
    without.setattr("ray_diffsynth.cluster.address.ANSWER_SECONDS", 1.0)
    with pytest.raises(ClusterError) as refused, ray_session(address):
        pass
    assert f"no Ray cluster at {address}: it does not answer" in str(refused.value)
    assert str(refused.value).endswith("start one, or leave --ray_address out for a local one")
    without.setenv("RAY_ADDRESS", address)
    told = r"\(from the variable RAY_ADDRESS\).*; start one, or unset RAY_ADDRESS"
    with pytest.raises(ClusterError, match=told), ray_session():
        pass


@pytest.mark.parametrize(
    "address", ["nonsense", "host:port", "http://127.0.0.1:8265", "foo://x", "a..b:1", "host:99999"]
)
def test_an_address_that_is_none(address: str, without: pytest.MonkeyPatch) -> None:
    without.setenv("RAY_ADDRESS", address)
    with pytest.raises(ClusterError) as refused, ray_session():
        pass
    assert f"no Ray cluster at {address} (from the variable RAY_ADDRESS)" in str(refused.value)
    assert "unset RAY_ADDRESS" in str(refused.value) and "\n" not in str(refused.value)


def test_only_host_and_port_are_asked(without: pytest.MonkeyPatch) -> None:
    without.setattr(socket, "create_connection", lambda *arguments, **options: pytest.fail("asked"))
    for address in ("auto", "local", "ray://host:10001", "host"):
        check_answers(address, given=True)


_SCRIPT = """
import os, psutil, ray
from ray_diffsynth.cluster.session import ray_session
from tests.processes import listening

@ray.remote
def add(one, two):
    return one + two

with ray_session():
    assert ray.get(add.remote(1, 2)) == 3
    own = psutil.Process()
    for process in (own, *own.children(recursive=True)):
        print("listening", process.name(), *listening(process))
    print("session in", os.path.realpath(ray._private.worker._global_node.get_session_dir_path()))
"""


@pytest.mark.ray
@pytest.mark.slow
def test_ray_starts_with_a_long_tmpdir_and_listens_on_loopback_alone(long: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(long)}
    for name in ("RAY_TMPDIR", "RAY_ADDRESS"):
        environment.pop(name, None)
    done = subprocess.run([sys.executable, "-c", _SCRIPT], cwd=long, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and f"session in {long}/ray/session_" in done.stdout, done.stderr
    told = [line.split()[1:] for line in done.stdout.splitlines() if line.startswith("listening ")]
    # The driver, the head's server, the node's daemon, its two agents, and the worker of the task.
    assert len([name for name, *addresses in told if addresses]) >= 6, done.stdout
    assert all(LOOPBACK.issuperset(addresses) for _, *addresses in told), done.stdout
