"""What runs a job: its configuration from the command line, errors into messages and exit codes.

Exit codes: 0 done, 1 an error while running, 2 a bad configuration, 130 interrupted, 143 ended by SIGTERM. What is
printed after its reader has gone (`| head`) is dropped, and changes no exit code. This module imports no torch
and no ray, so that ``--help`` and a typing mistake take well under a second.
"""

from __future__ import annotations

import logging
import sys
import traceback
from collections.abc import Callable, Sequence

from ray_diffsynth.config.flags import C, parse
from ray_diffsynth.console import prepare_process
from ray_diffsynth.errors import ConfigError, find_user_error
from ray_diffsynth.system_errors import explain


def main(config_class: type[C], run: Callable[[C], object], argv: Sequence[str] | None = None) -> int:
    """Parse, call ``run`` with the configuration, and turn what it raises into a message and an exit code."""
    if argv is None:
        prepare_process()
    config = parse(config_class, argv)
    _show_messages(config.verbose)
    try:
        run(config)
    except KeyboardInterrupt:
        done = f"what is finished lies in {config.output_path}; the same command goes on from there"
        print(f"\ninterrupted: {done}", file=sys.stderr)
        return 130
    except Exception as error:
        user_error = find_user_error(error)
        told = explain(error) if user_error is None else str(user_error)
        if config.verbose or told is None:
            traceback.print_exc()
        if told is None:
            return 1
        print(f"error: {told}", file=sys.stderr)
        for note in dict.fromkeys(note for each in (user_error, error) for note in getattr(each, "__notes__", ())):
            print(note, file=sys.stderr)
        return 2 if isinstance(user_error, ConfigError) else 1
    return 0


def _show_messages(verbose: bool) -> None:
    """This package's log messages go to stderr as they are; of other libraries only warnings."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("ray_diffsynth").setLevel(logging.DEBUG if verbose else logging.INFO)
