"""What a job's process needs first of all: UTF-8, and streams on which no message can end the job. No torch."""

from __future__ import annotations

import errno
import io
import os
import select
import sys
import tempfile
from typing import TextIO

_GONE = (errno.EPIPE, errno.EIO)
"""Errors of a stream that nobody reads any more: `| head` has ended, the terminal is closed."""


def prepare_process() -> None:
    """To be called once, first of all, by the owner of the process (`main` of a command line).

    Where Python would take another encoding than UTF-8 for file names (an ASCII locale without Python's own remedies,
    Latin-1), the process starts over in UTF-8 mode, which the processes that it starts inherit. A closed stdin, stdout
    or stderr becomes /dev/null. What the terminal's encoding lacks is written as an escape. A user without a home (a
    container's number that no account has) gets one below the temporary folder: Ray cannot be imported without.
    """
    if sys.getfilesystemencoding().lower() != "utf-8" and os.environ.get("PYTHONUTF8") != "1":
        os.environ["PYTHONUTF8"] = "1"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    _open_closed()
    _give_home()
    sys.stdout, sys.stderr = _tolerant(sys.stdout, 1), _tolerant(sys.stderr, 2)


def open_stream(descriptor: int, encoding: str, *, closefd: bool = True) -> TextIO:
    """A line-buffered text stream to a descriptor that survives characters it cannot write, and readers that leave."""
    raw = io.BufferedWriter(_Unread(descriptor, "w", closefd=closefd))  # type: ignore[type-var]
    return io.TextIOWrapper(raw, encoding=encoding, errors="backslashreplace", line_buffering=True)


class _Unread(io.FileIO):
    """Drops what is written once nobody reads it; the work goes on, as under nohup."""

    def write(self, data: bytes | memoryview) -> int:  # type: ignore[override]
        try:
            while (written := super().write(data)) is None:  # a terminal that another program set to non-blocking
                select.select([], [self], [])
            return written
        except OSError as error:
            if error.errno not in _GONE:
                raise
            return len(data)


def _tolerant(stream: TextIO, descriptor: int) -> TextIO:
    """The stream for `stream`, if that is the process's own; another (a test's, a notebook's) stays as it is."""
    try:
        if stream.fileno() != descriptor:
            return stream
    except (AttributeError, OSError, ValueError):  # none, without a descriptor, or closed
        return stream
    stream.flush()
    return open_stream(descriptor, stream.encoding, closefd=False)


def _give_home() -> None:
    if os.path.expanduser("~") != "~":
        return
    folder = os.path.join(tempfile.gettempdir(), f"home-{os.getuid()}")
    os.makedirs(folder, mode=0o700, exist_ok=True)
    if os.lstat(folder).st_uid != os.getuid():  # someone else has taken the name
        folder = tempfile.mkdtemp(prefix="home-")
    os.environ["HOME"] = folder
    print(f"note: this user has no home; {folder} is taken, set HOME for another", file=sys.stderr)


def _open_closed() -> None:
    """/dev/null for each standard descriptor that is closed; the next file that is opened would get its number."""
    for descriptor, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(descriptor)
        except OSError:
            null = os.open(os.devnull, os.O_RDWR)
            if null != descriptor:
                os.dup2(null, descriptor)
                os.close(null)
        if getattr(sys, name) is None:
            stream = open(descriptor, "r" if descriptor == 0 else "w", encoding="utf-8", closefd=False)  # noqa: SIM115
            setattr(sys, name, stream)
