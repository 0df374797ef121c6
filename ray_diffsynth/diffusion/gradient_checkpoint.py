"""Gradient checkpointing of one block, and its plug into diffusers' checkpointing hook."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

_STATE = "_ray_diffsynth_checkpointing"
_EVERY = "_ray_diffsynth_checkpoint_every"


def gradient_checkpoint_forward(
    model: Callable[..., Any],
    use_gradient_checkpointing: bool,
    use_gradient_checkpointing_offload: bool,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Return `model(*args, **kwargs)`, keeping only its inputs for the backward pass, which runs it again.

    With the offload (which implies checkpointing) inputs that carry a gradient wait in CPU memory, pinned if they come
    from a CUDA device. The others (masks, embeddings of the timestep without gradient, rotary tables) are shared by all
    blocks, so that copying them for every block would cost memory instead of saving it.
    """
    if not (use_gradient_checkpointing or use_gradient_checkpointing_offload) or not torch.is_grad_enabled():
        return model(*args, **kwargs)
    names = tuple(kwargs)

    # `checkpoint` passes positional tensors through saved-tensor hooks, but holds keyword arguments by reference.
    def run(*values: Any) -> Any:
        split = len(values) - len(names)
        return model(*values[:split], **dict(zip(names, values[split:], strict=True)))

    values = (*args, *kwargs.values())
    if not use_gradient_checkpointing_offload:
        return checkpoint(run, *values, use_reentrant=False)
    with torch.autograd.graph.saved_tensors_hooks(_pack, _unpack):
        return checkpoint(run, *values, use_reentrant=False)


def checkpoint_every(model: Any, every: int) -> None:
    """Of the blocks of `model`, have `enable_checkpointing` checkpoint the first and then each `every`-th."""
    if getattr(model, _EVERY, 1) != every:
        setattr(model, _EVERY, every)
        setattr(model, _STATE, None)


def enable_checkpointing(model: Any, use: bool, offload: bool) -> None:
    """Make a diffusers model checkpoint its blocks by `gradient_checkpoint_forward`, or stop it.

    Cheap to call before every forward: it acts only when the wish changes.

    Raises:
        TypeError: checkpointing is wanted and the model has no hook for it.
    """
    wish = (bool(use or offload), bool(offload))
    if (getattr(model, _STATE, None) or (False, False)) == wish:
        return
    if not hasattr(model, "enable_gradient_checkpointing"):
        raise TypeError(
            f"{type(model).__name__} has no enable_gradient_checkpointing; wrap its blocks in "
            f"gradient_checkpoint_forward in model_fn, or train with --use_gradient_checkpointing false"
        )
    if wish[0]:
        every: int = getattr(model, _EVERY, 1)
        numbers: dict[int, int] = {}  # of a block, in the order of the first forward

        def checkpoint_block(block: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            chosen = numbers.setdefault(id(block), len(numbers)) % every == 0
            return gradient_checkpoint_forward(block, wish[0] and chosen, wish[1] and chosen, *args, **kwargs)

        model.enable_gradient_checkpointing(gradient_checkpointing_func=checkpoint_block)
    else:
        model.disable_gradient_checkpointing()
    setattr(model, _STATE, wish)


def _pack(tensor: torch.Tensor) -> tuple[torch.device, torch.Tensor]:
    if not tensor.requires_grad or tensor.device.type == "cpu":
        return tensor.device, tensor
    pinned = tensor.device.type == "cuda"
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=pinned)
    # Later kernels of this stream, and the copy back, run after this one, so nothing needs to wait here.
    copy.copy_(tensor.detach(), non_blocking=pinned)
    return tensor.device, copy


def _unpack(packed: tuple[torch.device, torch.Tensor]) -> torch.Tensor:
    device, tensor = packed
    return tensor.to(device, non_blocking=True)
