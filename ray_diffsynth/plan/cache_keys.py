"""Content addresses: what a cached row depends on, and nothing else.

key = blake2b(group fingerprint, sample inputs that flow into the group), where the group fingerprint covers the code of
the group's units and of the pipeline that they call, the weights of its models, the dtype, the transform of the
images and the settings that the units read.
"""

import hashlib
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from ray_diffsynth.data.samples import TRANSFORM
from ray_diffsynth.models.fingerprint import SKETCH, part_fingerprint, part_sketch
from ray_diffsynth.models.locate import ModelSource
from ray_diffsynth.pipelines.core.base import BasePipeline
from ray_diffsynth.pipelines.core.graph import UnitGroup


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

    def key(self, inputs: Mapping[str, Any]) -> str:
        """Key of the row for sample inputs given as hashes (files) or plain values (text, numbers)."""
        return digest([self.fingerprint, {name: inputs[name] for name in self.inputs}])


def model_fingerprints(pipe: type[BasePipeline], source: ModelSource, models: Collection[str]) -> dict[str, str]:
    """Fingerprint of each named model with its companions (a tokenizer changes embeddings too)."""
    found = {}
    for name in models:
        part = pipe.parts[name]
        source.weight_files(part.subfolder)  # a folder without config.json or weights: said now, not by an actor
        found[name] = part_fingerprint(source, part.subfolder)
        for companion in part.companions:
            found[companion] = part_fingerprint(source, pipe.companions[companion].subfolder)
    return found


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
    """Address space of `group` for a dataset whose rows give `sample_inputs`; `settings`: see `settings_of`."""
    inputs = tuple(sorted(name for name in group.inputs if name in sample_inputs))
    settings = {name: value for name, value in sorted(settings.items()) if name in group.inputs}
    has_pixels = any(name in file_params for name in inputs)
    parts = {f"unit:{type(unit).__name__}": unit.code_version() for unit in group.units}
    parts["pipeline"] = pipe.code_version()
    parts |= {f"weights:{name}": value for name, value in model_fingerprints(type(pipe), source, group.models).items()}
    parts |= {f"setting:{name}": json.dumps(value) for name, value in settings.items()}
    parts["dtype"] = dtype
    if group.sided:  # they are stored in another form
        parts["sides"] = ", ".join(group.sided)
    if has_pixels:
        parts["transform"] = TRANSFORM
    bucketed = has_pixels or any(name in inputs for name in ("height", "width", "num_frames"))
    fingerprint = digest(parts)
    # For stage 2, which compares encoders without reading them; the keys depend on the whole weights above.
    for name in group.models:
        parts[f"{SKETCH}{name}"] = part_sketch(source, type(pipe).parts[name].subfolder) or ""
    return GroupPlan(group.name, group.parameters, inputs, settings, parts, fingerprint, bucketed)
