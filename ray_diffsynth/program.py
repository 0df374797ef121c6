"""How this program is started here, so that a message names a command that exists: in a checkout, or once installed."""

from __future__ import annotations

import sys
from pathlib import Path

NAME = "ray-diffsynth"
ROOT = Path(__file__).resolve().parent.parent
"""The folder that holds the package: a checkout, or an environment's site-packages."""


def in_checkout() -> bool:
    """Whether the package lies in a checkout of the repository, beside jobs/."""
    return (ROOT / "jobs" / "train.py").is_file()


def command(name: str) -> str:
    """What a message calls the command ``name``: "jobs/train.py" or "ray-diffsynth train".

    The second where the program is installed, or where this process was started so.
    """
    if Path(sys.argv[0]).name == NAME or not in_checkout():
        return f"{NAME} {name}"
    job = f"jobs/{name}.py"
    return job if (ROOT / job).is_file() else f"python -m ray_diffsynth.{name}"
