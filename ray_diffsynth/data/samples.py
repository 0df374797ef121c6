"""From a metadata row to the decoded inputs of one sample, shared by both stages.

Stage 1 scans every row (image header and content hash) to choose its bucket and to know its cache keys, then decodes what is
not cached yet. Unsplit training (`--task sft`) decodes through the same functions, so both forms see the same pixels.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import fsspec

from ray_diffsynth.data.buckets import Bucket, SizeRule, assign_bucket
from ray_diffsynth.data.media import MediaError, content_hash, load_image, probe_image, resize_crop
from ray_diffsynth.data.metadata import resolve_file

TRANSFORM = "cover-bilinear-center/1"
"""Name of what `resize_crop` does to a picture; part of the cache key of everything encoded from pixels."""

SIZE_PARAMS = ("height", "width", "num_frames")


@dataclass(frozen=True)
class SampleSpec:
    """How the columns of a dataset become the inputs of a pipeline.

    `columns` maps an input parameter to its metadata column (`{"input_image": "image", "prompt": "prompt"}`);
    `file_params` are those whose column holds a file path.
    """

    base_path: str
    columns: Mapping[str, str]
    file_params: tuple[str, ...]
    size: SizeRule = field(default_factory=SizeRule)

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of all inputs that a sample gives: its columns and its size."""
        return (*self.columns, *SIZE_PARAMS)

    def path(self, row: Mapping[str, Any], param: str) -> str:
        """Absolute path or URL of the file that `row` gives for `param`."""
        return resolve_file(self.base_path, row[self.columns[param]])


@dataclass(frozen=True)
class SourceFile:
    """Facts of one source file. `stamp` (size and modification time or ETag) tells whether it must be read again."""

    path: str
    stamp: str
    width: int
    height: int
    digest: str


def file_stamp(path: str) -> str:
    """Size and modification time (or ETag) of a file: equal stamps mean that its content need not be hashed again."""
    fs, inner = fsspec.core.url_to_fs(path)
    try:
        info = fs.info(inner)
    except (OSError, ValueError) as error:
        raise MediaError(path, f"the file is absent or unreadable ({type(error).__name__})") from error
    version = info.get("ETag") or info.get("etag") or info.get("mtime") or info.get("LastModified") or info.get("updated")
    return f"{info.get('size')}-{version}"


def scan_file(path: str) -> SourceFile:
    """Header size and content hash of a picture. Raises MediaError when it is absent or no picture."""
    stamp = file_stamp(path)
    width, height = probe_image(path)
    return SourceFile(path, stamp, width, height, content_hash(path))


def bucket_of(files: Mapping[str, SourceFile], spec: SampleSpec) -> Bucket:
    """Bucket of a sample: that of its first file parameter (the target; further pictures are conditions of it)."""
    first = files[spec.file_params[0]]
    return assign_bucket(first.width, first.height, spec.size)


def load_inputs(row: Mapping[str, Any], bucket: Bucket, spec: SampleSpec, only: Collection[str] | None = None) -> dict[str, Any]:
    """Decoded inputs of one sample: pictures cut to the bucket (RGB PIL), text and numbers as they stand, and the size.

    `only` limits the result, so that a text encoder's pool never opens a picture. Raises MediaError.
    """
    wanted = set(spec.inputs if only is None else only)
    inputs: dict[str, Any] = {}
    for param, column in spec.columns.items():
        if param not in wanted:
            continue
        if param in spec.file_params:
            inputs[param] = resize_crop(load_image(spec.path(row, param)), bucket.height, bucket.width)
        else:
            inputs[param] = row[column]
    sizes = {"height": bucket.height, "width": bucket.width, "num_frames": bucket.num_frames}
    inputs.update({name: value for name, value in sizes.items() if name in wanted})
    return inputs
