"""The numbers and charts of a training run, from the lines of its metrics.jsonl."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from markupsafe import Markup

from ray_diffsynth.report.charts import Points, Series, finite, line_chart, smooth

Line = Mapping[str, Any]

_SIGMA = re.compile(r"^loss_sigma_(.+)$")
"""Loss of the samples whose sigma lies in a part of the schedule."""


def series(metrics: Iterable[Line], name: str) -> list[tuple[float, float]]:
    """(step, value) of the steps that logged `name` as a finite number."""
    return finite([(float(line["step"]), float(line[name])) for line in metrics if _is_number(line.get(name))])


def training_numbers(metrics: Sequence[Line]) -> dict[str, Any]:
    """What report.json says of the run's course; None where nothing was logged."""
    losses, rates = series(metrics, "loss"), series(metrics, "samples_per_second")
    smoothed = smooth(losses)
    waits = [value for _, value in series(metrics, "data_wait")]
    held_out = series(metrics, "validation_loss")
    memory = [value for _, value in series(metrics, "gpu_memory_bytes")]
    learning_rates = series(metrics, "learning_rate")
    return {
        "logged_steps": len(losses),
        "loss_first": losses[0][1] if losses else None,
        "loss_last": losses[-1][1] if losses else None,
        "loss_smoothed": smoothed[-1][1] if smoothed else None,
        "held_out_first": held_out[0][1] if held_out else None,
        "held_out_last": held_out[-1][1] if held_out else None,
        "learning_rate_last": learning_rates[-1][1] if learning_rates else None,
        "samples_per_second": _median([value for _, value in rates]),
        "data_wait": sum(waits) / len(waits) if waits else None,
        "peak_memory_bytes": max(memory) if memory else None,
    }


def training_charts(metrics: Sequence[Line]) -> list[Markup]:
    """The curves that the metrics have points for."""
    losses = series(metrics, "loss")
    held_out = series(metrics, "validation_loss")
    sigmas = sorted({name for line in metrics for name in line if _SIGMA.match(name)})
    per_sigma = [Series("σ " + _SIGMA.sub(r"\1", name), smooth(series(metrics, name))) for name in sigmas]
    memory = [(step, value / 1e9) for step, value in series(metrics, "gpu_memory_bytes")]
    wait = [(step, 100 * value) for step, value in series(metrics, "data_wait")]
    rate = series(metrics, "samples_per_second")
    workers = series(metrics, "workers")
    changed = workers if len({count for _, count in workers}) > 1 else []
    charts = [
        line_chart("Loss", _with_smooth(losses), y_label="loss"),
        line_chart("Loss by noise level", per_sigma, y_label="loss"),
        line_chart("Held-out loss", [Series("held-out", held_out)], y_label="loss"),
        line_chart("Learning rate", [Series("learning rate", series(metrics, "learning_rate"))]),
        line_chart("Gradient norm", _with_smooth(series(metrics, "grad_norm"))),
        line_chart("Samples per second", _with_smooth(rate)),
        line_chart("Time spent waiting for data, %", _with_smooth(wait), y_label="% of the step"),
        line_chart("GPU memory, GB", [Series("memory", memory)], y_label="GB"),
        line_chart("Workers", [Series("workers", changed)]),
    ]
    return [chart for chart in charts if chart]


def _with_smooth(points: Points) -> list[Series]:
    return [Series("each step", points, faint=True), Series("smoothed", smooth(points))]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _median(values: Sequence[float]) -> float | None:
    ordered = sorted(values)
    middle = len(ordered) // 2
    if not ordered:
        return None
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2
