"""Errors in workers: those that would come again are told once, with their place; what was lost is tried again."""

from __future__ import annotations

import logging
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from ray_diffsynth.errors import UserError
from ray_diffsynth.training.ray import job
from ray_diffsynth.training.ray.failure import WorkerError, is_lost_connection, reason
from ray_diffsynth.training.report.metrics_log import read_metrics
from tests.training.conftest import CacheMaker
from tests.training.helpers import make_config
from tests.training.own_optimizers import Broken


def failed(kind: type[Exception] = LookupError) -> WorkerError:
    try:
        raise kind("no such column")
    except Exception as error:
        return WorkerError.of(error, 1, 2)


def test_the_message_names_worker_error_and_place() -> None:
    error = pickle.loads(pickle.dumps(failed()))  # as it comes to the driver
    assert str(error).startswith("worker 1 of 2 failed: LookupError: no such column (")
    assert f"{__file__}:" in str(error) and "in failed" in str(error)
    assert 'raise kind("no such column")' in error.__notes__[0]


class Died(Exception):
    """As Ray reports a process that is gone."""


CLOSED = RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:40321")


@pytest.mark.parametrize(
    ("failures", "told"),
    [
        ({0: failed()}, WorkerError),
        ({0: CLOSED, 1: failed()}, WorkerError),  # the other one only missed it
        ({0: failed(), 1: UserError("no such file")}, UserError),
        ({0: Died()}, None),
        ({0: CLOSED}, None),
        ({0: CLOSED, 1: Died()}, None),
        ({0: failed(), 1: Died()}, None),  # it may have failed for the loss of the other
        ({0: UserError("the cache is damaged"), 1: Died()}, UserError),
        ({}, None),
    ],
    ids=str,
)
def test_what_is_told_and_what_is_tried_again(failures: dict[int, BaseException], told: type[UserError] | None) -> None:
    found = reason(failures)
    assert found is None if told is None else type(found) is told


def test_lost_connections() -> None:
    assert is_lost_connection(CLOSED) and is_lost_connection(dist.DistBackendError("NCCL error"))
    assert not is_lost_connection(RuntimeError("mat1 and mat2 shapes cannot be multiplied (2x3 and 4x5)"))
    assert not is_lost_connection(ConnectionResetError("an object store"))


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
def test_an_error_that_would_come_again_ends_the_run_once(
    tiny_qwen: Path, make_cache: CacheMaker, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    options: dict[str, Any] = {"max_steps": 9, "save_steps": 1, "num_workers": 1, "resources": {"CPU": 1}}
    options["customized_optimizer"] = f"{Broken.__module__}:{Broken.__name__}"
    with caplog.at_level(logging.WARNING), pytest.raises(WorkerError) as error:
        job.run(make_config(tiny_qwen, make_cache(), tmp_path, **options))
    assert "worker 0 of 1 failed: LookupError: no such column: momentum_buffer_2" in str(error.value)
    assert "own_optimizers.py:" in str(error.value) and "in step" in str(error.value)
    assert "a worker was lost" not in caplog.text
    assert [line["step"] for line in read_metrics(str(tmp_path))] == [1, 2]
