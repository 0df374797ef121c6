"""Where a job finds its Ray: a cluster that answers, or a temporary folder in which a local one can start. No ray."""

from __future__ import annotations

import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ray_diffsynth.errors import UserError

SOCKET_PATH_BYTES = 107
"""The longest path of a Unix socket on Linux."""
_IN_SESSION = len("/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store.10")
"""The longest socket path below Ray's temporary folder."""
ANSWER_SECONDS = 10.0
_SHORT = ("/tmp", "/var/tmp", "/dev/shm")


class ClusterError(UserError):
    """The Ray cluster cannot be joined, or lacks what was asked for."""


def no_cluster(address: str, given: bool, reason: object) -> ClusterError:
    """The error about a cluster that cannot be joined; `given`: by --ray_address, else by the variable RAY_ADDRESS."""
    whose = "" if given else " (from the variable RAY_ADDRESS)"
    fix = "leave --ray_address out" if given else "unset RAY_ADDRESS"
    detail = " ".join(str(reason).split())
    return ClusterError(f"no Ray cluster at {address}{whose}: {detail}; start one, or {fix} for a local one")


def no_token(address: str) -> ClusterError:
    """The error about a cluster that wants a token which this process has not, or another one; with what to set."""
    path = os.environ.get("RAY_AUTH_TOKEN_PATH") or os.path.join("~", ".ray", "auth_token")
    if os.environ.get("RAY_AUTH_MODE", "").lower() != "token":
        reason = "RAY_AUTH_MODE is not token here"
    elif os.environ.get("RAY_AUTH_TOKEN"):
        reason = "the one in RAY_AUTH_TOKEN is not its own"
    elif _is_empty(os.path.expanduser(path)):
        reason = f"RAY_AUTH_TOKEN is not set here, and {path} is not there or empty"
    else:
        reason = f"the one in {path} is not its own"
    return ClusterError(
        f"the Ray cluster at {address} wants its token, and {reason}; set RAY_AUTH_MODE=token, and the token by "
        "RAY_AUTH_TOKEN or in ~/.ray/auth_token (or the file that RAY_AUTH_TOKEN_PATH names): `ray get-auth-token` on "
        "the cluster's head prints it"
    )


def _is_empty(path: str) -> bool:
    try:
        return not Path(path).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeError):
        return True


def is_host_and_port(address: str) -> bool:
    """Whether it is `host:port`; not `auto`, `local` and the like."""
    host, _, port = address.rpartition(":")
    return bool(host) and port.isdigit() and "://" not in address


def check_answers(address: str, given: bool) -> None:
    """Raise ClusterError if nothing listens at `host:port`: Ray itself would try for minutes, and end the process."""
    host, _, port = address.rpartition(":")
    if not is_host_and_port(address):  # Ray says what is wrong
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=ANSWER_SECONDS).close()
    except (OSError, OverflowError, UnicodeError) as error:  # refused, unknown, silent; no such port; no such name
        raise no_cluster(address, given, f"it does not answer ({error})") from error


@contextmanager
def temporary_folder() -> Iterator[str | None]:
    """A folder for a local Ray's sockets, logs and spilled objects; None for the one that Ray takes by itself.

    Where TMPDIR (or RAY_TMPDIR) is too long for the path of a socket, a short link to it that is removed afterwards.
    Raises ClusterError when nothing can be written there.
    """
    name = next((name for name in ("RAY_TMPDIR", "TMPDIR") if name in os.environ), None)
    if name is None:
        yield None
        return
    folder = Path(os.environ[name]).absolute() / "ray"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ClusterError(
            f"Ray cannot keep its temporary files in {folder}, which is below {name}: {error}; set {name} to a folder "
            "that can be written and has some GB of space"
        ) from error
    if len(os.fsencode(folder)) + _IN_SESSION <= SOCKET_PATH_BYTES:
        yield str(folder)
        return
    near_the_root = _make_short_folder(name)
    link = near_the_root / "ray"
    link.symlink_to(folder, target_is_directory=True)
    try:
        yield str(link)
    finally:
        shutil.rmtree(near_the_root, ignore_errors=True)  # the link, not what it leads to


def _make_short_folder(name: str) -> Path:
    problems = []
    for parent in _SHORT:
        try:
            return Path(tempfile.mkdtemp(prefix="rds-", dir=parent))
        except OSError as error:
            problems.append(str(error))
    raise ClusterError(
        f"{name} is too long for the sockets of Ray, whose paths may have {SOCKET_PATH_BYTES} bytes, and no link to it "
        f"can be made ({'; '.join(problems)}); set RAY_TMPDIR to a folder with a path of at most "
        f"{SOCKET_PATH_BYTES - _IN_SESSION - len('/ray')} bytes"
    )
