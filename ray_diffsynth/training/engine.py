"""accelerate underneath: device, autocast, DDP, gradient scaling, and the few collectives that the loop needs."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DistributedDataParallelKwargs
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ray_diffsynth.training.context import Context

MIXED_PRECISION = {"bfloat16": "bf16", "float16": "fp16", "float32": "no"}


@contextmanager
def accelerator(context: Context, dtype: str) -> Iterator[Accelerator]:
    """An Accelerator for one run. Its process-wide state is undone at the end, so that several runs fit a process."""
    on_cpu = context.device.type == "cpu"
    before = os.environ.get("ACCELERATE_TORCH_DEVICE")
    if not on_cpu:  # accelerate would take cuda:LOCAL_RANK, which need not be the device that Ray assigned
        os.environ["ACCELERATE_TORCH_DEVICE"] = str(context.device)
        torch.cuda.set_device(context.device)
    _reset()
    # Parameters without a gradient are frozen (module.fix_unused); buffers never change: nothing to search or send.
    ddp = DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)
    try:
        yield Accelerator(cpu=on_cpu, mixed_precision=MIXED_PRECISION[dtype], kwargs_handlers=[ddp])
    finally:
        _reset()
        if before is None:
            os.environ.pop("ACCELERATE_TORCH_DEVICE", None)
        else:
            os.environ["ACCELERATE_TORCH_DEVICE"] = before


def _reset() -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def distribute(engine: Accelerator, module: nn.Module, world_size: int) -> nn.Module:
    """`module` in DDP when there are several workers; frozen weights, which all have read already, are left out."""
    if world_size == 1:
        return module
    frozen = [name for name, p in module.named_parameters() if not p.requires_grad]
    frozen += [name for name, _ in module.named_buffers()]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, frozen)  # type: ignore[no-untyped-call]
    prepared: nn.Module = engine.prepare_model(module)
    return prepared


def total(value: torch.Tensor, world_size: int) -> torch.Tensor:
    """The sum of `value` over the workers, on each of them."""
    if world_size > 1:
        dist.all_reduce(value)
    return value


def same_everywhere(number: int, world_size: int, device: torch.device) -> bool:
    """Whether every worker passes the same number."""
    if world_size == 1:
        return True
    low, high = torch.tensor([number, number], dtype=torch.int64, device=device)
    dist.all_reduce(low, dist.ReduceOp.MIN)
    dist.all_reduce(high, dist.ReduceOp.MAX)
    return int(low) == int(high)
