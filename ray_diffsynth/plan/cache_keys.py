"""Content addresses: what a cached row depends on, and nothing else.

key = blake2b(group fingerprint, sample inputs that flow into the group), where the group fingerprint covers the stated
versions of the group's units and of the pipeline that they call, the units' attributes, the weights of its models, what
their tokenizers and processors do, prompt templates, the dtype, the versions of the pixels' transforms and of the
libraries that compute the values, and the settings that the units read.
"""

import hashlib
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from ray_diffsynth.data.samples import PIXEL_TRANSFORMS
from ray_diffsynth.data.scan import FRAME_TRANSFORMS
from ray_diffsynth.models.companion_meaning import companion_meaning
from ray_diffsynth.models.fingerprint import SKETCH, part_fingerprint, part_sketch
from ray_diffsynth.models.locate import ModelSource
from ray_diffsynth.pipelines.core.base import BasePipeline
from ray_diffsynth.pipelines.core.graph import UnitGroup, model_root
from ray_diffsynth.plan.library_versions import AGREEING, counted_version


def digest(value: Any) -> str:
    """Hex blake2b-128 of the canonical JSON of `value`."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


@dataclass(frozen=True)
class GroupPlan:
    """One group of stage-1 units with the address space of its rows.

    `parameters` are what its rows hold, `inputs` the sample inputs that flow into it, `settings` the constants that do;
    `parts` is the readable fingerprint. `bucketed` tells whether its rows depend on the size, so that a file holds one
    bucket.
    """

    name: str
    parameters: tuple[str, ...]
    inputs: tuple[str, ...]
    settings: Mapping[str, Any]
    parts: Mapping[str, str]
    fingerprint: str
    bucketed: bool

    @property
    def caption_only(self) -> bool:
        """True for a text encoder's group: its rows depend on the caption alone."""
        return self.inputs == ("prompt",)

    @property
    def sketches(self) -> dict[str, str | None]:
        """Which weights its models have (`part_sketch`), by model."""
        return {name.removeprefix(SKETCH): v or None for name, v in self.parts.items() if name.startswith(SKETCH)}

    def key(self, inputs: Mapping[str, Any]) -> str:
        """Key of the row for sample inputs given as hashes (files) or plain values (text, numbers)."""
        return digest([self.fingerprint, {name: inputs[name] for name in self.inputs}])


def model_parts(pipe: type[BasePipeline], source: ModelSource, models: Collection[str]) -> dict[str, str]:
    """`weights:<model>` of each model, and `companion:<name>` of what it is no use without (a tokenizer)."""
    found = {}
    for name in models:
        part = pipe.parts[name]
        source.weight_files(part.subfolder)  # a folder without config.json or weights: said now, not by an actor
        found[f"weights:{name}"] = part_fingerprint(source, part.subfolder)
        for companion in part.companions:
            other = pipe.companions[companion]
            found[f"companion:{companion}"] = companion_meaning(source, other.subfolder, other.cls)
    return found


def library_parts(pipe: BasePipeline, models: Collection[str], *, pixels: bool, prompt: bool) -> dict[str, str]:
    """`library:<name>` -> the version that it counts as, of the libraries that compute a group's values."""
    parts = [pipe.parts[model_root(name)] for name in models]
    companions = [pipe.companions[name] for part in parts for name in part.companions]
    names = {"torch", *(part.cls.partition(":")[0].partition(".")[0] for part in (*parts, *companions))}
    if pixels:
        names |= {"pillow", *(["av"] if pipe.video_params else [])}
    if prompt:
        names |= {"tokenizers", *pipe.text_libraries}
    return {f"library:{name}": counted_version(name) for name in sorted(names & {*AGREEING, *pipe.text_libraries})}


def transform_parts(pipe: BasePipeline, settings: Mapping[str, Any]) -> dict[str, str]:
    """`transform:<name>` -> version, of all that is done to pixels before a model sees them."""
    named = {**PIXEL_TRANSFORMS, **(FRAME_TRANSFORMS if pipe.video_params else {})}
    named |= {name: str(version) for name, version in pipe.pixel_transforms.items()}
    if not settings.get("tiled"):
        named.pop("tiling", None)
    return {f"transform:{name}": value for name, value in named.items()}


def plan_group(
    pipe: BasePipeline,
    source: ModelSource,
    group: UnitGroup,
    *,
    sample_inputs: Collection[str],
    file_params: Collection[str],
    dtype: str,
    settings: Mapping[str, Any],
) -> GroupPlan:
    """Address space of `group` for a dataset whose rows give `sample_inputs`; `settings`: see `settings_of`.

    Raises CacheKeyError: a unit or family without a version of its own, a unit's attribute without a value to compare.
    """
    inputs = tuple(sorted(name for name in group.inputs if name in sample_inputs))
    settings = {name: value for name, value in sorted(settings.items()) if name in group.inputs}
    has_pixels = any(name in file_params for name in inputs)
    parts = {f"unit:{type(unit).__name__}": unit.code_version() for unit in group.units}
    parts["pipeline"] = pipe.code_version()
    parts |= model_parts(type(pipe), source, group.models)
    parts |= library_parts(pipe, group.models, pixels=has_pixels, prompt="prompt" in inputs)
    if "prompt" in inputs:
        parts |= {f"template:{name}": text for name, text in pipe.prompt_templates().items()}
    parts |= {f"setting:{name}": json.dumps(value) for name, value in settings.items()}
    parts["dtype"] = dtype
    if group.sided:  # they are stored in another form
        parts["sides"] = ", ".join(group.sided)
    if has_pixels:
        parts |= transform_parts(pipe, settings)
    bucketed = has_pixels or any(name in inputs for name in ("height", "width", "num_frames"))
    fingerprint = digest(parts)
    # For stage 2, which compares encoders without reading them; the keys depend on the whole weights above.
    for name in group.models:
        parts[f"{SKETCH}{name}"] = part_sketch(source, type(pipe).parts[name].subfolder) or ""
    return GroupPlan(group.name, group.parameters, inputs, settings, parts, fingerprint, bucketed)
