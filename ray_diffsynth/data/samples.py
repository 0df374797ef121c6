"""From a metadata row to the decoded inputs of one sample, shared by both stages.

Stage 1 scans every row (header and content hash of its files) to choose its bucket and to know its cache keys, then
decodes what is not cached yet. Unsplit training (`--task sft`) decodes through the same functions, so both forms see
the same pixels.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from PIL import Image

from ray_diffsynth.data.bands import resize_crop
from ray_diffsynth.data.buckets import Bucket, BucketError, SizeRule, assign_bucket
from ray_diffsynth.data.decode_memory import cut_bytes, kept_bytes
from ray_diffsynth.data.fit import SizeFit
from ray_diffsynth.data.media import StoreFailure, check_decode_bytes, load_cut
from ray_diffsynth.data.scan import SourceFile, reads_as_video
from ray_diffsynth.data.sources import verified_bytes, verified_file
from ray_diffsynth.data.spec import SampleSpec
from ray_diffsynth.data.video import Frames, load_first_frame, load_frames
from ray_diffsynth.data.video_stream import VideoSupportError
from ray_diffsynth.storage import StorageError

PIXEL_TRANSFORMS: Mapping[str, str] = {"color": "srgb/3", "resize": "bilinear/1", "crop": "cover-center/1"}
"""How an image or frame is decoded and cut (see `load_cut`): name and version of each step, which
stand in the cache keys of everything encoded from pixels; raise a version when its step gives other pixels."""

ERRORS_OF_ALL_SAMPLES = (StorageError, StoreFailure, VideoSupportError)
"""Errors of the machine or of a store, which hold for every sample: they end a run, and no sample is left out."""
_SAME_SHAPE = 1.01
"""Ratio of two aspect ratios that are the same but for whole pixels."""


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
    images = 1 + sum(len(files[param]) - 1 for param in spec.file_params[1:])
    own = [_reference_size(file, param, target, bucket, spec) for param in spec.own_sized for file in files[param]]
    same = all(size == (bucket.height, bucket.width) for size in own)
    bucket = replace(bucket, images=images, references=() if same else tuple(own))
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
            size, frames = f"{file.width}x{file.height} pixels", 0
            if spec.gives_frames(param, file.path):
                frames = bucket.num_frames
                size = f"{size}, as {frames} frames of {bucket.width}x{bucket.height}"
            check_decode_bytes(file.path, size, _decode_bytes(file, bucket, frames), spec.max_decode_bytes)


def _decode_bytes(file: SourceFile, size: Bucket, frames: int) -> int:
    """Memory at the peak of decoding a file and cutting it to a size, as so many frames, or 0 for an image."""
    needed = file.decode_bytes + (kept_bytes(size.height, size.width, frames) if frames else 0)
    return needed if file.fps else needed + cut_bytes(file.width, file.height, size.height, size.width)


def decode_bytes(files: Mapping[str, Sequence[SourceFile]], bucket: Bucket, spec: SampleSpec) -> tuple[int, int]:
    """Memory that decoding the files of a sample takes, one after another: at its peak; and what stays of it, in bytes.

    The peak is that of one file, beside what stays of the others.
    """
    layout = _layout({param: len(found) for param, found in files.items()}, bucket, spec)
    peak = kept = 0
    for param, found in files.items():
        for file, size in zip(found, layout[param], strict=True):
            frames = bucket.num_frames if spec.gives_frames(param, file.path) else 0
            peak = max(peak, _decode_bytes(file, size, frames))
            kept += kept_bytes(size.height, size.width, frames or 1)
    return peak + kept, kept


def _check_kept(target: SourceFile, bucket: Bucket, rule: SizeRule) -> None:
    """Raise BucketError if the target is not used as it is: the noise that it was made from has its size."""
    height, width = target.height, target.width
    why = "and the noise of its seed belongs to it in its own size only"
    if (height, width) != (bucket.height, bucket.width):
        fix = f"give --height {height} --width {width}, or --max_pixels {height * width} or more"
        if height % rule.division or width % rule.division:
            fix = f"make images whose sides are multiples of {rule.division}"
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
        return file.frames_key(size, spec.size.fps) if frames else file.image_key(size)

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

    `only` limits the result, so that a text encoder's pool never opens an image. `digests`: the content hashes that
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
    """An image (RGB), or frames uint8 (F, H, W, 3), of the bucket's size."""
    frames = spec.gives_frames(param, path)
    if reads_as_video(path, spec.size.video):
        with verified_file(path, digest) as place:
            if frames:
                size = (bucket.num_frames, bucket.height, bucket.width)
                return load_frames(place, *size, fps=spec.size.fps, max_bytes=spec.max_decode_bytes)
            image = load_first_frame(place, max_bytes=spec.max_decode_bytes)
            cut = resize_crop(image, bucket.height, bucket.width)
    else:
        content, limit = verified_bytes(path, digest), spec.max_decode_bytes
        cut = load_cut(path, content, height=bucket.height, width=bucket.width, max_bytes=limit)
    return np.asarray(cut)[None] if frames else cut
