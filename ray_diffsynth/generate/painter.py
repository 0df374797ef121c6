"""One process that makes images: loads a model once, then turns items into files. No Ray here."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from ray_diffsynth.cluster.session import own_device
from ray_diffsynth.data.media import load_image
from ray_diffsynth.generate.items import GenerateError, Item
from ray_diffsynth.generate.lora import attach_loras, set_lora_scale
from ray_diffsynth.plan.run_plan import GeneratePlan
from ray_diffsynth.storage import join, write_bytes_atomic


class Painter:
    """A loaded model. Raises UserErrors of the model's files and of the LoRA's."""

    def __init__(self, plan: GeneratePlan) -> None:
        self.plan = plan = plan.on_this_machine()
        device = own_device()
        dtype: torch.dtype = getattr(torch, plan.config.dtype)
        if dtype is torch.float16 and device == "cpu":
            raise GenerateError("--dtype float16 needs a GPU; use bfloat16 or float32")
        self.pipe: Any = plan.pipeline.from_pretrained(plan.source, device=device, torch_dtype=dtype)
        attach_loras(self.pipe, plan.loras)

    def __call__(self, item: Item) -> str:
        """Make the image and write its file, whole or not at all; returns `item.file`."""
        set_lora_scale(self.pipe, item.lora_scale)
        images = {name: _opened(paths) for name, paths in item.images}
        result = self.pipe(item.prompt, seed=item.seed, **dict(item.arguments), **images)
        data = png(result) if isinstance(result, Image.Image) else mp4(result, self.plan.config.fps)
        write_bytes_atomic(join(self.plan.output_path, item.file), data)
        return item.file


def _opened(paths: str | tuple[str, ...]) -> Image.Image | list[Image.Image]:
    return load_image(paths) if isinstance(paths, str) else [load_image(path) for path in paths]


def png(image: Image.Image) -> bytes:
    """The image as a PNG file."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def mp4(frames: Sequence[Image.Image], fps: float) -> bytes:
    """The frames as an mp4 file (H.264). Raises GenerateError without PyAV."""
    try:
        import av
    except ImportError as error:
        raise GenerateError("videos are written by PyAV; install it: pip install 'ray-diffsynth[video]'") from error
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream: Any = container.add_stream("libx264", rate=round(fps))
        stream.width, stream.height = frames[0].size
        stream.pix_fmt = "yuv420p"
        stream.options = {"crf": "12"}
        for frame in frames:
            pixels = np.asarray(frame.convert("RGB"))
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return buffer.getvalue()
