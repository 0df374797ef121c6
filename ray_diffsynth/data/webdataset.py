"""WebDataset tars as metadata rows: members of one stem are one sample, read from their place when needed."""

from __future__ import annotations

import json
import posixpath
import re
import tarfile
from collections.abc import Sequence
from typing import IO, Any, cast

from ray_diffsynth import storage
from ray_diffsynth.data.folder import on_threads
from ray_diffsynth.data.formats import DatasetError, RawRow, RawTable
from ray_diffsynth.data.placeholders import HEAD, wrong_content
from ray_diffsynth.data.suffixes import IMAGE_SUFFIXES, UNREADABLE_SUFFIXES, VIDEO_SUFFIXES, why_unreadable
from ray_diffsynth.data.text import decode_text
from ray_diffsynth.data.warnings import warn

_MEDIA = (*IMAGE_SUFFIXES, *VIDEO_SUFFIXES)
_OWN = re.compile(r"__[^/]*__($|/)")
"""Beginnings of names that WebDataset keeps for itself, such as `__meta__/index.json`: no samples."""


def read_tars(base_path: str, names: Sequence[str], file_column: str, text_column: str) -> RawTable:
    """The samples of the tars `names` (relative to `base_path`), in their order; only headers and texts are read.

    A member is named `<stem>.<extension>`. Of a sample, the image or video is `file_column`, `.txt` is `text_column`,
    the values of `.json` are columns of their names, and `<stem>.<column>.<suffix>` is a further file of that column.
    Members named `__x__…` are not samples, by WebDataset's rule. Images of a form that is not read are warned of. A
    tar that cannot be read to its end gives what it has, and a row that says so.
    """
    rows: list[RawRow] = []
    columns: dict[str, None] = {file_column: None, text_column: None}
    tars = on_threads(lambda name: _read_tar(storage.join(base_path, name), name, file_column, text_column), names)
    for name, (samples, problem) in zip(names, tars, strict=True):
        for stem, (values, error) in samples.items():
            rows.append(RawRow(len(rows) + 1, f"{name}/{stem}", None if error else values, error))
            columns |= dict.fromkeys(values)
        if problem:
            rows.append(RawRow(len(rows) + 1, name, None, problem))
    if not rows:
        raise DatasetError(f"the tars {', '.join(names)} of {base_path} hold no samples")
    absent = "is absent: the tar has no .txt member of the same stem"
    return RawTable(tuple(columns), tuple(rows), absent_text=absent)


_Samples = dict[str, tuple[dict[str, Any], str]]


def _read_tar(path: str, name: str, file_column: str, text_column: str) -> tuple[_Samples, str]:
    """Stem -> (values, error), and what ended the reading too early."""
    samples: _Samples = {}
    try:
        with storage.open_input(path) as file, tarfile.open(fileobj=cast("IO[bytes]", file), mode="r:") as archive:
            for member in archive:
                if not member.isfile() or posixpath.basename(member.name).startswith("."):
                    continue
                if _OWN.match(member.name):
                    continue
                if member.name.lower().endswith(UNREADABLE_SUFFIXES):
                    warn("file_left_out", f"{name}/{member.name}", why_unreadable(member.name))
                    continue
                folder, base = posixpath.split(member.name)
                stem, _, extension = base.partition(".")
                values, error = samples.get(stem := posixpath.join(folder, stem), ({}, ""))
                place = storage.member_path(name, member.offset_data, member.size, member.name)
                try:
                    values |= _values(archive, member, extension.lower(), place, file_column, text_column)
                except (ValueError, RecursionError) as problem:
                    error = f"{member.name}: {problem}"
                if values or error:  # else a README or the like
                    samples[stem] = (values, error)
            end = archive.offset
        if storage.file_size(path) < end:
            return samples, f"{name} is cut short: it ends before its last member does"
    except FileNotFoundError as error:
        raise DatasetError(f"the tar {path} does not exist; check --dataset_base_path") from error
    # Beside TarError: numbers in a damaged header are ValueErrors, or too large for a file's offset.
    except (OSError, tarfile.TarError, ValueError, OverflowError, EOFError) as error:
        if why := _wrong_content(path):
            return samples, f"{name} is {why}"
        return samples, f"{name} cannot be read to its end ({error}); {len(samples)} samples were found"
    # `__meta__.json` describes the tar too.
    return {stem: row for stem, row in samples.items() if not _OWN.match(stem) or file_column in row[0]}, ""


def _wrong_content(path: str) -> str | None:
    """What a file that is no tar is instead; None if unknown."""
    try:
        with storage.open_input(path) as file:
            return wrong_content(file.read(HEAD))
    except OSError:
        return None


def _values(
    archive: tarfile.TarFile, member: tarfile.TarInfo, extension: str, place: str, file_column: str, text_column: str
) -> dict[str, Any]:
    """What one member gives to its sample. Raises ValueError for a text that cannot be read."""
    column, _, suffix = extension.rpartition(".")
    if f".{suffix}" in _MEDIA:
        return {column or file_column: place}
    content = archive.extractfile(member) if extension in ("txt", "json") else None
    if content is None:
        return {}
    text = decode_text(member.name, content.read())
    if extension == "txt":
        return {text_column: text.strip()}
    values = json.loads(text)
    if not isinstance(values, dict):
        raise ValueError(f"holds {type(values).__name__}, not an object with columns")
    return {key: value for key, value in values.items() if key not in (file_column, "sample_id")}
