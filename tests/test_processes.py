"""A session ends when its last process has ended, whoever started it and in whatever group."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import pytest

from tests.processes import kill_session, session_processes, wait_for_session

# A parent and its child in a process group of the child's own, as Ray's workers are; the child ends with its stdin.
_SCRIPT = """
import subprocess, sys
command = [sys.executable, "-c", "import sys; print('up', flush=True); sys.stdin.read()"]
child = subprocess.Popen(command, process_group=0)
print(child.pid, flush=True)
child.wait()
"""


@pytest.fixture
def parent() -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-c", _SCRIPT]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)
    yield process
    kill_session(process)
    assert process.stdin is not None and process.stdout is not None
    process.stdin.close()
    process.stdout.close()


def child_of(parent: subprocess.Popen[bytes]) -> int:
    """Its process id, as soon as it is up."""
    assert parent.stdout is not None
    lines = {parent.stdout.readline().strip() for _ in range(2)}
    (number,) = lines - {b"up"}
    return int(number)


def test_a_session_lasts_until_its_last_process_has_ended(parent: subprocess.Popen[bytes]) -> None:
    child = child_of(parent)
    assert sorted(session_processes(parent.pid)) == sorted([parent.pid, child])
    parent.kill()
    parent.wait()
    assert session_processes(parent.pid) == [child]
    assert parent.stdin is not None
    parent.stdin.close()
    wait_for_session(parent)
    assert session_processes(parent.pid) == []


def test_a_session_is_killed_with_what_left_its_process_group(parent: subprocess.Popen[bytes]) -> None:
    child_of(parent)
    kill_session(parent)
    assert session_processes(parent.pid) == [] and parent.returncode == -9
