"""Processes that a test starts, with all that they start themselves, and ports for them."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time

import psutil


def session_processes(session: int) -> list[int]:
    """Ids of the living processes of a session: whatever began in it, Ray's daemons and workers too.

    Not those that are dead and only wait for their parent to ask how they ended.
    """
    return [pid for pid in psutil.pids() if _lives_in(session, pid)]


def _lives_in(session: int, pid: int) -> bool:
    try:
        return os.getsid(pid) == session and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except (ProcessLookupError, psutil.NoSuchProcess):
        return False


def wait_for_session(process: subprocess.Popen[bytes]) -> None:
    """Wait until `process`, which began a session of its own, and everything in that session have ended."""
    process.wait()
    while session_processes(process.pid):  # as long as the test may last
        time.sleep(0.05)


def kill_session(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL for `process`, which began a session of its own, and for everything in that session."""
    while alive := session_processes(process.pid):  # one that is killed may just have started another
        for pid in alive:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:  # it ended meanwhile
                continue
        time.sleep(0.05)
    process.wait()


LOOPBACK = {"127.0.0.1", "::1", "::ffff:127.0.0.1"}


def listening(process: psutil.Process) -> list[str]:
    """The addresses on which a process listens, one for each port."""
    return [one.laddr.ip for one in process.net_connections("tcp") if one.status == psutil.CONN_LISTEN]


def free_ports(count: int) -> list[int]:
    """Ports of this machine on which nothing listens."""
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports
