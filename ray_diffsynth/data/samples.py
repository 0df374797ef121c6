"""From a metadata row to the decoded inputs of one sample, shared by both stages.

Stage 1 scans every row (header and content hash of its files) to choose its bucket and to know its cache keys, then
decodes what is not cached yet. Unsplit training (`--task sft`) decodes through the same functions, so both forms see
the same pixels.
"""

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from PIL import Image

from ray_diffsynth.data import media
from ray_diffsynth.data.buckets import Bucket, BucketError, SizeRule, assign_bucket
from ray_diffsynth.data.fit import SizeFit
from ray_diffsynth.data.media import (
    MAX_DECODE_BYTES,
    bytes_hash,
    check_decode_bytes,
    content_hash,
    fetch,
    image_info,
    load_image,
    resize_crop,
)
from ray_diffsynth.data.metadata import resolve_file
from ray_diffsynth.data.sources import steady_bytes, steady_file
from ray_diffsynth.data.video import (
    Frames,
    VideoInfo,
    available_frames,
    load_first_frame,
    load_frames,
    probe_video,
)
from ray_diffsynth.data.video_stream import is_video

TRANSFORM = "srgb-cover-bilinear-center/3"
"""Name of what becomes of an image or frame on its way (see `load_image`, `resize_crop`); part of the cache key of
everything encoded from pixels."""

_SAME_SHAPE = 1.01
"""Ratio of two aspect ratios that are the same but for whole pixels."""
_FRAME_COPIES = 3
"""How often the frames of a video are in memory at once, on their way to an encoder."""

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
    keep_size: bool = False
    """Whether a picture or video that would be scaled, cut or shortened cannot be used."""
    target_sized: tuple[str, ...] = ()
    """File parameters whose pictures a unit needs in the target's size. Frames always have it, and a picture of the
    target's shape; any other gets a size by its own shape."""
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
        """File parameters whose pictures may have a size of their own."""
        return tuple(param for param in self.file_params[1:] if param not in self.target_sized)

    def paths(self, row: Mapping[str, Any], param: str) -> list[str]:
        """Absolute paths or URLs of the files that `row` gives for `param`: one, or those of a list."""
        value = row[self.columns[param]]
        return [resolve_file(self.base_path, name) for name in (value if isinstance(value, list) else [value])]

    def gives_frames(self, param: str, path: str) -> bool:
        """Whether the file becomes frames (F, H, W, 3), not a picture."""
        if not self.size.video or param in self.picture_params:
            return False
        return param in self.video_params or is_video(path)


@dataclass(frozen=True, slots=True)
class SourceFile:
    """Facts of one source file. `stamp` (size and modification time or ETag) tells whether it must be read again.

    `num_frames` and `fps` are those of a video; a picture has one frame. `decode_bytes` is the memory that decoding
    takes, by the header; `note` says what of the file is left aside, or nothing.
    """

    path: str
    stamp: str
    width: int
    height: int
    digest: str
    num_frames: int = 1
    fps: float = 0.0
    decode_bytes: int = 0
    note: str = ""

    def available_frames(self, fps: float | None) -> int:
        """Frames that the file gives at `fps`."""
        if not self.fps:
            return 1
        return available_frames(VideoInfo(self.width, self.height, self.num_frames, self.fps), fps)

    def frames_key(self, bucket: Bucket, fps: float | None) -> str:
        """What the frames that this file becomes depend on: its content, the bucket they are cut to, the rate."""
        taken = f"@{'every frame' if fps is None else f'{fps:g} fps by time'}" if self.fps else ""
        return f"{self.digest}@{replace(bucket, pictures=1, references=()).name}{taken}"

    def picture_key(self, bucket: Bucket) -> str:
        """The same for a picture, or the first frame of a video."""
        return f"{self.digest}@{replace(bucket, num_frames=1, pictures=1, references=()).name}"


def file_list(value: Any) -> Any:
    """A list of files that stands as JSON in a csv, as a list; anything else as it is."""
    if not (isinstance(value, str) and value.startswith("[") and value.endswith("]")):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value  # a file whose name has brackets


def _read_as_video(path: str, animations: bool) -> bool:
    """A GIF is a video where videos are wanted, else a picture."""
    return is_video(path) and (animations or not path.lower().endswith(".gif"))


def scan_file(path: str, *, animations: bool = False, max_bytes: int = MAX_DECODE_BYTES) -> SourceFile:
    """Header and content hash of a picture or video. Raises MediaError when it is absent or neither.

    `animations`: count the frames of a GIF too. `max_bytes` of memory may be taken by the first frame of a video.
    """
    stamp = media.stamp(path)
    if _read_as_video(path, animations):
        video = probe_video(path, max_bytes=max_bytes)
        return SourceFile(
            path,
            stamp,
            video.width,
            video.height,
            content_hash(path),
            num_frames=video.num_frames,
            fps=video.fps,
            decode_bytes=video.decode_bytes,
            note=video.note,
        )
    data = fetch(path)
    image = image_info(path, data)
    return SourceFile(
        path,
        stamp,
        image.width,
        image.height,
        bytes_hash(data),
        decode_bytes=image.decode_bytes,
        note=image.note,
    )


def bucket_of(files: Mapping[str, Sequence[SourceFile]], spec: SampleSpec) -> Bucket:
    """Bucket of a sample: that of its first file (the target; further ones are conditions of it), with `references`.

    A video has as many frames as the shortest of its sample's videos gives. Raises BucketError: see `assign_bucket`; a
    target that would not keep its size where it must; a file that would be enlarged or cut more than it may. Raises
    MediaError for a file that would take too much memory.
    """
    target = files[spec.file_params[0]][0]
    frames = target.available_frames(spec.size.fps)
    conditions = [
        file for param in spec.file_params[1:] for file in files[param] if spec.gives_frames(param, file.path)
    ]
    frames = min([frames, *(file.available_frames(spec.size.fps) for file in conditions if file.fps)])
    bucket = assign_bucket(target.width, target.height, spec.size, frames)
    _check_memory(files, bucket, spec)
    if spec.keep_size:
        _check_kept(target, bucket, spec.size)
    pictures = 1 + sum(len(files[param]) - 1 for param in spec.file_params[1:])
    own = [_reference_size(file, param, target, bucket, spec) for param in spec.own_sized for file in files[param]]
    same = all(size == (bucket.height, bucket.width) for size in own)
    bucket = replace(bucket, pictures=pictures, references=() if same else tuple(own))
    for fit in size_fits(files, bucket, spec):
        fit.check(spec)
    return bucket


def size_fits(files: Mapping[str, Sequence[SourceFile]], bucket: Bucket, spec: SampleSpec) -> list[SizeFit]:
    """How each file of a sample, once, fits the size that it is cut to."""
    layout = _layout({param: len(found) for param, found in files.items()}, bucket, spec)
    pairs = [pair for param, found in files.items() for pair in zip(found, layout[param], strict=True)]
    return [SizeFit.of(file, size) for file, size in dict.fromkeys(pairs)]


def _reference_size(
    file: SourceFile, param: str, target: SourceFile, bucket: Bucket, spec: SampleSpec
) -> tuple[int, int]:
    """(height, width) of a file beside the target: the target's if it has its shape, else by its own."""
    difference = file.width * target.height / (file.height * target.width)
    if spec.gives_frames(param, file.path) or 1 / _SAME_SHAPE <= difference <= _SAME_SHAPE:
        return bucket.height, bucket.width
    try:
        own = assign_bucket(file.width, file.height, spec.size.for_references())
    except BucketError as error:
        raise BucketError(f"{file.path}: {error}") from error
    return own.height, own.width


def _layout(counts: Mapping[str, int], bucket: Bucket, spec: SampleSpec) -> dict[str, list[Bucket]]:
    """The size that each file of a parameter is cut to; `counts`: how many files it has."""
    alike = replace(bucket, references=())
    own = iter(bucket.references)
    found = {}
    for param in spec.file_params:
        if param in counts:
            sizes = [next(own) for _ in range(counts[param])] if bucket.references and param in spec.own_sized else None
            found[param] = (
                [alike] * counts[param] if sizes is None else [replace(alike, height=h, width=w) for h, w in sizes]
            )
    return found


def _check_memory(files: Mapping[str, Sequence[SourceFile]], bucket: Bucket, spec: SampleSpec) -> None:
    """Raise MediaError for a file that takes more memory than it may, with the frames that are made of it."""
    for param, found in files.items():
        for file in found:
            size, needed = f"{file.width}x{file.height} pixels", file.decode_bytes
            if spec.gives_frames(param, file.path):
                size = f"{size}, as {bucket.num_frames} frames of {bucket.width}x{bucket.height}"
                needed += bucket.area * 3 * _FRAME_COPIES
            check_decode_bytes(file.path, size, needed, spec.max_decode_bytes)


def _check_kept(target: SourceFile, bucket: Bucket, rule: SizeRule) -> None:
    """Raise BucketError if the target is not used as it is: the noise that it was made from has its size."""
    height, width = target.height, target.width
    why = "and the noise of its seed belongs to it in its own size only"
    if (height, width) != (bucket.height, bucket.width):
        fix = f"give --height {height} --width {width}, or --max_pixels {height * width} or more"
        if height % rule.division or width % rule.division:
            fix = f"make pictures whose sides are multiples of {rule.division}"
        raise BucketError(
            f"it is {height}x{width} (height x width) and would be scaled to {bucket.height}x{bucket.width}, "
            f"{why}; {fix}"
        )
    if target.fps and (target.num_frames != bucket.num_frames or (rule.fps and abs(rule.fps - target.fps) > 0.01)):
        raise BucketError(
            f"it has {target.num_frames} frames at {target.fps:g} a second and {bucket.num_frames} would be used, "
            f"{why}; give --num_frames {target.num_frames} and leave --fps out"
        )


def pixel_keys(
    row: Mapping[str, Any], files: Mapping[str, Sequence[SourceFile]], bucket: Bucket, spec: SampleSpec
) -> dict[str, Any]:
    """Each file parameter as it enters a cache key: what its pixels depend on, in a list where the row has a list."""

    def key(param: str, file: SourceFile, size: Bucket) -> str:
        frames = spec.gives_frames(param, file.path)
        return file.frames_key(size, spec.size.fps) if frames else file.picture_key(size)

    layout = _layout({param: len(found) for param, found in files.items()}, bucket, spec)
    keys = {
        param: [key(param, file, size) for file, size in zip(found, layout[param], strict=True)]
        for param, found in files.items()
    }
    return {param: found if isinstance(row[spec.columns[param]], list) else found[0] for param, found in keys.items()}


def digests_of(inputs: Any) -> list[str]:
    """The content hashes in a file parameter of `pixel_keys`, one for each file."""
    return [key.partition("@")[0] for key in (inputs if isinstance(inputs, list) else [inputs])]


def load_inputs(
    row: Mapping[str, Any],
    bucket: Bucket,
    spec: SampleSpec,
    only: Collection[str] | None = None,
    digests: Mapping[str, Sequence[str]] | None = None,
) -> dict[str, Any]:
    """Decoded inputs of one sample: files cut to the bucket (see `SampleSpec`; lists stay lists), text and numbers as
    they stand, and the size. If the bucket has references, `row` has the columns of all files that they are for.

    `only` limits the result, so that a text encoder's pool never opens a picture. `digests`: the content hashes that
    the files of a parameter must have. Raises MediaError; SourceChanged for a file that has another content.
    """
    wanted = set(spec.inputs if only is None else only)
    counted = {param: row[spec.columns[param]] for param in spec.file_params if spec.columns[param] in row}
    counts = {param: len(value) if isinstance(value, list) else 1 for param, value in counted.items()}
    layout = _layout(counts, bucket, spec)
    inputs: dict[str, Any] = {}
    for param, column in spec.columns.items():
        if param not in wanted:
            continue
        if param in spec.file_params:
            paths = spec.paths(row, param)
            known: Sequence[str | None] = (digests or {}).get(param) or [None] * len(paths)
            places = zip(paths, layout[param], known, strict=True)
            loaded = [_load_file(path, param, size, spec, digest) for path, size, digest in places]
            inputs[param] = loaded if isinstance(row[column], list) else loaded[0]
        else:
            inputs[param] = row[column]
    sizes = {"height": bucket.height, "width": bucket.width, "num_frames": bucket.num_frames}
    inputs.update({name: value for name, value in sizes.items() if name in wanted})
    return inputs


def _load_file(path: str, param: str, bucket: Bucket, spec: SampleSpec, digest: str | None) -> Image.Image | Frames:
    """A picture (RGB), or frames uint8 (F, H, W, 3), of the bucket's size."""
    frames = spec.gives_frames(param, path)
    if _read_as_video(path, spec.size.video):
        with steady_file(path, digest) as place:
            if frames:
                size = (bucket.num_frames, bucket.height, bucket.width)
                return load_frames(place, *size, fps=spec.size.fps, max_bytes=spec.max_decode_bytes)
            picture = load_first_frame(place, max_bytes=spec.max_decode_bytes)
    else:
        picture = load_image(path, steady_bytes(path, digest), max_bytes=spec.max_decode_bytes)
    cut = resize_crop(picture, bucket.height, bucket.width)
    return np.asarray(cut)[None] if frames else cut
