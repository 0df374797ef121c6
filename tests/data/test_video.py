"""Videos of every container become the frames that are asked for, and no more is decoded; bad ones an error."""

from __future__ import annotations

from pathlib import Path

import fsspec
import numpy as np
import pytest
from PIL import Image

from ray_diffsynth.data import video, video_stream
from ray_diffsynth.data.media import MediaError
from ray_diffsynth.data.video import (
    VideoInfo,
    available_frames,
    load_first_frame,
    load_frames,
    probe_video,
)
from ray_diffsynth.data.video_stream import ShownFrame, VideoSupportError, require_video_support
from tests.video_files import CODECS, draw_clip, grey


@pytest.mark.parametrize("suffix", CODECS)
def test_every_container(suffix: str, tmp_path: Path) -> None:
    path = str(draw_clip(tmp_path / f"clip{suffix}"))
    info = probe_video(path)
    assert (info.width, info.height, info.num_frames) == (64, 48, 11)
    assert info.fps == pytest.approx(16, rel=0.05)  # a GIF counts in hundredths of a second
    frames = load_frames(path, 5, 32, 48)
    assert frames.shape == (5, 32, 48, 3) and frames.dtype == np.uint8
    tolerance = 1 if suffix == ".gif" else 0  # of 8 shades of grey
    assert all(abs(grey(frame) - index) <= tolerance for index, frame in enumerate(frames))
    assert np.abs(frames[4, 16, 4].astype(int) - (255, 0, 0)).max() < 40, "red stays red"


def test_fps_takes_the_frames_that_are_shown_then(tmp_path: Path) -> None:
    path = str(draw_clip(tmp_path / "clip.mp4"))
    assert [grey(frame) for frame in load_frames(path, 5, 48, 64, fps=8)] == [0, 2, 4, 6, 8]
    assert [grey(frame) for frame in load_frames(path, 5, 48, 64, fps=32)] == [0, 0, 1, 1, 2]
    assert [grey(frame) for frame in load_frames(path, 22, 48, 64, fps=32)][-3:] == [9, 10, 10], "to its very end"
    with pytest.raises(MediaError, match="ends after 11 of the 12"):
        load_frames(path, 12, 48, 64)


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".webm"])
def test_fps_of_frames_at_unequal_distances(suffix: str, tmp_path: Path) -> None:
    """A screen recording: ten frames in the first half second, then one a second."""
    times = [*range(0, 500, 50), 1500, 2500, 3500]
    path = str(draw_clip(tmp_path / f"clip{suffix}", len(times), times=times))
    info = probe_video(path)
    assert info.num_frames == len(times) and available_frames(info, 2) == pytest.approx(7, abs=1)
    assert [grey(frame) for frame in load_frames(path, 7, 48, 64, fps=2)] == [0, 9, 9, 10, 10, 11, 11]
    assert [grey(frame) for frame in load_frames(path, 5, 48, 64, fps=10)] == [0, 2, 4, 6, 8]


def test_counts_at_a_rate() -> None:
    clip = VideoInfo(64, 48, 32, 16.0)
    assert [available_frames(clip, fps) for fps in (None, 16, 8, 24, 29.97, 0.1)] == [32, 32, 16, 48, 59, 1]


@pytest.mark.parametrize("rotation", [90, -90, 180])
def test_a_phones_rotation(rotation: int, tmp_path: Path) -> None:
    path = str(draw_clip(tmp_path / "clip.mp4", 2, rotation=rotation))
    size = (64, 48) if rotation == 180 else (48, 64)
    info = probe_video(path)
    assert (info.width, info.height) == size
    first = np.asarray(load_first_frame(path)).astype(int)
    assert first.shape[:2] == size[::-1]
    red = {90: first[-4:], -90: first[:4], 180: first[:, -4:]}[rotation]  # the left edge turns down, up, to the right
    assert np.abs(red - (255, 0, 0)).max() < 40


def test_only_used_frames_are_decoded_and_one_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = str(draw_clip(tmp_path / "clip.mp4", 60))
    seen: list[int] = []
    image = ShownFrame.image
    monkeypatch.setattr(ShownFrame, "image", lambda frame: (seen.append(frame.pts), image(frame))[1])
    decoded: list[int] = []
    source = video._decoded

    def counted(path: str, max_bytes: int, *, last: int | None = None) -> object:
        for frame in source(path, max_bytes, last=last):
            decoded.append(frame.pts)
            yield frame

    monkeypatch.setattr(video, "_decoded", counted)
    load_frames(path, 5, 32, 32)
    assert len(decoded) == len(seen) == 5
    seen.clear()
    decoded.clear()
    load_frames(path, 5, 32, 32, fps=4)
    assert len(decoded) == 17 and len(seen) == 5, "frames between two that are used are decoded, and not converted"


def test_transparent_animation_lies_on_white(tmp_path: Path) -> None:
    frames = [Image.new("RGBA", (32, 32), (0, 0, 0, 0)) for _ in range(2)]
    for index, frame in enumerate(frames):
        frame.paste((0, 0, 255, 255), (index, 0, 8 + index, 8))
    path = tmp_path / "clip.gif"
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=100, disposal=2)
    loaded = load_frames(str(path), 2, 32, 32)
    assert (loaded[:, 20, 20] == 255).all() and (loaded[:, 4, 4] == (0, 0, 255)).all()


@pytest.mark.parametrize(
    ("content", "reason"), [(None, "no such file"), (b"", "empty"), (b"no video at all" * 100, "damaged")]
)
def test_unusable_files(content: bytes | None, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4"
    if content is not None:
        path.write_bytes(content)
    for read in (probe_video, load_first_frame, lambda name: load_frames(name, 1, 32, 32)):
        with pytest.raises(MediaError, match=reason) as caught:
            read(str(path))
        assert caught.value.path == str(path)


def test_a_file_that_is_cut_short(tmp_path: Path) -> None:
    whole = draw_clip(tmp_path / "clip.mkv", 30).read_bytes()
    path = tmp_path / "short.mkv"
    path.write_bytes(whole[: len(whole) * 2 // 3])
    with pytest.raises(MediaError, match="of the 29 frames|damaged"):
        load_frames(str(path), 29, 32, 32)
    (tmp_path / "cut.mp4").write_bytes(draw_clip(tmp_path / "clip.mp4").read_bytes()[:-400])
    with pytest.raises(MediaError, match="damaged"):  # its index stands at the end
        probe_video(str(tmp_path / "cut.mp4"))


def test_sound_alone_is_no_video(tmp_path: Path) -> None:
    import av

    path = tmp_path / "sound.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        sound.sample_rate = 16000
        container.mux(stream.encode(sound))
        container.mux(stream.encode())
    with pytest.raises(MediaError, match="no video stream"):
        probe_video(str(path))


def test_a_url(tmp_path: Path) -> None:
    url = "memory://videos/clip.mp4"
    with fsspec.open(url, "wb") as file:
        file.write(draw_clip(tmp_path / "clip.mp4").read_bytes())
    assert probe_video(url).num_frames == 11
    assert grey(load_frames(url, 5, 48, 64)[4]) == 4


def test_without_pyav(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(video_stream.importlib.util, "find_spec", lambda name: None)
    require_video_support(["a.png"])
    with pytest.raises(VideoSupportError, match=r"b\.mp4.*pip install 'ray-diffsynth\[video\]'"):
        require_video_support(["a.png", "b.mp4"])
