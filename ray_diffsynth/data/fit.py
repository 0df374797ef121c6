"""How images and videos fit their sizes: how much they are enlarged and cut, what is warned of, and what is refused."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ray_diffsynth.data.buckets import Bucket, BucketError
from ray_diffsynth.data.scan import SourceFile
from ray_diffsynth.data.spec import SampleSpec
from ray_diffsynth.data.warnings import warn

WARN_UPSCALE = 1.01
"""Factor of enlargement above which it is warned of: more than rounding to whole pixels."""
WARN_CROP = 0.1
"""Fraction cut away above which it is warned of."""


@dataclass(frozen=True)
class SizeFit:
    """What `resize_crop` makes of a file: `upscale` is the factor of its sides, `crop` the fraction cut away."""

    file: SourceFile
    size: Bucket
    upscale: float
    crop: float

    @classmethod
    def of(cls, file: SourceFile, size: Bucket) -> SizeFit:
        """How a file fits the size that it is cut to: scaled to cover it, the rest cut away."""
        scale = max(size.width / file.width, size.height / file.height)
        kept = size.width * size.height / (file.width * file.height * scale * scale)
        return cls(file, size, scale, max(1 - kept, 0.0))

    def check(self, spec: SampleSpec) -> None:
        """Raise BucketError for more than `spec` allows."""
        if spec.max_upscale is not None and self.upscale > spec.max_upscale * (1 + 1e-6):
            raise BucketError(
                f"{self.file.path}: {self.enlarged}, more than --max_upscale {spec.max_upscale:g}; give a larger "
                f"image, a smaller size, or --max_upscale {self.upscale + 0.05:.1f}"
            )
        if spec.max_crop is not None and self.crop > spec.max_crop + 1e-6:
            raise BucketError(
                f"{self.file.path}: {self.cropped}, more than --max_crop {spec.max_crop:g}; give an image of another "
                f"shape, other sizes, or --max_crop {min(self.crop + 0.005, 1):.2f}"
            )

    @property
    def enlarged(self) -> str:
        """By how much the file is enlarged, for a message."""
        return f"{self._sizes} enlarges it {self.upscale:.1f} times"

    @property
    def cropped(self) -> str:
        """How much of the file is cut away, for a message."""
        return f"{self._sizes} cuts {self.crop:.0%} of it away"

    @property
    def _sizes(self) -> str:
        return f"{self.file.height}x{self.file.width} to {self.size.height}x{self.size.width}"


class Fits:
    """The warnings about the files of a dataset's samples, given once all are known: the worst first."""

    def __init__(self) -> None:
        self._enlarged: list[tuple[float, str, str]] = []
        self._cropped: list[tuple[float, str, str]] = []
        self._notes: list[tuple[str, str]] = []

    def add(self, sample_id: str, fits: Sequence[SizeFit]) -> None:
        """Add a sample with how each of its files fits."""
        for fit in fits:
            if fit.upscale > WARN_UPSCALE:
                self._enlarged.append((-fit.upscale, sample_id, fit.enlarged))
            if fit.crop > WARN_CROP:
                self._cropped.append((-fit.crop, sample_id, fit.cropped))
            if fit.file.note:
                self._notes.append((sample_id, fit.file.note))

    def warn_all(self) -> None:
        """Warn of all; see `ray_diffsynth.data.warnings`."""
        by_kind: Mapping[str, list[tuple[float, str, str]]] = {"enlarged": self._enlarged, "cropped": self._cropped}
        for kind, found in by_kind.items():
            for _, sample_id, detail in sorted(found):
                warn(kind, sample_id, detail)
        for sample_id, note in self._notes:
            warn("left_aside", sample_id, note)
