"""What a run leaves beside its images, without Ray: report.json, the page with the same numbers, and its images."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import fsspec
import pytest
from PIL import Image

from ray_diffsynth.config import GenerateConfig
from ray_diffsynth.generate.grid import LIMIT
from ray_diffsynth.generate.items import Item, plan_items
from ray_diffsynth.generate.summary import Made, write_results
from ray_diffsynth.pipelines.qwen_image.pipeline import QwenImagePipeline
from ray_diffsynth.plan.prompts import prompts_of
from ray_diffsynth.report.load import load_lines
from ray_diffsynth.report.page import lookup
from tests.report.browser import Dom

NASTY = 'a <b>cat</b> & "dog", ö'


def made(output: Path, *, failed: int = 0, reused: int = 0, loras: tuple[str, ...] = (), **options: Any) -> Dom:
    """The page of a run of which the last `failed` items failed; its images are plain colours."""
    config = GenerateConfig(model="org/model", prompt=NASTY, output_path=str(output), lora=",".join(loras), **options)
    items = plan_items(config, prompts_of(config), QwenImagePipeline, {})
    bad: list[Item] = items[len(items) - failed :]
    (output / "pictures").mkdir(parents=True)
    for number, item in enumerate(items[: len(items) - failed]):
        Image.new("RGB", (300, 200), (number % 256, 80, 0)).save(output / item.file)
    failures = {item.file: "RuntimeError: no <memory>" for item in bad}
    write_results(
        config,
        Made("qwen_image", QwenImagePipeline, loras, items, len(items) - reused, failures, 2.0),
        str(output),
        seconds=8.0,
    )
    return Dom((output / "report.html").read_text(encoding="utf-8"))


def test_the_page_says_what_the_report_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dom = made(tmp_path / "out", seeds="1,2,3,4,5,6", failed=1, reused=2, num_inference_steps=7)
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert report["counts"] == {"pictures": 5, "made": 3, "reused": 2, "failed": 1, "total": 6}
    assert report["pictures_per_second"] == 1.5 and report["seconds"] == {"total": 8.0, "generating": 2.0}
    assert report["settings"] == {"family": "qwen_image", "num_inference_steps": 7, "cfg_scale": 4.0}
    assert report["failures"][0]["reason"] == "RuntimeError: no <memory>" and report["job"] == "generate"
    keys = {"counts.made", "counts.reused", "counts.failed", "pictures_per_second", "seconds.total", "settings.family"}
    assert keys <= dom.values.keys()
    for key, shown in dom.values.items():
        assert shown == str(lookup(report, key)), key
    assert [image["alt"] for image in dom.all("img")] == [f"{NASTY}, seed {seed}" for seed in range(1, 6)]
    assert [item["seed"] for item in report["shown"]] == [1, 2, 3, 4, 5]
    assert "RuntimeError: no <memory>" in dom.text and f"seed 1: {NASTY}" in dom.text and not dom.all("b")
    assert not dom.all("pre") and "--num_inference_steps 7" in dom.text
    assert capsys.readouterr().out.strip().endswith(f"see {tmp_path / 'out/report.html'}")


def test_the_strengths_of_a_lora_stand_side_by_side(tmp_path: Path) -> None:
    (tmp_path / "zorp.safetensors").write_bytes(b"x" * 1234)
    lora = str(tmp_path / "zorp.safetensors")
    dom = made(tmp_path / "out", seeds="1,2", loras=(lora,), lora_scale="0,0.5,1")
    page = (tmp_path / "out/report.html").read_text(encoding="utf-8")
    assert len(dom.all("h3")) == 2 and page.count('<div class="sheet">') == 2
    alts = [image["alt"].removeprefix(f"{NASTY}, seed ") for image in dom.all("img")]
    assert alts[:4] == ["1, without the LoRA", "1, strength 0.5", "1, strength 1", "2, without the LoRA"]
    assert dom.values["loras.0.bytes"] == "1234" and "At strength 0, 0.5, 1." in dom.text
    assert code(page) == (
        "from diffusers import DiffusionPipeline "
        'pipe = DiffusionPipeline.from_pretrained("org/model") '
        f'pipe.load_lora_weights("{tmp_path}", weight_name="zorp.safetensors")'
    )


def test_several_loras_are_loaded_side_by_side(tmp_path: Path) -> None:
    loras = tuple(str(tmp_path / name) for name in ("a.safetensors", "b.safetensors"))
    for path in loras:
        Path(path).write_bytes(b"x")
    made(tmp_path / "out", loras=loras)
    lines = code((tmp_path / "out/report.html").read_text(encoding="utf-8"))
    assert 'weight_name="b.safetensors", adapter_name="lora_1") pipe.set_adapters(["lora_0", "lora_1"])' in lines


def test_a_lora_on_an_object_store_is_copied_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    loras = [{"folder": f"memory://runs/{name}/", "file": "epoch-0.safetensors"} for name in ("a", "b")]
    for number, lora in enumerate(loras):
        fsspec.filesystem("memory").pipe(lora["folder"] + lora["file"], bytes([number]))
    one = load_lines({"lora": loras[0]}, "memory://runs/a")
    several = load_lines({"loras": [*loras, {"folder": "here", "file": "c.safetensors"}]}, "out")
    for lines, names in ((one, ["epoch-0"]), (several, ["lora_0", "lora_1"])):
        exec("\n".join(line for line in lines if "fsspec" in line), {})
        for number, name in enumerate(names):
            assert (tmp_path / f"{name}.safetensors").read_bytes() == bytes([number])
            assert any(f'load_lora_weights(".", weight_name="{name}.safetensors"' in line for line in lines)
    assert several.count("import fsspec") == 1 and "import fsspec" not in load_lines({"lora": loras[0]}, "out")
    assert 'pipe.load_lora_weights("here", weight_name="c.safetensors", adapter_name="lora_2")' in several


def test_many_images_and_none(tmp_path: Path) -> None:
    dom = made(tmp_path / "many", images_per_prompt=LIMIT + 3, grid=False)
    assert len(dom.all("img")) == LIMIT and f"The first {LIMIT} of {LIMIT + 3}" in dom.text
    assert not (tmp_path / "many/grid.png").exists()
    dom = made(tmp_path / "none", failed=1)
    report = json.loads((tmp_path / "none/report.json").read_text())
    assert not dom.all("img") and "0 of 1 images" in dom.text and report["pictures_per_second"] is None


def code(page: str) -> str:
    return Dom(re.findall(r"<pre><code>(.*?)</code>", page, re.DOTALL)[0]).text
