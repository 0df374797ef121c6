"""What the submitter's shell does to the entrypoint of a RayJob before the job sees it.

KubeRay puts the text as it is into its `bash -c '… ray job submit … -- ENTRYPOINT ; fi ; …'`. The words that this shell
makes of it reach the job: `ray job submit` quotes them again for the shell of the head.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator

from cluster.check.problem import Place, Problem

_OPERATORS = ";|&<>()\n"


def acted_on(command: str) -> Iterator[tuple[int, str]]:
    """(position, character) of all that a shell acts on: operators, comments, line breaks, variables, commands."""
    quote, at = "", 0
    while at < len(command):
        character = command[at]
        if character == "\\" and quote != "'":
            at += 1
        elif character == quote:
            quote = ""
        elif not quote and character in "'\"":
            quote = character
        elif character in "$`":
            if quote != "'":
                yield at, character
        elif not quote and (character in _OPERATORS or (character == "#" and command[at - 1 : at] in ("", " "))):
            yield at, character
        at += 1


def shell_problems(entrypoint: str, place: Place) -> Iterator[Problem]:
    """What the submitter's shell would not hand on to the job as it is written."""
    command = entrypoint.strip()
    try:
        shlex.split(command)
    except ValueError as error:
        yield Problem(place, f"is no shell command: {error}; close the quotes")
        return
    for at, character in acted_on(command):
        yield Problem(place, _by_the_submitter(command, at, character))
        return  # the rest is another command, or follows from this


def _by_the_submitter(command: str, at: int, character: str) -> str:
    if character == "$":
        name = re.match(r"\$\{?\w*\}?", command[at:])
        what = name[0] if name else "$"
        return f"{what} is filled in in the submitter's pod; for the head's write sh -c '…' around it all"
    if character == "`":
        return "what stands in backticks runs in the submitter's pod; write sh -c '…' around it all"
    if character == "#":
        return "a # ends the command, and with it that of the submitter; leave the comment out"
    if character in "<>":
        return f"{character} redirects the submitter, not the job; leave it out: KubeRay and Ray keep the job's log"
    tail = command[at + 1 :].lstrip("&|").strip()
    what = "a line break" if character == "\n" else character
    return f"at {what} the entrypoint ends, and {tail!r} runs in the submitter's pod; write sh -c '…' around it all"
