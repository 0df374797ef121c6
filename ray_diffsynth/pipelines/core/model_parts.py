"""The models of a pipeline: which there are, how they are loaded, and where they are."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import torch

from ray_diffsynth.diffusion.flow_match import FlowMatchScheduler
from ray_diffsynth.models.folder import read_json_object
from ray_diffsynth.models.integrity import check_companion, check_part
from ray_diffsynth.models.load import load_companion, load_part
from ray_diffsynth.models.locate import ModelSource, locate_model
from ray_diffsynth.pipelines.core.errors import MissingModelError, PipelineError
from ray_diffsynth.pipelines.core.graph import model_root
from ray_diffsynth.pipelines.core.unit import PipelineUnit


@dataclass(frozen=True)
class Part:
    """A component of the model folder: where it lies, its class, and the parts that it is no use without."""

    subfolder: str
    cls: str
    """`library:Class`, e.g. `diffusers:QwenImageTransformer2DModel`."""
    companions: tuple[str, ...] = ()
    """Names in `BasePipeline.companions`, e.g. the tokenizer of a text encoder."""


class ModelParts(torch.nn.Module):
    """Models as attributes that are named as in `parts`, None until they are loaded."""

    parts: ClassVar[Mapping[str, Part]] = {}
    companions: ClassVar[Mapping[str, Part]] = {}
    """Tokenizers and processors: no weights, loaded with the part that names them."""
    schedule: ClassVar[str] = ""
    """Name in `diffusion.flow_match.SCHEDULES`."""

    units: list[PipelineUnit]
    scheduler: FlowMatchScheduler
    in_iteration_models: tuple[str, ...] = ("dit",)

    def __init__(self, device: str | torch.device = "cpu", torch_dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__()
        self.device = torch.device(device)
        self.torch_dtype = torch_dtype
        self.units = []
        if self.schedule:
            self.scheduler = FlowMatchScheduler(self.schedule)
        for name in (*self.parts, *self.companions):
            setattr(self, name, None)

    @classmethod
    def skeleton(cls) -> Self:
        """The units and declarations without any weights: enough to plan a split."""
        return cls()

    @classmethod
    def configured(cls, source: ModelSource) -> Self:
        """`skeleton` with what the model's configuration files say: sizes, schedule. Raises as `configure`."""
        pipe = cls.skeleton()
        pipe.set_up(source)
        return pipe

    @classmethod
    def from_pretrained(
        cls,
        source: ModelSource | str | Path,
        *,
        models: Collection[str] | None = None,
        device: str | torch.device = "cpu",
        torch_dtype: torch.dtype = torch.bfloat16,
    ) -> Self:
        """Load `models` (names of `parts`; None: all that `source` has), frozen, in eval mode; reads no other weights.

        Raises:
            PipelineError: a name that the family does not have, or that `source` does not name.
            ModelFolderError: a part's folder is unusable.
        """
        if not isinstance(source, ModelSource):
            source = locate_model(str(source))
        if models is None:
            wanted = [name for name, part in cls.parts.items() if source.has(part.subfolder)]
        else:
            wanted = list(dict.fromkeys(model_root(name) for name in models))
        pipe = cls(device=device, torch_dtype=torch_dtype)
        for name in wanted:
            if name not in cls.parts:
                raise PipelineError(f"{cls.__name__} has no model {name!r}; it has {', '.join(cls.parts)}")
            part = cls.parts[name]
            if not source.has(part.subfolder):
                raise PipelineError(
                    f"the {name} is needed, but {source.model_id} does not give it: "
                    f"name {part.subfolder}/*.safetensors "
                    "in --model_id_with_origin_paths too, or give the whole folder by --model"
                )
            setattr(pipe, name, load_part(source, part.subfolder, part.cls, torch_dtype=torch_dtype, device=device))
            for companion in part.companions:
                other = cls.companions[companion]
                setattr(pipe, companion, load_companion(source, other.subfolder, other.cls))
        pipe.set_up(source)
        return pipe.eval().requires_grad_(False)

    @classmethod
    def check_files(cls, source: ModelSource, models: Collection[str]) -> None:
        """Look at the files of `models` and their companions without reading weights; for the driver, before Ray.

        Raises:
            ModelFolderError: one is a Git LFS pointer, a web page, cut off, empty or damaged; says the fix.
        """
        for name in dict.fromkeys(model_root(model) for model in models):
            if (part := cls.parts.get(name)) is None or not source.has(part.subfolder):
                continue
            check_part(source, part.subfolder)
            for companion in part.companions:
                check_companion(source, cls.companions[companion].subfolder)

    def set_up(self, source: ModelSource) -> None:
        """Make the scheduler, and call the hook `configure`; for who makes an instance without loading its parts."""
        if self.schedule:
            self.scheduler = FlowMatchScheduler(self.schedule, config=scheduler_config(source))
        self.configure(source)

    def configure(self, source: ModelSource) -> None:
        """Read what a family needs from configuration files of parts whose weights are not loaded; a hook.

        It is called when a run is planned too: raise PipelineError there for a model that the family cannot take.
        """

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Move the models, and remember device and dtype for the parameters that units make."""
        for value in (*args, *kwargs.values()):
            if isinstance(value, torch.dtype):
                self.torch_dtype = value
            elif isinstance(value, (str, int, torch.device)) and not isinstance(value, bool):
                self.device = torch.device(value)
        return super().to(*args, **kwargs)

    def load_models_to_device(self, names: Sequence[str]) -> None:
        """Make sure that the models are loaded and on the pipeline's device.

        Raises:
            MissingModelError: a model is not loaded; names it and the units that need it.
        """
        for name in [names] if isinstance(names, str) else names:
            model = getattr(self, model_root(name), None)
            if model is None:
                users = [type(unit).__name__ for unit in self.units if name in (unit.onload_model_names or ())]
                users += ["model_fn"] if name in self.in_iteration_models else []
                raise MissingModelError(
                    f"the model {name!r} is not loaded, but {' and '.join(users) or 'the pipeline'} needs it: "
                    f"load it by from_pretrained(models=[…, {name!r}])"
                )
            if isinstance(model, torch.nn.Module):
                weight = next(model.parameters(), None)
                if weight is not None and weight.device != self.device:
                    model.to(self.device)


def scheduler_config(source: ModelSource) -> dict[str, Any] | None:
    """The model's scheduler_config.json; None where there is none. Raises ModelFolderError if it is damaged."""
    path = source.folder("scheduler") / "scheduler_config.json"
    if not path.is_file():
        return None
    return read_json_object(path)
