from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from ray_diffsynth.pipelines.registry import FamilyError, family_of, get_pipeline_class


def write(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def test_family_from_model_index(tmp_path: Path) -> None:
    write(tmp_path / "model_index.json", {"_class_name": "QwenImagePipeline"})
    assert family_of(tmp_path) == family_of(str(tmp_path)) == "qwen_image"


@pytest.mark.parametrize(
    ("part", "config"),
    [
        ("transformer", {"_class_name": "QwenImageTransformer2DModel"}),
        ("vae", {"_class_name": "AutoencoderKLQwenImage"}),
        ("text_encoder", {"architectures": ["Qwen2_5_VLForConditionalGeneration"]}),
    ],
)
def test_family_from_a_part(tmp_path: Path, part: str, config: dict[str, object]) -> None:
    write(tmp_path / part / "config.json", config)
    assert family_of(tmp_path) == "qwen_image"


def test_another_pipeline_of_known_parts_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "model_index.json", {"_class_name": "QwenImageInpaintPipeline"})
    write(tmp_path / "transformer" / "config.json", {"_class_name": "QwenImageTransformer2DModel"})
    with pytest.raises(FamilyError, match=r"QwenImageInpaintPipeline.*Known: .*qwen_image"):
        family_of(tmp_path)


def test_an_empty_folder_says_what_was_looked_at(tmp_path: Path) -> None:
    with pytest.raises(FamilyError, match=r"model_index.json \(absent\).*transformer/config.json \(absent\).*--family"):
        family_of(tmp_path)


def test_a_damaged_config_is_named(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text("{")
    with pytest.raises(FamilyError, match="model_index.json is not JSON"):
        family_of(tmp_path)


def test_unknown_family_names_the_nearest() -> None:
    with pytest.raises(FamilyError, match="did you mean qwen_image"):
        get_pipeline_class("qwen-image")
    with pytest.raises(
        FamilyError, match="unknown family 'no_such_package.pipeline'.*No module named 'no_such_package'"
    ):
        get_pipeline_class("no_such_package.pipeline")


def test_a_pipeline_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = "from ray_diffsynth.pipelines.core.base import BasePipeline\nclass Mine(BasePipeline): ...\n"
    (tmp_path / "my_pipes.py").write_text(source)
    (tmp_path / "my_two.py").write_text(source + "class Other(BasePipeline): ...\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert get_pipeline_class("my_pipes:Mine").__name__ == "Mine"
    assert get_pipeline_class("my_two:Other").__name__ == "Other"
    with pytest.raises(FamilyError, match="defines no pipeline 'Absent'"):
        get_pipeline_class("my_pipes:Absent")
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "__init__.py").write_text("")
    (tmp_path / "own" / "one.py").write_text(source)
    (tmp_path / "own" / "two.py").write_text(source + "class Other(BasePipeline): ...\n")
    assert get_pipeline_class("own.one").__name__ == "Mine"
    with pytest.raises(FamilyError, match="own.two:Class"):
        get_pipeline_class("own.two")


def test_declarations_need_no_torch() -> None:
    """`--help` and the driver's planning stay fast."""
    code = (
        "import sys; import ray_diffsynth.pipelines.registry, ray_diffsynth.pipelines.core.graph, "
        "ray_diffsynth.pipelines.core.unit, ray_diffsynth.diffusion.randomness; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
