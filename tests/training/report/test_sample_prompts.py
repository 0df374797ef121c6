"""What sample images show is planned before anything starts: prompts, sizes, images to start from."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ray_diffsynth.data.formats import DatasetError
from ray_diffsynth.diffusion.flow_match import ScheduleError
from ray_diffsynth.errors import UserError
from ray_diffsynth.plan.run_plan import RunPlan
from ray_diffsynth.training.errors import TrainingError
from ray_diffsynth.training.ray import job
from ray_diffsynth.training.report.sample_prompts import SamplePrompt, plan_samples, read_prompts
from tests.families.cases import load_case, make_image
from tests.training.conftest import CacheMaker
from tests.training.helpers import make_config


@pytest.fixture(scope="module")
def family_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def build(family: str) -> Path:
        if family not in made:
            made[family] = load_case(family).build(tmp_path_factory.mktemp("families") / family)
        return made[family]

    return build


def planned(model: Path, folder: Path, prompts: str, **options: Any) -> list[SamplePrompt]:
    options = {"task": "sft", **options}
    return plan_samples(
        RunPlan.resolve(make_config(model, folder, folder / "out", validation_prompts=prompts, **options))
    )


def texts(given: str) -> list[str]:
    return [prompt.prompt for prompt in read_prompts(given, {})]


def test_prompts_from_a_file_and_from_the_option(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a cat\n\n a dog \n")
    (tmp_path / "marked.txt").write_bytes(b"\xef\xbb\xbfa cat\r\na dog\r\n")
    (tmp_path / "prompts").write_text("a cat\na dog\n")
    (tmp_path / "prompts.csv").write_text("seed,prompt\n5,a cat\n,a dog\n")
    for given in ("prompts.txt", "marked.txt", "prompts", "prompts.csv"):
        assert texts(str(tmp_path / given)) == ["a cat", "a dog"], given
    assert texts("a cat | a dog") == ["a cat", "a dog"]
    assert texts("a" * 5000) == ["a" * 5000]  # no file's name is so long
    with pytest.raises(TrainingError, match="has no prompt"):
        texts(" | ")
    for absent in ("prompts/absent.txt", "absent.csv", "absent.jsonl", "absent.tsv"):
        with pytest.raises(TrainingError, match=f"{absent} does not exist; give a text file"):
            texts(absent)
    (tmp_path / "binary.txt").write_bytes(b"\xff\xff")
    with pytest.raises(DatasetError, match="binary.txt is not UTF-8"):
        texts(str(tmp_path / "binary.txt"))


def test_a_row_may_say_its_seed_size_and_negative_prompt(tiny_qwen: Path, tmp_path: Path) -> None:
    rows = [{"prompt": "a", "seed": 9, "height": 32, "width": 48, "negative_prompt": "blur"}, {"prompt": "b"}]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, rows)))
    one, two = planned(tiny_qwen, tmp_path, str(tmp_path / "p.jsonl"), height=64, width=64, seed=3)
    assert one == SamplePrompt("a", 9, (("height", 32), ("negative_prompt", "blur"), ("width", 48)))
    assert two == SamplePrompt("b", 4, (("height", 64), ("width", 64)))


def test_they_follow_the_size_that_is_trained(
    tiny_qwen: Path, make_cache: CacheMaker, tmp_path: Path, family_folder: Callable[[str], Path]
) -> None:
    def arguments(model: Path, folder: Path, **options: Any) -> dict[str, Any]:
        (sample,) = planned(model, folder, "a cat", **options)
        return dict(sample.arguments)

    # Of a cache the bucket of the most samples: six of 64x64, four of 32x64.
    assert arguments(tiny_qwen, make_cache(), task="sft:train") == {"height": 64, "width": 64}
    assert arguments(tiny_qwen, make_cache(), task="sft:train", height=32, width=32) == {"height": 32, "width": 32}
    wan = family_folder("wan")
    assert arguments(wan, tmp_path, num_frames=5, height=32, width=48) == {"num_frames": 5, "height": 32, "width": 48}
    assert arguments(wan, tmp_path)["num_frames"] == 81, "what the run trains"
    settings = {"tiled": True}
    assert arguments(wan, tmp_path, pipeline_settings=settings)["tiled"] is True
    assert "embedded_guidance" not in arguments(
        family_folder("flux"), tmp_path, pipeline_settings={"embedded_guidance": 2.0}
    ), "that of training; sampling has the family's own"


def test_what_cannot_be_drawn_is_refused_before_anything_starts(
    tiny_qwen: Path, tmp_path: Path, family_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    make_image().save(tmp_path / "a.png")
    (tmp_path / "absent.csv").write_text("prompt,edit_image\na cat,gone.png\n")
    (tmp_path / "half.csv").write_text("prompt,height\na cat,64\n")
    (tmp_path / "first.csv").write_text("prompt,input_image\na cat,a.png\n")
    edit, i2v, wan = (family_folder(name) for name in ("qwen_image_edit", "wan_i2v", "wan"))
    cases: list[tuple[Path, str, dict[str, Any], type[UserError], str]] = [
        (edit, "a cat|a dog", {}, TrainingError, "'a cat' has no edit_image, .* give --validation_prompts a csv"),
        (i2v, "a cat", {}, TrainingError, "has no input_image, which this family needs"),
        (edit, str(tmp_path / "absent.csv"), {}, TrainingError, "edit_image .*gone.png of the prompt 'a cat' does not"),
        (tiny_qwen, str(tmp_path / "half.csv"), {}, TrainingError, "a height or a width alone; give both"),
        (tiny_qwen, "a cat", {"height": 40, "width": 64}, UserError, "height=40 is not a multiple of"),
        (wan, "a cat", {"num_frames": 6}, UserError, "num_frames=6 is not a multiple of 4 plus 1"),
    ]
    monkeypatch.setattr(job, "ray_session", lambda *arguments, **options: pytest.fail("Ray would start"))
    for model, prompts, options, kind, message in cases:
        with pytest.raises(kind, match=message):
            planned(model, tmp_path, prompts, **options)
        config = make_config(model, tmp_path, tmp_path / "out", validation_prompts=prompts, task="sft", **options)
        with pytest.raises(kind, match=message):
            job.run(config)
    (sample,) = planned(i2v, tmp_path, str(tmp_path / "first.csv"), num_frames=5, height=32, width=48)
    assert sample.images == (("input_image", str(tmp_path / "a.png")),)


def test_too_few_inference_steps_are_told_before_ray_starts(tiny_qwen: Path, tmp_path: Path) -> None:
    with pytest.raises(ScheduleError, match="cannot be run in 1 step; use num_inference_steps=2 or more"):
        planned(tiny_qwen, tmp_path, "a cat", sample_inference_steps=1)
    (sample,) = planned(tiny_qwen, tmp_path, "a cat", sample_inference_steps=2)
    assert dict(sample.arguments)["num_inference_steps"] == 2
