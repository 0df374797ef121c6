"""Sorted texts in little memory: the order, the ranges, and what is left out."""

from __future__ import annotations

from random import Random

import pytest

from ray_diffsynth.data import sorted_texts
from ray_diffsynth.data.sorted_texts import SortedTexts


@pytest.mark.parametrize("count", [0, 1, 2, 500])
def test_each_text_once_in_order(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sorted_texts, "ROWS", 7)
    random = Random(count)
    texts = [random.choice(["a/", "a0", "b/ü", "b/\U0001f600"]) + str(random.randrange(300)) for _ in range(count)]
    found, digits = SortedTexts.of(texts, [lambda text: True, lambda text: text.startswith("a0")])
    wanted = sorted(set(texts))
    assert len(found) == len(wanted) and list(found.between(0, len(found))) == wanted
    assert [found[at] for at in range(len(found))] == wanted
    assert list(digits.between(0, len(digits))) == [text for text in wanted if text.startswith("a0")]
    start, end = found.range_of("a/")
    assert list(found.between(start, end)) == [text for text in wanted if text.startswith("a/")]
    assert list(found.between(3, 2)) == []


def test_what_utf8_cannot_write_is_left_out() -> None:
    (found,) = SortedTexts.of(["b", "\ud800", "a\n", "a\n"], [lambda text: True])
    assert list(found.between(0, len(found))) == ["a\n", "b"]


def test_the_memory_is_little_more_than_the_characters() -> None:
    (found,) = SortedTexts.of((f"s3://lab/data/{number:08d}.png" for number in range(100_000)), [lambda text: True])
    assert found._texts.nbytes < 100_000 * (len("s3://lab/data/00000000.png") + 9) + 1000
