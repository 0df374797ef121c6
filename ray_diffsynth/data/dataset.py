"""The rows of a configured dataset."""

from __future__ import annotations

from ray_diffsynth.data.metadata import Metadata, read_metadata
from ray_diffsynth.data.spec import SampleSpec


def read_dataset(spec: SampleSpec, metadata_path: str | None) -> Metadata:
    """The rows of the dataset's metadata with what `spec` reads, without a look at its files. Raises DatasetError."""
    columns = spec.columns
    return read_metadata(
        spec.base_path,
        metadata_path,
        file_columns=[columns[param] for param in spec.file_params],
        text_columns=[columns["prompt"]] if "prompt" in columns else [],
        required=list(columns.values()),
        parsers=spec.parsers,
        column_names=spec.column_names,
        split=spec.split,
    )
