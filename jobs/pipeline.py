"""Both stages: images in, LoRA out. `ray-diffsynth pipeline` from a checkout, also under `ray job submit`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from ray_diffsynth.cli import run_command

if __name__ == "__main__":
    raise SystemExit(run_command("pipeline"))
