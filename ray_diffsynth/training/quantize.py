"""The frozen base's linear layers in 8-bit floats with a scale for each output; computed in the dtype of the input."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

STORAGE = torch.float8_e4m3fn
_LARGEST = torch.finfo(STORAGE).max
# As diffusers' layerwise casting leaves them out: small, and what they see or give is not normalised.
KEPT = ("patch_embed", "pos_embed", "time_embed", "time_text_embed", "norm", "img_in", "txt_in", "proj_in", "proj_out")


class _ScaledLinear(torch.autograd.Function):
    """y = (x W8^T) scale + b for frozen W8. Saves W8 for the backward pass, not the weight that it stands for.

    What an element of W8 is in bf16 or fp32 is exact, so a copy of W8 in that dtype is all that is made; its size is
    given back to the result. Not in fp16, whose largest number a sum of products with elements of up to 448 exceeds.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight, scale)
        if x.dtype is torch.float16:
            return functional.linear(x, _unpacked(weight, scale, x.dtype), bias)
        y = functional.linear(x, weight.to(x.dtype)).mul_(scale.T)  # computed in fp32, rounded once
        return y if bias is None else y.add_(bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        weight, scale = ctx.saved_tensors
        (grad,) = grads
        if grad.dtype is torch.float16:
            return grad @ _unpacked(weight, scale, grad.dtype), None, None, None
        return (grad * scale.T).to(grad.dtype) @ weight.to(grad.dtype), None, None, None


class ScaledLinear(nn.Module):
    """`nn.Linear` without gradients for its own weights, in 8 bits: weight[i] = scale[i] * stored[i].

    The relative error of a weight is at most 2^-4 (three bits behind the point), whatever its row's size.
    """

    def __init__(self, layer: nn.Linear, device: torch.device | None = None) -> None:
        """device: where it is packed and lies; where `layer` lies when not given."""
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        weight = layer.weight.detach().to(device or layer.weight.device).float()
        scale = (weight.abs().amax(dim=1, keepdim=True) / _LARGEST).clamp(min=torch.finfo(torch.float32).tiny)
        self.dtype = layer.weight.dtype
        self.weight = nn.Parameter((weight / scale).to(STORAGE), requires_grad=False)
        self.scale = nn.Parameter(scale, requires_grad=False)
        self.bias = None if layer.bias is None else nn.Parameter(layer.bias.detach().to(weight.device), False)

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.dtype)
        result: Tensor = _ScaledLinear.apply(x, self.weight, self.scale, self.bias)  # type: ignore[no-untyped-call]
        return result


def _unpacked(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return (weight.to(torch.float32) * scale).to(dtype)


def castable(module: nn.Module) -> dict[str, nn.Linear]:
    """The frozen linear layers that may be kept in 8 bits, by path."""
    return {
        path: layer
        for path, layer in module.named_modules()
        if type(layer) is nn.Linear
        and not layer.weight.requires_grad
        and not any(part.startswith(KEPT) for part in path.split("."))
    }


def castable_bytes(module: nn.Module) -> int:
    """What `quantize` would save."""
    layers = castable(module).values()
    return sum(layer.weight.numel() * (layer.weight.element_size() - 1) for layer in layers)


def quantize(module: nn.Module, device: torch.device | None = None) -> int:
    """Replace the frozen linear layers of `module` in place, also those under a LoRA; returns how many.

    device: where the new ones are made, one after another: the old ones may lie on the CPU.
    """
    found = castable(module)
    for path, layer in found.items():
        parent, _, name = path.rpartition(".")
        setattr(module.get_submodule(parent), name, ScaledLinear(layer, device))
    return len(found)
