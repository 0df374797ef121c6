"""How the columns of a dataset become the inputs of a pipeline."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ray_diffsynth.data.buckets import SizeRule
from ray_diffsynth.data.media import MAX_DECODE_BYTES
from ray_diffsynth.data.metadata import resolve_file
from ray_diffsynth.data.video_stream import is_video

SIZE_PARAMS = ("height", "width", "num_frames")


@dataclass(frozen=True)
class SampleSpec:
    """How the columns of a dataset become the inputs of a pipeline.

    `columns` maps an input parameter to its metadata column (`{"input_image": "image", "prompt": "prompt"}`);
    `file_params` are those whose column holds a file path, or a list of them. Of a model that makes videos
    (`size.video`), `video_params` are given as frames (an image as one), `image_params` as an image (of a video its
    first frame), and any other by the ending of the file's name. `parsers`: column -> what reads its value (see
    `read_metadata`).
    """

    base_path: str
    columns: Mapping[str, str]
    file_params: tuple[str, ...]
    size: SizeRule = field(default_factory=SizeRule)
    video_params: tuple[str, ...] = ()
    image_params: tuple[str, ...] = ()
    parsers: Mapping[str, Callable[[Any], Any]] = field(default_factory=dict)
    keep_size: bool = False
    """Whether an image or video that would be scaled, cut or shortened cannot be used."""
    target_sized: tuple[str, ...] = ()
    """File parameters whose images a unit needs in the target's size. Frames always have it, and an image of the
    target's shape; any other gets a size by its own shape."""
    column_names: Mapping[str, str] = field(default_factory=dict)
    """Column -> what it is called in the dataset's files, where that differs."""
    split: str | None = None
    """The split of the dataset that is read; None: the only one, or train."""
    max_decode_bytes: int = MAX_DECODE_BYTES
    """Main memory that decoding one file, with the frames that it becomes, may take."""
    max_upscale: float | None = None
    """Largest factor by which a file may be enlarged; None allows any."""
    max_crop: float | None = None
    """Largest fraction of a file that may be cut away; None allows any."""

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of all inputs that a sample gives: its columns and its size."""
        return (*self.columns, *SIZE_PARAMS)

    @property
    def own_sized(self) -> tuple[str, ...]:
        """File parameters whose images may have a size of their own."""
        return tuple(param for param in self.file_params[1:] if param not in self.target_sized)

    def paths(self, row: Mapping[str, Any], param: str) -> list[str]:
        """Absolute paths or URLs of the files that `row` gives for `param`: one, or those of a list."""
        value = row[self.columns[param]]
        return [resolve_file(self.base_path, name) for name in (value if isinstance(value, list) else [value])]

    def gives_frames(self, param: str, path: str) -> bool:
        """Whether the file becomes frames (F, H, W, 3), not an image."""
        if not self.size.video or param in self.image_params:
            return False
        return param in self.video_params or is_video(path)


def file_list(value: Any) -> Any:
    """A list of files that stands as JSON in a csv, as a list; anything else as it is."""
    if not (isinstance(value, str) and value.startswith("[") and value.endswith("]")):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value  # a file whose name has brackets
