"""The images and their captions."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ray_diffsynth.demo.captions import SUFFIXES, Scene, canonical, vocabulary
from ray_diffsynth.demo.draw import Kind, draw_dataset, draw_image


def test_an_image_is_a_function_of_seed_and_index() -> None:
    first, again, other = draw_image(3, 5), draw_image(3, 5), draw_image(3, 6)
    assert np.array_equal(first.pixels, again.pixels)
    assert first.prompt == again.prompt
    assert first.scene == again.scene
    assert not np.array_equal(first.pixels, other.pixels)


@pytest.mark.parametrize("kind", ["shapes", "creature", "style"])
@pytest.mark.parametrize(("height", "width"), [(64, 64), (48, 96)])
def test_every_kind_is_drawn_at_every_size(kind: Kind, height: int, width: int) -> None:
    image = draw_image(0, 1, kind=kind, height=height, width=width)
    assert image.pixels.shape == (height, width, 3)
    assert image.pixels.dtype == np.uint8
    assert image.pixels.std() > 5


def test_a_dataset_is_written_twice_with_the_same_bytes(tmp_path: Path) -> None:
    tables = [draw_dataset(tmp_path / name, 4, seed=7) for name in ("a", "b")]
    files = [{file.name: file.read_bytes() for file in table.parent.iterdir()} for table in tables]
    assert files[0] == files[1]
    assert len(files[0]) == 5


def test_metadata_names_the_images(tmp_path: Path) -> None:
    table = draw_dataset(tmp_path, 3, seed=1, kind="creature")
    with table.open(newline="") as handle:
        rows = list(csv.DictReader(handle))
    assert [list(row) for row in rows] == [["image", "prompt"]] * 3
    for row in rows:
        assert row["prompt"].startswith("a zorp on a")
        with Image.open(tmp_path / row["image"]) as image:
            assert image.size == (64, 64)


def test_canonical_captions() -> None:
    scene = Scene("heart", "orange", "blue", "large", 0.7, 0.0, 0.0)
    assert canonical(scene) == "a large orange heart on a blue background"
    assert canonical(Scene("zorp", "red", "orange", "small", 0.6, 0.0, 0.0)) == "a zorp on an orange background"
    assert canonical(Scene("star", "red", "black", "small", 0.4, 0.0, 0.0, "neon")).endswith("background, neon")


def test_varied_captions_name_the_background_and_only_known_words() -> None:
    known = set(vocabulary())
    for index in range(200):
        image = draw_image(11, index)
        words = image.prompt.replace(",", "").split()
        assert image.scene.background in words
        assert set(words) <= known
        assert "zorp" not in words
        assert "neon" not in words
    assert any(draw_image(11, i).prompt.endswith(SUFFIXES) for i in range(50))
