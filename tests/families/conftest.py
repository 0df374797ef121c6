"""Fixtures of the conformance suite: of each family a tiny model, our pipeline of it, and diffusers'."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from ray_diffsynth.pipelines.core.base import BasePipeline
from ray_diffsynth.pipelines.registry import get_pipeline_class
from tests.families.cases import FAMILIES, FamilyCase, load_case


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A tiny model is built, loaded and used without a network."""

    def refuse(self: socket.socket, address: Any) -> None:
        raise AssertionError(f"a test of a family reached for the network: {address}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    yield


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folder of a family's tiny model, built once: read it, never write to it."""
    root = tmp_path_factory.mktemp("families")
    return cache(lambda family: load_case(family).build(root / family))


@pytest.fixture(params=FAMILIES, scope="module")
def case(request: pytest.FixtureRequest) -> FamilyCase:
    return load_case(request.param)


@pytest.fixture(scope="module")
def root(case: FamilyCase, model_folder: Callable[[str], Path]) -> Path:
    return model_folder(case.family)


@pytest.fixture(scope="module")
def loaded(case: FamilyCase, root: Path) -> BasePipeline:
    return get_pipeline_class(case.family).from_pretrained(root, torch_dtype=torch.float32)


@pytest.fixture
def pipe(loaded: BasePipeline) -> BasePipeline:
    """Our pipeline, whole, ready to train; tests that change weights load their own."""
    loaded.scheduler.set_timesteps(training=True)
    return loaded


@pytest.fixture(scope="module")
def theirs(case: FamilyCase, root: Path) -> Any:
    """diffusers' pipeline of the same folder."""
    import diffusers

    cls = getattr(diffusers, case.diffusers_pipeline)
    pipe = case.load(root) if case.load else cls.from_pretrained(str(root), dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe
