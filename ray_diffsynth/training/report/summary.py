"""What a run leaves for its user: report.json, report.html and the last line."""

from __future__ import annotations

import json
import math
from typing import Any

from ray_diffsynth.config import TrainConfig
from ray_diffsynth.data.warnings import DataWarnings
from ray_diffsynth.report import make_report, training_numbers, write_json, write_page
from ray_diffsynth.storage import absolute, file_size, join, open_input
from ray_diffsynth.training.export import newest_file
from ray_diffsynth.training.report.metrics_log import read_metrics
from ray_diffsynth.training.report.sample_grids import sample_grids
from ray_diffsynth.training.result import TrainResult
from ray_diffsynth.training.start import mark_finished


def write_training_report(config: TrainConfig, result: TrainResult, *, workers: int, seconds: float) -> dict[str, Any]:
    """Write report.json and report.html into the output path, print what was written where, and return the counts."""
    counts = {
        "samples": result.samples,
        "steps": result.steps,
        "steps_total": result.total,
        "steps_this_run": result.steps - result.started_at,
        "steps_per_epoch": result.steps_per_epoch,
        "padded_per_epoch": result.padded,
        "workers": workers,
        "parameters_without_gradient": result.unused,
    }
    output_path = absolute(config.output_path)
    times = {"total": seconds, "training": result.seconds}
    metrics = read_metrics(output_path)
    grids, images = sample_grids(output_path, result.steps)
    report = make_report(
        counts=counts,
        seconds=times,
        config=config,
        result=_without_warnings(result),
        warnings=DataWarnings.of(result.warnings).to_json(),
        training=training_numbers(metrics),
        lora=newest_lora(output_path, result),
        samples=grids,
    )
    write_json(output_path, report)
    write_page(output_path, report, metrics=metrics, images=images)
    if result.finished:
        mark_finished(output_path)
    print(last_line(result, output_path), flush=True)
    return {"counts": counts, "result": _without_warnings(result), "warnings": report["warnings"]}


def _without_warnings(result: TrainResult) -> dict[str, Any]:
    return {name: value for name, value in result.to_dict().items() if name != "warnings"}


def last_line(result: TrainResult, output_path: str) -> str:
    """One line: how far it came, on what, and where the files are."""
    state = f"trained {result.steps} of {result.total} steps on {result.samples} samples"
    if result.padded:
        state += f" ({result.padded} repeated per epoch to fill batches)"
    if result.started_at == result.total:
        return f"{state}: it was finished already; the files are in {output_path}"
    loss = "" if result.loss is None else f", loss {result.loss:.4g}"
    files = f"wrote {result.files[-1]}" if result.files else "no file yet"
    return f"{state}{loss}; {files}, checkpoint {result.checkpoint}; see {join(output_path, 'report.html')}"


def newest_lora(output_path: str, result: TrainResult) -> dict[str, Any] | None:
    """File, bytes, number of values and rank of the LoRA that the run wrote last; None if there is none.

    Only the file's header is read.
    """
    path = newest_file(output_path, result.steps_per_epoch, result.steps)
    if path is None:
        return None
    with open_input(path) as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    shapes = {key: entry["shape"] for key, entry in header.items() if key != "__metadata__"}
    ranks = {shape[0] for key, shape in shapes.items() if ".lora_A." in key or ".lora_down." in key}
    if not ranks:  # a model that was trained in full
        return None
    values = sum(math.prod(shape) for shape in shapes.values())
    return {"file": path.rpartition("/")[2], "bytes": file_size(path), "parameters": values, "rank": max(ranks)}
