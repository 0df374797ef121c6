"""Ray's own messages go to a file, this program's stay on the terminal: in a real process, with real descriptors."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

_SCRIPT = """
import logging, os, sys, tempfile
tempfile.tempdir = sys.argv[1]
logging.basicConfig(level=logging.WARNING, format="%(message)s")
from ray_diffsynth.cluster.session import native_messages_in_a_file
import ray.data

def handlers():
    return [logging.getLogger(name).handlers[:] for name in ("", "ray", "ray.data")]

def run(case):
    with native_messages_in_a_file():
        if case != "silent":
            os.write(2, b"native before\\n")
            logging.getLogger("ray.data").error("ray says")
        print("progress", file=sys.stderr)
        logging.getLogger("ray_diffsynth").warning("our warning")
        if case == "interrupt":
            raise KeyboardInterrupt
        if case != "good":
            raise ValueError("it failed")

for case in ("good", "silent", "interrupt", "failing"):
    before = handlers()
    try:
        run(case)
    except BaseException as error:
        print(case, *getattr(error, "__notes__", []), file=sys.stderr)
    os.write(2, b"native after\\n")
    assert handlers() == before
    print("end", file=sys.stderr)
"""


def test_what_stays_on_the_terminal(tmp_path: Path) -> None:
    command = [sys.executable, "-c", _SCRIPT, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    log = next(tmp_path.iterdir())
    ours, after = ["progress", "our warning"], ["native after", "end"]
    failing = f"failing Ray's own messages are in {log}"
    told = [*ours, *after, *ours, "silent", *after, *ours, "interrupt", *after, *ours, failing, *after]
    assert done.stderr.splitlines() == told
    assert list(tmp_path.iterdir()) == [log], "only the failing run leaves its file"
    assert re.search(r"native before\n(.*\n)*.*ray says", log.read_text())
