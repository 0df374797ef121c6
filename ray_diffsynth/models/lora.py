"""LoRA on any module, by peft: add it, take its state out, put it in, merge it into the weights."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeGuard

import torch
from torch import Tensor, nn

from ray_diffsynth.config.options import split_names
from ray_diffsynth.diffusion.randomness import generator
from ray_diffsynth.errors import nearest
from ray_diffsynth.models.lora_file import LoraError, export_lora, lora_scale, read_lora

if TYPE_CHECKING:
    from peft.tuners.tuners_utils import BaseTunerLayer

__all__ = [
    "LoraError",
    "LoraInfo",
    "add_lora",
    "export_lora",
    "fuse_lora",
    "is_adapted",
    "leave_casts_to_autocast",
    "load_lora_file",
    "load_lora_state",
    "lora_parameters",
    "lora_state",
    "match_targets",
    "read_lora",
]

_ADAPTER = "default"
_PARAMETER = re.compile(r"^(?P<module>.+)\.(?P<what>lora_[AB]|lora_magnitude_vector)\.default\.weight$")
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class LoraInfo:
    """What ``add_lora`` did. ``targets``: module paths; ``parameters``: number of trainable values."""

    name: str
    rank: int
    alpha: float
    rslora: bool
    targets: tuple[str, ...]
    parameters: int

    @property
    def scale(self) -> float:
        """The factor of B·A."""
        return lora_scale(self.rank, self.alpha, self.rslora)


def add_lora(
    module: nn.Module,
    *,
    rank: int,
    alpha: float | None,
    target_modules: str | Sequence[str],
    seed: int,
    name: str,
    dropout: float = 0.0,
    rslora: bool = False,
    dora: bool = False,
) -> LoraInfo:
    """Put a LoRA beside the matching layers of ``module``, in place; everything else of it is frozen.

    A is drawn kaiming-uniform(√5) as in peft, from a generator keyed by (seed, name, module path), so it is the same on
    every worker and moves no global generator; B is zero. LoRA parameters are fp32 whatever the base's dtype.

    Args:
        rank, alpha: scale is alpha / rank; alpha None is rank.
        target_modules: see ``match_targets``.
        name: of the model, e.g. ``"dit"``; part of the random key.

    Raises LoraError: rank < 1, a target that matches nothing, a module that already has a LoRA.
    """
    import peft  # here, as in is_adapted: it takes seconds, and the drivers of jobs, which import this, need none of it

    if rank < 1:
        raise LoraError(f"lora_rank={rank}: a LoRA needs a rank of at least 1")
    if any(is_adapted(m) for m in module.modules()):
        raise LoraError(f"{name} already has a LoRA; fuse it (fuse_lora) or load the model again before adding another")
    targets = match_targets(module, target_modules, name=name)
    effective_alpha = float(rank if alpha is None else alpha)
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=effective_alpha,
        # A regular expression of whole paths: peft matches a list's entries as suffixes, which could hit more.
        target_modules="|".join(re.escape(t) for t in targets),
        lora_dropout=dropout,
        use_rslora=rslora,
        use_dora=dora,
    )
    with torch.random.fork_rng(devices=[]):  # peft draws A itself; that draw is replaced below
        peft.inject_adapter_in_model(config, module, adapter_name=_ADAPTER)
    module.requires_grad_(False)
    parameters = lora_parameters(module)
    with torch.no_grad():
        for key, parameter in parameters.items():
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)
            if key.endswith(".lora_A.weight"):
                drawn = torch.empty(parameter.shape)
                key_generator = generator("lora_A", seed, name, key.removesuffix(".lora_A.weight"))
                nn.init.kaiming_uniform_(drawn, a=math.sqrt(5), generator=key_generator)
                parameter.copy_(drawn)
            elif key.endswith(".lora_B.weight"):
                parameter.zero_()
    count = sum(p.numel() for p in parameters.values())
    return LoraInfo(name, rank, effective_alpha, rslora, targets, count)


def is_adapted(module: nn.Module) -> TypeGuard[BaseTunerLayer]:
    """Whether ``module`` is a layer with an adapter of peft's in it."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return isinstance(module, BaseTunerLayer)


def leave_casts_to_autocast(module: nn.Module) -> None:
    """For use under autocast alone: peft gives a layer's input to A in fp32, which autocast casts back.

    So each layer would save a copy for the backward pass in place of the input that its neighbours save too. A DoRA is
    left as it is: it computes the norms of the weights in the input's dtype.
    """
    for layer in module.modules():
        if is_adapted(layer) and not getattr(layer, "lora_magnitude_vector", ()):
            layer.cast_input_dtype_enabled = False


def match_targets(
    module: nn.Module, target_modules: str | Sequence[str], *, name: str = "the model"
) -> tuple[str, ...]:
    """Paths of the layers that ``target_modules`` means, in the module's order.

    Args:
        target_modules: suffixes of module paths, as a list or with commas (``"to_q,to_out.0"``), in which ``*`` is any
            one name or number (``"blocks.*.proj_out"``); ``"re:…"`` is one regular expression of whole paths;
            ``"all-linear"`` every linear layer.

    Raises LoraError for each entry that matches no linear or convolution layer; it lists what there is.
    """
    layers = {path: m for path, m in module.named_modules() if path and _is_layer(m)}
    if isinstance(target_modules, str) and target_modules.startswith("re:"):
        try:
            pattern = re.compile(target_modules[3:])
        except re.error as err:
            raise LoraError(f"lora_target_modules={target_modules!r} is no regular expression: {err}") from err
        found = tuple(path for path in layers if pattern.fullmatch(path))
        if not found:
            raise LoraError(f"lora_target_modules={target_modules!r} matches no layer of {name}. {_existing(layers)}")
        return found
    wanted = split_names(target_modules if isinstance(target_modules, str) else ",".join(target_modules))
    if not wanted:
        raise LoraError(f"lora_target_modules is empty; name layers of {name}. {_existing(layers)}")
    if wanted == ("all-linear",):
        return tuple(path for path, m in layers.items() if isinstance(m, nn.Linear))
    matched: set[str] = set()
    problems: list[str] = []
    for entry in wanted:
        pattern = re.compile(rf"(?:.*\.)?{re.escape(entry)}".replace(r"\*", r"[^.]+"))
        hits = [path for path in layers if pattern.fullmatch(path)]
        matched.update(hits)
        if not hits:
            problems.append(_explain(module, layers, entry))
    if problems:
        raise LoraError(f"lora_target_modules match nothing in {name}: {'; '.join(problems)}. {_existing(layers)}")
    return tuple(path for path in layers if path in matched)


def lora_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """The adapter's own parameters under peft's file names without the adapter's name: ``X.lora_A.weight``."""
    found: dict[str, nn.Parameter] = {}
    for path, parameter in module.named_parameters():
        if match := _PARAMETER.match(path):
            dora = match["what"] == "lora_magnitude_vector"
            found[f"{match['module']}.{match['what']}" + ("" if dora else ".weight")] = parameter
    return found


def lora_state(module: nn.Module) -> dict[str, Tensor]:
    """CPU copies of the adapter's tensors, B unscaled, sorted by key, for ``export_lora`` and checkpoints."""
    return {key: p.detach().cpu().clone() for key, p in sorted(lora_parameters(module).items())}


def load_lora_state(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Inverse of ``lora_state``. LoraError, before anything is loaded, names missing and unexpected keys and shapes."""
    parameters = lora_parameters(module)
    differences = {
        "missing": sorted(parameters.keys() - state.keys()),
        "unexpected": sorted(state.keys() - parameters.keys()),
    }
    differences["shapes"] = [
        f"{key} is {tuple(state[key].shape)}, the model's is {tuple(p.shape)}"
        for key, p in parameters.items()
        if key in state and state[key].shape != p.shape
    ]
    problems = "; ".join(f"{what}: {_some(items)}" for what, items in differences.items() if items)
    if problems:
        raise LoraError(f"the LoRA does not fit ({problems}); use the same lora_rank and lora_target_modules")
    with torch.no_grad():
        for key, parameter in parameters.items():
            parameter.copy_(state[key])


def load_lora_file(
    module: nn.Module,
    path: str,
    info: LoraInfo,
    *,
    rename: Callable[[str], str] | None = None,
    prefix: str | None = None,
    prefixes: Sequence[str] = (),
) -> None:
    """Go on from a LoRA file (``--lora_checkpoint``): its folded scale is divided by this adapter's.

    ``rename`` maps a file's key to the module's (the inverse of ``export_lora``'s). Errors: ``read_lora``,
    ``load_lora_state``.
    """
    state, _ = read_lora(path, prefix=prefix, prefixes=prefixes)
    named: dict[str, Tensor] = {}
    for key, value in state.items():
        unscaled = value.float() / info.scale if key.endswith(".lora_B.weight") else value
        named[rename(key) if rename else key] = unscaled
    try:
        load_lora_state(module, named)
    except LoraError as err:
        raise LoraError(f"{path}: {err}") from err


def fuse_lora(module: nn.Module, state: Mapping[str, Tensor], scale: float = 1.0) -> None:
    """Add scale · B·A into the weights of the layers that ``state`` (of ``read_lora``) names, in fp32, in place.

    A layer under an adapter of ``add_lora`` gets it in its base. Raises LoraError, and changes nothing: layers that do
    not exist, shapes that do not fit, DoRA, weights that are not floating point.
    """
    dora = [key for key in state if key.endswith(".lora_magnitude_vector")]
    if dora:
        raise LoraError(f"a DoRA cannot be fused by adding ({_some(dora)}); use a LoRA file")
    layers = {p: m for p, m in module.named_modules() if isinstance(getattr(m, "weight", None), Tensor)}
    paths = sorted({key.rsplit(".lora_", 1)[0] for key in state})
    unknown = [path for path in paths if path not in layers]
    if unknown:
        raise LoraError(f"the LoRA names layers that the model does not have: {_some(unknown)}. {_existing(layers)}")
    weights: dict[str, Tensor] = {}
    for path in paths:
        layer = layers[path]
        base = layer.get_base_layer() if is_adapted(layer) else layer
        weight = base.weight
        a, b = state[f"{path}.lora_A.weight"], state[f"{path}.lora_B.weight"]
        if not isinstance(weight, Tensor) or not weight.is_floating_point():
            raise LoraError(f"{path} has no floating-point weight to fuse into; load the model without quantization")
        # Convolutions: A is (r, in, *kernel) and B is (out, r, 1, …); their product of matrices is the kernel's update.
        if b.flatten(1).shape[1] != a.shape[0] or b.shape[0] * a.flatten(1).shape[1] != weight.numel():
            shapes = f"B {tuple(b.shape)} · A {tuple(a.shape)}"
            raise LoraError(f"{path}: {shapes} does not fit its weight {tuple(weight.shape)}")
        weights[path] = weight
    with torch.no_grad():
        for path, weight in weights.items():  # one after another: an update is as large as its layer, in fp32
            a, b = (state[f"{path}.lora_{side}.weight"].flatten(1).float() for side in "AB")
            update = (scale * (b @ a)).reshape(weight.shape)
            weight.copy_((weight.float() + update.to(weight.device)).to(weight.dtype))


def _is_layer(module: nn.Module) -> bool:
    # Subclasses of convolutions pad in their own way, which peft's plain low-rank convolution would not do.
    return isinstance(module, nn.Linear) or type(module) in _CONVOLUTIONS


def _short(path: str) -> str:
    """A layer's path inside its block: ``transformer_blocks.0.attn.to_q`` → ``attn.to_q``."""
    return re.sub(r"^.*?\.\d+\.", "", path)


def _existing(layers: Iterable[str]) -> str:
    return f"Layers there: {', '.join(dict.fromkeys(_short(path) for path in layers)) or 'none'}"


def _explain(module: nn.Module, layers: Iterable[str], entry: str) -> str:
    tails = {".".join(_short(p).split(".")[-n:]) for p in layers for n in (1, 2, 3)}
    tails = {t for t in tails if not t[0].isdigit()}
    inside = sorted(t for t in tails if t.startswith(f"{entry}."))
    for path, child in module.named_modules():
        if path == entry or path.endswith(f".{entry}"):
            hint = f", which holds {', '.join(inside)}" if inside else ""
            return f"{entry!r} is a {type(child).__name__}, not a linear or convolution layer{hint}"
    near = [t for t in sorted(tails) if t.endswith(f"_{entry}")]  # q -> to_q
    near = near or nearest(entry, sorted(tails))
    return f"{entry!r}" + (f" (did you mean {', '.join(near)}?)" if near else "")


def _some(items: Sequence[str], limit: int = 5) -> str:
    return ", ".join(items[:limit]) + (f", … ({len(items) - limit} more)" if len(items) > limit else "")
