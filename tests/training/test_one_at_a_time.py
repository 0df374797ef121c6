"""One output path has one training at a time."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path

import pytest

from ray_diffsynth.cache.errors import CacheError
from ray_diffsynth.cache.lease import LEASE, lease
from ray_diffsynth.training import local
from ray_diffsynth.training.ray import job
from tests.training.conftest import CacheMaker
from tests.training.helpers import make_config


def test_a_second_training_is_refused(
    tiny_qwen: Path, make_cache: CacheMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job, "ray_session", lambda *_, **__: nullcontext())
    monkeypatch.setattr(job, "requester", lambda *_: nullcontext())
    output = tmp_path / "out"
    config = make_config(tiny_qwen, make_cache(), output, max_steps=1)
    with lease(str(output)):
        for run in (local.run, job.run):
            with pytest.raises(CacheError, match=f"{output} is being written by process"):
                run(config)
        assert [path.name for path in output.iterdir()] == [LEASE], "the second training has written something"
    local.run(config)
    assert (output / "report.json").exists()
    assert not (output / LEASE).exists()


def test_a_training_whose_path_was_taken_over_leaves_no_report(
    tiny_qwen: Path, make_cache: CacheMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, train = tmp_path / "out", local.train

    def overtaken(*arguments: object) -> object:
        result = train(*arguments)  # type: ignore[arg-type]
        (output / LEASE).write_text(json.dumps({"owner": "another"}))
        return result

    monkeypatch.setattr(local, "train", overtaken)
    with pytest.raises(CacheError, match="was taken over by another attempt"):
        local.run(make_config(tiny_qwen, make_cache(), output, max_steps=1))
    assert not (output / "report.json").exists()
