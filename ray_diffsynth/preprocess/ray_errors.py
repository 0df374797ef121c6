"""What Ray reports of a pass: which processes and machines died, and errors of other kinds.

The only module that knows how Ray reports it. Tasks report what they know (attempts, why the run ends) to the monitor.
"""

import logging
import threading
from contextvars import ContextVar, Token
from typing import Any

from ray.exceptions import (
    LocalRayletDiedError,
    NodeDiedError,
    ObjectLostError,
    OutOfMemoryError,
    RayActorError,
    WorkerCrashedError,
)

from ray_diffsynth.errors import remote_cause
from ray_diffsynth.preprocess.errors import EncoderError, described
from ray_diffsynth.ray_compat import DATA_ERRORS_LOGGER

DEATHS = (RayActorError, WorkerCrashedError, OutOfMemoryError, NodeDiedError, LocalRayletDiedError, ObjectLostError)
"""How Ray reports that a process or a machine has died, and with it what it worked on."""


class Stopped(Exception):
    """The pass was ended because another group, or a part of this one, cannot go on."""


class Reports(logging.Handler):
    """The errors of one pass that Ray Data logs and then ignores, since blocks may be lost; a context manager.

    Within it, an execution that this thread begins belongs to the pass: its thread logs to here and to no other pass,
    and ends with `Stopped` soon after `stop` is set.
    """

    def __init__(self, stop: threading.Event) -> None:
        super().__init__(logging.ERROR)
        self.stop = stop
        self.threads: set[str] = set()
        self.errors: list[BaseException] = []
        self._token: Token[Reports | None] | None = None

    def emit(self, record: logging.LogRecord) -> None:
        """Keep the error of a record that the pass's own execution logged."""
        if record.threadName in self.threads and record.exc_info and record.exc_info[1] is not None:
            self.errors.append(record.exc_info[1])

    def __enter__(self) -> "Reports":
        self._token = _current.set(self)
        logging.getLogger(DATA_ERRORS_LOGGER).addHandler(self)
        return self

    def __exit__(self, *_: object) -> None:
        logging.getLogger(DATA_ERRORS_LOGGER).removeHandler(self)
        if self._token is not None:
            _current.reset(self._token)

    def deaths(self, group: str) -> int:
        """How many processes died. Raises EncoderError for an error of another kind: it is no shard's fault."""
        for error in self.errors:
            if not isinstance(error, DEATHS):
                cause = remote_cause(error) or error  # a task's error holds a whole traceback as its text
                raise EncoderError(f"{group} could not be encoded: {described(cause)}") from error
        return len(self.errors)


_current: ContextVar[Reports | None] = ContextVar("reports", default=None)


class PassCallback:
    """Ray Data's callback, one for each execution: ties it to the pass whose thread began it."""

    def __init__(self) -> None:
        self.reports: Reports | None = None

    def before_execution_starts(self, executor: Any) -> None:
        """Tie the execution to the pass of this thread, if there is one."""
        self.reports = _current.get()
        if self.reports is not None:
            self.reports.threads.add(executor.name)  # a thread, named by its dataset

    def on_execution_step(self, executor: Any) -> None:
        """Raise Stopped once the pass is to end."""
        if self.reports is not None and self.reports.stop.is_set():
            raise Stopped("stopped on request")

    def after_execution_succeeds(self, executor: Any) -> None:
        """Nothing."""

    def after_execution_fails(self, executor: Any, error: Exception) -> None:
        """Nothing: `run_pass` gets the error."""
