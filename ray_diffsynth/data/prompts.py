"""Files of prompts, with what a row may say beside its prompt: sizes, a seed, and images that a family takes."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from ray_diffsynth import storage
from ray_diffsynth.data.formats import READERS, DatasetError
from ray_diffsynth.data.metadata import resolve_file
from ray_diffsynth.data.spec import file_list
from ray_diffsynth.data.text import TextError, decode_text
from ray_diffsynth.errors import did_you_mean

OWN_COLUMNS = ("negative_prompt", "seed", "height", "width")
"""Columns of a file of prompts that a row may have beside `prompt` and the family's images."""


@dataclass(frozen=True)
class Prompt:
    """One row of the prompts; what is None is the configuration's. `images`: parameter -> path, or several."""

    prompt: str
    negative_prompt: str | None = None
    seed: int | None = None
    height: int | None = None
    width: int | None = None
    images: tuple[tuple[str, str | tuple[str, ...]], ...] = ()


def read_prompt_file(
    path: str, images: Collection[str], *, option: str, lines: Collection[str] = (".txt",)
) -> list[Prompt]:
    """The prompts of a file in order: a line each of a .txt, or the rows of a csv, json, jsonl or parquet.

    Args:
        images: columns that name images, relative to the file's folder.
        option: the option that names the file, for messages.
        lines: suffixes of files with a prompt a line.

    Raises DatasetError that names the line of a row that cannot be used.
    """
    suffix = os.path.splitext(path)[1].lower()
    if not storage.exists(path):
        raise DatasetError(f"{path} does not exist; check {option}")
    if suffix in lines:
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
        found = [_prompt(row.values, row.error, row.source, folder, images) for row in raw.rows]
    else:
        raise DatasetError(f"{path} is no file of prompts; supported are .txt, {', '.join(READERS)}")
    if not found:
        raise DatasetError(f"{path} holds no prompt; write one a line, or in the column prompt")
    return found


def _prompt(values: Mapping[str, Any] | None, error: str, source: str, folder: str, images: Collection[str]) -> Prompt:
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
    files = {name: _files(values[name], name, source, folder) for name in images if values.get(name)}
    return Prompt(values["prompt"], **given, images=tuple(sorted(files.items())))


def _files(value: Any, name: str, source: str, folder: str) -> str | tuple[str, ...]:
    """The path, or the paths of a list, made whole."""
    value = file_list(value)
    paths = value if isinstance(value, list) else [value]
    if not all(isinstance(path, str) and path for path in paths):
        raise DatasetError(f"{source}: the column {name!r} holds {value!r}, not the path of an image or a list of them")
    found = tuple(resolve_file(folder, path) for path in paths)
    return found if isinstance(value, list) else found[0]
