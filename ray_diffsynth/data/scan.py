"""Facts of a source file, by its header and content hash: what its bucket and its cache keys depend on."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from ray_diffsynth.data import media
from ray_diffsynth.data.buckets import Bucket
from ray_diffsynth.data.media import MAX_DECODE_BYTES, bytes_hash, fetch, fetch_stamped, image_info
from ray_diffsynth.data.sources import hashed_file
from ray_diffsynth.data.video import VideoInfo, available_frames, probe_video
from ray_diffsynth.data.video_stream import is_video

FRAME_TRANSFORMS: Mapping[str, str] = {"frames": "by-time/1"}
"""Which frames of a video are taken, and how they are read: name and version, part of the cache keys of what is encoded
from videos; raise the version when that gives other frames."""


@dataclass(frozen=True, slots=True)
class SourceFile:
    """Facts of one source file. `stamp`: size and modification time, or ETag; while it is the same, so is the content.

    `num_frames` and `fps` are those of a video; an image has one frame. `decode_bytes` is the memory that decoding
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
        return f"{self.digest}@{replace(bucket, images=1, references=()).name}{taken}"

    def image_key(self, bucket: Bucket) -> str:
        """The same for an image, or the first frame of a video."""
        taken = f"@{FRAME_TRANSFORMS['frames']}" if self.fps else ""
        return f"{self.digest}@{replace(bucket, num_frames=1, images=1, references=()).name}{taken}"


def reads_as_video(path: str, animations: bool) -> bool:
    """A GIF is a video where videos are wanted, else an image."""
    return is_video(path) and (animations or not path.lower().endswith(".gif"))


def scan_file(
    path: str, *, stamp: str | None = None, animations: bool = False, max_bytes: int = MAX_DECODE_BYTES
) -> SourceFile:
    """Header and content hash of an image or video, by reading it once. Raises MediaError when it is absent or neither.

    `stamp`: the file's, where it is known. `animations`: count the frames of a GIF too. `max_bytes` of memory may be
    taken by the first frame of a video.
    """
    if reads_as_video(path, animations):
        found = media.source_stamp(path) if stamp is None else stamp
        with hashed_file(path) as (place, digest):
            video = probe_video(place, max_bytes=max_bytes)
        return SourceFile(
            path,
            found,
            video.width,
            video.height,
            digest,
            num_frames=video.num_frames,
            fps=video.fps,
            decode_bytes=video.decode_bytes,
            note=video.note,
        )
    data, found = fetch_stamped(path) if stamp is None else (fetch(path, stamp), stamp)
    image = image_info(path, data)
    return SourceFile(
        path,
        found,
        image.width,
        image.height,
        bytes_hash(data),
        decode_bytes=image.decode_bytes,
        note=image.note,
    )
