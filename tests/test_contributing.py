"""CONTRIBUTING's table is done as it says: each thing is added to a copy of the package and used, its files counted."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
Edit = Callable[[str], str]


def after(line: str, new: str) -> Edit:
    """Put `new` behind the one place that says `line`."""

    def edit(text: str) -> str:
        assert text.count(line) == 1, f"{line!r} stands {text.count(line)} times"
        return text.replace(line, f"{line}{new}")

    return edit


def before(line: str, new: str) -> Edit:
    def edit(text: str) -> str:
        assert text.count(line) == 1, f"{line!r} stands {text.count(line)} times"
        return text.replace(line, f"{new}{line}")

    return edit


def both(first: Edit, second: Edit) -> Edit:
    return lambda text: second(first(text))


def whole(new: str) -> Edit:
    """A file of its own."""

    def edit(text: str) -> str:
        assert not text
        return new

    return edit


OPTION = '''    caption_twinkle: int = option(3, least=1)
    """How often a caption twinkles."""
'''
TRACKER = """class Paper(Tracker):
    requires = ""

    def __init__(self, plan: TrainPlan, after: int) -> None:
        self._path = join(plan.output_path, "paper.txt")

    def write(self, metrics: Mapping[str, Any]) -> None:
        write_bytes_atomic(self._path, str(metrics["loss"]).encode())

    def close(self) -> None: ...


"""
SAMPLING = """def late_position(u: float, settings: TimestepSampling) -> float:
    return 0.75 + u / 4


"""
READER = """def read_captions(path: str) -> RawTable:
    lines = [line.split("|") for line in read_file(path).decode().splitlines()]
    rows = [RawRow(at, f"{path}:{at}", {"image": a, "prompt": b}) for at, (a, b) in enumerate(lines, 1)]
    return RawTable(("image", "prompt"), tuple(rows))


"""
FAMILY = """from ray_diffsynth.pipelines import BasePipeline, Part


class MyPipeline(BasePipeline):
    version = 1
    family = "mine"
    schedule = "Z-Image"
    parts = {"dit": Part("transformer", "diffusers:ZImageTransformer2DModel")}
"""
TASK = """from dataclasses import dataclass

import torch

from ray_diffsynth.tasks.base import LossOutput
from ray_diffsynth.tasks.sft import SFT


@dataclass(frozen=True)
class Nothing(SFT):
    name = "nothing"

    def loss(self, pipe, batch, keys):
        each = torch.zeros(len(keys))
        return LossOutput(each.mean(), each, each)
"""
EDITS: Mapping[str, Mapping[str, Edit]] = {
    "option": {"ray_diffsynth/config/timesteps.py": before("    def check(self)", OPTION + "\n")},
    "tracker": {
        "ray_diffsynth/training/report/trackers.py": both(
            before("TRACKERS: dict", TRACKER), after('    "csv": CsvFile,\n', '    "paper": Paper,\n')
        )
    },
    "timestep sampling": {
        "ray_diffsynth/diffusion/timestep_sampling.py": both(
            before("TIMESTEP_SAMPLINGS: dict", SAMPLING),
            after('    "mode": mode_position,\n', '    "late": late_position,\n'),
        )
    },
    "metadata format": {
        "ray_diffsynth/data/formats/__init__.py": both(
            before("READERS: dict", READER), after('    ".tsv": read_tsv,\n', '    ".captions": read_captions,\n')
        )
    },
    "model family outside this repository": {"my_pipeline.py": whole(FAMILY)},
    "task": {
        "ray_diffsynth/tasks/nothing.py": whole(TASK),
        "ray_diffsynth/tasks/registry.py": after(
            "TASKS: dict[str, str] = {\n", '    "nothing": "ray_diffsynth.tasks.nothing:Nothing",\n'
        ),
    },
}

USES: Mapping[str, str] = {
    "option": """
        config = parsed("--caption_twinkle", "7")
        assert config.caption_twinkle == 7 and parsed().caption_twinkle == 3
        refused("caption_twinkle", "--caption_twinkle", "0")
        (folder / "run.yaml").write_text("timesteps:\\n  caption_twinkle: 5\\n")
        assert parsed("--config", str(folder / "run.yaml")).caption_twinkle == 5
        assert "How often a caption twinkles." in " ".join(help_text().split())
        assert identity_of(config)["caption_twinkle"] == 7
    """,
    "tracker": """
        config = parsed("--log_with", "paper")
        refused("paper", "--log_with", "papr")
        from ray_diffsynth.training.report.trackers import Trackers, check_trackers
        check_trackers(config)
        with Trackers(SimpleNamespace(config=config, output_path=str(folder)), after=0) as trackers:
            trackers.write({"step": 1, "loss": 0.5})
        assert (folder / "paper.txt").read_text() == "0.5"
    """,
    "timestep sampling": """
        config = parsed("--timestep_sampling", "late")
        refused("late", "--timestep_sampling", "lat")
        from ray_diffsynth.diffusion.randomness import SampleKey
        from ray_diffsynth.diffusion.timestep_sampling import TimestepSampling
        assert 0.75 <= TimestepSampling("late").position(SampleKey(0, 0, 0, "a")) < 1
        from ray_diffsynth.tasks import get_task
        assert get_task(config.task, timestep_sampling="late").timestep_sampling == "late"
    """,
    "metadata format": """
        (folder / "a.png").write_bytes(b"")
        (folder / "metadata.captions").write_text("a.png|a cat\\n")
        from ray_diffsynth.data.metadata import read_metadata
        table = read_metadata(str(folder), str(folder / "metadata.captions")).table
        assert table["prompt"].to_pylist() == ["a cat"] and table["sample_id"].to_pylist() == ["a.png"]
    """,
    "model family outside this repository": """
        from ray_diffsynth.pipelines.registry import get_pipeline_class
        family = get_pipeline_class("my_pipeline")
        assert family.family == "mine" and family.skeleton().dit is None
        assert parsed("--family", "my_pipeline").family == "my_pipeline"
    """,
    "task": """
        assert parsed("--task", "nothing:train").reads_cache and not parsed("--task", "nothing").reads_cache
        refused("nothing:train", "--task", "nothin:train")
        from ray_diffsynth.tasks import get_task
        task = get_task("nothing:train", weighting="none")
        assert task.name == "nothing" and float(task.loss(None, {}, ["a", "b"]).loss) == 0
    """,
}

HEAD = """
import contextlib, io, sys
from pathlib import Path
from types import SimpleNamespace
import ray_diffsynth
from ray_diffsynth.config import TrainConfig
from ray_diffsynth.config.flags import parse
from ray_diffsynth.config.options import identity_of

folder = Path(sys.argv[1])
assert Path(ray_diffsynth.__file__).is_relative_to(folder), ray_diffsynth.__file__


def parsed(*flags):
    given = ["--model", "m", "--dataset_base_path", "d", "--output_path", str(folder / "out"), *flags]
    return parse(TrainConfig, given, prog="train")


def ended(*flags):
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            parsed(*flags)
        except SystemExit as end:
            return end.code, said.getvalue()
    raise AssertionError(f"{flags} were taken")


def refused(named, *flags):
    code, said = ended(*flags)
    assert code == 2 and named in said, said


def help_text():
    code, said = ended("--help")
    assert code == 0
    return said
"""


def table() -> dict[str, tuple[list[str], int]]:
    """What CONTRIBUTING says: the thing -> the files that are named, and how many are touched."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| an? ([^|]+?) \| ([^|]+) \| (\d) \|$", text, re.MULTILINE)
    return {thing: (re.findall(r"`([\w./<>]+\.py)`", where), int(count)) for thing, where, count in rows}


def test_the_table_names_files_that_are_there() -> None:
    found = table()
    assert set(EDITS) <= set(found) and len(found) >= 10
    for thing, (files, count) in found.items():
        assert files, thing
        there = [name for name in files if "<" not in name and name != "my_pipeline.py"]
        assert len(files) >= count, thing
        assert all((ROOT / name).exists() for name in there), (thing, there)


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("copy")
    shutil.copytree(
        ROOT / "ray_diffsynth", folder / "ray_diffsynth", ignore=shutil.ignore_patterns("__pycache__", "weights")
    )
    return folder


@pytest.mark.parametrize("thing", EDITS)
def test_a_thing_is_added_by_as_many_files_as_the_table_says(thing: str, copy: Path) -> None:
    files, count = table()[thing]
    assert len(EDITS[thing]) == count
    for name, edit in EDITS[thing].items():
        path = copy / name
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        path.write_text(edit(text), encoding="utf-8")
        told = [re.sub(r"<\w+>", r"\\w+", known) for known in files]
        assert any(re.match(known, name) for known in told), f"{name} is not named by the table ({files})"
    script = copy / "use.py"
    body = "\n".join(line[8:] for line in USES[thing].splitlines())
    script.write_text(f"{HEAD}\n{body}\n", encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(copy)}
    ran = subprocess.run(
        [sys.executable, str(script), str(copy)], env=environment, cwd=copy, capture_output=True, text=True, timeout=300
    )
    assert ran.returncode == 0, ran.stderr
