"""The stages of the recipe: encoder → latents → decoder and dit (side by side) → export. Each goes on where it stopped.

OMP_NUM_THREADS=2 python -m demo_recipe encoder latents decoder dit export --out build/demo
"""

from __future__ import annotations

import argparse
import logging
import time
from pathlib import Path

from diffusers import AutoencoderKLQwenImage, QwenImageTransformer2DModel

from demo_recipe.decoder import DecoderConfig, train_decoder
from demo_recipe.dit import DitConfig, train_dit
from demo_recipe.export import export_model, pipeline
from demo_recipe.generic import decoder_image, encoder_image, kept_images
from demo_recipe.latents import LatentsConfig, load_latents, prepare_latents
from demo_recipe.vae import build_vae, decode, encode, held_out_images
from ray_diffsynth.demo.captions import canonical
from ray_diffsynth.demo.evaluate import grid, known_scenes, sample, score

logger = logging.getLogger("demo_recipe")


def stage_encoder(out: Path) -> None:
    """Fit the VAE's encoder; writes vae_raw/ with a random decoder."""
    pixels = kept_images(out / "pictures.npy", encoder_image, seed=0, count=6_000)
    build_vae(pixels, seed=0).save_pretrained(out / "vae_raw")


def stage_latents(out: Path) -> None:
    """Encode the DiT's images and captions; writes latents.safetensors and vae/ with its statistics."""
    vae = AutoencoderKLQwenImage.from_pretrained(out / "vae_raw")
    prepare_latents(out / "latents.safetensors", vae, LatentsConfig())
    vae.save_pretrained(out / "vae")


def stage_decoder(out: Path) -> None:
    """Train the VAE's decoder; writes it into vae/, and vae_<step>.png (originals above reconstructions)."""
    vae = AutoencoderKLQwenImage.from_pretrained(out / "vae")

    def look(step: int) -> None:
        vae.save_pretrained(out / "vae")
        rows = [row for images in held_out_images(12).values() for row in (images, decode(vae, encode(vae, images)))]
        grid([image for row in rows for image in row], 12).save(out / f"vae_{step}.png")

    pixels = kept_images(out / "decoder_pictures.npy", decoder_image, seed=1, count=10_000)
    train_decoder(out / "decoder_state", vae, pixels, DecoderConfig(), look)


def stage_dit(out: Path) -> None:
    """Train the DiT; writes transformer/ and a grid of samples dit_<step>.png now and then."""
    scenes = known_scenes(40)

    def look(dit: QwenImageTransformer2DModel, step: int) -> None:
        dit.save_pretrained(out / "transformer")
        vae = AutoencoderKLQwenImage.from_pretrained(out / "vae")
        images = sample(pipeline(vae, dit), [canonical(scene) for scene in scenes])
        grid(images, 10).save(out / f"dit_{step}.png")
        logger.info("dit %d %s", step, score(images, scenes))

    train_dit(out / "dit_state", load_latents(out / "latents.safetensors"), DitConfig(), look, look_every=500)


def stage_export(out: Path) -> None:
    """Write the whole model in bf16 to model/."""
    vae = AutoencoderKLQwenImage.from_pretrained(out / "vae")
    dit = QwenImageTransformer2DModel.from_pretrained(out / "transformer")
    logger.info("exported %d bytes", export_model(out / "model", vae, dit))


STAGES = {
    "encoder": stage_encoder,
    "latents": stage_latents,
    "decoder": stage_decoder,
    "dit": stage_dit,
    "export": stage_export,
}


def main() -> None:
    """Run the named stages in the order given."""
    parser = argparse.ArgumentParser(prog="python -m demo_recipe", description=__doc__.split("\n")[0])
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
