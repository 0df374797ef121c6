"""``report.json``: what a job did, in how long, with which versions and settings."""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib import metadata
from typing import Any

from ray_diffsynth import storage
from ray_diffsynth.config import JobConfig
from ray_diffsynth.version import __version__

LIBRARIES = ("torch", "ray", "diffusers", "transformers", "peft", "accelerate", "pyarrow")


def library_versions() -> dict[str, str]:
    """Versions of Python, of this package and of LIBRARIES, without importing them; only those installed."""
    versions = {"python": platform.python_version(), "ray_diffsynth": __version__}
    for name in LIBRARIES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def make_report(
    *,
    counts: Mapping[str, int],
    seconds: float | Mapping[str, float],
    config: JobConfig | Mapping[str, Any],
    versions: Mapping[str, str] | None = None,
    **extra: Any,
) -> dict[str, Any]:
    """The content of report.json, as JSON values; `job` says of which job, when `config` is one's configuration.

    seconds: the whole time, or a mapping of phases. versions: those of this machine unless given. extra: further keys.
    Numbers that JSON lacks (NaN, infinities) become the strings "nan", "inf" and "-inf".
    """
    report: dict[str, Any] = plain(
        {
            **({"job": config.job} if isinstance(config, JobConfig) else {}),
            "counts": dict(counts),
            "seconds": seconds,
            "finished_at": datetime.now(UTC).isoformat(timespec="seconds"),
            "versions": dict(versions or library_versions()),
            "config": config.to_dict() if isinstance(config, JobConfig) else dict(config),
            **extra,
        }
    )
    return report


def write_json(output_path: str, report: Mapping[str, Any], name: str = "report.json") -> str:
    """Write `report` as it is into ``<output_path>/<name>``; returns the path."""
    return write_text(output_path, name, json.dumps(report, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_text(output_path: str, name: str, text: str) -> str:
    """Write a file of the output, whole or not at all; returns its path. Raises OSError."""
    path = storage.join(output_path, name)
    # Half a character (of a path that is no UTF-8) as its escape, which JSON reads as the same.
    storage.write_bytes_atomic(path, text.encode("utf-8", "backslashreplace"))
    return path


def plain(value: Any) -> Any:
    """``value`` with only what JSON knows; numpy and torch scalars become numbers, paths and the like strings."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else str(float(value))
    if value is None or isinstance(value, (str, bool, int)):
        return value
    return plain(value.item()) if hasattr(value, "item") else str(value)
