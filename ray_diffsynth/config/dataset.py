"""The data: where it lies, which columns are used, and in which sizes images and videos are taken."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ray_diffsynth.config.effects import FRAMES, IMAGE_SIZE, IMAGES, METADATA_COLUMNS, VIDEOS, unless_cached
from ray_diffsynth.config.options import REQUIRED, Component, Effect, option, split_names
from ray_diffsynth.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class DatasetConfig(Component):
    """A dataset, or the cache that was made of it."""

    section = "dataset"
    title = "Data"

    dataset_base_path: str = option(REQUIRED, identity=False)
    """Folder or URL of the data: images and metadata; the cache for sft:train and direct_distill:train."""
    dataset_metadata_path: str | None = option(
        None, identity=False, effects=(unless_cached("the cache has an index of its own"),)
    )
    """Metadata files or archives (csv, tsv, json, jsonl, parquet, tar, zip), several by commas, {000..146} or *; when
    not given, metadata.* in the base path, its archives or Parquet shards, else images + .txt."""
    dataset_split: str | None = option(None, identity=False, effects=(METADATA_COLUMNS,))
    """Split that is read of a dataset with several (train, validation, test); the only one or train when not given."""
    image_column: str | None = option(None, identity=False, effects=(METADATA_COLUMNS,))
    """Metadata column of the images or videos that are trained on, if it is not called image (video) or file_name."""
    caption_column: str | None = option(None, identity=False, effects=(METADATA_COLUMNS,))
    """Metadata column of the captions, if it is not called prompt or text."""
    column_map: dict[str, str] | None = option(None, identity=False, effects=(METADATA_COLUMNS,))
    """JSON of further columns: the name of an input (of --extra_inputs, say) to that of its metadata column."""
    data_file_keys: str = option("image,video", many=",", effects=(METADATA_COLUMNS,))
    """Comma-separated inputs whose metadata columns name files."""
    extra_inputs: str | None = option(
        None, many=",", effects=(unless_cached("the cache holds the inputs that preprocess was given"),)
    )
    """Comma-separated further metadata columns that are given to the pipeline's units."""
    dataset_num_workers: int = option(0, least=0, identity=False)
    """CPU processes or threads that decode or read ahead; 0 chooses by the machine."""
    max_decode_memory: float = option(
        4.0,
        identity=False,  # what it rejects is part of the data
        effects=(unless_cached("nothing is decoded: the cache holds encoded images"),),
    )
    """GiB of main memory that decoding one file may take, by its header; a larger one goes to quarantine."""

    def check(self) -> None:
        """Raise ConfigError without a place, or for a limit that lets nothing in."""
        if not self.dataset_base_path:
            raise ConfigError(
                "dataset_base_path is empty; give the folder of the data, or of the cache for the :train tasks"
            )
        for name, value in (self.column_map or {}).items():
            if not isinstance(value, str) or not value:
                raise ConfigError(f'column_map: {name} is {value!r}; write the name of a column, {{"{name}": "cond"}}')
        if not 0 < self.max_decode_memory < math.inf:
            raise ConfigError(
                f"max_decode_memory={self.max_decode_memory} lets no file be decoded; give GiB above 0, e.g. 4"
            )

    @property
    def file_columns(self) -> tuple[str, ...]:
        """``data_file_keys`` as names."""
        return split_names(self.data_file_keys)

    @property
    def extra_columns(self) -> tuple[str, ...]:
        """``extra_inputs`` as names."""
        return split_names(self.extra_inputs)


@dataclass(frozen=True, kw_only=True)
class SizeConfig(Component):
    """Sizes of images and videos."""

    section = "sizes"
    title = "Data"

    height: int | None = option(None, least=1, effects=(IMAGE_SIZE,))
    """Height of every image in pixels; leave height and width empty for dynamic sizes."""
    width: int | None = option(None, least=1, effects=(IMAGE_SIZE,))
    """Width of every image in pixels."""
    max_pixels: int = option(
        1024 * 1024,
        least=1,
        effects=(
            IMAGES,
            Effect(lambda config: config.height is None, "height and width fix the size", noted=True),
            Effect(lambda config: not config.resolution, "resolution has buckets of its own", noted=True),
        ),
    )
    """Largest area of an image in pixels with dynamic sizes; larger ones are scaled down."""
    resolution: str | None = option(None, many=",", effects=(IMAGES,))
    """Comma-separated sides, e.g. 512,1024: aspect-ratio buckets of about side x side pixels, not dynamic sizes."""
    num_frames: int | None = option(None, least=1, effects=(FRAMES,))
    """Frames of every video, 4n+1; of a shorter one as many as it has. 81 for a model of videos when not given."""
    fps: float | None = option(None, effects=(VIDEOS,))
    """Frames per second at which videos are read; every frame in turn when not given."""
    max_upscale: float | None = option(None, effects=(IMAGES,))
    """Largest factor by which an image may be enlarged, 1 for none; one that needs more goes to quarantine."""
    max_crop: float | None = option(None, effects=(IMAGES,))
    """Largest fraction of an image that may be cut away, e.g. 0.3; one that loses more goes to quarantine."""

    def check(self) -> None:
        """Raise ConfigError for sizes that contradict each other or cannot be."""
        if (self.height is None) != (self.width is None):
            raise ConfigError(
                f"height={self.height} and width={self.width}: give both for one fixed size, or neither for dynamic"
            )
        for side in split_names(self.resolution):
            if not (side.isascii() and side.isdigit() and int(side) > 0):
                raise ConfigError(
                    f"resolution={self.resolution!r}: {side!r} is not a side in pixels; write 1024 or 512,1024"
                )
        if self.resolution and self.height is not None:
            raise ConfigError("resolution and height/width are both given; a fixed size has one bucket: leave one out")
        if self.fps is not None and not 0 < self.fps < math.inf:
            raise ConfigError(f"fps={self.fps} is no rate of frames; give a number above 0, e.g. 16")
        if self.max_upscale is not None and not self.max_upscale >= 1:
            raise ConfigError(f"max_upscale={self.max_upscale} is a factor; give 1 (nothing is enlarged) or more")
        if self.max_crop is not None and not 0 <= self.max_crop <= 1:
            raise ConfigError(f"max_crop={self.max_crop} is a fraction of the image; give a number from 0 to 1")

    @property
    def resolutions(self) -> tuple[int, ...]:
        """``resolution`` as numbers."""
        return tuple(int(side) for side in split_names(self.resolution))


@dataclass(frozen=True, kw_only=True)
class DataConfig(SizeConfig, DatasetConfig):
    """A dataset and the sizes in which it is taken."""


@dataclass(frozen=True, kw_only=True)
class BatchConfig(Component):
    """Samples at once."""

    section = "batch"
    title = "Optimisation"

    batch_size: int = option(1, least=1)
    """Samples that one actor or worker handles at once; one batch holds one size."""
