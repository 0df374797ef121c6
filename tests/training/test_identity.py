"""What a message says of two runs that differ: both values, in the words of the user."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ray_diffsynth.plan.run_plan import RunPlan
from ray_diffsynth.training.checkpoint import CheckpointError
from ray_diffsynth.training.data.opening import open_data
from ray_diffsynth.training.identity import check_identity, identity
from tests.training.conftest import CacheMaker
from tests.training.helpers import make_config, train_here


def test_differences_are_named() -> None:
    check_identity({"seed": 0}, {"seed": 0}, "x")
    check_identity({"seed": 0, "no_more": 1}, {"seed": 0, "new": 2}, "x", {"new": 2})
    with pytest.raises(CheckpointError, match=r"\(new: 2 there, 3 here\)"):
        check_identity({"seed": 0}, {"seed": 0, "new": 3}, "x", {"new": 2})
    with pytest.raises(
        CheckpointError, match=r"lora_rank: nothing there, 4 here; seed: 0 there, 1 here.*--resume never"
    ):
        check_identity({"seed": 0}, {"seed": 1, "lora_rank": 4}, "x")


@pytest.mark.parametrize(
    ("name", "values", "positions", "message"),
    [
        ("data", ("aa", "bb"), ({"samples": 12}, {"samples": 13}), "data: 12 samples then, 13 now"),
        ("data", ("aa", "bb"), ({"samples": 12}, {"samples": 12}), "data: 12 samples then and now, but not the same"),
        ("data", ("aa", "bb"), ({}, {"samples": 13}), "data: other samples then, 13 now"),
        (
            "lr_total_steps",
            (8, 9),
            ({"max_steps": 8, "num_epochs": None}, {"max_steps": 9, "num_epochs": None}),
            "(max_steps: 8 there, 9 here)",
        ),
        (
            "lr_total_steps",
            (10, 15),
            ({"max_steps": None, "num_epochs": 2}, {"max_steps": None, "num_epochs": 3}),
            "num_epochs: 2 there, 3 here; which is 10 steps there, 15 here",
        ),
        ("lr_total_steps", (8, 9), ({}, {"max_steps": 9, "num_epochs": None}), "falls: 8 steps there, 9 steps here"),
        (
            "weights",
            ({"dit": "a", "vae": "c"}, {"dit": "b", "vae": "c"}),
            ({}, {}),
            "(weights of dit: a there, b here)",
        ),
        ("lora_target_modules", ("a," * 60 + "x", "a," * 60 + "y"), ({}, {}), "…a,a,a,a,a,x there, …a,a,a,a,a,y here"),
    ],
)
def test_the_words_of_a_difference(name: str, values: Any, positions: Any, message: str) -> None:
    with pytest.raises(CheckpointError) as error:
        check_identity({name: values[0]}, {name: values[1]}, "x", positions=positions)
    assert message in str(error.value) and "lr_total_steps" not in str(error.value)


def test_what_has_no_effect_is_no_part_of_it(tiny_qwen: Path, make_cache: CacheMaker, tmp_path: Path) -> None:
    """A cache decides the sizes and the columns of its samples: a resume does not compare them."""
    given: dict[str, Any] = {"max_steps": 1, "log_with": "none"}
    train_here(make_config(tiny_qwen, make_cache(), tmp_path, **given))
    given |= {"max_pixels": 4096, "data_file_keys": "picture", "extra_inputs": "mask", "resolution": "64"}
    given |= {"dataset_metadata_path": "elsewhere.csv", "max_steps": 2}
    train_here(make_config(tiny_qwen, make_cache(), tmp_path, **given))
    with pytest.raises(CheckpointError, match=r"seed: 0 there, 7 here\)"):
        train_here(make_config(tiny_qwen, make_cache(), tmp_path, **given, seed=7))
    with pytest.raises(CheckpointError, match=r"is beyond the 1 steps .* raise max_steps"):
        train_here(make_config(tiny_qwen, make_cache(), tmp_path, max_steps=1))


def test_unsplit_the_sizes_are_part_of_it(tiny_qwen: Path, images: Path, tmp_path: Path) -> None:
    plan = RunPlan.resolve(make_config(tiny_qwen, images, tmp_path, task="sft", max_pixels=4096))
    assert identity(plan, open_data(plan))["max_pixels"] == 4096
