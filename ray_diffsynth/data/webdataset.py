"""WebDataset tars as metadata rows: members of one stem are one sample, read from their place when needed."""

from __future__ import annotations

import json
import posixpath
import tarfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import IO, Any, cast

from ray_diffsynth.data import storage
from ray_diffsynth.data.formats import IMAGE_SUFFIXES, READ_THREADS, VIDEO_SUFFIXES, DatasetError, RawRow, RawTable

_MEDIA = (*IMAGE_SUFFIXES, *VIDEO_SUFFIXES)


def read_tars(base_path: str, names: Sequence[str], file_column: str, text_column: str) -> RawTable:
    """The samples of the tars `names` (relative to `base_path`), in their order; only headers and texts are read.

    A member is named `<stem>.<extension>`. Of a sample, the picture or video is `file_column`, `.txt` is `text_column`,
    the values of `.json` are columns of their names, and `<stem>.<column>.<suffix>` is a further file of that column. A
    tar that cannot be read to its end gives what it has, and a row that says so.
    """
    rows: list[RawRow] = []
    columns: dict[str, None] = {file_column: None, text_column: None}
    with ThreadPoolExecutor(READ_THREADS) as pool:
        tars = list(
            pool.map(lambda name: _read_tar(storage.join(base_path, name), name, file_column, text_column), names)
        )
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
                folder, base = posixpath.split(member.name)
                stem, _, extension = base.partition(".")
                values, error = samples.get(stem := posixpath.join(folder, stem), ({}, ""))
                place = storage.member_path(name, member.offset_data, member.size, member.name)
                try:
                    values |= _values(archive, member, extension.lower(), place, file_column, text_column)
                except ValueError as problem:
                    error = f"{member.name}: {problem}"
                if values or error:  # else a README or the like
                    samples[stem] = (values, error)
            end = archive.offset
        if storage.file_size(path) < end:
            return samples, f"{name} is cut short: it ends before its last member does"
    except FileNotFoundError as error:
        raise DatasetError(f"the tar {path} does not exist; check --dataset_base_path") from error
    except (OSError, tarfile.TarError) as error:
        return samples, f"{name} cannot be read to its end ({error}); {len(samples)} samples were found"
    return samples, ""


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
    text = content.read().decode("utf-8-sig")
    if extension == "txt":
        return {text_column: text.strip()}
    values = json.loads(text)
    if not isinstance(values, dict):
        raise ValueError(f"holds {type(values).__name__}, not an object with columns")
    return {key: value for key, value in values.items() if key not in (file_column, "sample_id")}
