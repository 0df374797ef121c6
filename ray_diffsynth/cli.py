"""The commands of `ray-diffsynth`, and what runs a job: configuration from flags, errors into messages and exit codes.

Exit codes: 0 done, 1 an error while running, 2 a bad configuration, 130 interrupted, 143 ended by SIGTERM. What is
printed after its reader has gone (`| head`) is dropped, and changes no exit code. This module imports no torch
and no ray, so that ``--help`` and a typing mistake take well under a second.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any, NamedTuple

from ray_diffsynth.config import JOBS
from ray_diffsynth.config.flags import C, parse
from ray_diffsynth.console import prepare_process
from ray_diffsynth.errors import ConfigError, did_you_mean, find_user_error
from ray_diffsynth.program import NAME, ROOT, in_checkout
from ray_diffsynth.system_errors import explain
from ray_diffsynth.version import __version__

SUMMARY = "Two-stage LoRA training of diffusion transformers on a Ray cluster: encode once, then train from the cache."


class Command(NamedTuple):
    """``target`` is "module:function", imported when called: a job takes its configuration, another the words."""

    target: str
    help: str


COMMANDS = {
    "preprocess": Command(
        "ray_diffsynth.preprocess.job:run", "stage 1: encode images, videos and captions into a cache"
    ),
    "train": Command("ray_diffsynth.training.ray.job:run", "stage 2: train a LoRA from a cache"),
    "pipeline": Command("ray_diffsynth.two_stages:main", "both stages, one after the other, with one configuration"),
    "generate": Command("ray_diffsynth.generate.job:run", "make images from prompts, with a LoRA or without"),
    "cache": Command("ray_diffsynth.cache.__main__:main", "inspect, verify, repair, preview or export a cache"),
    "demo": Command("ray_diffsynth.demo.run:main", "preprocess, train and generate with a tiny model, on this machine"),
}


def run_program(argv: Sequence[str] | None = None) -> int:
    """`ray-diffsynth COMMAND …`. Returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        listed = "\n".join(f"  {name:12}{command.help}" for name, command in COMMANDS.items())
        usage = f"usage: {NAME} COMMAND [options]\n\n{SUMMARY}\n\n{listed}\n\n{NAME} COMMAND --help tells its options."
        print(usage, file=sys.stdout if words else sys.stderr)
        return 0 if words else 2
    if words[0] == "--version":
        print(f"{NAME} {__version__}")
        return 0
    if words[0] not in COMMANDS:
        print(f"{NAME}: {words[0]} is no command; {did_you_mean(words[0], COMMANDS)}", file=sys.stderr)
        return 2
    return run_command(words[0], words[1:], prog=f"{NAME} {words[0]}")


def run_command(name: str, argv: Sequence[str] | None = None, *, prog: str | None = None) -> int:
    """Run one of COMMANDS in this process, which it owns. Returns the exit code."""
    prepare_process()
    words = sys.argv[1:] if argv is None else argv
    module, _, function = COMMANDS[name].target.partition(":")

    def call(argument: Any) -> int:
        return getattr(import_module(module), function)(argument) or 0

    config_class = next((config for config in JOBS if config.job == name), None)
    if config_class is None:
        return call(words)
    prepare_ray()
    return main(config_class, call, words, prog=prog)


def prepare_ray() -> None:
    """What the processes that Ray starts on this machine inherit."""
    if in_checkout():
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(paths))
    # A thread of Ray Data that outlives an interrupted job must not start a Ray of its own.
    os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")


def main(
    config_class: type[C], run: Callable[[C], object], argv: Sequence[str] | None = None, *, prog: str | None = None
) -> int:
    """Parse, call ``run`` with the configuration, and turn what it raises into a message and an exit code."""
    if argv is None:
        prepare_process()
    config = parse(config_class, argv, prog=prog)
    return run_told(lambda: run(config), verbose=config.verbose, output_path=config.output_path)


def run_told(run: Callable[[], object], *, verbose: bool, output_path: str) -> int:
    """Call ``run``, and turn what it raises into a message and an exit code."""
    _show_messages(verbose)
    try:
        run()
    except KeyboardInterrupt:
        done = f"what is finished lies in {output_path}; the same command goes on from there"
        print(f"\ninterrupted: {done}", file=sys.stderr)
        return 130
    except SystemExit as error:
        if error.code == signal.SIGTERM:  # as Ray's handler ends a job that has none of its own
            return 128 + signal.SIGTERM
        raise
    except Exception as error:
        user_error = find_user_error(error)
        message = explain(error) if user_error is None else str(user_error)
        if verbose or message is None:
            traceback.print_exc()
        if message is None:
            return 1
        print(f"error: {message}", file=sys.stderr)
        for note in dict.fromkeys(note for each in (user_error, error) for note in getattr(each, "__notes__", ())):
            print(note, file=sys.stderr)
        return 2 if isinstance(user_error, ConfigError) else 1
    return 0


def _show_messages(verbose: bool) -> None:
    """This package's log messages go to stderr as they are; of other libraries only warnings."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("ray_diffsynth").setLevel(logging.DEBUG if verbose else logging.INFO)
