"""W&B and MLflow by modules that stand in for them: what they are told, and that a resumed run is the same run."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ray_diffsynth.config import TrainConfig
from ray_diffsynth.training.report import trackers
from ray_diffsynth.training.report.trackers import TrackerError
from tests.training.conftest import CacheMaker
from tests.training.helpers import make_config, train_here


class Told:
    """Notes each call as (name, arguments); some answer with a run."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []

    def __getattr__(self, name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.calls.append((name, args, kwargs))
            run = {"id": "run-7", "info": SimpleNamespace(run_id="run-7"), "log": self.log_step, "finish": self.ended}
            return SimpleNamespace(**run)

        return call

    def log_step(self, values: dict[str, float], step: int) -> None:
        self.calls.append(("log", (values,), {"step": step}))

    def ended(self) -> None:
        self.calls.append(("finish", (), {}))

    def named(self, name: str) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
        return [(args, kwargs) for called, args, kwargs in self.calls if called == name]


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_tracker_that_fails_is_left_alone(
    tiny_qwen: Path,
    make_cache: CacheMaker,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    name: str,
) -> None:
    """The server goes away after the first line; and it is still away when the run is started again."""
    told = Told()
    monkeypatch.setitem(sys.modules, name, told)  # type: ignore[arg-type]

    def away(*args: Any, **kwargs: Any) -> None:
        if kwargs.get("step") != 1:
            raise ConnectionError("the server is away")

    monkeypatch.setattr(told, "log_step" if name == "wandb" else "log_metrics", away, raising=False)
    config = make_config(tiny_qwen, make_cache(), tmp_path, max_steps=4, log_with=f"csv,{name}")
    assert train_here(config).finished
    assert caplog.text.count(f"{name} failed (ConnectionError: the server is away)") == 1
    assert len((tmp_path / "metrics.csv").read_text().splitlines()) == 5
    begin = "init" if name == "wandb" else "start_run"
    monkeypatch.setattr(told, begin, lambda **_: away(), raising=False)
    longer = make_config(tiny_qwen, make_cache(), tmp_path, max_steps=5, log_with=f"csv,{name}")
    assert train_here(longer).started_at == 4
    new = make_config(tiny_qwen, make_cache(), tmp_path / "new", max_steps=5, log_with=name)
    with pytest.raises(TrackerError, match=f"--log_with {name} cannot start: ConnectionError"):
        train_here(new)


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_resumed_training_goes_on_in_the_same_run(
    tiny_qwen: Path, make_cache: CacheMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    told = Told()
    monkeypatch.setitem(sys.modules, name, told)  # type: ignore[arg-type]
    for steps in (2, 3):
        config = make_config(tiny_qwen, make_cache(), tmp_path, max_steps=steps, log_with=name)
        train_here(config)
    log, begin, end = {
        "wandb": ("log", "init", "finish"),
        "mlflow": ("log_metrics", "start_run", "end_run"),
    }[name]
    lines = told.named(log)
    assert [kwargs["step"] for _, kwargs in lines] == [1, 2, 3]
    assert {"loss", "grad_norm", "learning_rate", "samples_per_second", "data_wait"} <= lines[0][0][0].keys()
    first, second = (kwargs.get("id", kwargs.get("run_id")) for _, kwargs in told.named(begin))
    assert (first, second) == (None, "run-7")
    assert len(told.named(end)) == 2


def test_who_has_no_tensorboard_hears_where_the_metrics_go(monkeypatch: pytest.MonkeyPatch) -> None:
    def told(**options: str) -> str:
        return trackers.fallback(TrainConfig(dataset_base_path="data", model="tiny", **options))

    assert told() == told(log_with="csv") == "", "it is installed here"
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    assert "metrics go to metrics.csv" in told(log_with="csv")
    assert told(log_with="none") == told(log_with="wandb") == ""
