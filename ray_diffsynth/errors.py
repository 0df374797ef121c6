"""Errors that a user can act on, and the wording they share. The lowest layer: imports nothing of the package."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A problem with the input, the configuration or the files, not with the program.

    Its message names the thing, the reason and the fix. The jobs print it without a traceback and exit with 1.
    Each package defines its own beside the code that raises it: DatasetError in data/, CacheError in cache/.
    """

    def __str__(self) -> str:
        # KeyError, which some subclasses also are, would quote the message.
        return str(self.args[0]) if len(self.args) == 1 else super().__str__()


class ConfigError(UserError, ValueError):
    """A configuration field holds a value that cannot work. The jobs exit with 2."""


def nearest(name: str, names: Iterable[str], count: int = 3) -> list[str]:
    """The names closest to ``name``, best first; none when nothing is close. Dashes count as underscores."""
    by_key = {candidate.replace("-", "_").lower(): candidate for candidate in names}
    matches = difflib.get_close_matches(name.replace("-", "_").lower(), by_key, n=count, cutoff=0.6)
    return [by_key[match] for match in matches]


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """The end of an error about an unknown ``name``: the closest of ``names``, or all of them if none is close."""
    choices = sorted(set(names))
    if close := nearest(name, choices):
        return f"did you mean {' or '.join(close)}?"
    return f"choose from {', '.join(choices)}" if choices else "there is nothing to choose from"


def first_line(error: BaseException) -> str:
    """The first line of the error's text; its type's name where it has none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def remote_cause(error: BaseException) -> BaseException | None:
    """The original in Ray's wrapper around an error of another process (`RayTaskError.cause`); None for any other.

    The wrapper's own text is a whole traceback.
    """
    cause = getattr(error, "cause", None)
    return cause if isinstance(cause, BaseException) else None


def worker_failures(error: BaseException) -> dict[int, BaseException]:
    """The errors of the workers by rank, of Ray Train's error about a group of them; empty for any other error."""
    failures = getattr(error, "worker_failures", None)
    return dict(failures) if isinstance(failures, dict) else {}


def find_user_error(error: BaseException) -> UserError | None:
    """The UserError that caused ``error``, through chained exceptions and Ray's wrappers around remote ones."""
    seen: set[int] = set()
    waiting: list[BaseException | None] = [error]
    while waiting:
        current = waiting.pop(0)
        if current is None or id(current) in seen:
            continue
        seen.add(id(current))
        remote = remote_cause(current)
        if isinstance(current, UserError) and not isinstance(remote, UserError):
            return current
        waiting += [remote, *worker_failures(current).values()]
        waiting += [current.__cause__, None if current.__suppress_context__ else current.__context__]
    return None
