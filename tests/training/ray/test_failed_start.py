"""A group of workers whose process group cannot be made, as when one of them is cut off meanwhile."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import ray.util

from ray_diffsynth.training.ray import fit, job
from ray_diffsynth.training.ray.backend import BackendConfig
from ray_diffsynth.training.ray.process_group import ProcessGroup
from tests.training.conftest import CacheMaker
from tests.training.helpers import make_config


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_what_a_failed_start_reserved_is_free_for_the_next_one(
    local_ray: None, tiny_qwen: Path, make_cache: CacheMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of the two workers takes a whole CPU of the two: the second group needs those of the first."""
    failed = tmp_path / "failed"

    class Backend(ProcessGroup):
        def on_start(self, worker_group: Any, backend_config: Any) -> None:
            if not failed.exists():
                failed.touch()
                raise RuntimeError("Gloo connectFullMesh failed (the test says so)")
            super().on_start(worker_group, backend_config)

    class Config(BackendConfig):
        @property
        def backend_cls(self) -> type[Any]:
            return Backend

    monkeypatch.setattr(fit, "BackendConfig", Config)
    config = make_config(tiny_qwen, make_cache(), tmp_path / "lora", num_workers=2, max_steps=2, resources={"CPU": 1.0})
    assert job.run(config)["counts"]["steps"] == 2
    assert failed.exists()
    assert all(group["state"] == "REMOVED" for group in ray.util.placement_group_table().values())
