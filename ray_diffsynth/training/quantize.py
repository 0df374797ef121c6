"""The frozen base's linear layers in 8-bit floats with a scale for each output; computed in the dtype of the input."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

STORAGE = torch.float8_e4m3fn
_LARGEST = torch.finfo(STORAGE).max


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


def kept_patterns(module: nn.Module) -> tuple[str, ...]:
    """Regular expressions of the layers that keep their precision: diffusers' defaults and those of the model's class.

    As `ModelMixin.enable_layerwise_casting` puts them together; a model of one's own may set the same attributes.
    """
    from diffusers.hooks.layerwise_casting import DEFAULT_SKIP_MODULES_PATTERN

    own = ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict", "_skip_layerwise_casting_patterns")
    found = [pattern for name in own for pattern in sorted(getattr(module, name, None) or ())]
    return tuple(dict.fromkeys([*DEFAULT_SKIP_MODULES_PATTERN, *found]))


def keeping_pattern(path: str, patterns: Iterable[str]) -> str | None:
    """The first of `patterns` that is found in a layer's path, or in that of a module around it; None: it is packed.

    diffusers' rule (`apply_layerwise_casting`): `re.search` on the whole path of each module from the root down, so
    that "^proj_out$" is the model's last layer alone, and "norm" whatever lies in a module with norm in its name.
    """
    names = path.split(".")
    around = [".".join(names[:count]) for count in range(1, len(names) + 1)]
    return next((pattern for pattern in patterns if any(re.search(pattern, outer) for outer in around)), None)


def castable(module: nn.Module) -> dict[str, nn.Linear]:
    """The frozen linear layers that may be kept in 8 bits, by path. `module`: a whole model."""
    patterns = kept_patterns(module)
    return {path: layer for path, layer in _frozen_linears(module) if keeping_pattern(path, patterns) is None}


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


def describe_packed(name: str, module: nn.Module) -> str:
    """One line for the log about a model after `quantize`: how many layers are packed, and what keeps the others."""
    packed = sum(isinstance(layer, ScaledLinear) for layer in module.modules())
    patterns = kept_patterns(module)
    kept = Counter(keeping_pattern(path, patterns) for path, _ in _frozen_linears(module))
    reasons = ", ".join(f"{count} by {pattern!r}" for pattern, count in sorted(kept.items(), key=str))
    line = f"8 bits: {packed} linear layers of {name} are packed, {sum(kept.values())} keep their precision"
    return f"{line} ({reasons})" if reasons else line


def _frozen_linears(module: nn.Module) -> Sequence[tuple[str, nn.Linear]]:
    layers = [(path, layer) for path, layer in module.named_modules() if type(layer) is nn.Linear]
    return [(path, layer) for path, layer in layers if not layer.weight.requires_grad]
