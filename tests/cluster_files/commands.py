"""Commands that stand in files and pages, as the programs read them: Ray's own parsers, and shellcheck."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

BIN = Path(sys.executable).parent


def ray_options(command: str, words: str) -> dict[str, Any]:
    """What `ray COMMAND` makes of its options, variables of the shell in their places; click's errors are raised."""
    from ray.scripts.scripts import cli

    group: Any = cli
    names = command.split()
    for name in names[:-1]:
        group = group.commands[name]
    found: Any = group.commands[names[-1]]
    filled = re.sub(r"\$\{?\w+\}?", "x", words)
    with found.make_context(names[-1], shlex.split(filled, comments=True), resilient_parsing=False) as context:
        return dict(context.params)


def shell_problems(script: str, *options: str) -> str:
    """What shellcheck says of a script of bash; empty where it says nothing."""
    words = [str(BIN / "shellcheck"), "--shell=bash", *options, "-"]
    return subprocess.run(words, input=script, text=True, capture_output=True, check=False).stdout
