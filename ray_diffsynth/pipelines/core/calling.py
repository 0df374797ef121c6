"""What a family's `__call__` takes beside the prompt."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping

from ray_diffsynth.data.prompts import Prompt
from ray_diffsynth.pipelines.core.base import BasePipeline


def image_params(pipe: BasePipeline) -> dict[str, bool]:
    """Parameters of the family's `__call__` that are images -> whether its units cannot do without."""
    accepted = inspect.signature(type(pipe).__call__).parameters
    needed = {name for name, parameter in accepted.items() if parameter.default is inspect.Parameter.empty}
    written: set[str] = set()
    for unit in pipe.units:
        arguments = {} if unit.take_over else inspect.signature(unit.process).parameters
        reads = [name for name in unit.input_params or () if name in arguments and name not in written]
        needed |= {name for name in reads if arguments[name].default is inspect.Parameter.empty}
        written |= set(unit.fetch_output_params())
    return {name: name in needed for name in pipe.file_params if name in accepted and name not in pipe.video_params}


def missing_images(prompts: Iterable[Prompt], images: Mapping[str, bool], *, option: str) -> str | None:
    """What to say of the first prompt without an image that the family needs; None if there is none.

    Args:
        images: see `image_params`.
        option: the option that names the file of prompts.
    """
    needed = [name for name, is_needed in images.items() if is_needed]
    for prompt in prompts:
        if absent := [name for name in needed if name not in dict(prompt.images)]:
            return (
                f"the prompt {prompt.prompt!r} has no {' and '.join(absent)}, which this family needs: give "
                f"{option} a csv or jsonl file with the columns prompt, {', '.join(needed)} (paths relative to it)"
            )
    return None
