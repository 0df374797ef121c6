"""accelerate underneath: device, autocast, DDP, gradient scaling, and the few collectives that the loop needs."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ray_diffsynth.training.runtime import Context

T = TypeVar("T")

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
    try:
        yield Accelerator(cpu=on_cpu, mixed_precision=MIXED_PRECISION[dtype])
    finally:
        _reset()
        if before is None:
            os.environ.pop("ACCELERATE_TORCH_DEVICE", None)
        else:
            os.environ["ACCELERATE_TORCH_DEVICE"] = before


def _reset() -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def distribute(module: nn.Module, world_size: int) -> nn.Module:
    """`module` in DDP when there are several workers; frozen weights and buffers, which all have read, are left out.

    Not by accelerate, which takes a worker's number on its machine for the number of its GPU: they differ when workers
    share a GPU or have several. DDP takes the device that the module lies on, and leaves the inputs where they are.
    """
    if world_size == 1:
        return module
    frozen = [name for name, p in module.named_parameters() if not p.requires_grad]
    frozen += [name for name, _ in module.named_buffers()]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, frozen)  # type: ignore[no-untyped-call]
    # Parameters without a gradient are frozen (module.fix_unused), so DDP need not search for them in every step.
    return DistributedDataParallel(module, gradient_as_bucket_view=True)


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


def gather(own: list[T], world_size: int) -> list[T]:
    """The lists of all workers, joined in their order, on each of them."""
    if world_size == 1:
        return own
    found: list[list[T]] = [[] for _ in range(world_size)]
    dist.all_gather_object(found, own)
    return [item for part in found for item in part]


def meet(world_size: int) -> None:
    """Wait until every worker is here."""
    if world_size > 1:
        dist.barrier()


def same_everywhere(number: int, world_size: int, device: torch.device) -> bool:
    """Whether every worker passes the same number."""
    if world_size == 1:
        return True
    low, high = torch.tensor([number, number], dtype=torch.int64, device=device)
    dist.all_reduce(low, dist.ReduceOp.MIN)
    dist.all_reduce(high, dist.ReduceOp.MAX)
    return int(low) == int(high)
