"""report.html: its parts, its charts, and colours that can be read."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest

from ray_diffsynth.config import PreprocessConfig, TrainConfig
from ray_diffsynth.report import PageImage, make_report, render, training_numbers, write_page
from ray_diffsynth.report.charts import Series, bar_chart, finite, line_chart, short, smooth, thin, ticks
from ray_diffsynth.report.page import duration, number, size
from tests.report.browser import Dom, look_at, needs_chromium

NASTY = 'x<script>alert("1")</script>&.png'


def metrics(steps: int = 40) -> list[dict[str, Any]]:
    return [
        {"step": i, "loss": 1 / i, "learning_rate": 1e-3, "samples_per_second": 4.0, "data_wait": 0.25}
        | {"loss_sigma_0.00-0.25": 2 / i, "loss_sigma_0.25-0.50": 1 / i, "gpu_memory_bytes": 1e9 + i}
        | ({"validation_loss": 3 / i} if i % 10 == 0 else {})
        for i in range(1, steps + 1)
    ]


def train_page(**changes: Any) -> tuple[dict[str, Any], str]:
    report = make_report(
        counts={"samples": 5, "steps": 40, "steps_total": 40},
        seconds={"total": 12.5, "training": 10.0},
        config=TrainConfig(model="org/model", dataset_base_path="cache", learning_rate=3e-4),
        **{"training": training_numbers(metrics()), "lora": {"file": "epoch-0.safetensors", "bytes": 2048, "rank": 4}},
        **changes,
    )
    return report, render(report, metrics=metrics(), output_path="models/zorp")


def preprocess_page(images: list[PageImage]) -> tuple[dict[str, Any], str]:
    group = {"name": "vae", "parameters": ["input_latents"], "encoded": 3, "reused": 1}
    report = make_report(
        counts={"samples": 4, "quarantined": 1, "total": 5},
        seconds=3.0,
        config=PreprocessConfig(model="org/model", dataset_base_path="data"),
        bytes=123456,
        buckets={"64x64": 3, "32x64": 1},
        groups=[{**group, "seconds": 1.5, "rows_per_second": 2.0, "bytes": 123456}],
        quarantine={
            "by_error": {"MediaError": 1},
            "first": [{"sample_id": NASTY, "source": NASTY, "error": "MediaError", "message": "damaged"}],
        },
    )
    return report, render(report, images=images, output_path="cache/zorp")


def test_the_page_of_stage_2() -> None:
    report, page = train_page()
    dom = Dom(page)
    assert dom.values["training.loss_last"] == str(report["training"]["loss_last"]) == "0.025"
    assert dom.values["training.held_out_last"] == str(3 / 40) and dom.values["lora.bytes"] == "2048"
    for title in ("Loss", "Loss by noise level", "Held-out loss", "Learning rate", "Samples per second"):
        assert any(svg["aria-label"].startswith(f"{title}. ") for svg in dom.all("svg")), title
    assert "2.05 kB" in dom.text and "25.0 %" in dom.text and "--learning_rate 0.0003" in dom.text
    code = re.findall(r"<pre><code>(.*?)</code>", page, re.DOTALL)[0]
    assert Dom(code).text == (
        "from diffusers import DiffusionPipeline "
        'pipe = DiffusionPipeline.from_pretrained("org/model") '
        'pipe.load_lora_weights("models/zorp", weight_name="epoch-0.safetensors")'
    )


def test_warnings_are_counted_and_the_first_are_named() -> None:
    samples = [{"sample_id": f"{i}{NASTY}", "detail": "600 tokens cut to 512"} for i in range(12)]
    _, page = train_page(warnings={"caption_cut": {"what": "captions that are cut", "count": 12, "samples": samples}})
    dom = Dom(page)
    assert dom.values["warnings.caption_cut.count"] == "12" and "captions that are cut" in dom.text
    assert f"9{NASTY}: 600 tokens cut to 512" in dom.text and f"10{NASTY}" not in dom.text
    assert "Warnings" not in Dom(train_page(warnings={})[1]).text


def test_control_characters_are_escaped_wherever_text_comes_into_the_page() -> None:
    text = "one\0two\x1b[2J\u2028\ud800\u202e and 🧑\u200d🚀\nline"
    images = [PageImage(b"", text, text)]
    report, page = preprocess_page(images)
    report["quarantine"]["first"][0]["message"] = text
    report["config"]["output_path"] = text
    page = render(report, images=images, output_path=text)
    assert page.encode().decode() == page
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f\u2028\u202e\ud800]", page)
    assert page.count(r"one\x00two\x1b[2J\u2028\ud800\u202e and 🧑\u200d🚀".replace(r"\u200d", "\u200d")) >= 4


def test_a_run_without_steps_or_lora_has_a_page() -> None:
    report = make_report(
        counts={"steps": 0, "steps_total": 4},
        seconds={"total": 1.0},
        config=TrainConfig(model="m", dataset_base_path="c"),
        training=training_numbers([]),
        lora=None,
    )
    page = render(report)
    assert "<svg" not in page and "load_lora_weights" not in page and "Trained 0 of 4" in page


def test_the_page_of_stage_1() -> None:
    _, page = preprocess_page([PageImage(b"\xff\xd8", "a <b>zorp</b>", NASTY)])
    dom = Dom(page)
    assert dom.values["groups.0.encoded"] == "3" and dom.values["quarantine.by_error.MediaError"] == "1"
    assert NASTY in dom.text and "a <b>zorp</b>" in dom.text and "<script" not in page and "<b>" not in page
    assert [image["alt"] for image in dom.all("img")] == [NASTY]
    assert "64x64: 3 samples, 32x64: 1 samples" in dom.all("svg")[0]["aria-label"]


def test_nothing_is_fetched_and_everything_is_labelled() -> None:
    for _, page in (train_page(), preprocess_page([PageImage(b"x", "a", "b")])):
        dom = Dom(page)
        urls = [a[name] for _, a in dom.elements for name in ("src", "href") if name in a]
        assert all(url.startswith("data:") for url in urls) and "url(" not in page and "@import" not in page
        assert all(image["alt"] for image in dom.all("img")) and all(svg["aria-label"] for svg in dom.all("svg"))
        assert all(head.get("scope") == "col" for head in dom.all("th")) and dom.all("html")[0]["lang"] == "en"
        assert any(meta.get("name") == "viewport" for meta in dom.all("meta"))


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_contrast(theme: str) -> None:
    """WCAG AA: 4.5 for text, 3 for lines."""
    themes = re.findall(r":root\{(.*?)\}", train_page()[1], re.DOTALL)
    colours = dict(re.findall(r"--(\w+):(#\w{6})", themes[theme == "dark"]))
    assert len(themes) == 2 and {"bg", "card", "ink", "soft", "warn", "c5"} <= colours.keys()
    for text in ("ink", "soft", "warn"):
        assert all(contrast(colours[text], colours[ground]) >= 4.5 for ground in ("bg", "card")), text
    assert all(contrast(colours[f"c{i}"], colours["bg"]) >= 3 for i in range(6))


def contrast(first: str, second: str) -> float:
    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    light, dark = sorted((luminance(first), luminance(second)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def test_numbers_and_curves() -> None:
    assert finite([(1, 2.0), (2, math.nan), (3, math.inf)]) == [(1, 2.0)]
    assert [y for _, y in smooth([(i, 5.0) for i in range(9)])] == pytest.approx([5.0] * 9)
    assert smooth([]) == [] and training_numbers([])["loss_smoothed"] is None
    few = thin([(float(i), float(i)) for i in range(10_000)], 100)
    assert len(few) == 100 and few[-1] == (9999.0, 9999.0)
    assert ticks(0.03, 0.41, 4) == pytest.approx([0, 0.1, 0.2, 0.3, 0.4, 0.5]) and ticks(2, 2, 4) == [2]
    assert [short(v) for v in (0.00012345, 12, 12_345, 2.5e6, 0)] == ["0.0001234", "12", "12.3k", "2.5M", "0"]
    assert not line_chart("empty", []) and not bar_chart("empty", {})
    assert "<circle" in line_chart("one point", [Series("a", [(1, 1.0)])])
    assert (duration(3.25), duration(75), duration(4210)) == ("3.2 s", "1 min 15 s", "1 h 10 min")
    assert (size(12), size(3.4e9), size(None)) == ("12 bytes", "3.4 GB", "–")
    assert (number(12345), number(0.123456), number(None)) == ("12\u202f345", "0.1235", "–")


@needs_chromium
def test_the_console_check_sees_an_error(tmp_path: Path) -> None:
    """What the page's policy forbids is said on the console, so a quiet console means something."""
    report, _ = train_page()
    path = Path(write_page(str(tmp_path), report, metrics=metrics()))
    _, console = look_at(path, tmp_path / "profile")
    assert console == []
    path.write_text(path.read_text().replace("</main>", '<img alt="" src="http://127.0.0.1:9/x.png"></main>'))
    _, console = look_at(path, tmp_path / "profile")
    assert console
