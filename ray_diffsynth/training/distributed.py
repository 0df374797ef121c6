"""Several workers: the process group, DDP, and the few collectives that the loop needs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ray_diffsynth.training.runtime import WorkerRuntime

T = TypeVar("T")


def init_distributed(runtime: WorkerRuntime) -> None:
    """Choose the worker's GPU, and meet the other workers if that has not been done for it (torchrun)."""
    on_gpu = runtime.device.type == "cuda"
    if on_gpu:
        torch.cuda.set_device(runtime.device)
    if runtime.world_size > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if on_gpu else "gloo")


def wrap_ddp(module: nn.Module, world_size: int) -> nn.Module:
    """`module` in DDP when there are several workers; frozen weights and buffers, which all have read, are left out.

    DDP takes the device that the module lies on, and leaves the inputs where they are: a worker's number on its machine
    is not the number of its GPU when workers share one or have several.
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


def all_reduce_sum(value: torch.Tensor, world_size: int) -> torch.Tensor:
    """The sum of `value` over the workers, on each of them."""
    if world_size > 1:
        dist.all_reduce(value)
    return value


def all_gather(own: list[T], world_size: int) -> list[T]:
    """The lists of all workers, joined in their order, on each of them."""
    if world_size == 1:
        return own
    found: list[list[T]] = [[] for _ in range(world_size)]
    dist.all_gather_object(found, own)
    return [item for part in found for item in part]


def barrier(world_size: int) -> None:
    """Wait until every worker is here."""
    if world_size > 1:
        dist.barrier()


def all_equal(number: int, world_size: int, device: torch.device) -> bool:
    """Whether every worker passes the same number."""
    if world_size == 1:
        return True
    low, high = torch.tensor([number, number], dtype=torch.int64, device=device)
    dist.all_reduce(low, dist.ReduceOp.MIN)
    dist.all_reduce(high, dist.ReduceOp.MAX)
    return int(low) == int(high)
