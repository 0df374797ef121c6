"""The prompts of a run."""

from __future__ import annotations

from collections.abc import Mapping

from ray_diffsynth.config import GenerateConfig
from ray_diffsynth.data.prompts import Prompt, read_prompt_file
from ray_diffsynth.errors import UserError
from ray_diffsynth.pipelines.core.calling import lacking_pictures


class GenerateError(UserError):
    """Pictures that cannot be made, or were not."""


def read_prompts(config: GenerateConfig, pictures: Mapping[str, bool] | None = None) -> list[Prompt]:
    """The prompts in order; `pictures`: see `picture_params`.

    Raises DatasetError that names the line of a row that cannot be used, GenerateError if a picture is missing.
    """
    pictures = pictures or {}
    if config.prompt is not None:
        found = [Prompt(config.prompt)]
    else:
        found = read_prompt_file(str(config.prompt_path), pictures, option="--prompt_path")
    if lacking := lacking_pictures(found, pictures, option="--prompt_path"):
        raise GenerateError(lacking)
    return found
