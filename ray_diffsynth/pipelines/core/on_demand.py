"""A pipeline that reads each part when it is first used, and lets it go again when asked."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import torch
from torch import nn

from ray_diffsynth.models.load import load_companion, load_part
from ray_diffsynth.models.locate import ModelSource
from ray_diffsynth.pipelines.core.base import BasePipeline


def on_demand(
    cls: type[BasePipeline], source: ModelSource, *, device: torch.device, torch_dtype: torch.dtype
) -> BasePipeline:
    """A `cls` none of whose parts is loaded yet: the first use of one reads it, which raises as `from_pretrained`.

    `release_parts` lets go what was read so; a part that is set as an attribute is kept.
    """
    kind = type(cls.__name__, (_OnDemand, cls), {})
    pipe: BasePipeline = kind(device=device, torch_dtype=torch_dtype)
    for name in (*cls.parts, *cls.companions):
        delattr(pipe, name)  # without it Python asks __getattr__
    pipe.__dict__.update(_source=source, _read=[])
    pipe.set_up(source)
    return pipe


def release_parts(pipe: BasePipeline) -> None:
    """Let go of the parts that `on_demand` read."""
    read: list[str] = pipe.__dict__["_read"]
    for name in read:
        delattr(pipe, name)
    read.clear()
    if pipe.device.type == "cuda":
        torch.cuda.empty_cache()


class _OnDemand(nn.Module):
    parts: Any
    companions: Any
    device: torch.device
    torch_dtype: torch.dtype
    _source: ModelSource
    _read: list[str]

    def __getattr__(self, name: str) -> Any:
        own = self.__dict__
        if "_source" not in own or (name not in self.parts and name not in self.companions):
            return super().__getattr__(name)
        with suppress(AttributeError):
            return super().__getattr__(name)
        source: ModelSource = own["_source"]
        if name in self.parts:
            part = self.parts[name]
            value: Any = load_part(source, part.subfolder, part.cls, torch_dtype=self.torch_dtype, device=self.device)
        else:
            companion = self.companions[name]
            value = load_companion(source, companion.subfolder, companion.cls)
        setattr(self, name, value)
        own["_read"].append(name)
        return value
