"""docs/families.md says what the classes say, and its commands are accepted."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from ray_diffsynth.config import PreprocessConfig, TrainConfig
from ray_diffsynth.config.flags import parse
from ray_diffsynth.pipelines.registry import FAMILIES, get_pipeline_class

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "families.md").read_text(encoding="utf-8")
JOBS = {"preprocess": PreprocessConfig, "train": TrainConfig}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_in_the_table(family: str) -> None:
    assert re.search(rf"^\| `{family}` \|", PAGE, re.MULTILINE)


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "flux"])
def test_the_default_targets_are_named(family: str) -> None:
    flat = " ".join(PAGE.split())
    assert f"`{', '.join(get_pipeline_class(family).lora_targets)}`" in flat


def test_all_names_of_diffsynth_are_explained() -> None:
    part = PAGE.partition("## FLUX.1")[2].partition("\n## ")[0]
    aliases = get_pipeline_class("flux").lora_aliases
    assert [name for name in aliases if f"`{name}`" not in part] == []
    layers = {layer.partition("*.")[2] for value in aliases.values() for layer in value.split(",")}
    assert [layer for layer in layers if layer not in part] == []


def test_the_commands_are_accepted() -> None:
    code = "".join(re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL)).replace("\\\n", " ")
    lines = [shlex.split(line) for line in code.splitlines() if line.strip()]
    assert len(lines) >= 8
    for words in lines:
        assert words[0] == "ray-diffsynth"
        config = parse(JOBS[words[1]], words[2:])
        assert config.model and config.output_path
