"""A loss or a gradient that is not finite: which samples, written down with what was read of them, and what to do."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from safetensors.torch import save

from ray_diffsynth.storage import write_bytes_atomic
from ray_diffsynth.tasks import LossOutput
from ray_diffsynth.training.data.loader import Microbatch
from ray_diffsynth.training.distributed import all_gather, barrier
from ray_diffsynth.training.report.metrics_log import output_file

ADVICE = "lower --learning_rate, use --dtype bfloat16 or float32, or look at these samples"


@dataclass(frozen=True)
class MicrobatchRecord:
    """A microbatch of the step, what was read for it, and its loss."""

    microbatch: Microbatch
    samples: Sequence[Mapping[str, Any]]
    output: LossOutput


def dump_not_finite(
    output_path: str,
    step: int,
    records: Sequence[MicrobatchRecord],
    what: Literal["loss", "gradient"],
    rank: int,
    world_size: int,
) -> str:
    """Write down the samples of the step, on all workers, that may be the reason; returns the message, on each.

    Those with a loss that is not finite, or all when each one's is. `nonfinite-step-N.json` holds their ids and losses,
    a safetensors file of each worker their tensors, `<virtual rank>-<position>/<name>`. All workers must call it.
    """
    own = list(_entries(records, step, rank))
    entries = all_gather(own, world_size)
    bad = [entry for entry in entries if not math.isfinite(float(entry["loss"]))] or entries
    tensors = {
        f"{item.microbatch.virtual_rank}-{position}/{name}": value.detach()
        .cpu()
        .clone(memory_format=torch.contiguous_format)
        for item in records
        for position, sample in enumerate(item.samples)
        if any((entry["lane"], entry["position"]) == (item.microbatch.virtual_rank, position) for entry in bad)
        for name, value in sample.items()
        if isinstance(value, torch.Tensor)
    }
    if tensors:
        write_bytes_atomic(output_file(output_path, _tensor_file(step, rank)), save(tensors))
    path = output_file(output_path, f"nonfinite-step-{step + 1}.json")
    if rank == 0:
        content = {"step": step + 1, "not_finite": what, "samples": bad}
        write_bytes_atomic(path, json.dumps(content, indent=1).encode())
    barrier(world_size)  # the first worker that raises ends the others, which must have written by then
    ids = ", ".join(dict.fromkeys(str(entry["sample_id"]) for entry in bad))
    if what == "loss":
        return f"step {step + 1}: the loss is not finite for {ids} (see {path}); {ADVICE}"
    return (
        f"step {step + 1}: the gradient is not finite though the loss is; the step trained on {ids} (see {path}); "
        f"nothing was changed by it: {ADVICE}"
    )


def _entries(records: Sequence[MicrobatchRecord], step: int, rank: int) -> Iterator[dict[str, Any]]:
    for item in records:
        losses, sigmas = item.output.per_sample.tolist(), item.output.sigma.tolist()
        for position, (key, loss, sigma) in enumerate(zip(item.microbatch.keys, losses, sigmas, strict=True)):
            yield {
                "sample_id": key.sample_id,
                "epoch": key.epoch,
                "repeat": key.repeat,
                "loss": str(loss),
                "sigma": sigma,
                "lane": item.microbatch.virtual_rank,
                "position": position,
                "tensors": _tensor_file(step, rank),
            }


def _tensor_file(step: int, rank: int) -> str:
    return f"nonfinite-step-{step + 1}.worker-{rank}.safetensors"
