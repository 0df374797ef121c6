"""The grammar of captions: what a scene is called, with filler words and with words left out.

Filler words, nonsense nouns and style suffixes that change nothing are part of the pre-training captions, so that a
word which the model has never seen (the held-out creature, the held-out style) leaves the rest of the image whole.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (220, 40, 40),
    "orange": (250, 140, 20),
    "yellow": (250, 220, 50),
    "green": (40, 160, 60),
    "blue": (40, 80, 215),
    "purple": (135, 50, 175),
    "white": (245, 245, 245),
    "black": (25, 25, 30),
}
SHAPES = ("circle", "ring", "square", "diamond", "triangle", "star", "heart", "cross")
SIZES: dict[str, tuple[float, float]] = {"small": (0.48, 0.52), "medium": (0.60, 0.64), "large": (0.72, 0.76)}  # radii
CREATURE = "zorp"
STYLE = "neon"
NEUTRAL = ("thing", "object", "shape", "figure")
NONSENSE = ("wug", "dax", "blicket", "toma", "fep", "gavagai", "kiki", "bouba", "modi", "snark", "tulver", "quib")
OPENINGS = ("a picture of", "a drawing of", "an image of", "we see", "there is", "look at")
SUFFIXES = ("flat", "simple", "poster", "sticker", "print", "icon", "minimal", "clipart", "vintage", "modern")
JOINTS = ("on {} background", "with {} background", "before {} wall")
VOWELS = "aeiou"


@dataclass(frozen=True)
class Scene:
    """What an image shows. `shape` is one of SHAPES or the creature; `style` is empty or the held-out style.

    `radius`, `x`, `y` are in units of half the image's shorter side, with the origin in the centre.
    """

    shape: str
    color: str
    background: str
    size: str
    radius: float
    x: float
    y: float
    style: str = ""


def with_article(words: str) -> str:
    """`words` after a or an."""
    return f"{'an' if words[0] in VOWELS else 'a'} {words}"


def canonical(scene: Scene) -> str:
    """The plain caption: 'a large red heart on a blue background', 'a zorp on a red background', '…, neon'."""
    noun = scene.shape if scene.shape == CREATURE else f"{scene.size} {scene.color} {scene.shape}"
    suffix = f", {scene.style}" if scene.style else ""
    return f"{with_article(noun)} on {with_article(scene.background)} background{suffix}"


def caption(scene: Scene, rng: np.random.Generator | None = None) -> str:
    """A caption of the scene: the canonical one without `rng`, otherwise one drawn from the whole grammar."""
    if rng is None:
        return canonical(scene)
    noun = scene.shape
    if noun != CREATURE:
        if rng.random() < 0.12:
            noun = str(rng.choice(NEUTRAL + NONSENSE))
        words = [scene.size if rng.random() < 0.7 else "", scene.color if rng.random() < 0.85 else "", noun]
        noun = " ".join(w for w in words if w)
    joint = JOINTS[0] if rng.random() < 0.8 else str(rng.choice(JOINTS[1:]))
    opening = f"{rng.choice(OPENINGS)} " if rng.random() < 0.15 else ""
    suffix = f", {rng.choice(SUFFIXES)}" if rng.random() < 0.2 else ""
    if scene.style:
        suffix = f", {scene.style}"
    return f"{opening}{with_article(noun)} {joint.format(with_article(scene.background))}{suffix}"


def vocabulary() -> list[str]:
    """Every word that a caption may contain, each once, in a fixed order."""
    phrases = [*COLORS, *SHAPES, *SIZES, *NEUTRAL, *NONSENSE, *OPENINGS, *SUFFIXES, *JOINTS, "a an", CREATURE, STYLE]
    words = [word for phrase in phrases for word in phrase.replace("{}", " ").split()]
    return list(dict.fromkeys(words))
