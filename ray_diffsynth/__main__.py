"""`python -m ray_diffsynth COMMAND …`, where the script `ray-diffsynth` is not on the path."""

from ray_diffsynth.cli import run_program

if __name__ == "__main__":
    raise SystemExit(run_program())
