"""The pages of the three jobs in a browser: they render, the console stays quiet, the numbers equal report.json."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ray_diffsynth.config import GenerateConfig
from ray_diffsynth.report.page import lookup
from ray_diffsynth.training import local
from tests.e2e.conftest import train_config
from tests.report.browser import look_at, needs_chromium, overflow

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def trained(tiny_qwen: Path, fp32_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("trained")
    local.run(train_config(tiny_qwen, fp32_cache, output, max_steps=6))
    return output


@pytest.fixture(scope="module")
def generated(trained: Path, tiny_qwen: Path, tmp_path_factory: pytest.TempPathFactory, local_ray: None) -> Path:
    from ray_diffsynth.generate import job

    output = tmp_path_factory.mktemp("generated")
    lora = str(trained / json.loads((trained / "report.json").read_text())["lora"]["file"])
    size = {"height": 32, "width": 32, "num_inference_steps": 2, "cfg_scale": 1.0}
    prompt = "a cat, " + "very " * 60 + "fluffy"
    options = {"num_workers": 1, "resources": {"CPU": 1.0}, "dtype": "float32", "seeds": "3,4", "lora_scale": "0,1"}
    job.run(GenerateConfig(model=str(tiny_qwen), prompt=prompt, output_path=str(output), lora=lora, **options, **size))  # type: ignore[arg-type]
    return output


def check(folder: Path, profile: Path, keys: set[str]) -> None:
    """The page of a job in `folder`: quiet, complete, equal to report.json, and no wider than a phone."""
    page, report = folder / "report.html", json.loads((folder / "report.json").read_text())
    dom, console = look_at(page, profile)
    assert console == []
    assert keys <= dom.values.keys()
    for key, shown in dom.values.items():
        assert shown == str(lookup(report, key)), key
    assert all(option in dom.text for option in ("--model", "--output_path"))
    assert overflow(page, profile, 500) <= 0


@needs_chromium
def test_stage_1(fp32_cache: Path, tmp_path: Path) -> None:
    keys = {"counts.samples", "counts.quarantined", "counts.total", "bytes", "seconds", "groups.0.encoded"}
    check(fp32_cache, tmp_path / "profile", {*keys, "groups.1.rows_per_second"})
    dom, _ = look_at(fp32_cache / "report.html", tmp_path / "profile")
    assert dom.values["counts.samples"] == "12" and len(dom.all("img")) == 12 and dom.all("svg")


@needs_chromium
def test_stage_2(trained: Path, tmp_path: Path) -> None:
    keys = {"counts.steps", "training.loss_smoothed", "training.samples_per_second", "training.data_wait", "lora.bytes"}
    check(trained, tmp_path / "profile", {*keys, "training.learning_rate_last", "seconds.total", "lora.rank"})
    report = json.loads((trained / "report.json").read_text())
    assert report["lora"]["bytes"] == (trained / report["lora"]["file"]).stat().st_size and report["lora"]["rank"] == 4


@needs_chromium
def test_generate(generated: Path, tmp_path: Path) -> None:
    keys = {"counts.made", "counts.reused", "pictures_per_second", "seconds.total", "settings.num_inference_steps"}
    check(generated, tmp_path / "profile", {*keys, "loras.0.bytes"})
    dom, _ = look_at(generated / "report.html", tmp_path / "profile")
    assert dom.values["counts.pictures"] == "4" and "pipe.load_lora_weights(" in dom.text
    ends = [image["alt"].rpartition("seed ")[2] for image in dom.all("img")]
    assert ends == ["3, without the LoRA", "3, strength 1", "4, without the LoRA", "4, strength 1"]


def test_the_three_lines_load_the_lora(trained: Path, tiny_qwen: Path) -> None:
    from ray_diffsynth.report.load import load_lines

    report = json.loads((trained / "report.json").read_text())
    names: dict[str, object] = {}
    exec("\n".join(load_lines(report, str(trained))), names)
    assert names["pipe"].get_active_adapters()  # type: ignore[attr-defined]
