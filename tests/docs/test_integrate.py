"""docs/integrate.md builds a family of one's own, docs/distillation.md a student: their code and commands run."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
from PIL import Image
from safetensors.torch import load_file

from ray_diffsynth.demo.draw import draw_dataset
from tests.docs.test_docs import ROOT, blocks, commands, run_command


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_guide(
    local_ray: None,
    importable: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "data").mkdir()
    draw_dataset(tmp_path / "data" / "mine", 4)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.setattr(sys, "path", [str(importable), *sys.path])
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{importable}")
    names: dict[str, object] = {"__name__": "guide"}
    ran = 0
    for block in blocks(ROOT / "docs" / "integrate.md"):
        if block.language == "sh":
            for line in commands(block.code):
                run_command(line, block.place, capsys)
                ran += 1
        elif module := re.match(r"# (\w+/\w+\.py)\n", block.code):
            path = importable / module[1]
            path.parent.mkdir(exist_ok=True)
            (path.parent / "__init__.py").touch()
            path.write_text(block.code)
        elif block.language == "python":
            exec(compile(block.code, block.place, "exec"), names)
    assert ran == 3

    manifest = json.loads((tmp_path / "models/my_cache/manifest.json").read_text())
    assert manifest["family"] == "my_package.my_pipeline"
    assert sorted(manifest["parameters"]) == ["input_latents", "prompt_embeds"]
    lora = load_file(tmp_path / "models/my_lora/epoch-1.safetensors")
    assert any(bool(value.any()) for key, value in lora.items() if "lora_B" in key)
    without, with_lora = (Image.open(path).tobytes() for path in (tmp_path / "models/my_pictures/pictures").iterdir())
    assert without != with_lora


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_page_on_distillation(
    local_ray: None,
    tiny_qwen: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """As it stands, but in small pictures and few steps."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "prompts.txt").write_text("a red circle\na blue square\n")
    (tmp_path / "models" / "Qwen").mkdir(parents=True)
    (tmp_path / "models" / "Qwen" / "Qwen-Image").symlink_to(tiny_qwen)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    for block in blocks(ROOT / "docs" / "distillation.md"):
        for line in commands(block.code) if block.language == "sh" else ():
            run_command(line.replace("1328", "32").replace("_steps 40", "_steps 5"), block.place, capsys)
    cached = json.loads((tmp_path / "models/distill_cache/manifest.json").read_text())
    assert cached["counts"]["samples"] == 4
    read = {"input_latents", "prompt_embeds", "seed", "rand_device", "num_inference_steps"}
    assert set(cached["parameters"]) == read
    pictures = {path: Image.open(path).tobytes() for path in (tmp_path / "data/student/pictures").iterdir()}
    assert len(pictures) == len(set(pictures.values())) == 4
