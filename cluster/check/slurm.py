"""The head of a script for sbatch: misspelled options, and those that Slurm takes although the script needs others."""

from __future__ import annotations

import re
from collections.abc import Iterator

from cluster.check.problem import Problem
from ray_diffsynth.errors import did_you_mean

_NAMES = """
account array begin chdir clusters comment constraint container contiguous core-spec cores-per-socket cpu-freq
cpus-per-gpu cpus-per-task deadline delay-boot dependency distribution error exclude exclusive export
export-file extra-node-info get-user-env gid gpu-bind gpu-freq gpus gpus-per-node gpus-per-socket
gpus-per-task gres gres-flags hint hold input job-name kill-on-invalid-dep licenses mail-type mail-user mem
mem-bind mem-per-cpu mem-per-gpu mincpus network nice no-kill no-requeue nodefile nodelist nodes ntasks
ntasks-per-core ntasks-per-gpu ntasks-per-node ntasks-per-socket open-mode output overcommit oversubscribe
parsable partition power prefer priority profile propagate qos quiet reboot requeue reservation segment signal
sockets-per-node spread-job switches thread-spec threads-per-core time time-min tmp tres-bind tres-per-task
uid verbose wait wait-all-nodes wckey
"""
OPTIONS = tuple(_NAMES.split())
"""Long options of sbatch."""


def slurm_problems(text: str) -> Iterator[Problem]:
    """Misspelled options, options that Slurm does not read, and what the script needs of them."""
    lines = text.splitlines()
    first = next((at for at, line in enumerate(lines) if line.strip() and not line.startswith("#")), len(lines))
    found: dict[str, str] = {}
    for at, line in enumerate(lines, start=1):
        if not re.match(r"#\s*SBATCH\b", line):
            continue
        option = re.match(r"#SBATCH --([\w-]+)(?:[= ](\S+))?", line)
        if option is None:
            yield Problem(("line", at), "is not read by Slurm; write #SBATCH --OPTION=VALUE")
        elif at > first + 1:
            yield Problem(("line", at), f"--{option[1]} stands behind the first command, where Slurm reads none")
        elif option[1] not in OPTIONS:
            yield Problem(("line", at), f"--{option[1]} is no option of sbatch; {did_you_mean(option[1], OPTIONS)}")
        else:
            found[option[1]] = option[2] or ""
    if not found.get("signal", "B:").startswith("B:"):
        yield Problem(("signal",), "goes to every process of the job and ends Ray's; write B: before it")
    if "signal" not in found:
        yield Problem(("signal",), "is missing: at the time limit no checkpoint is saved; write --signal=B:USR1@300")
    if "cpus-per-task" not in found:
        yield Problem(("cpus-per-task",), "is missing: the script gives Ray so many CPUs of each node")
    if found.get("ntasks-per-node", "1") != "1":
        yield Problem(("ntasks-per-node",), "must be 1: a node has one Ray")
