"""The stages of the recipe: vae → latents → dit → export. Each goes on where it stopped.

    OMP_NUM_THREADS=2 python -m ray_diffsynth.demo.recipe vae latents dit export --out build/demo
"""

from __future__ import annotations

import argparse
import logging
import time
from pathlib import Path

from diffusers import AutoencoderKLQwenImage, QwenImageTransformer2DModel

from ray_diffsynth.demo.captions import canonical
from ray_diffsynth.demo.evaluate import grid, known_scenes, sample, score
from ray_diffsynth.demo.recipe.dit import DitConfig, train_dit
from ray_diffsynth.demo.recipe.export import export_model, pipeline
from ray_diffsynth.demo.recipe.latents import LatentsConfig, load_latents, prepare_latents
from ray_diffsynth.demo.recipe.vae import VaeConfig, decode, encode, test_pictures, train_vae

logger = logging.getLogger("ray_diffsynth.demo.recipe")


def stage_vae(out: Path) -> None:
    """Train the VAE; writes vae_raw/ and vae.png (originals above reconstructions)."""
    vae = train_vae(out / "vae_state", VaeConfig())
    vae.save_pretrained(out / "vae_raw")
    sheet = []
    for pictures in test_pictures(12).values():
        sheet += [*pictures, *decode(vae, encode(vae, pictures))]
    grid(sheet, 12).save(out / "vae.png")


def stage_latents(out: Path) -> None:
    """Encode the DiT's pictures and captions; writes latents.safetensors and vae/ with its statistics."""
    vae = AutoencoderKLQwenImage.from_pretrained(out / "vae_raw")
    prepare_latents(out / "latents.safetensors", vae, LatentsConfig())
    vae.save_pretrained(out / "vae")


def stage_dit(out: Path) -> None:
    """Train the DiT; writes transformer/ and a grid of samples dit_<step>.png now and then."""
    vae = AutoencoderKLQwenImage.from_pretrained(out / "vae")
    scenes = known_scenes(40)

    def look(dit: QwenImageTransformer2DModel, step: int) -> None:
        pictures = sample(pipeline(vae, dit), [canonical(scene) for scene in scenes])
        grid(pictures, 10).save(out / f"dit_{step}.png")
        dit.save_pretrained(out / "transformer")
        logger.info("dit %d %s", step, score(pictures, scenes))

    train_dit(out / "dit_state", load_latents(out / "latents.safetensors"), DitConfig(), look, look_every=500)


def stage_export(out: Path) -> None:
    """Write the whole model in bf16 to model/."""
    vae = AutoencoderKLQwenImage.from_pretrained(out / "vae")
    dit = QwenImageTransformer2DModel.from_pretrained(out / "transformer")
    logger.info("exported %d bytes", export_model(out / "model", vae, dit))


STAGES = {"vae": stage_vae, "latents": stage_latents, "dit": stage_dit, "export": stage_export}


def main() -> None:
    """Run the named stages in the order given."""
    parser = argparse.ArgumentParser(prog="python -m ray_diffsynth.demo.recipe", description=__doc__.split("\n")[0])
    parser.add_argument("stages", nargs="+", choices=list(STAGES))
    parser.add_argument("--out", type=Path, default=Path("build/demo"))
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    args.out.mkdir(parents=True, exist_ok=True)
    for name in args.stages:
        clock = time.perf_counter()
        STAGES[name](args.out)
        logger.info("stage %s took %.0f s", name, time.perf_counter() - clock)


if __name__ == "__main__":
    main()
