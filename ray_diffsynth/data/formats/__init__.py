"""Metadata files by the ending of their names. A format is one function and one line of `READERS`."""

from __future__ import annotations

from collections.abc import Callable

from ray_diffsynth.data.formats.delimited import read_csv, read_tsv
from ray_diffsynth.data.formats.json_rows import read_json, read_jsonl
from ray_diffsynth.data.formats.parquet_rows import read_parquet
from ray_diffsynth.data.formats.raw import DatasetError, RawRow, RawTable, read_file

__all__ = ["READERS", "DatasetError", "RawRow", "RawTable", "read_file"]

READERS: dict[str, Callable[[str], RawTable]] = {
    ".csv": read_csv,
    ".tsv": read_tsv,
    ".json": read_json,
    ".jsonl": read_jsonl,
    ".parquet": read_parquet,
}
"""By the ending of a file's name, in lower case. A reader gets the path or URL of the file."""
