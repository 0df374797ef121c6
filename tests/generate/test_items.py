"""Which images are made, under which names; the sheet; and the LoRA's strength, without Ray."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ray_diffsynth.config import GenerateConfig
from ray_diffsynth.data.formats import DatasetError
from ray_diffsynth.data.media import MediaError
from ray_diffsynth.data.spec import file_list
from ray_diffsynth.data.video import load_first_frame, probe_video
from ray_diffsynth.diffusion.flow_match import ScheduleError
from ray_diffsynth.errors import ConfigError, UserError
from ray_diffsynth.generate.grid import columns_of, draw_grid
from ray_diffsynth.generate.items import (
    GenerateError,
    Item,
    check_arguments,
    family_defaults,
    makes_videos,
    metadata_rows,
    plan_items,
)
from ray_diffsynth.generate.lora import attach_loras, joined, set_lora_scale
from ray_diffsynth.generate.painter import mp4
from ray_diffsynth.models.lora import add_lora, export_lora, fuse_lora, lora_parameters, lora_state
from ray_diffsynth.models.lora_file import LoraError
from ray_diffsynth.pipelines.core.base import BasePipeline
from ray_diffsynth.pipelines.core.calling import image_params
from ray_diffsynth.pipelines.core.errors import PipelineError
from ray_diffsynth.pipelines.qwen_image.pipeline import QwenImagePipeline
from ray_diffsynth.pipelines.qwen_image_edit import QwenImageEditPipeline
from ray_diffsynth.pipelines.qwen_image_edit_plus import QwenImageEditPlusPipeline
from ray_diffsynth.pipelines.wan_i2v import WanImageToVideoPipeline
from ray_diffsynth.plan.prompts import prompts_of

IDENTITY = {"weights": "a"}


def config(**changes: Any) -> GenerateConfig:
    values: dict[str, Any] = {"model": "tiny", **changes}
    return GenerateConfig(**({"prompt": "a cat"} | values if "prompt_path" not in values else values))


def planned(given: GenerateConfig, identity: Any = IDENTITY) -> list[Item]:
    return plan_items(given, prompts_of(given), QwenImagePipeline, identity)


def test_prompts_from_files(tmp_path: Path) -> None:
    lines = tmp_path / "p.txt"
    lines.write_text("a cat\n\n  zwei Hunde, groß\n", encoding="utf-8")
    assert [p.prompt for p in prompts_of(config(prompt_path=str(lines)))] == ["a cat", "zwei Hunde, groß"]
    table = tmp_path / "p.csv"
    table.write_text('prompt,seed,height,width,negative_prompt\n"a, b",7,64,32,ugly\nc,,,,\n')
    first, second = prompts_of(config(prompt_path=str(table)))
    assert (first.prompt, first.seed, first.height, first.width, first.negative_prompt) == ("a, b", 7, 64, 32, "ugly")
    assert (second.prompt, second.seed, second.height) == ("c", None, None)
    (tmp_path / "q.jsonl").write_text(json.dumps({"prompt": "x", "seed": 3}))
    assert prompts_of(config(prompt_path=str(tmp_path / "q.jsonl")))[0].seed == 3


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("p.csv", "text\na\n", "no column 'prompt'"),
        ("p.csv", "prompt,seed\na,x\n", r"p.csv:2: the column 'seed' holds 'x'"),
        ("p.csv", "prompt,seed\na,1,2\n", "3 fields where the header has 2"),
        ("p.txt", "\n", "holds no prompt"),
        ("p.md", "a", "supported are .txt"),
        ("absent.txt", None, "does not exist"),
        ("absent.csv", None, "absent.csv does not exist; check --prompt_path"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused_before_anything_is_made(
    tmp_path: Path, name: str, text: str | None, message: str
) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(DatasetError, match=message):
        prompts_of(config(prompt_path=str(tmp_path / name)))


def test_what_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_bytes(b"a cat \xff\xfe")
    with pytest.raises(DatasetError, match="p.txt is not UTF-8"):
        prompts_of(config(prompt_path=str(tmp_path / "p.txt")))


def test_sizes_and_steps_that_cannot_be_are_refused_before_ray_starts() -> None:
    check_arguments(planned(config(height=64, width=32)), QwenImagePipeline)
    check_arguments(planned(config()), QwenImagePipeline)
    with pytest.raises(PipelineError, match="height=63 is not a multiple of 16; use 48 or 64"):
        check_arguments(planned(config(height=63, width=64)), QwenImagePipeline)
    check_arguments(planned(config(num_inference_steps=2)), QwenImagePipeline)
    with pytest.raises(ScheduleError, match="cannot be run in 1 step; use num_inference_steps=2 or more"):
        check_arguments(planned(config(num_inference_steps=1)), QwenImagePipeline)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt_path": "p.txt", "prompt": "a"}, "either prompt"),
        ({"height": 64}, "give both"),
        ({"seeds": "1,x"}, "'x' is not a whole number"),
        ({"lora": "a", "lora_scale": "1,much"}, "could not convert"),
        ({"lora_scale": "0.5"}, "without lora"),
        ({"images_per_prompt": 0}, "at least 1"),
        ({"dtype": "bf16"}, "did you mean bfloat16"),
        ({"rand_device": "gpu"}, "use cpu or cuda"),
    ],
)
def test_what_cannot_work_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config(**fields)
    with pytest.raises(ConfigError, match="either prompt"):
        GenerateConfig(model="tiny")


def test_each_image_once_under_a_name_that_holds_all_that_decides_it(tmp_path: Path) -> None:
    lines = tmp_path / "p.txt"
    lines.write_text("a cat\na dog\na cat\n")
    given = {"prompt_path": str(lines), "seeds": "1,2"}
    items = planned(config(**given))
    assert [(item.prompt, item.seed) for item in items] == [("a cat", 1), ("a cat", 2), ("a dog", 1), ("a dog", 2)]
    assert items[0].file.startswith("pictures/a-cat-") and items[0].file.endswith(".png")
    assert len({item.file for item in items}) == 4
    lines.write_text("a bird\na cat\n")  # what is before it does not matter
    assert items[0].file in {item.file for item in planned(config(**given))}
    again = {"seeds": "1"}
    changes: list[dict[str, Any]] = [
        {}, {"num_inference_steps": 9}, {"cfg_scale": 2.0}, {"height": 64, "width": 64}, {"negative_prompt": "b"},
        {"rand_device": "cuda"}, {"prompt": "A cat"}, {"lora": "x", "lora_scale": "0.5"},
    ]  # fmt: skip
    names = [planned(config(**again, **change))[0].file for change in changes]
    names += [planned(config(**again), {"weights": "b"})[0].file]
    assert len(set(names)) == len(names)


def test_seeds(tmp_path: Path) -> None:
    table = tmp_path / "p.csv"
    table.write_text("prompt,seed\na,\nb,70\nc,\n")
    items = planned(config(prompt_path=str(table), seed=5, images_per_prompt=2))
    assert [(item.prompt, item.seed) for item in items] == [
        ("a", 5), ("a", 6), ("b", 70), ("b", 71), ("c", 9), ("c", 10),
    ]  # fmt: skip
    scaled = planned(config(lora="x", lora_scale="0,0.5,1", seeds="3"))
    assert [item.lora_scale for item in scaled] == [0.0, 0.5, 1.0]


def test_the_metadata_is_what_direct_distill_reads() -> None:
    given = config(seeds="3", cfg_scale=2.5, student_steps=6)
    (row,) = metadata_rows(given, planned(given), QwenImagePipeline)
    assert (row["seed"], row["rand_device"], row["num_inference_steps"], row["cfg_scale"]) == (3, "cpu", 6, 1)
    assert row["teacher_cfg_scale"] == 2.5
    assert row["teacher_num_inference_steps"] == family_defaults(QwenImagePipeline)["num_inference_steps"] > 1
    assert not makes_videos(QwenImagePipeline)


def test_an_argument_that_the_family_does_not_take_is_refused() -> None:
    class Plain(BasePipeline):
        def __call__(self, prompt: str, seed: int) -> Image.Image:
            raise NotImplementedError

    given = config(negative_prompt="ugly")
    with pytest.raises(GenerateError, match="Plain takes no negative_prompt"):
        plan_items(given, prompts_of(given), Plain, IDENTITY)


def test_the_grid_has_a_column_for_each_strength() -> None:
    assert [columns_of(9, 3, 1), columns_of(6, 1, 2), columns_of(7, 1, 1)] == [3, 2, 3]
    images = [Image.new("RGB", (64, 32), (40 * i, 0, 0)) for i in range(6)]
    sheet = draw_grid(images, [f"image {i} " * 9 for i in range(6)], 3)
    assert sheet.size == (3 * (256 + 8) + 8, 2 * (128 + 18 + 8) + 8)
    assert sheet.getpixel((8 + 264 + 5, 8 + 18 + 5)) == (40, 0, 0)
    assert sheet.getpixel((8 + 5, 8 + 18 + 128 + 8 + 18 + 5)) == (120, 0, 0)
    large = draw_grid([Image.new("RGB", (1024, 512))], ["x"], 1)
    assert large.size == (256 + 16, 128 + 18 + 16)


def test_a_video_is_written_as_the_dataset_reads_it(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (48, 32), (50 * i, 80, 0)) for i in range(5)]
    (tmp_path / "a.mp4").write_bytes(mp4(frames, 16))
    info = probe_video(str(tmp_path / "a.mp4"))
    assert (info.width, info.height, info.num_frames, round(info.fps)) == (48, 32, 5, 16)
    assert np.abs(np.asarray(load_first_frame(str(tmp_path / "a.mp4"))).astype(int) - [0, 80, 0]).max() < 12


def written(pipe: Any, path: Path, rank: int, seed: int, targets: str) -> dict[str, torch.Tensor]:
    """A random LoRA of `pipe.dit` in a file of our own layout."""
    info = add_lora(pipe.dit, rank=rank, alpha=2 * rank, target_modules=targets, seed=seed, name="dit")
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in lora_parameters(pipe.dit).items():
        if "lora_B" in name:
            parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)
    state = lora_state(pipe.dit)
    export_lora(state, prefix=pipe.lora_prefix, rank=rank, alpha=info.alpha, path=str(path))
    return {key: 2 * value if "lora_B" in key else value for key, value in state.items()}


@pytest.fixture
def load(tiny_qwen: Path) -> Any:
    return lambda: QwenImagePipeline.from_pretrained(tiny_qwen, torch_dtype=torch.float32)


def test_loras_of_two_files_add_up_at_any_strength(load: Any, tmp_path: Path) -> None:
    first = written(load(), tmp_path / "a.safetensors", 2, 1, "to_q,to_k")
    second = written(load(), tmp_path / "b.safetensors", 4, 2, "to_q,to_out.0")
    size = {"height": 32, "width": 32, "num_inference_steps": 2, "cfg_scale": 1.0, "seed": 0, "output_type": "latent"}
    plain = load()("a cat", **size)
    pipe = load()
    attach_loras(pipe, [str(tmp_path / "a.safetensors"), str(tmp_path / "b.safetensors")])
    for scale in (1.0, 0.5, 0.0, 1.0):  # and back
        set_lora_scale(pipe, scale)
        fused = load()
        for state in (first, second):
            fuse_lora(fused.dit, state, scale)
        got = pipe("a cat", **size)
        torch.testing.assert_close(got, fused("a cat", **size), rtol=0, atol=1e-4)
        assert torch.equal(got, plain) == (scale == 0)
    assert {len(value) for key, value in joined([first, second]).items() if "lora_A" in key} == {6}


def test_a_lora_of_another_model_is_refused(load: Any, tmp_path: Path) -> None:
    state = {"blocks.0.q.lora_A.weight": torch.ones(2, 4), "blocks.0.q.lora_B.weight": torch.ones(4, 2)}
    export_lora(state, prefix="diffusion_model.", rank=2, alpha=2, path=str(tmp_path / "x.safetensors"))
    with pytest.raises(LoraError, match=r"x.safetensors names 1 layers that the dit does not have, such as blocks.0.q"):
        attach_loras(load(), [str(tmp_path / "x.safetensors")])


def test_a_lora_of_the_text_encoder(load: Any, tmp_path: Path) -> None:
    pipe = load()
    targets = "re:.*language_model.layers.1.self_attn.q_proj"
    add_lora(pipe.text_encoder, rank=2, alpha=2, target_modules=targets, seed=0, name="text_encoder")
    for name, parameter in lora_parameters(pipe.text_encoder).items():
        if "lora_B" in name:
            parameter.data.fill_(0.1)
    path = str(tmp_path / "te.safetensors")
    export_lora(lora_state(pipe.text_encoder), prefix="text_encoder.", rank=2, alpha=2, path=path)
    other = load()
    with torch.no_grad():
        before = other.encode_prompts(["a cat"])[0]
        attach_loras(other, [path])
        torch.testing.assert_close(other.encode_prompts(["a cat"])[0], pipe.encode_prompts(["a cat"])[0])
        set_lora_scale(other, 0.0)
        assert np.array_equal(other.encode_prompts(["a cat"])[0].numpy(), before.numpy())


def edits(folder: Path, rows: list[dict[str, Any]]) -> GenerateConfig:
    (folder / "prompts.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return config(prompt_path=str(folder / "prompts.jsonl"))


def test_images_beside_the_prompts(tmp_path: Path) -> None:
    for name, color in (("a", "red"), ("b", "blue")):
        Image.new("RGB", (64, 32), color).save(tmp_path / f"{name}.png")
    pipe = QwenImageEditPlusPipeline.skeleton()
    assert image_params(pipe) == {"input_image": False, "edit_image": True}
    assert image_params(WanImageToVideoPipeline.skeleton()) == {"input_image": True}
    assert image_params(QwenImagePipeline.skeleton()) == {"input_image": False}
    rows = [{"prompt": "paint it", "edit_image": "a.png"}, {"prompt": "mix", "edit_image": ["a.png", "b.png"]}]
    given = edits(tmp_path, rows)
    prompts = prompts_of(given, image_params(pipe))
    one, two = plan_items(given, prompts, pipe, IDENTITY)
    assert dict(one.images) == {"edit_image": str(tmp_path / "a.png")}
    assert dict(two.images) == {"edit_image": (str(tmp_path / "a.png"), str(tmp_path / "b.png"))}
    found = [row["edit_image"] for row in metadata_rows(given, [one, two], pipe)]
    assert found[0] == str(tmp_path / "a.png") and file_list(found[1]) == [
        str(tmp_path / n) for n in ("a.png", "b.png")
    ]

    # The name follows the content, wherever the file lies.
    shutil.copy(tmp_path / "a.png", tmp_path / "c.png")
    again = edits(tmp_path, [{**rows[0], "edit_image": "c.png"}])
    assert plan_items(again, prompts_of(again, image_params(pipe)), pipe, IDENTITY)[0].file == one.file
    Image.new("RGB", (64, 32), "green").save(tmp_path / "c.png")
    assert plan_items(again, prompts_of(again, image_params(pipe)), pipe, IDENTITY)[0].file != one.file


@pytest.mark.parametrize("family", [QwenImageEditPipeline, WanImageToVideoPipeline])
def test_an_image_that_is_missing_is_said_before_anything_is_loaded(family: Any, tmp_path: Path) -> None:
    needed = image_params(family.skeleton())
    name = next(name for name, is_needed in needed.items() if is_needed)
    with pytest.raises(GenerateError, match=f"has no {name}, which this family needs: give --prompt_path a csv"):
        prompts_of(config(), needed)
    given = edits(tmp_path, [{"prompt": "a", name: "absent.png"}])
    with pytest.raises(MediaError, match="absent.png: no such file"):
        plan_items(given, prompts_of(given, needed), family, IDENTITY)
    given = edits(tmp_path, [{"prompt": "a", name: 3}])
    with pytest.raises(DatasetError, match=f"the column '{name}' holds 3, not the path"):
        prompts_of(given, needed)


def test_settings_of_the_pipeline() -> None:
    plain, tiled = (planned(config(pipeline_settings=given)) for given in (None, {"tiled": True}))
    assert dict(tiled[0].arguments)["tiled"] is True and plain[0].file != tiled[0].file
    for given, message in (({"seed": 3}, "does not sample by 'seed'"), ({"tiled": 1}, "give true or false")):
        with pytest.raises(UserError, match=message):
            planned(config(pipeline_settings=given))
