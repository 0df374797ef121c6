"""`ray-diffsynth demo` (`make demo`): drawn images in, a LoRA that teaches their creature to the tiny model out, here.

Runs the two jobs as a user would, as separate processes, then draws the same prompts with the same seeds by the plain
diffusers pipeline before and after: new ones (what was learnt) beside known ones (what was kept).
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ray_diffsynth.console import prepare_process
from ray_diffsynth.demo import demo_model_path
from ray_diffsynth.demo.captions import CREATURE, canonical
from ray_diffsynth.demo.draw import Pixels, draw_dataset
from ray_diffsynth.demo.evaluate import grid, is_creature, known_scenes, sample
from ray_diffsynth.program import ROOT, command

CREATURES, PLAIN = 64, 16
"""Images to learn from: the creature, and shapes that keep the model from drawing nothing else."""
BACKGROUNDS = ("red", "yellow", "white", "purple", "green", "blue", "black", "orange")
EPOCHS, REPEAT = 5, 7
TRAINING = ("--lora_rank", "16", "--learning_rate", "2e-3", "--batch_size", "8", "--dtype", "float32")
SEED = 50


def run_job(name: str, arguments: Sequence[str]) -> None:
    """Run `ray-diffsynth <name>`; its output goes to this terminal. Raises CalledProcessError."""
    print(f"$ ray-diffsynth {name} {' '.join(arguments)}", flush=True)
    # One computing thread a process would leave a core idle: the demo has the machine for itself.
    environment = {**os.environ, "OMP_NUM_THREADS": str(os.cpu_count() or 1)}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), environment.get("PYTHONPATH")]))
    job = [sys.executable, "-m", "ray_diffsynth", name, *arguments]
    subprocess.run(job, check=True, env=environment)


def draw_images(folder: Path) -> None:
    """The dataset: creatures, and plain shapes in a folder of their own, under one metadata.csv."""
    rows = draw_dataset(folder, CREATURES, seed=64, kind="creature").read_text("utf-8").splitlines()
    plain = draw_dataset(folder / "plain", PLAIN, seed=65).read_text("utf-8").splitlines()[1:]
    (folder / "metadata.csv").write_text("\n".join([*rows, *(f"plain/{row}" for row in plain)]) + "\n", "utf-8")


def generate(model: Path, lora: Path | None, prompts: Sequence[str]) -> list[Pixels]:
    """One image a prompt from the plain diffusers pipeline, with `lora` loaded if given."""
    import diffusers
    import torch

    diffusers.utils.logging.disable_progress_bar()
    pipe = diffusers.QwenImagePipeline.from_pretrained(str(model), dtype=torch.float32)
    if lora is not None:
        pipe.load_lora_weights(str(lora.parent), weight_name=lora.name)
    return sample(pipe, prompts, seed=SEED)


def train(model: Path, out: Path) -> Path:
    """Draw, preprocess and train below `out`; returns the LoRA file."""
    data, cache, trained = out / "data", out / "cache", out / "lora"
    if trained.exists():
        shutil.rmtree(trained)  # of an earlier demo: it would be gone on with, and be finished at once
    draw_images(data)
    base = ["--model", str(model), "--dataset_base_path"]
    run_job("preprocess", [*base, str(data), "--output_path", str(cache), "--batch_size", "8", "--dtype", "float32"])
    length = ["--num_epochs", str(EPOCHS), "--dataset_repeat", str(REPEAT)]
    run_job("train", [*base, str(cache), "--output_path", str(trained), *TRAINING, *length])
    return trained / f"epoch-{EPOCHS - 1}.safetensors"


def main(argv: Sequence[str] | None = None) -> None:
    """Train, compare, and print where everything is and what was learnt."""
    if argv is None:
        prepare_process()
    parser = argparse.ArgumentParser(prog=command("demo"), description=__doc__)
    parser.add_argument("--output", default="demo", help="folder for everything that the demo makes")
    out = Path(parser.parse_args(argv).output).resolve()
    started = time.monotonic()
    model = demo_model_path()
    lora = train(model, out)
    new = [f"a {CREATURE} on {'an' if name[0] in 'aeio' else 'a'} {name} background" for name in BACKGROUNDS]
    prompts = [*new, *(canonical(scene) for scene in known_scenes(len(new), seed=77))]
    before, after = generate(model, None, prompts), generate(model, lora, prompts)
    if all(np.array_equal(a, b) for a, b in zip(before, after, strict=True)):
        raise SystemExit("the LoRA changed nothing: this is a bug, please report it")
    count = len(new)
    rows = [*before[:count], *after[:count], *before[count:], *after[count:]]
    grid(rows, columns=count).save(out / "before_after.png")
    learnt = [sum(is_creature(image) for image in images[:count]) for images in (before, after)]
    print(f'\n"a {CREATURE} …" gives the creature in {learnt[0]} of {count} images before, in {learnt[1]} after')
    print(f"model     {model}\nimages    {out / 'data'}\ncache     {out / 'cache'}\nLoRA      {lora}")
    print(f"report    {out / 'lora' / 'report.html'}")
    print(f"images before and after (new prompts above, known ones below)  {out / 'before_after.png'}")
    print(f"{time.monotonic() - started:.0f} s in all")


if __name__ == "__main__":
    main()
