"""Commands of jobs in cluster files, by the jobs' own parsers."""

from __future__ import annotations

import re
import shlex
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import redirect_stderr
from functools import cache
from io import StringIO
from pathlib import Path

from cluster.check.problem import Place, Problem
from ray_diffsynth.config import JOBS, JobConfig
from ray_diffsynth.config.both_stages import parse_both
from ray_diffsynth.config.flags import parse, split_flags
from ray_diffsynth.errors import did_you_mean

PIPELINE = "pipeline"
KNOWN = (*(config.job for config in JOBS), PIPELINE)
WRITTEN = ("--output_path", "--cache_path")
_JOB = re.compile(r"(?:^|/)jobs/(\w+)\.py$")


def job_words(command: str) -> tuple[str, list[str]] | None:
    """The job of a command and its options; None where no job of ours stands. `sh -c '…'` is looked into.

    Raises ValueError for quotes that do not close.
    """
    words = shlex.split(command.replace("\\\n", " "), comments=True)
    for at, word in enumerate(words):
        if found := _JOB.search(word):
            return found[1], _up_to_operator(words[at + 1 :])
        if word.rsplit("/", 1)[-1] == "ray-diffsynth" and at + 1 < len(words):
            return words[at + 1], _up_to_operator(words[at + 2 :])
    for word in words:
        if " " in word and (inner := job_words(word)):
            return inner
    return None


def _up_to_operator(words: Sequence[str]) -> list[str]:
    """The words of one command, of a line that may hold more."""
    found = []
    for word in words:
        if word in ("&&", "||", ";", "|", "&"):
            break
        found.append(word.removesuffix(";"))
        if word.endswith(";"):
            break
    return found


def job_problems(command: str, place: Place) -> Iterator[Problem]:
    """What the job's parser says of its options."""
    try:
        found = job_words(command)
    except ValueError as error:
        yield Problem(place, f"is no shell command: {error}; close the quotes")
        return
    if found is None:
        yield Problem(place, "runs no job of ray_diffsynth; write ray-diffsynth JOB … or python jobs/JOB.py …")
    elif found[0] not in KNOWN:
        yield Problem(place, f"there is no job {found[0]!r}; {did_you_mean(found[0], KNOWN)}")
    elif message := _parsed(found[0], tuple(found[1]))[1]:
        yield Problem(place, message)


def job_configs(command: str) -> tuple[JobConfig, ...]:
    """The configuration that a command gives to its job, one for each stage; empty where the job refuses them."""
    try:
        found = job_words(command)
    except ValueError:
        return ()
    return _parsed(found[0], tuple(found[1]))[0] if found and found[0] in KNOWN else ()


@cache
def _parsed(name: str, given_words: tuple[str, ...]) -> tuple[tuple[JobConfig, ...], str]:
    """The configurations, and what is wrong with them. Paths of the cluster are not looked for here."""
    words = [re.sub(r"\$\{?\w+\}?", "1", word) for word in given_words]  # filled in by a shell
    given = _options(words)
    if (file := given.get("--config")) and not Path(file).exists():
        words = [word for word in words if word not in ("--config", file, f"--config={file}")]
    elif file:
        file = None
    for option in WRITTEN:
        if (path := given.get(option)) and "://" not in path:  # the parser tries whether it can be written
            here = {path: tempfile.gettempdir(), f"{option}={path}": f"{option}={tempfile.gettempdir()}"}
            words = [here.get(word, word) for word in words]
    with redirect_stderr(StringIO()) as told:
        try:
            if name == PIPELINE:
                return parse_both(words, prog=name), ""
            return (parse(next(config for config in JOBS if config.job == name), words, prog=name),), ""
        except SystemExit:
            message = " ".join(told.getvalue().split(f"{name}: ", 1)[-1].partition("\nSee ")[0].split())
    if file and "is missing" in message:  # perhaps it stands in that file
        return (), ""
    return (), f"{name}: {message}"


def _options(words: Sequence[str]) -> dict[str, str]:
    """The options that are given with a value, as they are written."""
    return {flag: value for flag, value in split_flags(list(words)) if value is not None}


def path_problems(command: str, place: Place, mounts: Sequence[str]) -> Iterator[Problem]:
    """Paths of a job that no volume holds. mounts: where the pods have volumes that all of them share."""
    try:
        found = job_words(command)
    except ValueError:
        return
    for option, path in _options(found[1] if found else []).items():
        if option not in (*WRITTEN, "--dataset_base_path", "--dataset_metadata_path") or "://" in path:
            continue
        if not path.startswith(("/", "$")):
            yield Problem(place, f"{option} {path} is relative to a pod that goes; use an absolute path or a URL")
        elif not any(path == mount or path.startswith(mount.rstrip("/") + "/") for mount in mounts):
            there = ", ".join(mounts) or "no path"
            yield Problem(place, f"{option} {path} lies on no volume that all pods share; those are at {there}")
