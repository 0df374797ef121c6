"""Where a run begins: anew, at a chosen checkpoint, or where an earlier attempt of the same run came to.

`<output_path>/run.json` names the run that the files there are of: the options of the command that started it, and
whether it has finished. So `--resume never`, or a folder, starts a run once, and the same command after a kill goes on
with it.
What another run left is set aside in `<output_path>/previous-<n>`, that nobody's numbers, images or files are mixed.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from ray_diffsynth.config import TrainConfig
from ray_diffsynth.config.cluster import ElasticConfig
from ray_diffsynth.errors import UserError
from ray_diffsynth.storage import (
    absolute,
    exists,
    is_remote,
    join,
    list_files,
    list_folders,
    move,
    read_bytes,
    write_bytes_atomic,
)
from ray_diffsynth.training.checkpoint import (
    Checkpoint,
    CheckpointError,
    list_checkpoints,
    newest_checkpoint,
    read_checkpoint,
    save_checkpoint,
)
from ray_diffsynth.training.report.metrics_log import METRICS_FILE

logger = logging.getLogger(__name__)

RUN_FILE = "run.json"
ASIDE = "previous"
"""Beginning of the names of the folders that hold the files of earlier runs."""
MACHINE_FIELDS = frozenset(
    (
        *(field.name for field in fields(ElasticConfig)),
        *("verbose", "dataset_num_workers", "sample_resources", "sample_node_labels", "shard_cache", "shard_cache_gb"),
    )
)
"""Options that a batch system may change when it starts the same command on other machines."""
_TRACES = re.compile(r"checkpoints|metrics\.jsonl|tensorboard|samples|(step|epoch)-\d+(\.[\w.-]+)?\.safetensors")
"""Files and folders that only a training leaves."""
_OTHERS = re.compile(
    r"metrics\.csv|report\.json|report\.html|run\.json|ray|wandb|\.wandb-run|\.mlflow-run|nonfinite-step-.*"
)
"""What a training leaves beside them."""


@dataclass(frozen=True)
class Start:
    """How a run begins in `output_path`. `of` decides and changes nothing; `begin` does it.

    goes_on: with what lies there. chosen: the checkpoint that it starts from in place of that. options: of the command,
    as JSON values.
    """

    output_path: str
    resume: str
    options: dict[str, Any]
    goes_on: bool
    chosen: Checkpoint | None = None

    @classmethod
    def of(cls, config: TrainConfig) -> Start:
        """Raises CheckpointError for a checkpoint that is not there, and for files that would have to be set aside
        though this run needs them.
        """
        output_path = absolute(config.output_path)
        resume = config.resume if config.resume in ("auto", "never") else absolute(config.resume)
        options = _options(config)
        there = _read(output_path)
        same = there is not None and _same(there["options"], options)
        if resume == "auto":
            goes_on = bool(list_checkpoints(output_path)) or same
        else:
            goes_on = there is not None and same and there["resume"] == resume and not there["finished"]
            goes_on = goes_on and not _is_damaged(output_path)
        chosen = None
        if not goes_on:
            _check_needed(config, output_path)
            chosen = None if resume in ("auto", "never") else read_checkpoint(_found(resume, output_path))
        return cls(output_path, resume, options, goes_on, chosen)

    def begin(self) -> None:
        """Make `output_path` hold what the run starts from; every attempt then takes the newest checkpoint in it.

        Call it once when a command starts, which holds the lease of `output_path`, not when its run recovers from a
        crash.
        """
        if self.goes_on:
            self._go_on()
            return
        moved = _set_aside(self.output_path)
        if self.chosen is not None:
            if moved and absolute(self.resume).startswith(join(self.output_path, "")):
                _copy(join(moved, METRICS_FILE), join(self.output_path, METRICS_FILE))  # the curves of its past
            save_checkpoint(self.output_path, self.chosen, keep=1)
        _write(self.output_path, self.resume, self.options, finished=False)

    def _go_on(self) -> None:
        if self.resume != "auto":
            logger.info(
                "--resume %s: %s holds what this very command began; going on with it (to start again, give another "
                "--output_path)",
                self.resume,
                self.output_path,
            )


def mark_going_on(config: TrainConfig) -> None:
    """Note that the run in `config.output_path` is now the one of `config`: its checkpoint was found to fit.

    Not before: a command that is refused leaves the run to the command that began it.
    """
    output_path, options = absolute(config.output_path), _options(config)
    there = _read(output_path)
    if there is None or not _same(there["options"], options):
        _write(output_path, "auto", options, finished=False)


def mark_finished(output_path: str) -> None:
    """Note that the run in `output_path` has come to its end and left its report: nothing of it is to go on."""
    there = _read(output_path)
    if there is not None and not there["finished"]:
        _write(output_path, there["resume"], there["options"], finished=True)


def _options(config: TrainConfig) -> dict[str, Any]:
    values = {name: value for name, value in config.to_dict().items() if name not in (*MACHINE_FIELDS, "resume")}
    values["output_path"] = absolute(config.output_path)
    return dict(json.loads(json.dumps(values)))


def _same(there: Mapping[str, Any], here: Mapping[str, Any]) -> bool:
    """Whether two commands say the same; an option that one of their versions did not have was at its default."""
    defaults = {field.name: field.default for field in dataclasses.fields(TrainConfig)}
    names = there.keys() | here.keys()
    return all(there.get(name, defaults.get(name)) == here.get(name, defaults.get(name)) for name in names)


def _is_damaged(output_path: str) -> bool:
    """Whether there are checkpoints, and none of them can be used."""
    try:
        newest_checkpoint(output_path)
    except CheckpointError as error:
        logger.warning("%s", error)
        return True
    return False


def _read(output_path: str) -> dict[str, Any] | None:
    """What `run.json` says; None if it is not there, or is no such file. Raises StorageError."""
    try:
        found = json.loads(read_bytes(join(output_path, RUN_FILE)))
        return {"resume": str(found["resume"]), "options": dict(found["options"]), "finished": bool(found["finished"])}
    except (FileNotFoundError, NotADirectoryError):
        return None
    except UserError:
        raise  # a store that does not answer: the file may well be there
    except (ValueError, KeyError, TypeError) as error:
        logger.warning("%s is left out of account: %s: %s", join(output_path, RUN_FILE), type(error).__name__, error)
        return None


def _write(output_path: str, resume: str, options: Mapping[str, Any], *, finished: bool) -> None:
    value = {"version": 1, "resume": resume, "finished": finished, "options": options}
    write_bytes_atomic(join(output_path, RUN_FILE), (json.dumps(value, indent=1) + "\n").encode())


def _left(output_path: str) -> list[str]:
    """Names of what an earlier training left in the folder; none if there is no trace of one."""
    names = [*list_files(output_path), *list_folders(output_path)]
    names += [name for name in (".wandb-run", ".mlflow-run") if exists(join(output_path, name))]
    traces = [name for name in names if _TRACES.fullmatch(name)]
    return sorted([*traces, *(name for name in names if _OTHERS.fullmatch(name))]) if traces else []


def _set_aside(output_path: str) -> str | None:
    """Move what an earlier training left into a folder of its own, and say so; returns that, None if there is nothing.

    Nothing is deleted. An object store has no rename: there it is copied first.
    """
    names = _left(output_path)
    if not names:
        return None
    number = 1
    taken = set(list_folders(output_path))
    while f"{ASIDE}-{number}" in taken:
        number += 1
    aside = join(output_path, f"{ASIDE}-{number}")
    if not is_remote(output_path):
        os.makedirs(aside)
    for name in names:
        move(join(output_path, name), join(aside, name))
    listed = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
    logger.warning("set the files of the earlier run aside (%s): they lie in %s", listed, aside)
    return aside


def _copy(source: str, target: str) -> None:
    if exists(source):
        write_bytes_atomic(target, read_bytes(source))


def _found(resume: str, output_path: str) -> str:
    """The folder of the checkpoint that `resume` names, also if it has been set aside from there."""
    inside = join(output_path, "")
    if exists(resume) or not resume.startswith(inside):
        return resume
    numbers = [int(name[len(ASIDE) + 1 :]) for name in list_folders(output_path) if re.fullmatch(rf"{ASIDE}-\d+", name)]
    for number in sorted(numbers, reverse=True):
        if exists(moved := join(output_path, f"{ASIDE}-{number}", resume[len(inside) :])):
            return moved
    return resume


def _check_needed(config: TrainConfig, output_path: str) -> None:
    """Raise CheckpointError if a LoRA that this run starts from is one of the files that it would set aside."""
    left = {absolute(join(output_path, name)) for name in _left(output_path)}
    named = [("lora_checkpoint", path) for path in config.lora_checkpoints.values()]
    named += [("preset_lora_path", path) for path in (config.preset_lora_path,) if path]
    for option, path in named:
        if absolute(path) in left:
            raise CheckpointError(
                f"--{option} {path} is a file of the earlier run in {output_path}, which a new run sets aside; give "
                "another --output_path, or move the file elsewhere first"
            )
