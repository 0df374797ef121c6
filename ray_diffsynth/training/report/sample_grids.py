"""The grids of sample images as files: `samples/step-<number>.png`, each of which says inside what it shows."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from os.path import basename
from typing import TYPE_CHECKING, Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ray_diffsynth.config.lora import LoraConfig
from ray_diffsynth.report import PageImage
from ray_diffsynth.report.image_grid import ImageGrid
from ray_diffsynth.storage import exists, join, list_files, read_bytes

if TYPE_CHECKING:
    from ray_diffsynth.training.report.sample_prompts import SamplePrompt

SAMPLES_FOLDER = "samples"
"""Where the grids lie."""
MAX_GRIDS = 12
"""Grids that the report shows."""
BASE = "Base model"
"""Title of step 0, when no LoRA was loaded."""
_KEY = "ray_diffsynth"


@dataclass(frozen=True)
class GridInfo:
    """What a grid shows, written into its file: `title` stands below it, `prompts` are its images row by row.

    `options`: `samples`, of each its seed, the arguments of `__call__` and the images that it is made from.
    """

    title: str
    prompts: list[str]
    options: dict[str, Any]

    @classmethod
    def of(cls, config: LoraConfig, samples: Sequence[SamplePrompt], step: int) -> GridInfo:
        """Of a grid after `step` steps; step 0 is what the training starts from."""
        options = json.loads(json.dumps([[s.seed, dict(s.arguments), dict(s.images)] for s in samples]))
        title = f"Step {step}" if step else start_title(config)
        return cls(title, [sample.prompt for sample in samples], {"samples": options})


def start_title(config: LoraConfig) -> str:
    """`Base model`, or `Start, with my_lora.safetensors` when the training goes on from LoRA files."""
    files = [config.preset_lora_path] if config.preset_lora_path else []
    files += config.lora_checkpoints.values()
    return f"Start, with {' and '.join(map(basename, files))}" if files else BASE


def grid_name(step: int) -> str:
    return f"step-{step:08d}.png"


def encode_grid(sheet: Image.Image, info: GridInfo) -> bytes:
    """The grid as the bytes of a PNG that says inside what it shows."""
    text = PngInfo()
    text.add_itxt(_KEY, json.dumps(asdict(info), ensure_ascii=False))
    data = io.BytesIO()
    sheet.save(data, format="PNG", pnginfo=text)
    return data.getvalue()


def read_grid_info(data: bytes) -> GridInfo | None:
    """What the grid in a file's bytes shows; None for an image that no grid is, and for what is no image."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            text = image.info.get(_KEY)
        return None if text is None else GridInfo(**json.loads(text))
    # Pillow of a damaged PNG; JSON, or fields, of another version.
    except (OSError, ValueError, SyntaxError, TypeError, RecursionError, Image.DecompressionBombError):
        return None


def is_drawn(output_path: str, step: int, info: GridInfo) -> bool:
    """Whether the grid of `step` is there, and shows this."""
    path = join(output_path, SAMPLES_FOLDER, grid_name(step))
    return exists(path) and read_grid_info(read_bytes(path)) == info


def make_grid(images: Sequence[Image.Image]) -> Image.Image:
    """The images in rows, about as many rows as columns, each in its place also when sizes differ."""
    columns = math.ceil(math.sqrt(len(images)))
    return ImageGrid.uniform(images, columns, background="black").image


def _step(name: str) -> int | None:
    number = name.removesuffix(".png").rpartition("-")[2]
    return int(number) if number.isdigit() else None


def sample_grids(output_path: str, until: int) -> tuple[list[dict[str, Any]], list[PageImage]]:
    """The grids of a run's first `until` steps for its report, as JSON values and as images; evenly chosen when many.

    The first and the last are among them: what the training started from, and where it came to.
    """
    folder = join(output_path, SAMPLES_FOLDER)
    names = [name for name in list_files(folder, suffix=".png") if (_step(name) or 0) <= until]
    if len(names) > MAX_GRIDS:
        names = [names[round(i * (len(names) - 1) / (MAX_GRIDS - 1))] for i in range(MAX_GRIDS)]
    values: list[dict[str, Any]] = []
    images: list[PageImage] = []
    for name in names:
        data = read_bytes(join(folder, name))
        step = _step(name)
        info = read_grid_info(data) or GridInfo(name.removesuffix(".png") if step is None else f"Step {step}", [], {})
        values.append({"file": f"{SAMPLES_FOLDER}/{name}", "step": step, **asdict(info)})
        alt = f"Sample pictures, {info.title}" + "".join(f"; {prompt}" for prompt in info.prompts)
        images.append(PageImage(data, info.title, alt, "png"))
    return values, images
