"""The options that say what the columns of a dataset are called."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ray_diffsynth.config import PreprocessConfig
from ray_diffsynth.data.dataset import read_dataset
from ray_diffsynth.errors import ConfigError
from ray_diffsynth.pipelines.core.columns import check_columns, dataset_spec
from ray_diffsynth.pipelines.core.errors import PipelineError
from ray_diffsynth.pipelines.qwen_image_edit import QwenImageEditPipeline
from ray_diffsynth.pipelines.wan.pipeline import WanPipeline
from ray_diffsynth.tasks import get_task

OPTIONS: dict[str, Any] = {
    "image_column": "photo",
    "caption_column": "caption",
    "column_map": {"edit_image": "before"},
    "extra_inputs": "edit_image",
    "data_file_keys": "image,edit_image",
}


def config(**options: Any) -> PreprocessConfig:
    return PreprocessConfig(model="tiny", output_path="out", **{"dataset_base_path": "data", **options})


def test_the_columns_of_a_file_by_their_names(tmp_path: Path) -> None:
    pipe = QwenImageEditPipeline.skeleton()
    (tmp_path / "metadata.csv").write_text("before,photo,caption\nb.png,a.png,a night\n")
    spec = dataset_spec(pipe, config(dataset_base_path=str(tmp_path), **OPTIONS), {})
    check_columns(pipe, get_task("sft"), config(**OPTIONS))
    assert spec.column_names == {"edit_image": "before", "image": "photo", "prompt": "caption"}
    (row,) = read_dataset(spec, None).rows()
    assert row == {"sample_id": "a.png", "image": "a.png", "prompt": "a night", "edit_image": "b.png"}


def test_the_column_of_a_family_of_videos() -> None:
    spec = dataset_spec(WanPipeline.skeleton(), config(image_column="clip", dataset_split="test"), {})
    assert spec.column_names == {"video": "clip"} and spec.split == "test"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"column_map": {"photo": "image"}}, "--column_map photo: no input of that name is read; its inputs are"),
        ({"image_column": "a", "column_map": {"image": "b"}}, "--image_column a and --column_map name two columns"),
    ],
)
def test_names_that_reach_nobody_are_refused(options: dict[str, Any], words: str) -> None:
    pipe = QwenImageEditPipeline.skeleton()
    with pytest.raises(PipelineError, match=words):
        check_columns(pipe, get_task("sft"), config(**options))
        dataset_spec(pipe, config(**options), {})


def test_a_column_is_a_name() -> None:
    with pytest.raises(ConfigError, match="column_map: control is 3; write the name of a column"):
        config(column_map={"control": 3})
