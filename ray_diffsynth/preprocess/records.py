"""What stage 1 knows of the rows of the dataset: good samples, and why others cannot be used."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ray_diffsynth.data.buckets import Bucket


@dataclass(frozen=True, slots=True)
class Sample:
    """A good row: its id, raw values, bucket, and its inputs as they enter a cache key (content hash for a file).

    `decode_bytes`: memory that decoding its files takes at its peak, and `kept_bytes`: what of it stays.
    """

    sample_id: str
    source: str
    row: Mapping[str, Any]
    bucket: Bucket
    inputs: Mapping[str, Any]
    decode_bytes: int = 0
    kept_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a file or row cannot be used: error class and message, as they go to quarantine."""

    error: str
    message: str

    @classmethod
    def of(cls, error: Exception) -> "Failure":
        """The class and the message of an error."""
        return cls(type(error).__name__, str(error))
