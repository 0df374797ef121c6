"""Commands of Ray in cluster files, by the parsers of Ray that will read them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator

from cluster.check.problem import Place, Problem


def ray_start_problems(command: str, place: Place) -> Iterator[Problem]:
    """What Ray's own parser says of each `ray start …` and `ray drain-node …` in a line of shell."""
    from click import ClickException
    from ray.scripts.scripts import drain_node, start

    commands = {"start": start, "drain-node": drain_node}
    for part in re.split(r"&&|\|\||;|\n", command.replace("\\\n", " ")):
        found = re.search(r"(?:^|[\s/])ray (start|drain-node)(?=\s|$)(.*)", part, re.DOTALL)
        if found is None:
            continue
        words = [re.sub(r"\$\{?\w+\}?", "1", word) for word in shlex.split(found[2].rstrip(" &"), comments=True)]
        try:
            commands[found[1]].make_context(found[1], words)
        except ClickException as error:
            yield Problem(place, f"ray {found[1]}: {error.format_message()}")
