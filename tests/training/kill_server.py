"""Runs that are killed: one process that has imported everything, and a fork of it for each run, so that a kill is cheap.

Reads one JSON line a run from stdin: {"config": {...}, "kill": {...} or null, "term": step or null}; answers with the
child's exit code, or minus the signal. kill: {"step": n}: SIGKILL within step n, after backward; {"fsync": n}: at
the n-th fsync of a checkpoint's folder, so that it is half written; {"rename": n}: before its n-th rename.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
from collections.abc import Callable
from typing import Any

from ray_diffsynth.config import TrainConfig
from ray_diffsynth.training import checkpoint, local, loop


# What a run would import by itself, again in each child.
LAZY = (
    "diffusers.models.transformers.transformer_qwenimage",
    "diffusers.optimization",
    "diffusers.schedulers.scheduling_flow_match_euler_discrete",
    "ray_diffsynth.pipelines.qwen_image",
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
        clip, last = loop._Run._clip, kill["step"]
        steps = _dying_at(lambda: None, last)

        def dying(self: Any) -> float:
            steps()
            return clip(self)

        loop._Run._clip = dying  # type: ignore[method-assign]
    if "fsync" in kill:
        # Only in the checkpoint's module: other files are synced too.
        checkpoint.os = _Os(fsync=_dying_at(os.fsync, kill["fsync"]))  # type: ignore[attr-defined]
    if "rename" in kill:
        checkpoint.os = _Os(rename=_dying_at(os.rename, kill["rename"]))  # type: ignore[attr-defined]


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
        step, clip = order["term"], loop._Run._clip

        def asked(self: Any) -> float:
            nonlocal step
            step -= 1
            if step == 0:
                os.kill(os.getpid(), signal.SIGTERM)
            return clip(self)

        loop._Run._clip = asked  # type: ignore[method-assign]
    local.run(TrainConfig(**order["config"]))


def main() -> None:
    """Serve until stdin ends."""
    for name in LAZY:
        importlib.import_module(name)
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            os.dup2(2, 1)  # stdout is for the answers
            code = 1
            try:
                _run(json.loads(line))
                code = 0
            except SystemExit as left:
                code = int(left.code or 0)
            finally:
                sys.stderr.flush()
                os._exit(code)
        _, status = os.waitpid(child, 0)
        print(json.dumps(os.waitstatus_to_exitcode(status)), flush=True)


if __name__ == "__main__":
    main()
