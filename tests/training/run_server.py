"""Runs in processes of their own: one has imported everything, and each run is a fork of it, so that a kill is cheap.

Reads one JSON line a run from stdin and answers with the exit codes of its workers (minus the signal that ended one):
{"config": {…}, "workers": how many, "meet": file by which they find each other, "kill": {…} or null, "term": step or
null}. kill: {"step": n}: SIGKILL within step n, after backward; {"fsync": n}: in place of the n-th fsync of a
checkpoint, so that it is half written; {"rename": n}: in place of its n-th rename. term: SIGTERM within that step.
Each worker leaves the bytes of its frozen weights in <meet>-<rank>.json.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from ray_diffsynth.config import TrainConfig
from ray_diffsynth.storage import folders
from ray_diffsynth.training import local
from ray_diffsynth.training.optimization import Optimization
from ray_diffsynth.training.trainer import Trainer

# What a run would import by itself, again in each child.
LAZY = (
    "diffusers.models.transformers.transformer_qwenimage",
    "diffusers.optimization",
    "diffusers.schedulers.scheduling_flow_match_euler_discrete",
    "ray_diffsynth.pipelines.qwen_image.pipeline",
    "ray_diffsynth.report",
    "torch.optim.adamw",
)


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _dying_at(call: Callable[..., Any], number: int) -> Callable[..., Any]:
    """`call`, whose `number`-th call kills the process instead."""
    count = 0

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        if count == number:
            _die()
        return call(*args, **kwargs)

    return wrapped


def _arm(kill: dict[str, int]) -> None:
    if "step" in kill:
        clip, last = Optimization.clip, kill["step"]
        steps = _dying_at(lambda: None, last)

        def dying(self: Any) -> float:
            steps()
            return clip(self)

        Optimization.clip = dying  # type: ignore[method-assign]
    if "fsync" in kill:
        # Only of folders, which are the checkpoints: other files are synced too.
        sync = _dying_at(lambda call, place: call(place), kill["fsync"])
        for name in ("sync_file", "sync_folder"):
            setattr(folders, name, partial(sync, getattr(folders, name)))
    if "rename" in kill:
        folders.os = _Os(rename=_dying_at(os.rename, kill["rename"]))  # type: ignore[attr-defined]


class _Os:
    """The module os with some functions replaced."""

    def __init__(self, **others: Callable[..., Any]) -> None:
        self.__dict__.update(others)

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)


def _run(order: dict[str, Any]) -> None:
    if order["kill"]:
        _arm(order["kill"])
    if order.get("term"):
        step, clip = order["term"], Optimization.clip

        def asked(self: Any) -> float:
            nonlocal step
            step -= 1
            if step == 0:
                os.kill(os.getpid(), signal.SIGTERM)
            return clip(self)

        Optimization.clip = asked  # type: ignore[method-assign]
    local.run(TrainConfig(**order["config"]))


def _worker(order: dict[str, Any], rank: int) -> None:
    """One of several."""
    meet, workers = order["meet"], order["workers"]
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(workers))
    torch.distributed.init_process_group("gloo", init_method=f"file://{meet}", rank=rank, world_size=workers)
    after = Trainer._after

    def measured(self: Any, *others: Any) -> None:
        with open(f"{meet}-{rank}.json", "w") as file:
            json.dump(self.reporting.footprint().base, file)
        after(self, *others)

    Trainer._after = measured  # type: ignore[method-assign]
    _run(order)


def main() -> None:
    """Serve until stdin ends."""
    for name in LAZY:
        importlib.import_module(name)
    for line in sys.stdin:
        order = json.loads(line)
        children = [_fork(order, rank) for rank in range(order["workers"])]
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        print(json.dumps(codes), flush=True)


def _fork(order: dict[str, Any], rank: int) -> int:
    child = os.fork()
    if child:
        return child
    os.dup2(2, 1)  # stdout is for the answers
    code = 1
    try:
        if order["workers"] == 1:
            _run(order)
        else:
            _worker(order, rank)
        code = 0
    except SystemExit as left:
        code = int(left.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    main()
