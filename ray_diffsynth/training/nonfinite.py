"""A loss that is not finite: which samples, written down, and what to do."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence

from ray_diffsynth.data.storage import write_bytes_atomic
from ray_diffsynth.tasks import LossOutput
from ray_diffsynth.training.feed import Microbatch
from ray_diffsynth.training.metrics import output_file


def dump_not_finite(output_path: str, step: int, outputs: Sequence[tuple[Microbatch, LossOutput]]) -> str:
    """Write down the samples of this worker whose loss is not finite; returns the message."""
    samples = [
        {"sample_id": key.sample_id, "epoch": key.epoch, "repeat": key.repeat, "loss": str(loss), "sigma": sigma}
        for microbatch, output in outputs
        for key, loss, sigma in zip(microbatch.keys, output.per_sample.tolist(), output.sigma.tolist(), strict=True)
        if not math.isfinite(loss)
    ]
    if not samples:
        return f"step {step + 1}: the loss of another worker is not finite; see its message"
    path = output_file(output_path, f"nonfinite-step-{step + 1}.json")
    write_bytes_atomic(path, json.dumps({"step": step + 1, "samples": samples}, indent=1).encode())
    ids = ", ".join(str(sample["sample_id"]) for sample in samples)
    return (
        f"step {step + 1}: the loss is not finite for {ids} (see {path}); lower --learning_rate, use "
        "--dtype bfloat16 or float32, or look at these samples"
    )
