"""Whether a model's files are what their names say, by their beginnings and sizes; no torch, no weights are read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ray_diffsynth.data.placeholders import HEAD, looks_like_lfs_pointer, looks_like_pickle, text_of, wrong_content
from ray_diffsynth.models.folder import ModelFolderError, read_json_object
from ray_diffsynth.models.locate import ModelSource

_LARGEST_HEADER = 100_000_000  # bytes; the safetensors library reads no larger one
_MAY_BE_EMPTY = (".txt", ".jinja", ".md")


def check_part(source: ModelSource, subfolder: str) -> None:
    """Raise ModelFolderError for weights of a part, or its config.json, that are no such files; absent ones are not
    looked for."""
    if source.has(subfolder) and (source.folder(subfolder) / "config.json").is_file():
        source.config(subfolder)
        for file in source.weight_files(subfolder):
            check_safetensors(file)


def check_companion(source: ModelSource, subfolder: str) -> None:
    """Raise ModelFolderError for files of a tokenizer, processor or scheduler that are not what their names say."""
    folder = source.companion(subfolder)
    try:
        files = sorted(file for file in folder.iterdir() if file.is_file() and not file.name.startswith("."))
    except OSError as err:
        raise ModelFolderError(f"{folder} cannot be read: {err}") from err
    for file in files:
        head, size = _beginning(file)
        if file.suffix == ".json":
            read_json_object(file)
        elif looks_like_lfs_pointer(head) or not (size or file.suffix in _MAY_BE_EMPTY):
            raise ModelFolderError(f"{file} is {wrong_content(head)}")


def check_safetensors(file: Path) -> None:
    """Raise ModelFolderError, with the cause and the fix, for a file that is no safetensors or is cut off."""
    head, size = _beginning(file)
    if (why := wrong_content(head)) is not None:
        raise ModelFolderError(f"{file} is {why}")
    if looks_like_pickle(head):
        raise ModelFolderError(f"{file} is a pickle by its content, which is not read; use the model's *.safetensors")
    length = int.from_bytes(head[:8], "little")
    if length > min(size - 8, _LARGEST_HEADER):
        if (text := text_of(head)) is not None:
            raise ModelFolderError(f"{file} is text that begins with {text!r}, not weights; download it again")
        if 8 < length <= _LARGEST_HEADER and head[8:9] == b"{":
            raise ModelFolderError(f"{file} is cut off within its header ({size} bytes); download it again")
        raise ModelFolderError(f"{file} is no safetensors file ({size} bytes); download it again")
    end = 8 + length + _data_size(file, length)
    if size != end:
        what = "is cut off" if size < end else "has bytes behind its end"
        raise ModelFolderError(f"{file} {what}: {size} bytes instead of {end}; download it again")


def _data_size(file: Path, length: int) -> int:
    """Bytes that the tensors of a safetensors file take, by its header."""
    try:
        with file.open("rb") as opened:
            opened.seek(8)
            header: Any = json.loads(opened.read(length))
        ends = [int(entry["data_offsets"][1]) for name, entry in header.items() if name != "__metadata__"]
    except OSError as err:
        raise ModelFolderError(f"{file} cannot be read: {err}") from err
    except (ValueError, TypeError, KeyError, IndexError, AttributeError) as err:
        raise ModelFolderError(f"{file} is no safetensors file (a damaged header: {err}); download it again") from err
    return max(ends, default=0)


def _beginning(file: Path) -> tuple[bytes, int]:
    try:
        with file.open("rb") as opened:
            return opened.read(HEAD), file.stat().st_size
    except OSError as err:
        raise ModelFolderError(f"{file} cannot be read: {err}; check that it is there and may be read") from err
