"""The reader that docs/cache_format.md gives, run as it stands: it needs nothing of ray_diffsynth."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ray_diffsynth.cache.manifest import Manifest

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "cache_format.md"


def reader_source() -> str:
    (code,) = DOCUMENT.read_text(encoding="utf-8").split("```python\n")[1:]
    return code.split("```")[0]


@pytest.mark.parametrize("codec", ["planes-zstd", "zstd", "none"])
def test_the_documents_reader_reads_every_value(
    tmp_path: Path, make_cache: Callable[..., Manifest], sample: Callable[[int], dict[str, Any]], codec: str
) -> None:
    make_cache(str(tmp_path / "cache"), codec=codec)
    scope: dict[str, Any] = {"__name__": "reader"}
    exec(compile(reader_source(), str(DOCUMENT), "exec"), scope)
    rows = list(scope["read_cache"](str(tmp_path / "cache")))
    assert [row["sample_id"] for row in rows] == [f"s{i}" for i in range(12)]
    for number, row in enumerate(rows):
        for name, value in sample(number).items():
            dtype, shape, data = row[name]
            assert dtype == "bfloat16" and tuple(shape) == tuple(value.shape)
            assert torch.equal(torch.frombuffer(bytearray(data), dtype=torch.bfloat16).reshape(shape), value)


def test_it_runs_without_ray_diffsynth(tmp_path: Path, make_cache: Callable[..., Manifest]) -> None:
    make_cache(str(tmp_path / "cache"))
    (tmp_path / "reader.py").write_text(reader_source())
    command = [sys.executable, str(tmp_path / "reader.py"), str(tmp_path / "cache")]
    shown = subprocess.run(command, cwd=tmp_path, text=True, capture_output=True, check=True).stdout
    assert len(shown.splitlines()) == 12 and "'input_latents': ('bfloat16', [1, 4, 2, 2])" in shown
    assert "ray_diffsynth." not in reader_source()
