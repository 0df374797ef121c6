"""What happened to the data: summed a line a kind, counted exactly, collected where it is asked for."""

from __future__ import annotations

import logging
import threading

import pytest

from ray_diffsynth.data import warnings
from ray_diffsynth.data.warnings import DESCRIPTIONS, DataWarning, DataWarnings, UnknownWarningError, collecting, warn
from ray_diffsynth.errors import UserError
from ray_diffsynth.printable import printable


def test_a_line_a_kind_with_the_count_and_the_first_samples() -> None:
    found = DataWarnings()
    for number in range(5):
        found.add("caption_cut", f"{number}.png", f"{600 + number} tokens cut to 512")
    found.add("batch_halved", "", "vae: 8 to 4")
    assert found.lines() == [
        "captions longer than the text encoder reads, and cut: 5 (0.png: 600 tokens cut to 512; "
        "1.png: 601 tokens cut to 512; 2.png: 602 tokens cut to 512; … and 2 more, see report.json)",
        "batches that did not fit into memory, and were halved: 1 (vae: 8 to 4)",
    ]
    assert DataWarnings().lines() == [] and DataWarnings().to_json() == {}


def test_the_same_thing_twice_is_one_and_the_order_of_coming_does_not_count() -> None:
    first, second = DataWarnings(), DataWarnings()
    first.add("batch_halved", "", "a")
    first.add("caption_cut", "x", "1")
    second.add("caption_cut", "x", "1")
    second.add("caption_cut", "x", "2")
    first.merge(second)
    assert len(first) == 3
    assert list(first) == [
        DataWarning("caption_cut", "x", "1"),
        DataWarning("caption_cut", "x", "2"),
        DataWarning("batch_halved", "", "a"),
    ]


def test_the_json_lists_so_many_and_counts_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warnings, "MAX_LISTED", 2)
    found = DataWarnings(DataWarning("caption_cut", f"{i}.png", "d") for i in range(7))
    assert found.to_json() == {
        "caption_cut": {
            "what": DESCRIPTIONS["caption_cut"],
            "count": 7,
            "samples": [{"sample_id": "0.png", "detail": "d"}, {"sample_id": "1.png", "detail": "d"}],
        }
    }


def test_an_unknown_kind_is_an_error_that_lists_the_known_ones() -> None:
    with pytest.raises(UnknownWarningError, match="'caption_cutt'; did you mean caption_cut"):
        DataWarnings().add("caption_cutt", "a", "b")
    with pytest.raises(UserError, match="choose from .*batch_halved, .*caption_cut"):
        warn("zzz", "a", "b")


def test_a_name_cannot_write_to_the_terminal() -> None:
    found = DataWarnings()
    found.add("caption_cut", "a\x1b[2J\n\0.png", "x\ud800")
    assert found.lines()[0].endswith(r"1 (a\x1b[2J\n\x00.png: x\ud800)")
    assert printable("häß 中文 🎨") == "häß 中文 🎨" and printable("a\nb\tc", keep="\n") == "a\nb\\tc"


def test_the_nearest_collection_takes_it_in_and_without_one_the_log(caplog: pytest.LogCaptureFixture) -> None:
    with collecting() as outer:
        warn("caption_cut", "a", "1")
        with collecting() as inner:
            warn("caption_cut", "b", "2")
        thread = threading.Thread(target=warn, args=("caption_cut", "other thread", "3"))
        with caplog.at_level(logging.WARNING):
            thread.start()
            thread.join()
        warn("caption_cut", "c", "4")
    assert [w.sample_id for w in outer] == ["a", "c"] and [w.sample_id for w in inner] == ["b"]
    assert "1 (other thread: 3)" in caplog.text and "(a: 1)" not in caplog.text
