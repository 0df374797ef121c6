"""Sizes: which bucket (height, width, frames) an image of some size is cut to. Pure functions of whole numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cache, lru_cache

from ray_diffsynth.errors import UserError

SHARD_BYTES = 2**24
"""Size that a cache file of latents is cut for: 16 MiB."""
MAX_ROWS_PER_SHARD = 64
MAX_ASPECT_RATIO = 4.0
"""Aspect-ratio buckets go from 1:4 to 4:1."""


class BucketError(UserError, ValueError):
    """A size that fits no bucket, or a rule that makes none."""


@dataclass(frozen=True, order=True)
class Bucket:
    """Height and width in pixels and number of frames that every sample of a batch has.

    `images`: how many images a sample is made from, where its row gives a list of them. `references`: (height,
    width) of each image that may have a size of its own, in the order of the sample's files; empty where all have
    the target's.
    """

    height: int
    width: int
    num_frames: int = 1
    images: int = 1
    references: tuple[tuple[int, int], ...] = ()

    @property
    def name(self) -> str:
        """`480x832` for images (height x width), `480x832x81` for videos, `480x832+2` with two images to edit.

        `480x832+1024x512` with one of another shape, `480x832+2+1024x512+480x832` with two.
        """
        size = f"{self.height}x{self.width}"
        size = size if self.num_frames == 1 else f"{size}x{self.num_frames}"
        size = size if self.images == 1 else f"{size}+{self.images}"
        return size + "".join(f"+{height}x{width}" for height, width in self.references)

    @property
    def area(self) -> int:
        """Pixels of one sample over all frames."""
        return self.height * self.width * self.num_frames

    @property
    def sort_key(self) -> tuple[int, ...]:
        """The order of buckets in the index of a cache: by area, then height, width, frames, images, references."""
        sides = (side for size in self.references for side in size)
        return (self.area, self.height, self.width, self.num_frames, self.images, *sides)

    @classmethod
    def parse(cls, name: str) -> Bucket:
        """The bucket of a `name`. Raises BucketError."""
        size, *more = name.split("+")
        images = more.pop(0) if more and "x" not in more[0] else "1"
        target, *references = ([_side(part) for part in one.split("x")] for one in (size, *more))
        if (
            len(target) not in (2, 3)
            or any(len(one) != 2 for one in references)
            or 0
            in (
                _side(images),
                *target,
                *(side for one in references for side in one),
            )
        ):
            raise BucketError(f"{name!r} is not a bucket; write height x width (480x832) or with frames (480x832x81)")
        height, width, frames = (*target, 1)[:3]
        return cls(height, width, frames, int(images), tuple((one[0], one[1]) for one in references))


def _side(text: str) -> int:
    """The number, or 0 for what is none."""
    return int(text) if text.isascii() and text.isdigit() else 0


@dataclass(frozen=True)
class SizeRule:
    """How a bucket is chosen; all sizes in pixels.

    `height` and `width` fix one size; else `resolutions` make aspect-ratio buckets of about `resolution`² pixels; else
    an image keeps its size, scaled down to at most `max_pixels` a frame. Sides are multiples of `division` (VAE and
    patch size).

    With `time_division` samples are videos, of `num_frames` frames at `fps` (None: each frame in turn) or, where a
    video is shorter, of as many as it has; a multiple of `time_division` plus `time_remainder`, or one frame.
    """

    height: int | None = None
    width: int | None = None
    max_pixels: int | None = None
    resolutions: tuple[int, ...] = ()
    division: int = 16
    num_frames: int = 1
    fps: float | None = None
    time_division: int | None = None
    time_remainder: int = 1

    def __post_init__(self) -> None:
        self._check_frames()
        if self.division < 1:
            raise BucketError(f"division={self.division} must be at least 1")
        if (self.height is None) != (self.width is None):
            given, absent = ("height", "width") if self.width is None else ("width", "height")
            raise BucketError(f"{given} is set without {absent}; set both for one fixed size, or neither")
        for name, side in (("height", self.height), ("width", self.width)):
            if side is not None and (side < self.division or side % self.division):
                fix = max(self.division, round(side / self.division) * self.division)
                raise BucketError(f"{name}={side} is not a multiple of {self.division}; use {name}={fix}")
        if self.max_pixels is not None and self.max_pixels < self.division**2:
            smallest = f"{self.division}x{self.division}"
            raise BucketError(f"max_pixels={self.max_pixels} is below {smallest}; use at least {self.division**2}")
        for side in self.resolutions:
            if side < self.division:
                raise BucketError(f"resolution={side} is below {self.division}, the smallest bucket side")
        if self.resolutions and self.height is not None:
            raise BucketError("both height/width and resolutions are set; a fixed size has one bucket: leave one out")

    def _check_frames(self) -> None:
        if self.time_division is None:
            if self.num_frames != 1:
                raise BucketError(f"num_frames={self.num_frames}, but the model makes images; leave num_frames out")
            if self.fps is not None:
                raise BucketError(f"fps={self.fps:g}, but the model makes images; leave fps out")
        elif self.num_frames < 1 or self.num_frames % self.time_division != self.time_remainder % self.time_division:
            lower = max((self.num_frames - self.time_remainder) // self.time_division, 0)
            near = [n * self.time_division + self.time_remainder for n in (lower, lower + 1)]
            raise BucketError(
                f"num_frames={self.num_frames} is not a multiple of {self.time_division} plus {self.time_remainder}; "
                f"use {near[0]} or {near[1]}"
            )
        if self.fps is not None and not self.fps > 0:
            raise BucketError(f"fps={self.fps} shows no frame; use a rate above 0, or leave fps out")

    def for_references(self) -> SizeRule:
        """The rule for an image beside the target: its own shape, and of one fixed size the area at most."""
        area = self.max_pixels if self.height is None or self.width is None else self.height * self.width
        return SizeRule(max_pixels=area, resolutions=self.resolutions, division=self.division)

    @property
    def video(self) -> bool:
        """Whether samples are videos."""
        return self.time_division is not None

    def frames(self, available: int) -> int:
        """Number of frames to use of a video that has `available`: DiffSynth-Studio's rule for those that are short."""
        if available >= self.num_frames or self.time_division is None:
            return self.num_frames
        excess = (available - self.time_remainder) % self.time_division
        return max(available - excess, 1)


@cache
def aspect_buckets(resolution: int, division: int) -> tuple[Bucket, ...]:
    """Buckets of at most `resolution`² pixels with aspect ratios from 1:4 to 4:1.

    Widths go in steps of a sixteenth of the resolution (64 at 1024, as SDXL's table, arXiv 2307.01952, appendix I);
    a height is the largest multiple of the step that keeps the area.
    """
    step = max(division, resolution // 16 // division * division)
    found = set()
    for width in range(step, int(resolution * math.sqrt(MAX_ASPECT_RATIO)) + 1, step):
        height = resolution * resolution // width // step * step
        if height and 1 / MAX_ASPECT_RATIO <= height / width <= MAX_ASPECT_RATIO:
            # Both ways round: a rule that favours landscape over portrait would cut one of them more.
            found |= {Bucket(height, width), Bucket(width, height)}
    return tuple(sorted(found))


def _nearest_aspect(width: int, height: int, resolution: int, division: int) -> Bucket:
    def distance(bucket: Bucket) -> tuple[float, int, Bucket]:
        # Rounded, so that the order does not hang on the last bit of a logarithm; then the larger bucket.
        return (round(abs(math.log(bucket.width * height / (bucket.height * width))), 9), -bucket.area, bucket)

    return min(aspect_buckets(resolution, division), key=distance)


@lru_cache(maxsize=4096)
def assign_bucket(width: int, height: int, rule: SizeRule, available_frames: int = 1) -> Bucket:
    """The bucket of an image of `width` x `height` pixels, or of a video that gives so many frames.

    With several resolutions it is the largest one whose bucket the image covers without being scaled up, else the
    smallest. Raises BucketError for an image smaller than one division cell.
    """
    bucket = _size(width, height, rule)
    return replace(bucket, num_frames=rule.frames(available_frames)) if rule.video else bucket


def _size(width: int, height: int, rule: SizeRule) -> Bucket:
    division = rule.division
    if min(width, height) < division:
        raise BucketError(f"{height}x{width} is smaller than {division}x{division}, the smallest bucket")
    if rule.height is not None and rule.width is not None:
        return Bucket(rule.height, rule.width)
    if rule.resolutions:
        choices = [_nearest_aspect(width, height, r, division) for r in sorted(set(rule.resolutions), reverse=True)]
        covered = (bucket for bucket in choices if width >= bucket.width and height >= bucket.height)
        return next(covered, choices[-1])
    new_height, new_width = height, width
    if rule.max_pixels is not None and width * height > rule.max_pixels:
        # DiffSynth-Studio's rule: scale by the square root of the excess, then cut down to whole cells.
        scale = math.sqrt(width * height / rule.max_pixels)
        new_height, new_width = int(height / scale), int(width / scale)
    if min(new_height, new_width) < division:
        raise BucketError(
            f"{height}x{width} scaled to {rule.max_pixels} pixels is {new_height}x{new_width}, "
            f"smaller than {division}x{division}, the smallest bucket"
        )
    return Bucket(new_height // division * division, new_width // division * division)


def rows_per_shard(bucket: Bucket) -> int:
    """Samples in one cache file (one row group) of a bucket: a pure function, so that every run cuts the same files.

    Counts half a byte per pixel, the 16-bit latents of an 8x VAE with 16 channels.
    """
    return min(max(SHARD_BYTES // max(bucket.area // 2, 1), 1), MAX_ROWS_PER_SHARD)
