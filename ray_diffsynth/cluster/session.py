"""Joining or starting Ray: the one place where a job decides which cluster it runs on."""

import io
import logging
import os
import re
import socket
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, TextIO

import ray
from ray.util.annotations import RayDeprecationWarning

from ray_diffsynth.cluster.address import ClusterError as ClusterError
from ray_diffsynth.cluster.address import check_answers, is_host_and_port, no_cluster, no_token, temporary_folder
from ray_diffsynth.cluster.environment import Environment, environment, forwarded
from ray_diffsynth.cluster.request import EXPIRE_SECONDS
from ray_diffsynth.console import open_stream
from ray_diffsynth.ray_compat import init_local, join, refuses_token
from ray_diffsynth.system_errors import explain

LOGGERS = ("ray", "ray.data", "ray.train", "ray.tune")
"""Those of Ray that print on the terminal by themselves."""
SUBMITTED = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""A variable that a job of `ray job submit` has: it runs on the cluster's head, whose files its user may not see."""
SHOWN_LINES = 20
SHOWN_COLUMNS = 300
_SECRET = re.compile("TOKEN|KEY|SECRET|PASSW|CREDENTIAL", re.IGNORECASE)
LEAST_SECRET = 6
"""Characters of a value that is left out: a shorter one would be found in other words."""


@contextmanager
def ray_session(
    address: str | None = None, *, verbose: bool = False, env: Sequence[str] | None = ()
) -> Iterator[Environment | None]:
    """Within it Ray is up: the one already joined, else `address` or RAY_ADDRESS, else a local one that ends with it.

    Gives what brings the variables of this process to the job's others, those named by `env` too; None for a local Ray,
    where they inherit them, and for `env` None. Raises ClusterError, and ConfigError for a variable that is not set.

    Workers compute with one thread per reserved CPU (OMP_NUM_THREADS is Ray's default): pools do not fight over cores.
    Unless `verbose`, Ray's own messages go to a file, which a failure names and a success removes.
    """
    values = {} if env is None else forwarded(env)
    if ray.is_initialized():
        with environment(values) as given_out:
            yield given_out
        return
    given = bool(address)
    address = address or os.environ.get("RAY_ADDRESS") or "local"
    os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "0" if verbose else "1")
    # What the dataset of a killed driver wanted stays reserved for so long, by default three minutes: the same job, run
    # again, has next to nothing of the cluster meanwhile. One that lives repeats it each ten seconds.
    os.environ.setdefault("RAY_DATA_AUTOSCALING_REQUEST_EXPIRE_TIME_S", f"{EXPIRE_SECONDS:.0f}")
    # By Ray 2.60's default an actor that reserves no GPU sees all of them. The nodes of a cluster that is there already
    # have their own setting: see `own_device`.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "1")
    level = logging.INFO if verbose else logging.ERROR
    with ExitStack() as session:
        if not verbose:
            # Ray Data has no other way yet to bound an actor's restarts than the arguments that 2.60 deprecates.
            warnings.filterwarnings("ignore", category=RayDeprecationWarning)
            elsewhere = address != "local" or SUBMITTED in os.environ
            session.enter_context(native_messages_in_a_file(show=elsewhere))
        options: dict[str, Any] = {"log_to_driver": verbose, "logging_level": level}
        if address == "local":
            _start(options, session.enter_context(temporary_folder()))
        else:
            _join(address, given, options)
        for name in LOGGERS:
            logging.getLogger(name).setLevel(level)
        session.callback(ray.shutdown)
        yield None if address == "local" else session.enter_context(environment(values))


def _join(address: str, given: bool, options: dict[str, Any]) -> None:
    check_answers(address, given)
    if is_host_and_port(address) and refuses_token(address):  # Ray would try for half a minute, and not say why
        raise no_token(address)
    try:
        join(address, options)
    except ray.exceptions.AuthenticationError as error:
        raise no_token(address) from error
    except Exception as error:  # ConnectionError, ValueError, RuntimeError, RayError: by what is wrong with the address
        raise no_cluster(address, given, error) from error


def _start(options: dict[str, Any], folder: str | None) -> None:
    try:
        init_local(folder, options)
    except Exception as error:
        if explain(error):
            raise
        raise ClusterError(
            f"no Ray could be started on this machine: {type(error).__name__}: {' '.join(str(error).split())}; look at "
            f"free memory and at the limit of processes (ulimit -u), and at Ray's logs in {folder or '/tmp/ray'}"
        ) from error


@contextmanager
def native_messages_in_a_file(*, show: bool = False) -> Iterator[None]:
    """Within it, what native code writes to stderr and what Ray's loggers print goes to a temporary file.

    Python's own stderr (progress, messages, tracebacks) stays where it was. An exception that leaves the block gets a
    note with the file's path, and with the last lines of it where the file may soon be gone (`show`); without an
    exception, or when nothing was written, the file is removed.
    """
    handle, path = tempfile.mkstemp(prefix="ray_diffsynth-", suffix=".log")
    with os.fdopen(handle, "w", buffering=1, encoding="utf-8", errors="backslashreplace") as log:
        try:
            with _native_stderr(log), _loggers(log):
                yield
        except BaseException as error:
            log.flush()
            if os.path.getsize(path) and isinstance(error, Exception):  # not Ctrl-C, not an exit code
                error.add_note(f"Ray's own messages are in {path}" + (_last_lines(path) if show else ""))
            else:
                os.unlink(path)
            raise
        os.unlink(path)


def _last_lines(path: str) -> str:
    """The end of a file of messages, without the values of variables that look secret."""
    with open(path, "rb") as file:
        file.seek(max(0, os.path.getsize(path) - SHOWN_LINES * SHOWN_COLUMNS))
        lines = file.read().decode(errors="replace").splitlines()[-SHOWN_LINES:]
    text = "\n".join(f"  {line[:SHOWN_COLUMNS]}" for line in lines)
    for name, value in os.environ.items():
        if _SECRET.search(name) and len(value) >= LEAST_SECRET:
            text = text.replace(value, f"<{name}>")
    return f" on {socket.gethostname()}; the last of them:\n{text}"


@contextmanager
def _native_stderr(log: TextIO) -> Iterator[None]:
    """File descriptor 2 is `log`; `sys.stderr` and its logging handlers, if they wrote there, write to a copy of it."""
    python = sys.stderr
    python.flush()
    saved = os.dup(2)
    with open_stream(saved, python.encoding) as copy:
        moved = _writes_to_stderr(python)
        handlers = [h for h in logging.root.handlers if isinstance(h, logging.StreamHandler) and h.stream is python]
        if moved:
            sys.stderr = copy
            for handler in handlers:
                handler.setStream(copy)
        os.dup2(log.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(saved, 2)
            if moved:
                sys.stderr = python
                for handler in handlers:
                    handler.setStream(python)


def _writes_to_stderr(stream: TextIO) -> bool:
    try:
        return stream.fileno() == 2
    except (AttributeError, io.UnsupportedOperation):  # a test's or a notebook's own object
        return False


@contextmanager
def _loggers(log: TextIO) -> Iterator[None]:
    """What Ray's loggers print on the terminal goes to `log`; their files in Ray's session folder stay."""
    before = {name: list(logging.getLogger(name).handlers) for name in LOGGERS}
    instead = logging.StreamHandler(log)
    for name, handlers in before.items():
        files = [h for h in handlers if not isinstance(h, logging.StreamHandler) or isinstance(h, logging.FileHandler)]
        if len(files) < len(handlers):
            logging.getLogger(name).handlers = [*files, instead]
    try:
        yield
    finally:
        for name, handlers in before.items():
            logging.getLogger(name).handlers = handlers


def own_device() -> str:
    """`cuda` in an actor that has reserved a GPU, or part of one, and outside Ray where there is one; else `cpu`."""
    import torch

    ours = not ray.is_initialized() or bool(ray.get_gpu_ids())
    return "cuda" if ours and torch.cuda.is_available() else "cpu"
