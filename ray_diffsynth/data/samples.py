"""From a metadata row to the decoded inputs of one sample, shared by both stages.

Stage 1 scans every row (header and content hash of its files) to choose its bucket and to know its cache keys, then
decodes what is not cached yet. Unsplit training (`--task sft`) decodes through the same functions, so both forms see
the same pixels.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from PIL import Image

from ray_diffsynth.data import storage
from ray_diffsynth.data.buckets import Bucket, SizeRule, assign_bucket
from ray_diffsynth.data.media import MediaError, content_hash, load_image, probe_image, resize_crop
from ray_diffsynth.data.metadata import resolve_file
from ray_diffsynth.data.video import (
    Frames,
    VideoInfo,
    available_frames,
    is_video,
    load_first_frame,
    load_frames,
    probe_video,
)

TRANSFORM = "cover-bilinear-center/1"
"""Name of what `resize_crop` does to a picture; part of the cache key of everything encoded from pixels."""

SIZE_PARAMS = ("height", "width", "num_frames")


@dataclass(frozen=True)
class SampleSpec:
    """How the columns of a dataset become the inputs of a pipeline.

    `columns` maps an input parameter to its metadata column (`{"input_image": "image", "prompt": "prompt"}`);
    `file_params` are those whose column holds a file path, or a list of them. Of a model that makes videos
    (`size.video`), `video_params` are given as frames (a picture as one), `picture_params` as a picture (of a video its
    first frame), and any other as the file's name tells. `parsers`: column -> what reads its value (see
    `read_metadata`).
    """

    base_path: str
    columns: Mapping[str, str]
    file_params: tuple[str, ...]
    size: SizeRule = field(default_factory=SizeRule)
    video_params: tuple[str, ...] = ()
    picture_params: tuple[str, ...] = ()
    parsers: Mapping[str, Callable[[Any], Any]] = field(default_factory=dict)

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of all inputs that a sample gives: its columns and its size."""
        return (*self.columns, *SIZE_PARAMS)

    def paths(self, row: Mapping[str, Any], param: str) -> list[str]:
        """Absolute paths or URLs of the files that `row` gives for `param`: one, or those of a list."""
        value = row[self.columns[param]]
        return [resolve_file(self.base_path, name) for name in (value if isinstance(value, list) else [value])]

    def gives_frames(self, param: str, path: str) -> bool:
        """Whether the file becomes frames (F, H, W, 3), not a picture."""
        if not self.size.video or param in self.picture_params:
            return False
        return param in self.video_params or is_video(path)


@dataclass(frozen=True)
class SourceFile:
    """Facts of one source file. `stamp` (size and modification time or ETag) tells whether it must be read again.

    `num_frames` and `fps` are those of a video; a picture has one frame.
    """

    path: str
    stamp: str
    width: int
    height: int
    digest: str
    num_frames: int = 1
    fps: float = 0.0

    def available_frames(self, fps: float | None) -> int:
        """Frames that the file gives at `fps`."""
        if not self.fps:
            return 1
        return available_frames(VideoInfo(self.width, self.height, self.num_frames, self.fps), fps)

    def frames_key(self, bucket: Bucket, fps: float | None) -> str:
        """What the frames that this file becomes depend on: its content, the bucket they are cut to, the rate."""
        taken = f"@{'every frame' if fps is None else f'{fps:g} fps'}" if self.fps else ""
        return f"{self.digest}@{bucket.name}{taken}"

    def picture_key(self, bucket: Bucket) -> str:
        """The same for a picture, or the first frame of a video."""
        return f"{self.digest}@{replace(bucket, num_frames=1).name}"


def file_stamp(path: str) -> str:
    """Size and modification time (or ETag) of a file: equal stamps mean that its content need not be hashed again."""
    try:
        return storage.stamp(path)
    except (OSError, ValueError) as error:
        raise MediaError(path, f"the file is absent or unreadable ({type(error).__name__})") from error


def _read_as_video(path: str, animations: bool) -> bool:
    """A GIF is a video where videos are wanted, else a picture."""
    return is_video(path) and (animations or not path.lower().endswith(".gif"))


def scan_file(path: str, *, animations: bool = False) -> SourceFile:
    """Header and content hash of a picture or video. Raises MediaError when it is absent or neither.

    `animations`: count the frames of a GIF too.
    """
    stamp = file_stamp(path)
    if _read_as_video(path, animations):
        video = probe_video(path)
        return SourceFile(path, stamp, video.width, video.height, content_hash(path), video.num_frames, video.fps)
    width, height = probe_image(path)
    return SourceFile(path, stamp, width, height, content_hash(path))


def bucket_of(files: Mapping[str, Sequence[SourceFile]], spec: SampleSpec) -> Bucket:
    """Bucket of a sample: that of its first file (the target; further ones are conditions of it).

    A video has as many frames as the shortest of its sample's videos gives.
    """
    target = files[spec.file_params[0]][0]
    frames = target.available_frames(spec.size.fps)
    conditions = [
        file for param in spec.file_params[1:] for file in files[param] if spec.gives_frames(param, file.path)
    ]
    frames = min([frames, *(file.available_frames(spec.size.fps) for file in conditions if file.fps)])
    return assign_bucket(target.width, target.height, spec.size, frames)


def pixel_keys(
    row: Mapping[str, Any], files: Mapping[str, Sequence[SourceFile]], bucket: Bucket, spec: SampleSpec
) -> dict[str, Any]:
    """Each file parameter as it enters a cache key: what its pixels depend on, in a list where the row has a list."""

    def key(param: str, file: SourceFile) -> str:
        frames = spec.gives_frames(param, file.path)
        return file.frames_key(bucket, spec.size.fps) if frames else file.picture_key(bucket)

    keys = {param: [key(param, file) for file in found] for param, found in files.items()}
    return {param: found if isinstance(row[spec.columns[param]], list) else found[0] for param, found in keys.items()}


def load_inputs(
    row: Mapping[str, Any], bucket: Bucket, spec: SampleSpec, only: Collection[str] | None = None
) -> dict[str, Any]:
    """Decoded inputs of one sample: files cut to the bucket (see `SampleSpec`; lists stay lists), text and numbers as
    they stand, and the size.

    `only` limits the result, so that a text encoder's pool never opens a picture. Raises MediaError.
    """
    wanted = set(spec.inputs if only is None else only)
    inputs: dict[str, Any] = {}
    for param, column in spec.columns.items():
        if param not in wanted:
            continue
        if param in spec.file_params:
            loaded = [_load_file(path, param, bucket, spec) for path in spec.paths(row, param)]
            inputs[param] = loaded if isinstance(row[column], list) else loaded[0]
        else:
            inputs[param] = row[column]
    sizes = {"height": bucket.height, "width": bucket.width, "num_frames": bucket.num_frames}
    inputs.update({name: value for name, value in sizes.items() if name in wanted})
    return inputs


def _load_file(path: str, param: str, bucket: Bucket, spec: SampleSpec) -> Image.Image | Frames:
    """A picture (RGB), or frames uint8 (F, H, W, 3), of the bucket's size."""
    moving, frames = _read_as_video(path, spec.size.video), spec.gives_frames(param, path)
    if moving and frames:
        return load_frames(path, bucket.num_frames, bucket.height, bucket.width, fps=spec.size.fps)
    picture = load_first_frame(path) if moving else load_image(path)
    cut = resize_crop(picture, bucket.height, bucket.width)
    return np.asarray(cut)[None] if frames else cut
