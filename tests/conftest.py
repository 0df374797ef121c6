"""Fixtures that the whole suite shares."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

# A machine that others load too takes as long as it takes: hypothesis fails what needs more than 0.2 s.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")
# No test may reach for a hub; set before transformers and diffusers are imported.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Ray gives its workers niceness 15. On a machine that others load too they would starve, and Ray's own deadlines pass.
os.environ.setdefault("RAY_worker_niceness", "0")
# A node has five minutes to start in place of Ray's half a one. Ray reads this when it is imported.
os.environ.setdefault("RAY_raylet_start_wait_time_s", "300")
# No test may start a Ray by accident, by the first call that needs one: the session's own could not start any more.
os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")


@pytest.fixture(scope="session")
def tiny_qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny Qwen-Image model, one a session: read it, never write to it."""
    from tests.tiny_models import tiny_qwen_image

    return tiny_qwen_image(tmp_path_factory.mktemp("tiny") / "qwen_image")


@pytest.fixture(scope="session")
def importable(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder on the path of the session's Ray workers, for packages that a test writes (each under its own name)."""
    return tmp_path_factory.mktemp("importable")


@pytest.fixture(scope="session")
def local_ray(importable: Path) -> Iterator[None]:
    """The session's Ray: two CPUs, no dashboard, its own temporary folder."""
    import ray

    from ray_diffsynth.ray_compat import init_local

    with pytest.MonkeyPatch.context() as patched:  # workers inherit it
        patched.setenv("PYTHONPATH", os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(importable)])))
        init_local(None, {"num_cpus": 2, "log_to_driver": False})
    yield
    ray.shutdown()
