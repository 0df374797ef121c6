"""The dtype that a run computes in: torch's autocast, and for float16 its gradient scaling."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn
from torch.optim import Optimizer


class Precision:
    """Autocast to bfloat16 or float16 around a forward, and around nothing for float32.

    scaler: scales the loss of float16, whose small gradients would be zero; a step whose gradients are not finite is
    left out and the scale lowered. None for the other dtypes.
    """

    def __init__(self, device: torch.device, dtype: str) -> None:
        """dtype: as `--dtype` names it."""
        self._device = device.type
        self._dtype: torch.dtype = getattr(torch, dtype)
        self.scaler = torch.amp.GradScaler(device.type) if self._dtype is torch.float16 else None

    def autocast(self) -> AbstractContextManager[None]:
        if self._dtype is torch.float32:
            return nullcontext()
        return torch.autocast(self._device, dtype=self._dtype)

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradients of `loss`, scaled."""
        scaled = loss if self.scaler is None else self.scaler.scale(loss)
        scaled.backward()  # type: ignore[no-untyped-call]

    def clip(self, parameters: list[nn.Parameter], optimizer: Optimizer, limit: float) -> float:
        """Undo the scale and bound the norm of all gradients together; returns the norm before. Once a step."""
        if self.scaler is not None:
            self.scaler.unscale_(optimizer)
        return float(nn.utils.clip_grad_norm_(parameters, limit))

    def step(self, optimizer: Optimizer) -> bool:
        """Let the optimizer step; returns whether it did, which with a scaler needs finite gradients."""
        if self.scaler is None:
            optimizer.step()
            return True
        before = self.scaler.get_scale()
        self.scaler.step(optimizer)
        self.scaler.update()
        return self.scaler.get_scale() >= before
