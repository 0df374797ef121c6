"""Runs in processes of their own: one has imported everything, and each run is a fork of it, so that a kill is cheap.

Reads one JSON line a run from stdin and answers with the exit codes of its workers (minus the signal that ended one):
{"config": {…}, "workers": how many, "meet": file by which they find each other, "kill": {…} or null, "term": step or
null}. kill: {"step": n}: SIGKILL within step n, after backward, when what was saved before is written; {"fsync": n}: in
place of the n-th fsync of a checkpoint, so that it is half written; {"rename": n}: in place of its n-th rename;
with "until" beside one of these two it lasts until that step, within which the process is killed. term: SIGTERM within
that step.
Each worker leaves the bytes of its frozen weights in <meet>-<rank>.json.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from ray_diffsynth.config import TrainConfig
from ray_diffsynth.storage import folders
from ray_diffsynth.training import local
from ray_diffsynth.training.background import BackgroundWriter
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


def _acting_at(call: Callable[..., Any], number: int, act: Callable[[], None]) -> Callable[..., Any]:
    """`call`, in place of whose `number`-th call `act` is called."""
    count = 0

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        return act() if count == number else call(*args, **kwargs)

    return wrapped


def _at_step(number: int, act: Callable[[], None]) -> None:
    """Have `act` done within the `number`-th step of this attempt, after backward."""
    clip, step = Optimization.clip, _acting_at(lambda: None, number, act)

    def clipping(self: Any) -> float:
        step()
        return clip(self)

    Optimization.clip = clipping  # type: ignore[method-assign]


def _arm(kill: dict[str, int]) -> None:
    act = _die
    if "until" in kill:
        reached = threading.Event()

        def act() -> None:  # on the thread that writes, which never goes on
            reached.set()
            threading.Event().wait()

        def die_when_reached() -> None:
            assert reached.wait(60), "nothing is being written beside this step"
            _die()

        _at_step(kill["until"], die_when_reached)
    if "step" in kill:
        _at_step(kill["step"], _die_when_written())
    if "fsync" in kill:
        # Only of folders, which are the checkpoints: other files are synced too.
        sync = _acting_at(lambda call, place: call(place), kill["fsync"], act)
        for name in ("sync_file", "sync_folder"):
            setattr(folders, name, partial(sync, getattr(folders, name)))
    if "rename" in kill:
        folders.os = _Os(rename=_acting_at(os.rename, kill["rename"], act))  # type: ignore[attr-defined]


def _die_when_written() -> Callable[[], None]:
    """SIGKILL when what was saved before is written, so that it is known which checkpoint is there."""
    writers: list[BackgroundWriter] = []
    start = BackgroundWriter.start

    def noted(self: Any, write: Callable[[], None]) -> None:
        writers[:] = [self]
        start(self, write)

    def die() -> None:
        for writer in writers:
            writer.wait()
        _die()

    BackgroundWriter.start = noted  # type: ignore[method-assign]
    return die


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
        _at_step(order["term"], lambda: os.kill(os.getpid(), signal.SIGTERM))
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
