"""CUDA's autocast rules on the CPU, whose own lists are shorter, so that tests see what a GPU would compute."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

# https://docs.pytorch.org/docs/stable/amp.html#cuda-op-specific-behavior, by the name of the function.
HALF = frozenset(
    ("__matmul__", "addbmm", "addmm", "addmv", "addr", "baddbmm", "bmm", "chain_matmul", "multi_dot", "conv1d")
    + ("conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "linear", "matmul", "mm", "mv")
    + ("prelu", "einsum", "scaled_dot_product_attention")
)
FULL = frozenset(
    ("__pow__", "__rpow__", "__rdiv__", "__rtruediv__", "cosine_similarity", "cumprod", "cumsum", "exp", "expm1")
    + ("group_norm", "layer_norm", "rms_norm", "log", "log10", "log1p", "log2", "log_softmax", "mse_loss", "norm")
    + ("normalize", "pow", "prod", "reciprocal", "rsqrt", "softmax", "softmin", "softplus", "sum", "tan")
)


class CudaAutocast(TorchFunctionMode):
    """Within it `torch.autocast("cpu", …)` follows CUDA's lists too."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        named = dict(kwargs or {})
        if torch.is_autocast_enabled("cpu"):
            name = getattr(func, "__name__", "")
            if name in HALF:
                args, named = _cast((args, named), torch.get_autocast_dtype("cpu"))
            elif name in FULL:
                args, named = _cast((args, named), torch.float32)
        return func(*args, **named)


def _cast(values: Any, dtype: torch.dtype) -> Any:
    kinds = (torch.float32, torch.bfloat16, torch.float16)
    return tree_map_only(Tensor, lambda value: value.to(dtype) if value.dtype in kinds else value, values)


@contextmanager
def runs_under_autocast(model: nn.Module) -> Iterator[set[bool]]:
    """Of each call of a layer of `model` within the block, whether autocast was on; empty if it was not run."""
    seen: set[bool] = set()

    def note(module: nn.Module, args: Any) -> None:
        seen.add(torch.is_autocast_enabled("cpu"))

    handles = [layer.register_forward_pre_hook(note) for layer in model.modules()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
