"""LoRA files: one way to write them, and all known key layouts read into one.

The state inside the package is ``{"<module>.lora_A.weight": (r, in), "<module>.lora_B.weight": (out, r)}``. In a file
the effective weight is W + B·A: the scale (alpha / r) is always folded into B, as readers disagree on where alpha is.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import PurePath
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from ray_diffsynth.data import storage
from ray_diffsynth.errors import UserError

# The longer ones first: what a key starts with is stripped once.
PREFIXES = (
    *("base_model.model.", "model.diffusion_model.", "diffusion_model."),
    *("pipe.dit.", "pipe.text_encoder.", "pipe.transformer."),
    *("text_encoder.", "transformer.", "dit.", "unet."),
)
_KEY = re.compile(r"^(?P<module>.+)\.lora_(?P<side>A|B|up|down)(\.[^.]+)??\.weight$")
_DORA = re.compile(r"^(?P<module>.+)\.lora_magnitude_vector(\..+)?$")
_SIDES = {"A": "A", "down": "A", "B": "B", "up": "B"}
_FLATTENED = ("lora_unet_", "lora_te_", "lora_te1_", "lora_te2_", "lora_te3_", "lora_transformer_")
_METADATA_KEY = "lora_adapter_metadata"  # diffusers: JSON of the peft configuration, keys "<model>.<field>"
_HOW = "convert it with diffusers: pipe.load_lora_weights(file), then pipe.save_lora_weights(folder)"


class LoraError(UserError):
    """A LoRA's targets or file do not fit."""


def lora_scale(rank: int, alpha: float | None, rslora: bool = False) -> float:
    """alpha / r, or alpha / √r for rank-stabilised LoRA (arXiv 2312.03732); alpha None is r."""
    return (rank if alpha is None else alpha) / (math.sqrt(rank) if rslora else rank)


def export_lora(
    state: Mapping[str, Tensor],
    *,
    prefix: str,
    rank: int,
    alpha: float | None,
    path: str,
    rename: Callable[[str], str] | None = None,
    dtype: torch.dtype | None = None,
    metadata: Mapping[str, str] | None = None,
    rslora: bool = False,
) -> None:
    """Write ``state`` (see ``lora_state``) as one safetensors file, atomically; equal states give equal bytes.

    Args:
        prefix: put before each key, ``"diffusion_model."`` or ``"transformer."``.
        rank, alpha, rslora: their scale is folded into lora_B in fp32, so readers need no alpha.
        rename: applied to each key before the prefix.
        dtype: of the written tensors; None keeps theirs.
        metadata: strings, added to ``format: pt``.

    Raises LoraError: empty state, a key that is no LoRA key, two keys renamed to one.
    """
    if not state:
        raise LoraError(f"no LoRA to write to {path}: the state is empty; call add_lora first")
    scale = lora_scale(rank, alpha, rslora)
    tensors: dict[str, Tensor] = {}
    for key, value in state.items():
        if not (_KEY.match(key) or _DORA.match(key)):
            raise LoraError(
                f"{key} is no LoRA key ('<module>.lora_A.weight' or '.lora_B.weight'); give lora_state(module)"
            )
        tensor = value.detach().cpu()
        if key.endswith(".lora_B.weight") and scale != 1.0:
            tensor = (tensor.float() * scale).to(value.dtype)
        name = prefix + (rename(key) if rename else key)
        if name in tensors:
            raise LoraError(f"two keys of the LoRA are renamed to {name}")
        tensors[name] = tensor.to(dtype or tensor.dtype).contiguous()
    data = safetensors.torch.save(tensors, metadata={**(metadata or {}), "format": "pt"})
    storage.write_bytes_atomic(str(path), _canonical(data))


def read_lora(
    path: str, *, prefix: str | None = None, prefixes: Sequence[str] = ()
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """A LoRA file's tensors under plain keys (``X.lora_A.weight``, scale folded into B), and its metadata.

    Known layouts: keys after any of ``PREFIXES`` or bare; ``.lora_A.default.weight`` (an adapter's name inside);
    ``lora_down``/``lora_up`` with ``.alpha``; diffusers' ``lora_adapter_metadata``. Tensors keep their dtype, but a
    B that was scaled is fp32.

    Args:
        prefix: read only keys that start with it, of a file for several models.
        prefixes: what all keys may start with beside ``PREFIXES``; the first that they do goes.

    Raises LoraError naming the file and what its layout is: no safetensors, names that cannot be mapped, another kind
    of adapter, one half of a pair, several prefixes.
    """
    tensors, metadata = _read(str(path))
    if prefix is None:
        prefix = next((p for p in prefixes if all(key.startswith(p) for key in tensors)), None)
    known = {_prefix_of(key) for key in tensors}
    if prefix is None and len(known) > 1:
        listed = ", ".join(repr(p) if p else "none" for p in sorted(known))
        raise LoraError(f"{path} is for several models (keys start with {listed}); choose one with prefix=")
    if prefix is not None and not any(key.startswith(prefix) for key in tensors):
        raise LoraError(f"{path} has no key that starts with {prefix!r}; its keys start with {sorted(known)}")
    start = prefix if prefix is not None else next(iter(known), "")

    halves: dict[str, dict[str, Tensor]] = {}
    scales: dict[str, float] = {}
    state: dict[str, Tensor] = {}
    for full, tensor in sorted(tensors.items()):
        if not full.startswith(start):
            continue
        key = full[len(start) :]
        if key.startswith(_FLATTENED):
            raise LoraError(f"{path}: {_why_unknown(full)}")
        if match := _KEY.match(key):
            halves.setdefault(match["module"], {})[_SIDES[match["side"]]] = tensor
        elif match := _DORA.match(key):
            state[f"{match['module']}.lora_magnitude_vector"] = tensor
        elif key.endswith(".alpha"):
            scales[key.removesuffix(".alpha")] = float(tensor)
        else:
            raise LoraError(f"{path}: {_why_unknown(full)}")
    if not halves:
        raise LoraError(f"{path} holds no LoRA: no key ends in lora_A.weight or lora_down.weight")
    configured = _configured_scale(metadata, start)
    for module, pair in halves.items():
        if set(pair) != {"A", "B"}:
            raise LoraError(f"{path}: {module} has only lora_{next(iter(pair))}; the file is incomplete")
        rank = pair["A"].shape[0]
        scale = scales[module] / rank if module in scales else configured(module, rank)
        state[f"{module}.lora_A.weight"] = pair["A"]
        state[f"{module}.lora_B.weight"] = pair["B"] if scale == 1.0 else pair["B"].float() * scale
    return dict(sorted(state.items())), metadata


def lora_prefixes(path: str) -> list[str]:
    """Those of ``PREFIXES`` that a file's keys start with, "" for bare ones; each is a ``prefix`` of ``read_lora``."""
    tensors, _ = _read(str(path))
    return sorted({_prefix_of(key) for key in tensors})


def _read(path: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    if PurePath(path).suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl"):
        raise LoraError(f"{path} is a pickle, which is not read; {_HOW}")
    try:
        data = storage.read_bytes(path)
    except FileNotFoundError:
        raise LoraError(f"LoRA file {path} does not exist; check the path") from None
    except OSError as err:
        raise LoraError(f"LoRA file {path} cannot be read: {err}; give one .safetensors file") from err
    try:
        tensors = safetensors.torch.load(data)
    except safetensors.SafetensorError as err:
        raise LoraError(f"{path} is not a readable safetensors file ({err}); copy or train it again") from err
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return tensors, dict(header.get("__metadata__") or {})


def _prefix_of(key: str) -> str:
    return next((p for p in PREFIXES if key.startswith(p)), "")


def _why_unknown(key: str) -> str:
    if key.startswith(_FLATTENED):
        return f"the key {key} has kohya's flattened names, which do not say where a dot was; {_HOW}"
    if "dora_scale" in key:
        return f"the key {key} is kohya's DoRA, which is not read; train or export without DoRA"
    if "hada_" in key or "lokr_" in key:
        return f"the key {key} is of a LoHa or LoKr, not of a LoRA"
    if key.endswith((".diff", ".diff_b")):
        return f"the key {key} is a full weight difference, not a LoRA"
    return f"the key {key} is of no known layout ('<module>.lora_A.weight', '.lora_B.weight', bare or after {PREFIXES})"


def _configured_scale(metadata: Mapping[str, str], prefix: str) -> Callable[[str, int], float]:
    """The scale of a module by diffusers' metadata; 1 without it."""
    if _METADATA_KEY not in metadata:
        return lambda module, rank: 1.0
    flat: dict[str, Any] = json.loads(metadata[_METADATA_KEY])
    config = {key.removeprefix(prefix): value for key, value in flat.items()}
    patterns: dict[str, float] = config.get("alpha_pattern") or {}

    def scale(module: str, rank: int) -> float:
        alpha = next((a for p, a in patterns.items() if re.match(rf"(.*\.)?({p})$", module)), config.get("lora_alpha"))
        return lora_scale(rank, alpha, bool(config.get("use_rslora")))

    return scale


def _canonical(data: bytes) -> bytes:
    """The same safetensors file with its header in one order: the library writes metadata in a random one."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps({"__metadata__": header.pop("__metadata__"), **header}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors start at a multiple of 8 bytes
    return len(text).to_bytes(8, "little") + text + data[8 + length :]
