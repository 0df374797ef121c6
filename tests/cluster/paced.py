"""Families for clusters that are tested: they note what is encoded and where it trains, and wait where a test says so.

What they compute is not changed by their waits. The model's folder holds `calls.log`, and while a test holds a part of
it up, `vae.hold`, `text_encoder.hold` or `train.hold`.
"""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ray_diffsynth.models.locate import ModelSource
from ray_diffsynth.pipelines.qwen_image.pipeline import QwenImagePipeline
from tests.preprocess.counting import CountingPipeline, digest

QWEN, COUNTING = f"{__name__}:PacedQwen", f"{__name__}:PacedCounting"


@dataclass(frozen=True)
class Call:
    """A sample that was encoded, or a microbatch that was trained on (without a digest). node: Ray's id of it."""

    part: str
    node: str
    pid: int
    digest: str


def calls(model: Path, part: str) -> list[Call]:
    """What a part of the model was called for, in order."""
    path = model / "calls.log"
    lines = path.read_text().splitlines() if path.exists() else []
    found = [Call(words[0], words[1], int(words[2]), words[3]) for words in (line.split() for line in lines)]
    return [call for call in found if call.part == part]


def hold(model: Path, part: str, after: int) -> None:
    """From now on each process waits when it has done so much (samples, or microbatches) with this part."""
    new = model / f"{part}.new"
    new.write_text(str(after))
    new.rename(model / f"{part}.hold")


def release(model: Path, part: str) -> None:
    """Nothing waits any more."""
    (model / f"{part}.hold").unlink(missing_ok=True)


class _Paced:
    """Of a pipeline: what it has done so far, and the files that hold it up."""

    def __init__(self) -> None:
        self.folder = Path()
        self._done: dict[str, int] = {}

    def note(self, part: str, digest: str) -> None:
        """A part has done one more (`digest`, or `-`); returns when nothing holds it up."""
        with open(self.folder / "calls.log", "a") as log:  # one write, so that lines of two processes do not mix
            log.write(f"{part} {_node()} {os.getpid()} {digest}\n")
        self._done[part] = self._done.get(part, 0) + 1
        while (limit := _limit(self.folder / f"{part}.hold")) is not None and self._done[part] >= limit:
            time.sleep(0.05)


class PacedQwen(QwenImagePipeline):
    """Qwen-Image that can be held up in both stages."""

    version = 1

    def __init__(self, device: str | torch.device = "cpu", torch_dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__(device=device, torch_dtype=torch_dtype)
        self._pace = _Paced()
        compute = self.model_fn

        @functools.wraps(compute)
        def noted(**inputs: Any) -> Tensor:
            result: Tensor = compute(**inputs)
            self._pace.note("train", "-")
            return result

        self.model_fn = noted

    def configure(self, source: ModelSource) -> None:
        super().configure(source)
        self._pace.folder = Path(source.root)

    def encode_images(self, pixels: Tensor, **options: Any) -> Tensor:
        latents = super().encode_images(pixels, **options)
        for image in pixels:
            self._pace.note("vae", digest(image.float().numpy()))
        return latents

    def encode_prompts(self, prompts: Sequence[str], **options: Any) -> list[Tensor]:
        embeds = super().encode_prompts(prompts, **options)
        for prompt in prompts:
            self._pace.note("text_encoder", digest(prompt))
        return embeds


class PacedCounting(CountingPipeline):
    """The family that counts its calls, which starts in no time and has no model to train; it can be held up too."""

    version = 1

    def __init__(self, device: str = "cpu", torch_dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__(device=device, torch_dtype=torch_dtype)
        self._pace = _Paced()

    def count(self, group: str, samples: list[Any]) -> None:
        assert self.control is not None
        self._pace.folder = self.control.parent
        for sample in samples:
            self._pace.note(group, digest(sample))


def _limit(file: Path) -> int | None:
    try:
        return int(file.read_text())
    except FileNotFoundError:
        return None


def _node() -> str:
    import ray

    return ray.get_runtime_context().get_node_id() if ray.is_initialized() else "-"
