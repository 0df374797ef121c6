"""The frozen base shared out among the workers, block by block (FSDP2); what is trained stays whole on each."""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from ray_diffsynth.training.module import DiffusionTrainingModule
from ray_diffsynth.training.setup import TrainingError


def shard_base(module: DiffusionTrainingModule, device: torch.device, world_size: int, lanes: int) -> None:
    """Move `module` (on the CPU) to `device`; of the denoising models each worker keeps 1 / world_size.

    A block's weights are gathered when it computes and let go again. Trained parameters are left out of it: LoRAs are
    small, and so their checkpoints and optimizer are those of an unsharded run. Call `sync_gradients` after backward.

    Raises TrainingError: lanes that do not divide, a model that is trained in full.
    """
    pipe = module.pipe
    pipe.device = device
    if world_size == 1:
        pipe.to(device)
        return
    if lanes % world_size:
        raise TrainingError(
            f"--shard_base needs equally many batches on each worker: {lanes} lanes do not divide among {world_size} "
            "workers; use another --num_workers"
        )
    mesh = init_device_mesh(device.type, (world_size,))
    for name in pipe.in_iteration_models:
        model: nn.Module = getattr(pipe, name)
        trained = {p for p in model.parameters() if p.requires_grad}
        if any(p in trained for path, p in model.named_parameters() if "lora_" not in path):
            raise TrainingError(f"--shard_base shares out frozen weights, but {name} is trained in full; leave it out")
        for parameter in trained:
            parameter.data = parameter.data.to(device)
        for block in _blocks(model):
            fully_shard(block, mesh=mesh, ignored_params=trained)
        fully_shard(model, mesh=mesh, ignored_params=trained)
    pipe.to(device)


def _blocks(model: nn.Module) -> list[nn.Module]:
    """The entries of the model's outermost lists of layers."""
    return [block for child in model.children() if isinstance(child, nn.ModuleList) for block in child]
