"""The judge, on images whose content is known because they were drawn."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from ray_diffsynth.demo.captions import COLORS, SHAPES, Scene
from ray_diffsynth.demo.draw import draw_image, draw_scene
from ray_diffsynth.demo.evaluate import grid, is_creature, judge, known_scenes, score


def test_it_is_right_on_drawn_images() -> None:
    images = [draw_image(21, i) for i in range(150)]
    result = score([p.pixels for p in images], [p.scene for p in images])
    assert result.all == 1.0
    assert result.overlap > 0.9


def test_noise_does_not_fool_it() -> None:
    images = [draw_image(22, i) for i in range(50)]
    rng = np.random.default_rng(0)
    noisy = [np.clip(p.pixels + rng.normal(0, 12, p.pixels.shape), 0, 255).astype(np.uint8) for p in images]
    assert score(noisy, [p.scene for p in images]).all > 0.95


@pytest.mark.parametrize("field", ["shape", "color", "background"])
def test_it_notices_what_is_wrong(field: str) -> None:
    scene = Scene("heart", "red", "blue", "large", 0.7, 0.0, 0.0)
    drawn = replace(scene, **{field: {"shape": "square", "color": "yellow", "background": "white"}[field]})
    verdict = judge(draw_scene(drawn, np.random.default_rng(0)))
    assert verdict.agrees(scene) == {name: name != field for name in ("background", "color", "shape")}


def test_an_empty_image_shows_nothing() -> None:
    verdict = judge(np.full((64, 64, 3), COLORS["red"], dtype=np.uint8))
    assert (verdict.background, verdict.color, verdict.shape) == ("red", "nothing", "nothing")


def test_only_the_creature_is_a_creature() -> None:
    assert all(is_creature(draw_image(23, i, kind="creature").pixels) for i in range(40))
    assert not any(is_creature(draw_image(23, i).pixels) for i in range(40))
    assert not any(is_creature(draw_image(23, i, kind="style").pixels) for i in range(20))


def test_known_scenes_cover_everything_and_differ_from_their_background() -> None:
    scenes = known_scenes(100)
    assert {scene.shape for scene in scenes} == set(SHAPES)
    assert {scene.color for scene in scenes} == {scene.background for scene in scenes} == set(COLORS)
    assert all(scene.color != scene.background for scene in scenes)
    assert scenes == known_scenes(100)


def test_a_grid_has_a_cell_for_each_image() -> None:
    sheet = grid([draw_image(0, i).pixels for i in range(5)], columns=3, scale=1)
    assert sheet.size == (3 * 66 + 2, 2 * 66 + 2)
