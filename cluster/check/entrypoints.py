"""Commands in cluster files, by the parsers that will read them: the jobs' own, and that of `ray start`."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import redirect_stderr
from io import StringIO
from typing import Any

from cluster.check.problem import Place, Problem
from ray_diffsynth.config import JOBS
from ray_diffsynth.config.flags import parse

_JOB = re.compile(r"(?:^|/)jobs/(\w+)\.py$")


def job_words(command: str) -> tuple[str, list[str]] | None:
    """The job of a command and its options; None where no job of ours stands. `sh -c '…'` is looked into.

    Raises ValueError for quotes that do not close.
    """
    words = shlex.split(command.replace("\\\n", " "), comments=True)
    for at, word in enumerate(words):
        if found := _JOB.search(word):
            return found[1], words[at + 1 :]
        if word.rsplit("/", 1)[-1] == "ray-diffsynth" and at + 1 < len(words):
            return words[at + 1], words[at + 2 :]
    for word in words:
        if " " in word and (inner := job_words(word)):
            return inner
    return None


def job_problems(command: str, place: Place, groups: Sequence[Mapping[str, str]] | None = None) -> Iterator[Problem]:
    """What the job's parser says of the options; and labels that no group of the file (`groups`) has."""
    try:
        found = job_words(command)
    except ValueError as error:
        yield Problem(place, f"is no shell command: {error}")
        return
    if found is None:
        yield Problem(place, "runs no job of ray_diffsynth (python jobs/NAME.py …)")
        return
    name, words = found
    config_class = next((config for config in JOBS if config.job == name), None)
    if config_class is None:
        yield Problem(place, f"there is no job {name!r}; jobs are {', '.join(config.job for config in JOBS)}")
        return
    words = [re.sub(r"\$\{?\w+\}?", "x", word) for word in words]  # filled in by the shell
    with redirect_stderr(StringIO()) as told:
        try:
            config = parse(config_class, words, prog=f"jobs/{name}.py")
        except SystemExit:
            yield Problem(place, " ".join(told.getvalue().split()))
            return
    labels: Any = getattr(config, "node_labels", None)
    if groups is not None and labels and not any(labels.items() <= dict(group).items() for group in groups):
        yield Problem(
            place, f"no group has the labels {json.dumps(labels)}; they are {json.dumps([dict(g) for g in groups])}"
        )


def ray_start_problems(command: str, place: Place) -> Iterator[Problem]:
    """What Ray's own parser says of each `ray start …` in a line of shell."""
    from click import ClickException
    from ray.scripts.scripts import start

    for part in re.split(r"&&|\|\||;|\n", command.replace("\\\n", " ")):
        found = re.search(r"(?:^|[\s/])ray start(?=\s|$)(.*)", part, re.DOTALL)
        if found is None:
            continue
        words = [re.sub(r"\$\{?\w+\}?", "1", word) for word in shlex.split(found[1].rstrip(" &"), comments=True)]
        try:
            start.make_context("start", words)
        except ClickException as error:
            yield Problem(place, f"ray start: {error.format_message()}")
