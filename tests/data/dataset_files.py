"""Datasets as other programs write them: archives, and the files of Hugging Face's `datasets`."""

from __future__ import annotations

import io
import json
import tarfile
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

HF_IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def png(seed: int, height: int = 32, width: int = 48) -> bytes:
    """An image of noise, another for each seed."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, format="PNG")
    return out.getvalue()


def put(folder: Path, files: Mapping[str, bytes | str]) -> Path:
    """Write files below a folder."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


def jsonl(rows: Sequence[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def tar_of(members: Mapping[str, bytes]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return out.getvalue()


def zip_of(members: Mapping[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", method) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return out.getvalue()


def hf_parquet(columns: Mapping[str, Any], rows_per_group: int = 2) -> bytes:
    """As `Dataset.to_parquet` writes it: images as {bytes, path}, the features as JSON in the schema's metadata."""
    arrays = {
        name: value if isinstance(value, pa.Array) else pa.array(value, HF_IMAGE if _is_image(value) else None)
        for name, value in columns.items()
    }
    features = {name: {"_type": "Image" if _is_image(value) else "Value"} for name, value in columns.items()}
    table = pa.table(arrays).replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    out = io.BytesIO()
    pq.write_table(table, out, row_group_size=rows_per_group)
    return out.getvalue()


def _is_image(value: Any) -> bool:
    return isinstance(value, list) and isinstance(value[0], dict) and "bytes" in value[0]
