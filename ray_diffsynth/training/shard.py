"""The frozen base shared out among the workers, block by block (FSDP2); what is trained stays whole on each."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ray_diffsynth.training.distributed import all_equal
from ray_diffsynth.training.errors import TrainingError
from ray_diffsynth.training.module import DiffusionTrainingModule

logger = logging.getLogger(__name__)


def shard_base(module: DiffusionTrainingModule, device: torch.device, world_size: int, virtual_ranks: int) -> None:
    """Move `module` (on the CPU) to `device`; of the denoising models each worker keeps 1 / world_size.

    A block's weights are gathered when it computes and let go again. Trained parameters are left out of it: LoRAs are
    small, and so their checkpoints and optimizer are those of an unsharded run. Call `sync_gradients` after backward.

    Raises TrainingError: virtual ranks that do not divide, a model that is trained in full.
    """
    pipe = module.pipe
    pipe.device = device
    if world_size == 1:
        logger.warning("--shard_base has no effect with one worker, which has nobody to share the base with")
        pipe.to(device)
        return
    if virtual_ranks % world_size:
        raise TrainingError(
            f"--shard_base needs equally many batches on each worker: {virtual_ranks} virtual ranks do not divide "
            f"among {world_size} workers; use another --num_workers"
        )
    # Not above: these take as long as half of torch, which the driver, who imports this too, has no use for.
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

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


def check_equal_work(samples: Sequence[Mapping[str, Any]], world_size: int, device: torch.device) -> None:
    """Raise TrainingError, on every worker, if their batches run the model differently often.

    Distillation runs it `num_inference_steps` times. The workers gather the weights of a block together, so that one
    with fewer steps would wait for ever.
    """
    counts = sorted({int(sample["num_inference_steps"]) for sample in samples if "num_inference_steps" in sample})
    # Rows of one batch with equal steps run together: the model runs as often as the sum of the differing numbers.
    if counts and not all_equal(sum(counts), world_size, device):
        raise TrainingError(
            "--shard_base needs the same num_inference_steps in all rows, as the workers compute every block together; "
            f"a batch here has {', '.join(map(str, counts))}, another worker's others: leave --shard_base out, or make "
            "the column equal"
        )


def _blocks(model: nn.Module) -> list[nn.Module]:
    """The entries of the model's outermost lists of layers."""
    return [block for child in model.children() if isinstance(child, nn.ModuleList) for block in child]
