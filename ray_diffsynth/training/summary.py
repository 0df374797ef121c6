"""What a run leaves for its user: report.json and the last line."""

from __future__ import annotations

from typing import Any

from ray_diffsynth.config import TrainConfig
from ray_diffsynth.data.storage import absolute
from ray_diffsynth.report import write_report
from ray_diffsynth.training.loop import TrainResult


def finish(config: TrainConfig, result: TrainResult, *, workers: int, seconds: float) -> dict[str, Any]:
    """Write report.json into the output path, print what was written where, and return the counts."""
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
    write_report(output_path, counts=counts, seconds=times, config=config, result=result.to_dict())
    print(last_line(result, output_path), flush=True)
    return {"counts": counts, "result": result.to_dict()}


def last_line(result: TrainResult, output_path: str) -> str:
    """One line: how far it came, on what, and where the files are."""
    state = f"trained {result.steps} of {result.total} steps on {result.samples} samples"
    if result.padded:
        state += f" ({result.padded} repeated per epoch to fill batches)"
    if result.started_at == result.total:
        return f"{state}: it was finished already; the files are in {output_path}"
    loss = "" if result.loss is None else f", loss {result.loss:.4g}"
    files = f"wrote {result.files[-1]}" if result.files else "no file yet"
    return f"{state}{loss}; {files}, checkpoint {result.checkpoint}"
