"""`make demo`: a tiny model and a folder of drawn pictures in, a LoRA that plain diffusers loads out, on this machine.

Runs the two jobs as a user would, as separate processes, then shows the model before and after.
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ray_diffsynth.demo.tiny import build_tiny_model, draw_dataset

ROOT = Path(__file__).resolve().parents[2]
PICTURES = 100
PROMPTS = ("a large red circle on a blue background", "a zorp on a red background")
LORA_TARGETS = "to_q,to_k,to_v,add_q_proj,add_k_proj,add_v_proj,to_out.0,to_add_out,img_mlp.net.2,img_mod.1,txt_mlp.net.2,txt_mod.1"


def run_job(name: str, arguments: Sequence[str]) -> None:
    """Run `jobs/<name>.py`; its output goes to this terminal. Raises CalledProcessError."""
    command = [sys.executable, str(ROOT / "jobs" / f"{name}.py"), *arguments]
    print(f"$ python jobs/{name}.py {' '.join(arguments)}", flush=True)
    subprocess.run(command, check=True, cwd=ROOT)


def pictures(model: Path, lora: Path | None, prompts: Sequence[str]) -> list[Image.Image]:
    """One picture per prompt from the plain diffusers pipeline, with `lora` loaded if given."""
    from diffusers import QwenImagePipeline

    pipe = QwenImagePipeline.from_pretrained(str(model), torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    if lora is not None:
        pipe.load_lora_weights(str(lora.parent), weight_name=lora.name)
    return [
        pipe(
            prompt=prompt,
            true_cfg_scale=1.0,
            num_inference_steps=16,
            height=64,
            width=64,
            generator=torch.Generator().manual_seed(seed),
        ).images[0]
        for seed, prompt in enumerate(prompts)
    ]


def grid(rows: Sequence[Sequence[Image.Image]], scale: int = 3, gap: int = 4) -> Image.Image:
    """Rows of pictures of one size as one picture."""
    width, height = (side * scale for side in rows[0][0].size)
    sheet = Image.new("RGB", (len(rows[0]) * (width + gap) + gap, len(rows) * (height + gap) + gap), "white")
    for y, row in enumerate(rows):
        for x, picture in enumerate(row):
            place = (gap + x * (width + gap), gap + y * (height + gap))
            sheet.paste(picture.resize((width, height), Image.Resampling.NEAREST), place)
    return sheet


def main(argv: Sequence[str] | None = None) -> None:
    """Build, preprocess, train, compare; prints where everything is."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", default="demo", help="folder for everything that the demo makes")
    out = Path(parser.parse_args(argv).output).resolve()
    started = time.monotonic()
    model, data, cache, trained = out / "model", out / "data", out / "cache", out / "lora"
    build_tiny_model(model)
    draw_dataset(data, PICTURES, kind="creature")
    run_job("preprocess", ["--model", str(model), "--dataset_base_path", str(data), "--output_path", str(cache), "--batch_size", "8"])
    arguments = ["--model", str(model), "--dataset_base_path", str(cache), "--output_path", str(trained)]
    arguments += ["--lora_target_modules", LORA_TARGETS, "--lora_rank", "16", "--learning_rate", "1e-3"]
    run_job("train", [*arguments, "--batch_size", "8", "--num_epochs", "2", "--dtype", "float32"])
    lora = trained / "epoch-1.safetensors"
    before, after = pictures(model, None, PROMPTS), pictures(model, lora, PROMPTS)
    changed = max(float(np.abs(np.asarray(a, float) - np.asarray(b, float)).max()) for a, b in zip(before, after, strict=True))
    if not changed:
        raise SystemExit("the LoRA changed nothing: this is a bug, please report it")
    grid([before, after]).save(out / "before_after.png")
    print(f"\nmodel     {model}\npictures  {data}\ncache     {cache}\nLoRA      {lora}\nbefore (top) and after  {out / 'before_after.png'}")
    print(f"{time.monotonic() - started:.0f} s in all")


if __name__ == "__main__":
    main()
