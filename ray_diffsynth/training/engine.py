"""accelerate underneath: device, autocast, DDP, gradient scaling, and the few collectives that the loop needs."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
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
    # Parameters without a gradient are frozen (module.fix_unused), so DDP need not search for them in every step.
    ddp = DistributedDataParallelKwargs(gradient_as_bucket_view=True)
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
    """`module` in DDP when there are several workers; frozen weights and buffers, which all have read, are left out."""
    if world_size == 1:
        return module
    frozen = [name for name, p in module.named_parameters() if not p.requires_grad]
    frozen += [name for name, _ in module.named_buffers()]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, frozen)  # type: ignore[no-untyped-call]
    prepared: nn.Module = engine.prepare_model(module)
    return prepared


def sync_gradients(parameters: Iterable[nn.Parameter], world_size: int) -> None:
    """The mean of the gradients over the workers, in one message; for a module without DDP."""
    if world_size == 1:
        return
    found = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([grad.reshape(-1) for grad in found])
    dist.all_reduce(flat)
    flat /= world_size
    for grad, part in zip(found, torch.split(flat, [grad.numel() for grad in found]), strict=True):
        grad.copy_(part.view_as(grad))


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
