"""The prompts of a run, and the pictures that a family takes beside them."""

from __future__ import annotations

import inspect
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from ray_diffsynth.config import GenerateConfig
from ray_diffsynth.data import storage
from ray_diffsynth.data.formats import READERS, DatasetError
from ray_diffsynth.data.metadata import resolve_file
from ray_diffsynth.data.samples import file_list
from ray_diffsynth.data.text import TextError, decode_text
from ray_diffsynth.errors import UserError, did_you_mean
from ray_diffsynth.pipelines.base import BasePipeline

OWN_COLUMNS = ("negative_prompt", "seed", "height", "width")
"""Columns of a file of prompts that a row may have beside `prompt` and the family's pictures."""


class GenerateError(UserError):
    """Pictures that cannot be made, or were not."""


@dataclass(frozen=True)
class Prompt:
    """One row of the prompts; what is None is the configuration's. `pictures`: parameter -> path, or several."""

    prompt: str
    negative_prompt: str | None = None
    seed: int | None = None
    height: int | None = None
    width: int | None = None
    pictures: tuple[tuple[str, str | tuple[str, ...]], ...] = ()


def picture_params(pipe: BasePipeline) -> dict[str, bool]:
    """Parameters of the family's `__call__` that are pictures -> whether its units cannot do without."""
    accepted = inspect.signature(type(pipe).__call__).parameters
    needed = {name for name, parameter in accepted.items() if parameter.default is inspect.Parameter.empty}
    written: set[str] = set()
    for unit in pipe.units:
        arguments = {} if unit.take_over else inspect.signature(unit.process).parameters
        reads = [name for name in unit.input_params or () if name in arguments and name not in written]
        needed |= {name for name in reads if arguments[name].default is inspect.Parameter.empty}
        written |= set(unit.fetch_output_params())
    return {name: name in needed for name in pipe.file_params if name in accepted and name not in pipe.video_params}


def read_prompts(config: GenerateConfig, pictures: Mapping[str, bool] | None = None) -> list[Prompt]:
    """The prompts in order; `pictures`: see `picture_params`.

    Raises DatasetError that names the line of a row that cannot be used, GenerateError if a picture is missing.
    """
    pictures = pictures or {}
    needed = [name for name, is_needed in pictures.items() if is_needed]
    found = [Prompt(config.prompt)] if config.prompt is not None else _read(str(config.prompt_path), pictures)
    for prompt in found:
        if absent := [name for name in needed if name not in dict(prompt.pictures)]:
            raise GenerateError(
                f"the prompt {prompt.prompt!r} has no {' and '.join(absent)}, which this family needs: give "
                f"--prompt_path a csv or jsonl file with the columns prompt, {', '.join(needed)} (paths relative to it)"
            )
    return found


def _read(path: str, pictures: Collection[str]) -> list[Prompt]:
    suffix = os.path.splitext(path)[1].lower()
    if not storage.exists(path):
        raise DatasetError(f"{path} does not exist; check --prompt_path")
    if suffix == ".txt":
        try:
            text = decode_text(path, storage.read_bytes(path))
        except TextError as error:
            raise DatasetError(f"{path} {error}; it must hold one prompt a line") from error
        except OSError as error:
            raise DatasetError(f"{path} cannot be read: {error}; give a text file, one prompt a line") from error
        found = [Prompt(line.strip()) for line in text.splitlines() if line.strip()]
    elif suffix in READERS:
        raw = READERS[suffix](path)
        if "prompt" not in raw.columns:
            raise DatasetError(f"{path} has no column 'prompt'; {did_you_mean('prompt', raw.columns)}")
        folder = storage.absolute(path).rpartition("/")[0]
        found = [_prompt(row.values, row.error, row.source, folder, pictures) for row in raw.rows]
    else:
        raise DatasetError(f"{path} is no file of prompts; supported are .txt, {', '.join(READERS)}")
    if not found:
        raise DatasetError(f"{path} holds no prompt; write one a line, or in the column prompt")
    return found


def _prompt(
    values: Mapping[str, Any] | None, error: str, source: str, folder: str, pictures: Collection[str]
) -> Prompt:
    if values is None:
        raise DatasetError(f"{source}: {error}")
    if not isinstance(values.get("prompt"), str):
        raise DatasetError(f"{source}: the column 'prompt' holds no text")
    given = {name: values[name] for name in OWN_COLUMNS if values.get(name) not in (None, "")}
    for name in ("seed", "height", "width"):
        if name in given:
            text = str(given[name]).strip().removesuffix(".0")
            if not (text.isascii() and text.isdigit()):
                raise DatasetError(f"{source}: the column {name!r} holds {given[name]!r}, not a whole number")
            given[name] = int(text)
    files = {name: _files(values[name], name, source, folder) for name in pictures if values.get(name)}
    return Prompt(values["prompt"], **given, pictures=tuple(sorted(files.items())))


def _files(value: Any, name: str, source: str, folder: str) -> str | tuple[str, ...]:
    """The path, or the paths of a list, made whole."""
    value = file_list(value)
    paths = value if isinstance(value, list) else [value]
    if not all(isinstance(path, str) and path for path in paths):
        raise DatasetError(
            f"{source}: the column {name!r} holds {value!r}, not the path of a picture or a list of them"
        )
    found = tuple(resolve_file(folder, path) for path in paths)
    return found if isinstance(value, list) else found[0]
