"""The prompts of a run."""

from __future__ import annotations

from collections.abc import Mapping

from ray_diffsynth.config import GenerateConfig
from ray_diffsynth.data.prompts import Prompt, read_prompt_file
from ray_diffsynth.errors import UserError
from ray_diffsynth.pipelines.core.calling import missing_images


class GenerateError(UserError):
    """Images that cannot be made, or were not."""


def prompts_of(config: GenerateConfig, images: Mapping[str, bool] | None = None) -> list[Prompt]:
    """The prompts in order; `images`: see `image_params`.

    Raises DatasetError that names the line of a row that cannot be used, GenerateError if an image is missing.
    """
    images = images or {}
    if config.prompt is not None:
        found = [Prompt(config.prompt)]
    else:
        found = read_prompt_file(str(config.prompt_path), images, option="--prompt_path")
    if lacking := missing_images(found, images, option="--prompt_path"):
        raise GenerateError(lacking)
    return found
