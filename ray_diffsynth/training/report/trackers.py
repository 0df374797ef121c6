"""Where the metrics go beside metrics.jsonl: TensorBoard (default), a CSV file, W&B, MLflow."""

from __future__ import annotations

import csv
import importlib
import io
import logging
import os
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, Self

from ray_diffsynth.config.validation import TrackingConfig
from ray_diffsynth.errors import UserError
from ray_diffsynth.storage import exists, is_remote, join, read_bytes, write_bytes_atomic
from ray_diffsynth.training.report.metrics_log import METRICS_FILE, read_metrics

if TYPE_CHECKING:
    from ray_diffsynth.plan.run_plan import TrainPlan

logger = logging.getLogger(__name__)

TENSORBOARD_FOLDER = "tensorboard"
CSV_FILE = "metrics.csv"
_NOT_CURVES = ("step", "steps", "samples", "samples_total", "samples_seen")


class TrackerError(UserError):
    """A tracker that is asked for and cannot be used."""


class Tracker(Protocol):
    """One of them. A step comes once, or again after a resume from an earlier one."""

    requires: ClassVar[str]
    """The module without which it cannot start; "" for none."""

    def __init__(self, plan: TrainPlan, after: int) -> None:
        """after: the step that the run goes on from."""

    def write(self, metrics: Mapping[str, Any]) -> None: ...

    def close(self) -> None: ...


def check_trackers(config: TrackingConfig) -> None:
    """Raise TrackerError if the package of a tracker that `config` names is not installed."""
    for name in config.trackers:
        if module := TRACKERS[name].requires:
            _import(module, name)


def fallback(config: TrackingConfig) -> str:
    """What a user should know who has no TensorBoard and chose no other tracker; "" where there is nothing to say."""
    if config.trackers != ("csv",) or find_spec("tensorboard"):
        return ""
    return f"TensorBoard is not installed: metrics go to {CSV_FILE} (pip install ray-diffsynth[tensorboard])"


class Trackers:
    """All that `--log_with` names. Used by rank 0 alone; a context manager.

    One that cannot start is an error in a new run. Later it is left alone after its first failure, which is logged: a
    run does not end because a server is away; metrics.jsonl has all lines.
    """

    def __init__(self, plan: TrainPlan, *, after: int) -> None:
        """after: the step that the run goes on from; what was written for later ones is taken back where it can be."""
        self._open: dict[str, Tracker] = {}
        for name in plan.config.trackers:
            try:
                self._open[name] = TRACKERS[name](plan, after)
            except UserError:
                raise
            except Exception as error:
                if not after:
                    raise TrackerError(
                        f"--log_with {name} cannot start: {type(error).__name__}: {error}; mend it, or leave it out"
                    ) from error
                _without(name, error)

    def write(self, metrics: Mapping[str, Any]) -> None:
        for name, tracker in list(self._open.items()):
            try:
                tracker.write(metrics)
            except Exception as error:
                _without(name, error)
                del self._open[name]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for name, tracker in self._open.items():
            try:
                tracker.close()
            except Exception as problem:
                _without(name, problem)


def _without(name: str, error: Exception) -> None:
    logger.warning(
        "%s failed (%s: %s): the run goes on without it; %s has all metrics",
        name,
        type(error).__name__,
        error,
        METRICS_FILE,
    )


class TensorBoard(Tracker):
    """Curves in `<output_path>/tensorboard`, on the local file system."""

    requires = "torch.utils.tensorboard"

    def __init__(self, plan: TrainPlan, after: int) -> None:
        self._writer: Any = None
        if is_remote(plan.output_path):
            logger.info("no TensorBoard: it needs a local output_path; the curves are in report.html")
            return
        writer = _import(self.requires, "tensorboard").SummaryWriter
        self._writer = writer(join(plan.output_path, TENSORBOARD_FOLDER), purge_step=after + 1 if after else None)

    def write(self, metrics: Mapping[str, Any]) -> None:
        if self._writer is not None:
            for name, value in curves(metrics).items():
                self._writer.add_scalar(name, value, metrics["step"])

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


class CsvFile(Tracker):
    """`<output_path>/metrics.csv`: metrics.jsonl as a table, made when the run ends or is asked to stop."""

    requires = ""

    def __init__(self, plan: TrainPlan, after: int) -> None:
        self._output_path = plan.output_path

    def write(self, metrics: Mapping[str, Any]) -> None:
        """Nothing: metrics.jsonl has the line already."""

    def close(self) -> None:
        lines = read_metrics(self._output_path)
        columns = list(dict.fromkeys(name for line in lines for name in line))
        text = io.StringIO(newline="")
        table = csv.DictWriter(text, columns)
        table.writeheader()
        table.writerows(lines)
        write_bytes_atomic(join(self._output_path, CSV_FILE), text.getvalue().encode())


class WeightsAndBiases(Tracker):
    """A run of wandb; a resumed training goes on in the same one. Project by WANDB_PROJECT, else ray_diffsynth."""

    requires = "wandb"

    def __init__(self, plan: TrainPlan, after: int) -> None:
        wandb = _import(self.requires, "wandb")
        known = _known_id(plan.output_path, "wandb")
        folder = None if is_remote(plan.output_path) else plan.output_path
        if folder:
            Path(folder).mkdir(parents=True, exist_ok=True)
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "ray_diffsynth"),
            dir=folder,
            id=known,
            resume="allow" if known else None,
            config=plan.config.to_dict(),
        )
        _remember_id(plan.output_path, "wandb", self._run.id)

    def write(self, metrics: Mapping[str, Any]) -> None:
        self._run.log(curves(metrics), step=metrics["step"])

    def close(self) -> None:
        self._run.finish()


class MLflow(Tracker):
    """A run of MLflow, at MLFLOW_TRACKING_URI; a resumed training goes on in the same one."""

    requires = "mlflow"

    def __init__(self, plan: TrainPlan, after: int) -> None:
        self._mlflow = _import(self.requires, "mlflow")
        known = _known_id(plan.output_path, "mlflow")
        run = self._mlflow.start_run(run_id=known)
        if known is None:
            _remember_id(plan.output_path, "mlflow", run.info.run_id)
            self._mlflow.log_params({name: str(value)[:500] for name, value in plan.config.to_dict().items()})

    def write(self, metrics: Mapping[str, Any]) -> None:
        self._mlflow.log_metrics(curves(metrics), step=metrics["step"])

    def close(self) -> None:
        self._mlflow.end_run()


TRACKERS: dict[str, type[Tracker]] = {
    "tensorboard": TensorBoard,
    "csv": CsvFile,
    "wandb": WeightsAndBiases,
    "mlflow": MLflow,
}
"""By the name that ``--log_with`` takes."""


def curves(metrics: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a line that change."""
    return {
        name: float(value)
        for name, value in metrics.items()
        if name not in _NOT_CURVES and isinstance(value, (int, float))
    }


def _import(module: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except Exception as error:  # ImportError, or whatever a version raises that does not fit the other packages
        raise TrackerError(
            f"--log_with {package}: {type(error).__name__}: {error}; install it (pip install {package}), or omit it"
        ) from error


def _known_id(output_path: str, tracker: str) -> str | None:
    path = join(output_path, f".{tracker}-run")
    return read_bytes(path).decode() if exists(path) else None


def _remember_id(output_path: str, tracker: str, run_id: str) -> None:
    write_bytes_atomic(join(output_path, f".{tracker}-run"), run_id.encode())
