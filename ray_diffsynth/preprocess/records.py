"""What stage 1 knows of a row of the dataset: a good sample, or why it cannot be used."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ray_diffsynth.data.buckets import Bucket


@dataclass(frozen=True, slots=True)
class Sample:
    """A good row: its id, raw values, bucket, and its inputs as they enter a cache key (content hash for a file)."""

    sample_id: str
    source: str
    row: Mapping[str, Any]
    bucket: Bucket
    inputs: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a file or row cannot be used: error class and message, as they go to quarantine."""

    error: str
    message: str

    @classmethod
    def of(cls, error: Exception) -> "Failure":
        return cls(type(error).__name__, str(error))
