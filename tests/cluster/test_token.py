"""A cluster with token authentication: what is told where the token is missing or another one."""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ray_diffsynth.cluster.address import no_token
from ray_diffsynth.cluster.session import SHOWN_COLUMNS, SHOWN_LINES, _last_lines
from tests.processes import free_ports, kill_session

ROOT = Path(__file__).resolve().parents[2]
NAMES = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_ADDRESS")


@pytest.mark.parametrize(
    ("variables", "file", "told"),
    [
        ({}, "abc", "RAY_AUTH_MODE is not token here"),
        ({"RAY_AUTH_MODE": "disabled"}, "abc", "RAY_AUTH_MODE is not token here"),
        ({"RAY_AUTH_MODE": "token"}, None, "RAY_AUTH_TOKEN is not set here, and ~/.ray/auth_token is not there"),
        ({"RAY_AUTH_MODE": "token"}, " \n", "~/.ray/auth_token is not there or empty"),
        ({"RAY_AUTH_MODE": "token"}, "abc", "the one in ~/.ray/auth_token is not its own"),
        ({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": "/no/file"}, "abc", "/no/file is not there or empty"),
        ({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "s3cret"}, "abc", "the one in RAY_AUTH_TOKEN is not its own"),
    ],
)
def test_what_is_missing_is_told(
    variables: dict[str, str], file: str | None, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    for name, value in {**variables, "HOME": str(tmp_path)}.items():
        monkeypatch.setenv(name, value)
    if file is not None:
        (tmp_path / ".ray").mkdir()
        (tmp_path / ".ray" / "auth_token").write_text(file)
    message = str(no_token("head:6379"))
    assert told in message and "set RAY_AUTH_MODE=token" in message and "`ray get-auth-token`" in message
    assert "s3cret" not in message and "abc" not in message


def test_the_last_lines_are_few_and_hold_no_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_API_KEY", "s3cretvalue")
    lines = [f"line {number}" for number in range(100)] + ["token s3cretvalue refused", "x" * 1000]
    (tmp_path / "ray.log").write_text("\n".join(lines))
    told = _last_lines(str(tmp_path / "ray.log")).splitlines()
    assert len(told) == 1 + SHOWN_LINES and max(map(len, told[1:])) <= SHOWN_COLUMNS + 2
    assert "  token <MY_API_KEY> refused" in told and "s3cret" not in "".join(told)


@pytest.fixture
def head(tmp_path: Path) -> Iterator[tuple[str, str]]:
    """Address and token of a Ray head with own ports and folder; in an empty home."""
    gcs, agent, client, metrics = free_ports(4)
    folder = Path("/tmp") / f"rds-{secrets.token_hex(4)}"  # short: it holds sockets
    token = secrets.token_hex(16)
    known = {name: value for name, value in os.environ.items() if name not in NAMES}
    environment = {**known, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token, "HOME": str(tmp_path)}
    command = [str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", "--num-cpus=1"]
    command += ["--node-ip-address=127.0.0.1", f"--port={gcs}", f"--temp-dir={folder}", "--include-dashboard=false"]
    command += [f"--dashboard-agent-listen-port={agent}", f"--ray-client-server-port={client}"]
    command += [f"--metrics-export-port={metrics}", "--disable-usage-stats"]
    log = tmp_path / "head.log"
    with log.open("wb") as output:
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=output, start_new_session=True)
    try:
        while "Ray runtime started" not in log.read_text():
            assert process.poll() is None, log.read_text()
            time.sleep(0.2)
        assert token not in log.read_text()
        yield f"127.0.0.1:{gcs}", token
    finally:
        kill_session(process)
        shutil.rmtree(folder, ignore_errors=True)


_JOIN = """
import sys
from ray_diffsynth.cluster.session import ray_session
from ray_diffsynth.errors import UserError
try:
    with ray_session(sys.argv[1]):
        import ray
        print(f"joined {len(ray.nodes())}")
except UserError as error:
    print(f"error: {error}")
"""


@pytest.mark.ray
@pytest.mark.slow
def test_joining_a_cluster_that_wants_its_token(head: tuple[str, str], tmp_path: Path) -> None:
    address, token = head
    known = {name: value for name, value in os.environ.items() if name not in NAMES} | {"HOME": str(tmp_path)}
    cases = {
        "joined 1": {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token},
        "RAY_AUTH_MODE is not token here": {},
        "RAY_AUTH_TOKEN is not set here": {"RAY_AUTH_MODE": "token"},
        "the one in RAY_AUTH_TOKEN is not its own": {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 32},
    }
    command = [sys.executable, "-c", _JOIN, address]
    started = {
        told: subprocess.Popen(command, env={**known, **more}, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        for told, more in cases.items()
    }
    for told, process in started.items():
        output, _ = process.communicate()
        assert told in output and token not in output
        assert told == "joined 1" or output.startswith(f"error: the Ray cluster at {address} wants its token")
