"""LoRA files: one way to write them, and all known key layouts read into one.

The state inside the package is ``{"<module>.lora_A.weight": (r, in), "<module>.lora_B.weight": (out, r)}``. In a file
that is written the effective weight is W + B·A: the scale (alpha / r) is folded into B, as readers disagree on where
alpha is. Of a file that is read the scale is what it says, wherever (``lora_alpha``).
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import PurePath

import safetensors.torch
import torch
from torch import Tensor

from ray_diffsynth import storage
from ray_diffsynth.data.placeholders import HEAD, looks_like_pickle, text_of, wrong_content
from ray_diffsynth.models.adapter_config import adapter_config, adapter_config_bytes
from ray_diffsynth.models.folder import PICKLE_SUFFIXES
from ray_diffsynth.models.lora_alpha import MERGE, LoraFile, layer_scales
from ray_diffsynth.models.lora_alpha import LoraError as LoraError
from ray_diffsynth.models.lora_alpha import lora_scale as lora_scale
from ray_diffsynth.models.tensor_file import tensor_file

logger = logging.getLogger(__name__)

# The longer ones first: what a key starts with is stripped once.
PREFIXES = (
    *("base_model.model.", "model.diffusion_model.", "diffusion_model."),
    *("pipe.dit.", "pipe.text_encoder.", "pipe.transformer."),
    *("text_encoder.", "transformer.", "dit.", "unet."),
)
# lora_A and lora_B are peft's, lora_down and lora_up kohya's, lora.down and lora_linear_layer.down diffusers' of old.
_KEY = re.compile(r"^(?P<module>.+)\.lora(_|\.|_linear_layer\.)(?P<side>A|B|up|down)(\.[^.]+)??\.weight$")
_DORA = re.compile(r"^(?P<module>.+)\.lora_magnitude_vector(\..+)?$")
_SIDES = {"A": "A", "down": "A", "B": "B", "up": "B"}
_FLATTENED = ("lora_unet_", "lora_te_", "lora_te1_", "lora_te2_", "lora_te3_", "lora_transformer_")
_HOW = "convert it with diffusers: pipe.load_lora_weights(file), then pipe.save_lora_weights(folder)"
_PEFT = "base_model."  # what the keys of peft's own files start with
_OTHER_KINDS = (
    (r"\.hada_", "a LoHa"),
    (r"\.lokr_", "a LoKr"),
    (r"\.(boft_|oft_|vec$)", "an OFT or BOFT"),
    (r"\.(ia3_|on_input$)", "an (IA)3"),
    (r"\.(diff|diff_b|w_norm|b_norm|set_weight)$", "a full weight difference"),
    (r"\.lora_mid\.", "a LoCon with a core of its own (Tucker)"),
    (r"\.lora_(E|ranknum)\b", "an AdaLoRA"),
    (r"\.(vera_|randlora_|hra_u|lora_ga)", "another kind of adapter"),
    (r"\.[ab][12]\.weight$", "a GLoRA"),
    (r"\.scalar$", "a LyCORIS adapter with trained scalars"),
    (r"\.lora_embedding_", "a LoRA on an embedding"),
    (r"\.lora_(A|B|up|down)(\.[^.]+)??\.bias$", "a LoRA with biases"),
    (r"\.modules_to_save\.", "a layer that was trained whole (peft's modules_to_save)"),
)


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
    storage.write_bytes_atomic(str(path), tensor_file(tensors, {**(metadata or {}), "format": "pt"}))


def read_lora(
    path: str, *, prefix: str | None = None, prefixes: Sequence[str] = ()
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """A LoRA file's tensors under plain keys (``X.lora_A.weight``, scale folded into B), and its metadata.

    Known layouts: keys after any of ``PREFIXES`` or bare; ``.lora_A.default.weight`` (an adapter's name inside);
    ``lora_down``/``lora_up``. For where the scale is found see ``lora_alpha``. Tensors keep their dtype, but a B that
    was scaled is fp32.

    Args:
        prefix: read only keys that start with it, of a file for several models.
        prefixes: what all keys may start with beside ``PREFIXES``; the first that they do goes.

    Raises LoraError naming the file and what its layout is: no safetensors, names that cannot be mapped, another kind
    of adapter, one half of a pair, several prefixes, scales that disagree.
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

    state, _ = _state(str(path), tensors, metadata, start)
    return state, metadata


def check_lora_file(path: str) -> None:
    """Raise the LoraErrors of a file, whichever model it is for, and log its scale if it is not 1.

    For the driver: with it a file that a worker could not use ends a run before Ray starts.
    """
    tensors, metadata = _read(str(path))
    for start in sorted({_prefix_of(key) for key in tensors}):
        _, scales = _state(str(path), tensors, metadata, start)
        if told := {f"{scale:g}" for scale, _ in scales} - {"1"}:
            places = dict.fromkeys(place for _, found in scales for place in found)
            logger.info("%s: scale %s, by %s", path, ", ".join(sorted(told)), " and ".join(places))


def lora_digest(path: str, digest_size: int) -> str:
    """Hex blake2b of what a LoRA file means: its bytes, and adapter_config.json where that says its scale.

    Raises OSError or LoraError for a file that cannot be read.
    """
    data = storage.read_bytes(path)
    content = hashlib.blake2b(data, digest_size=digest_size)
    config = adapter_config_bytes(path, peft_names=f'"{_PEFT}'.encode() in _header(data))
    content.update(config or b"")
    return content.hexdigest()


def lora_prefixes(path: str) -> list[str]:
    """Those of ``PREFIXES`` that a file's keys start with, "" for bare ones; each is a ``prefix`` of ``read_lora``."""
    tensors, _ = _read(str(path))
    return sorted({_prefix_of(key) for key in tensors})


def _read(path: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    if PurePath(path).suffix in PICKLE_SUFFIXES:
        raise LoraError(f"{path} is a pickle, which is not read; {_HOW}")
    try:
        data = storage.read_bytes(path)
    except FileNotFoundError:
        raise LoraError(f"LoRA file {path} does not exist; check the path") from None
    except OSError as err:
        raise LoraError(f"LoRA file {path} cannot be read: {err}; give one .safetensors file") from err
    try:
        tensors = safetensors.torch.load(data)
    except Exception as err:  # its own type, or what Python and torch raise for a header that it does not check
        if (why := wrong_content(data[:HEAD])) is not None:
            raise LoraError(f"LoRA file {path} is {why}") from err
        if looks_like_pickle(data):
            raise LoraError(f"{path} is a pickle by its content, which is not read; {_HOW}") from err
        shown = f"its text is {text!r}" if (text := text_of(data)) else str(err)
        raise LoraError(f"{path} is not a readable safetensors file ({shown}); copy or train it again") from err
    header = json.loads(_header(data))
    return tensors, dict(header.get("__metadata__") or {})


def _header(data: bytes) -> bytes:
    """The JSON text at the beginning of a safetensors file."""
    return data[8 : 8 + int.from_bytes(data[:8], "little")]


def _state(
    path: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], start: str
) -> tuple[dict[str, Tensor], list[tuple[float, list[str]]]]:
    """The tensors whose keys begin with `start` under plain keys, scaled; each scale with the places that state it."""
    halves: dict[str, dict[str, Tensor]] = {}
    alphas: dict[str, float] = {}
    state: dict[str, Tensor] = {}
    for full, tensor in sorted(tensors.items()):
        if not full.startswith(start):
            continue
        key = full[len(start) :]
        match = None if key.startswith(_FLATTENED) else _KEY.match(key)
        if match and not tensor.is_floating_point():
            raise LoraError(
                f"{path}: {full} is of {tensor.dtype}, no floating point; save the LoRA without quantization"
            )
        if match:
            side, pair = _SIDES[match["side"]], halves.setdefault(match["module"], {})
            if side in pair:
                raise LoraError(f"{path}: {match['module']} has two LoRAs; save one adapter a file")
            pair[side] = tensor
        elif not key.startswith(_FLATTENED) and (match := _DORA.match(key)):
            state[f"{match['module']}.lora_magnitude_vector"] = tensor
        elif key.endswith(".alpha") and not key.startswith(_FLATTENED):
            if tensor.numel() != 1:
                raise LoraError(f"{path}: {full} holds {tensor.numel()} numbers, not one; save the LoRA again")
            alphas[key.removesuffix(".alpha")] = float(tensor)
        else:
            raise LoraError(f"{path}: {_why_unknown(full)}")
    if not halves:
        raise LoraError(f"{path} holds no LoRA: no key ends in lora_A.weight or lora_down.weight")
    for module, pair in halves.items():
        if set(pair) != {"A", "B"}:
            raise LoraError(f"{path}: {module} has only lora_{next(iter(pair))}; the file is incomplete")
        _check_shapes(path, module, pair["A"], pair["B"])
    ranks = {module: pair["A"].shape[0] for module, pair in halves.items()}
    config = adapter_config(path, peft_names=start.startswith(_PEFT))
    scales, places = layer_scales(LoraFile(path, start, ranks, alphas, metadata, config))
    for module, pair in halves.items():
        scale = scales[module]
        state[f"{module}.lora_A.weight"] = pair["A"]
        state[f"{module}.lora_B.weight"] = pair["B"] if scale == 1.0 else pair["B"].float() * scale
    return dict(sorted(state.items())), [(scale, places) for scale in sorted(set(scales.values()))]


def _check_shapes(path: str, module: str, a: Tensor, b: Tensor) -> None:
    """A is (rank, in, …) and B (out, rank, …); LoraError for others."""
    if a.ndim < 2 or b.ndim < 2 or a.shape[0] < 1 or a.shape[0] != b.shape[1]:
        raise LoraError(
            f"{path}: {module} has A {tuple(a.shape)} and B {tuple(b.shape)}, which have no rank in common; "
            "save the LoRA again with the program that made it"
        )


def _prefix_of(key: str) -> str:
    return next((p for p in PREFIXES if key.startswith(p)), "")


def _why_unknown(key: str) -> str:
    if key.startswith(_FLATTENED):
        return f"the key {key} has kohya's flattened names, which do not say where a dot was; {_HOW}"
    if "dora_scale" in key:
        return f"the key {key} is kohya's DoRA, which is not read; train or export without DoRA"
    for pattern, kind in _OTHER_KINDS:
        if re.search(pattern, key):
            return f"the key {key} is of {kind}, not of a LoRA; {MERGE}"
    return f"the key {key} is of no known layout ('<module>.lora_A.weight', '.lora_B.weight', bare or after {PREFIXES})"
