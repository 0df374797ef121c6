"""A family that is loaded in no time, writes a line for every sample that it encodes, and fails when it is told to.

Its model folder holds `counting.json`, which actors read at every call: `log` (a file), `sleep` (seconds a sample),
`kill`, `lose` and `mistake` (digests of texts or pixels that kill the process, lose its device, or meet a mistake of
the unit's own), `kill_after` (samples of its group after which it is killed once), `memory` (batches above it are out
of memory), `too_big` (a sample that is so even alone), `words` (of a longer caption it says that it is cut), `meet`
(groups that wait for each other: after its first sample each waits until the others have encoded one too, and fails if
they do not).
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import time
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from ray_diffsynth.data.warnings import warn
from ray_diffsynth.models.locate import ModelSource
from ray_diffsynth.pipelines.core.base import BasePipeline
from ray_diffsynth.pipelines.core.errors import MissingInputError
from ray_diffsynth.pipelines.core.model_parts import Part
from ray_diffsynth.pipelines.core.unit import PipelineUnit

FAMILY = "tests.preprocess.counting:CountingPipeline"


def build_model(folder: Path, **behaviour: Any) -> Path:
    """A model folder of this family; `behaviour` as in the module's docstring."""
    for name in ("vae", "text_encoder", "transformer"):
        (folder / name).mkdir(parents=True)
        (folder / name / "config.json").write_text(json.dumps({"kind": name}))
        file = "model.safetensors" if name == "text_encoder" else "diffusion_pytorch_model.safetensors"
        save_file({"weight": torch.zeros(1)}, folder / name / file)
    behave(folder, **behaviour)
    return folder


def behave(folder: Path, **behaviour: Any) -> None:
    """Change what the family does from the next call on."""
    (folder / "counting.json").write_text(json.dumps({"log": str(folder / "calls.log"), **behaviour}))


def calls(folder: Path, group: str | None = None) -> list[str]:
    """The samples that were encoded, in order: `group digest` (of one group: the digests)."""
    path = folder / "calls.log"
    lines = path.read_text().splitlines() if path.exists() else []
    return lines if group is None else [line.split()[1] for line in lines if line.split()[0] == group]


def wait_for_groups(folder: Path, groups: list[str]) -> None:
    """Wait until each of the groups has encoded a sample. Raises TimeoutError when one does not within five minutes."""
    deadline = time.monotonic() + 300
    while missing := [group for group in groups if not calls(folder, group)]:
        if time.monotonic() > deadline:
            raise TimeoutError(f"{' and '.join(missing)} encoded nothing while another group waited for it")
        time.sleep(0.02)


def digest(value: Any) -> str:
    """What stands for a sample in the log: a hash of its text or its pixels."""
    data = value.encode() if isinstance(value, str) else value.tobytes()
    return hashlib.blake2b(data, digest_size=8).hexdigest()


class CountingPipeline(BasePipeline):
    """Latents are the image shrunk by 8; embeddings are made of the caption's hash, one token a word."""

    version = 1
    family = "counting"
    schedule = "Qwen-Image"
    parts: ClassVar[dict[str, Part]] = {
        "vae": Part("vae", "diffusers:Any"),
        "text_encoder": Part("text_encoder", "transformers:Any"),
        "dit": Part("transformer", "diffusers:Any"),
    }

    def __init__(self, device: str = "cpu", torch_dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__(device=device, torch_dtype=torch_dtype)
        self.units = [ImageUnit(), CaptionUnit()]
        self.model_fn = model_fn
        self.control: Path | None = None

    @classmethod
    def from_pretrained(cls, source: ModelSource, **options: Any) -> Self:
        pipe = cls(device=options["device"], torch_dtype=options["torch_dtype"])
        pipe.control = Path(source.root) / "counting.json"
        return pipe

    def count(self, group: str, samples: list[Any]) -> None:
        """Log the samples, after failing where that is asked for."""
        assert self.control is not None
        how = json.loads(self.control.read_text())
        digests = [digest(sample) for sample in samples]
        if len(samples) > how.get("memory", len(samples)) or set(digests) & set(how.get("too_big", [])):
            raise torch.OutOfMemoryError("CUDA out of memory (the test says so)")
        for name in digests:
            if name in how.get("kill", []):
                os.kill(os.getpid(), signal.SIGKILL)
            if name in how.get("mistake", []):
                raise MissingInputError("ImageUnit needs 'mask' (the test says so)")
            if name in how.get("lose", []):
                raise RuntimeError("CUDA error: device-side assert triggered")
            time.sleep(how.get("sleep", 0))
            with open(how["log"], "a") as log:
                log.write(f"{group} {name}\n")
            wait_for_groups(self.control.parent, how.get("meet", []))
            after, mark = how.get("kill_after", {}).get(group), Path(how["log"] + ".killed")
            if after is not None and len(calls(self.control.parent, group)) >= after and not mark.exists():
                mark.touch()
                os.kill(os.getpid(), signal.SIGKILL)

    def say_what_is_cut(self, texts: list[str]) -> None:
        """Warn of the captions of too many words."""
        assert self.control is not None
        limit = json.loads(self.control.read_text()).get("words")
        for text in texts:
            if limit is not None and len(text.split()) > limit:
                warn("caption_cut", text, f"{len(text.split())} tokens cut to {limit}")


class ImageUnit(PipelineUnit):
    """`input_image` -> `input_latents`."""

    version = 1

    def __init__(self) -> None:
        super().__init__(input_params=("input_image",), output_params=("input_latents",), onload_model_names=("vae",))

    def process(self, pipe: CountingPipeline, input_image: Any) -> dict[str, Any]:
        return self.process_batch(pipe, [{"input_image": input_image}])[0]

    def process_batch(self, pipe: CountingPipeline, batch: list[dict[str, Any]]) -> list[dict[str, Any]]:
        images = [np.asarray(inputs["input_image"]) for inputs in batch]
        pipe.count("vae", images)
        small = [torch.from_numpy(image[::8, ::8].copy()).permute(2, 0, 1)[None] for image in images]
        return [{"input_latents": (pixels / 127.5 - 1).to(pipe.torch_dtype)} for pixels in small]


class CaptionUnit(PipelineUnit):
    """`prompt` -> `prompt_embeds`."""

    version = 1

    def __init__(self) -> None:
        super().__init__(
            input_params=("prompt",), output_params=("prompt_embeds",), onload_model_names=("text_encoder",)
        )

    def process(self, pipe: CountingPipeline, prompt: str) -> dict[str, Any]:
        return self.process_batch(pipe, [{"prompt": prompt}])[0]

    def process_batch(self, pipe: CountingPipeline, batch: list[dict[str, Any]]) -> list[dict[str, Any]]:
        texts = [inputs["prompt"] for inputs in batch]
        pipe.count("text_encoder", texts)
        pipe.say_what_is_cut(texts)
        result = []
        for text in texts:
            bits = np.frombuffer(hashlib.blake2b(text.encode(), digest_size=32).digest(), dtype=np.uint8)
            token = torch.from_numpy(bits.copy()).to(pipe.torch_dtype) / 255
            result.append({"prompt_embeds": token.repeat(1, 1 + len(text.split()), 1)})
        return result


def model_fn(*, dit: Any, latents: Tensor, timestep: Tensor, prompt_embeds: Tensor) -> Tensor:
    """Never called: only stage 1 is tested with this family."""
    raise NotImplementedError
