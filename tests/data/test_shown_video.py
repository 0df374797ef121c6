"""Videos have the shape and the colours that a player shows; what of them cannot be decoded is named."""

from __future__ import annotations

import io
import struct
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ray_diffsynth.data.media import MediaError
from ray_diffsynth.data.video import load_first_frame, load_frames, probe_video
from tests.video_files import draw_clip, drawn_frame

COLOR = (200, 60, 30)
MATRIX = {1: "ITU709", 5: "ITU601", 9: "BT2020"}


def write(
    path: Path,
    pixels: np.ndarray[Any, Any],
    *,
    codec: str = "libx264",
    stored: str = "yuv420p",
    frames: int = 2,
    aspect: Fraction | None = None,
    rotation: int = 0,
    matrix: int = 1,
    full: bool = False,
    tags: dict[str, int] | None = None,
    options: dict[str, str] | None = None,
) -> str:
    """A clip of equal frames (H, W, 3 or 4). `tags`: what the stream says of its colours."""
    import av

    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream(codec, rate=16, options=options or {})
        stream.height, stream.width = pixels.shape[:2]
        stream.pix_fmt = stored
        for name, value in (tags or {}).items():
            setattr(stream.codec_context, name, value)
        if aspect is not None:
            stream.codec_context.sample_aspect_ratio = aspect
        if rotation:
            stream.set_display_rotation(rotation)
        for index in range(frames):
            source = av.VideoFrame.from_ndarray(pixels, format="rgb24" if pixels.shape[2] == 3 else "rgba")
            image = source.reformat(format=stored, dst_colorspace=MATRIX[matrix], dst_color_range=2 if full else 1)
            image.pts = index
            container.mux(stream.encode(image))
        container.mux(stream.encode())
    return str(path)


def plain(height: int = 48, width: int = 64, color: tuple[int, ...] = COLOR) -> np.ndarray[Any, Any]:
    return np.full((height, width, len(color)), color, np.uint8)


def middle(path: str) -> list[int]:
    image = np.asarray(load_first_frame(path)).astype(int)
    return [int(value) for value in image[image.shape[0] // 2, image.shape[1] // 2]]


def close(found: list[int], wanted: tuple[int, ...], within: int = 4) -> bool:
    return max(abs(a - b) for a, b in zip(found, wanted, strict=True)) <= within


# ---------------------------------------------------------------- shape


@pytest.mark.parametrize(
    ("aspect", "rotation", "size"),
    [
        (Fraction(4, 3), 0, (96, 48)),
        (Fraction(1, 2), 0, (72, 96)),
        (Fraction(4, 3), 90, (48, 96)),
        (Fraction(1, 1), 0, (72, 48)),
        (None, 0, (72, 48)),
    ],
)
@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_pixels_that_are_not_square_are_stretched(
    suffix: str, aspect: Fraction | None, rotation: int, size: tuple[int, int], tmp_path: Path
) -> None:
    path = write(tmp_path / f"a{suffix}", drawn_frame(5, 48, 72), aspect=aspect, rotation=rotation)
    if rotation and suffix == ".mkv":
        pytest.skip("Matroska has no rotation that this library writes")
    info = probe_video(path)
    first = load_first_frame(path)
    assert (info.width, info.height) == first.size == size
    whole = load_frames(path, 1, size[1], size[0])[0]
    assert (whole == np.asarray(first)).all(), "scaled once to its bucket, with nothing cut"


def mirrored(path: Path, matrix: tuple[int, int, int, int]) -> str:
    """The clip with another display matrix (a b / c d) in its header than that of a quarter turn."""
    content = draw_clip(path, 2, rotation=90).read_bytes()
    turned = struct.pack(">9i", 0, -65536, 0, 65536, 0, 0, 0, 0, 1 << 30)
    assert content.count(turned) == 1
    a, b, c, d = (value * 65536 for value in matrix)
    path.write_bytes(content.replace(turned, struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)))
    return str(path)


@pytest.mark.parametrize(
    ("matrix", "size", "edge"),
    [
        ((-1, 0, 0, 1), (64, 48), np.s_[:, -4:]),
        ((1, 0, 0, -1), (64, 48), np.s_[:, :4]),
        ((0, 1, 1, 0), (48, 64), np.s_[:4]),
        ((0, -1, -1, 0), (48, 64), np.s_[-4:]),
        ((-1, 0, 0, -1), (64, 48), np.s_[:, -4:]),
    ],
)
def test_a_mirrored_video(matrix: tuple[int, int, int, int], size: tuple[int, int], edge: Any, tmp_path: Path) -> None:
    path = mirrored(tmp_path / "a.mp4", matrix)
    info = probe_video(path)
    first = np.asarray(load_first_frame(path)).astype(int)
    assert (info.width, info.height) == size == first.shape[1::-1]
    assert np.abs(first[edge] - (255, 0, 0)).max() < 40, "where the red left edge is shown"


# ---------------------------------------------------------------- colours


@pytest.mark.parametrize("matrix", [1, 5])
@pytest.mark.parametrize("full", [False, True])
def test_the_matrix_and_range_that_the_file_names(matrix: int, full: bool, tmp_path: Path) -> None:
    tags = {"colorspace": matrix, "color_range": 2 if full else 1}
    assert close(middle(write(tmp_path / "a.mp4", plain(), matrix=matrix, full=full, tags=tags)), COLOR)


@pytest.mark.parametrize(("height", "width", "matrix"), [(48, 64, 5), (720, 1280, 1), (576, 720, 5), (1080, 608, 1)])
def test_a_video_that_names_none_is_taken_as_players_do(height: int, width: int, matrix: int, tmp_path: Path) -> None:
    path = write(tmp_path / "a.mp4", plain(height, width), matrix=matrix, options={"preset": "ultrafast"})
    assert close(middle(path), COLOR)


def test_ten_bits_do_not_wrap(tmp_path: Path) -> None:
    ramp = np.repeat(np.arange(0, 256, 4, dtype=np.uint8)[None, :, None], 48, 0).repeat(3, 2)
    path = write(tmp_path / "a.mkv", ramp, codec="ffv1", stored="yuv444p10le", tags={"colorspace": 1, "color_range": 1})
    found = np.asarray(load_first_frame(path)).astype(int)
    assert np.abs(found - ramp).max() <= 2


@pytest.mark.parametrize(("curve", "code", "shown"), [(16, 592, 253), (16, 400, 106), (18, 500, 134), (18, 300, 75)])
def test_hdr_is_converted(curve: int, code: int, shown: int, tmp_path: Path) -> None:
    """PQ and HLG greys of 10 bits, as sRGB with white at 203 cd/m² (ITU-R BT.2408)."""
    import av

    path = tmp_path / "a.mkv"
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("ffv1", rate=16)
        stream.width = stream.height = 64
        stream.pix_fmt = "yuv444p10le"
        context = stream.codec_context
        context.colorspace, context.color_range, context.color_trc, context.color_primaries = 9, 2, curve, 9
        frame = av.VideoFrame(64, 64, "yuv444p10le")
        for plane, value in zip(frame.planes, (code, 512, 512), strict=True):
            plane.update(np.full((64, 64), value, np.uint16).tobytes())
        frame.pts, frame.color_range = 0, 2
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    assert close(middle(str(path)), (shown, shown, shown), 4)


ALPHA = {"libvpx": {"auto-alt-ref": "0"}}
"""Options without which a codec cannot write alpha."""


@pytest.mark.parametrize(
    ("name", "codec", "stored"),
    [
        ("a.webm", "libvpx-vp9", "yuva420p"),
        ("b.webm", "libvpx", "yuva420p"),
        ("a.mov", "qtrle", "argb"),
        ("b.mov", "png", "rgba"),
        ("c.mov", "prores_ks", "yuva444p10le"),
    ],
)
def test_transparency_lies_over_white(name: str, codec: str, stored: str, tmp_path: Path) -> None:
    pixels = plain(color=(200, 60, 30, 255))
    pixels[:, 32:] = (0, 0, 0, 0)
    path = write(tmp_path / name, pixels, codec=codec, stored=stored, matrix=5, frames=3, options=ALPHA.get(codec))
    found = np.asarray(load_first_frame(path)).astype(int)
    assert (found[:, 44:] >= 250).all(), "nothing is there"
    assert np.abs(found[8:40, 8:20] - COLOR).max() < 20
    assert (load_frames(path, 3, 48, 64)[2, :, 44:] >= 250).all()


# ---------------------------------------------------------------- damage and memory


def packets(path: Path, keep: Any) -> str:
    """The clip without the packets that `keep(index)` refuses."""
    import av

    cut = path.with_name(f"cut{path.suffix}")
    with av.open(str(path)) as source, av.open(str(cut), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for index, packet in enumerate(source.demux(video=0)):
            if packet.size and keep(index):
                packet.stream = stream
                target.mux(packet)
    return str(cut)


def test_frames_before_the_first_that_decodes_are_counted_and_named(tmp_path: Path) -> None:
    """A recording that begins in the middle of a group of images."""
    import av

    path = tmp_path / "a.mkv"
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("libx264", rate=16, options={"g": "6", "bf": "0", "sc_threshold": "0"})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for index in range(12):
            frame = av.VideoFrame.from_ndarray(drawn_frame(index, 48, 64), format="rgb24")
            frame.pts = index
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    whole = probe_video(str(path))
    assert whole.num_frames == 12 and whole.note == ""
    late = packets(path, lambda index: index > 2)
    info = probe_video(late)
    assert info.num_frames == 6 and info.note == "its first 3 frames cannot be decoded and were left out"
    assert len(load_frames(late, 6, 48, 64)) == 6


def test_a_frame_that_the_decoder_calls_damaged_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ray_diffsynth.data import video_stream

    path = str(draw_clip(tmp_path / "a.mp4", 5))
    monkeypatch.setattr(video_stream.ShownFrame, "damaged", property(lambda frame: frame.pts and frame.time > 0.1))
    assert len(load_frames(path, 2, 48, 64)) == 2, "the damage comes later"
    with pytest.raises(MediaError, match="its frame 3 is damaged"):
        load_frames(path, 4, 48, 64)


def test_a_video_of_too_large_frames_is_refused_before_one_is_decoded(tmp_path: Path) -> None:
    path = str(draw_clip(tmp_path / "a.mp4", 2))
    needed = probe_video(path).decode_bytes
    assert needed == 64 * 48 * 4 * 13
    assert len(load_frames(path, 2, 48, 64, max_bytes=needed)) == 2
    for read in (probe_video, load_first_frame):
        with pytest.raises(MediaError, match="64x48.*--max_decode_memory"):
            read(path, max_bytes=needed - 1)
    stretched = write(tmp_path / "b.mp4", plain(), aspect=Fraction(20, 1))
    assert probe_video(stretched).decode_bytes == 64 * 48 * 4 * 51


# ---------------------------------------------------------------- what is no video


def test_a_script_that_names_other_files_is_not_read(tmp_path: Path) -> None:
    write(tmp_path / "other.mp4", plain())
    script = tmp_path / "clip.mp4"
    script.write_text("ffconcat version 1.0\nfile other.mp4\n")
    with pytest.raises(MediaError, match="names other files"):
        probe_video(str(script))


def test_a_cover_is_no_video(tmp_path: Path) -> None:
    import av

    cover = io.BytesIO()
    Image.new("RGB", (16, 16), "blue").save(cover, "JPEG")

    def with_cover(path: Path, video: bool) -> str:
        with av.open(str(path), "w") as container:
            image: Any = container.add_stream("mjpeg")
            image.width = image.height = 16
            image.pix_fmt = "yuvj420p"
            image.disposition = av.stream.Disposition.attached_pic
            moving: Any = container.add_stream("libx264" if video else "aac", rate=16 if video else 44100)
            if video:
                moving.width, moving.height, moving.pix_fmt = 64, 48, "yuv420p"
            packet = av.Packet(cover.getvalue())
            packet.stream, packet.pts, packet.dts, packet.time_base = image, 0, 0, Fraction(1, 1000)
            container.start_encoding()
            container.mux(packet)
            if video:
                frame: Any = av.VideoFrame.from_ndarray(plain(), format="rgb24").reformat(format="yuv420p")
            else:
                frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
                frame.sample_rate = 44100
            frame.pts = 0
            container.mux(moving.encode(frame))
            container.mux(moving.encode(None))
        return str(path)

    with pytest.raises(MediaError, match="has no video stream"):
        probe_video(with_cover(tmp_path / "song.mp4", video=False))
    found = probe_video(with_cover(tmp_path / "clip.mp4", video=True))
    assert (found.width, found.height) == (64, 48)
