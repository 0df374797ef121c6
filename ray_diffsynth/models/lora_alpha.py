"""The factor of a LoRA file's B·A: every place where programs write alpha is read, and all must agree.

Those places: a tensor `<layer>.alpha` (kohya), a peft configuration (`adapter_config.json` beside the file, or as JSON
in the header, such as diffusers' `lora_adapter_metadata`), and plain entries of the header (`alpha`, `ss_network_alpha`
…). A file that says nothing has the scale 1, as in diffusers.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ray_diffsynth.errors import UserError

ADAPTER_CONFIG = "adapter_config.json"
_ALPHAS = ("alpha", "lora_alpha", "network_alpha", "networkalpha", "ss_network_alpha")
_RANKS = ("rank", "r", "lora_rank", "network_dim", "networkdim", "ss_network_dim")
_RSLORA = ("use_rslora", "rslora", "rs_lora")
_METADATA_KEY = "lora_adapter_metadata"  # diffusers: JSON of the peft configuration, keys "<model>.<field>"
_UNSTATED = ("", "none", "null")
# Of peft's configuration: what changes the result beyond B·A. Whatever else it holds is for training alone.
_MORE_THAN_A_LORA = (
    *("lora_bias", "modules_to_save", "trainable_token_indices", "layer_replication", "target_parameters"),
    *("use_qalora", "use_bdlora", "arrow_config", "alora_invocation_tokens", "kasa_config", "monteclora_config"),
)
_INITS = (None, True, False, "gaussian", "eva", "orthogonal")
"""Ways to begin that leave the base weights alone; with others (pissa, olora …) the file belongs to a changed base."""
_TEXT_ENCODER = re.compile(r"^(pipe\.)?text_encoder(_\d+)?\.")
_CLOSE = 5e-3  # two scales that differ by less are one: alpha may be stored in bfloat16


class LoraError(UserError):
    """A LoRA's targets or file do not fit."""


def lora_scale(rank: int, alpha: float | None, rslora: bool = False) -> float:
    """alpha / r, or alpha / √r for rank-stabilised LoRA (arXiv 2312.03732); alpha None is r."""
    return (rank if alpha is None else alpha) / (math.sqrt(rank) if rslora else rank)


@dataclass(frozen=True)
class LoraFile:
    """What of a file decides its scales. path: for errors. start: what stands before each layer's name in the file.

    ranks, alphas: layer -> rank, and its `.alpha`. header: the safetensors metadata. config: adapter_config.json.
    """

    path: str
    start: str
    ranks: Mapping[str, int]
    alphas: Mapping[str, float]
    header: Mapping[str, str]
    config: Mapping[str, Any] | None = None


def layer_scales(file: LoraFile) -> tuple[dict[str, float], list[str]]:
    """The scale of each layer, and the places that say so.

    Raises LoraError: places that disagree (names both), values that are no numbers, a configuration of another method.
    """
    stated = [*_by_tensors(file), *_by_configs(file), *_by_header(file)]
    scales: dict[str, float] = {}
    for layer in file.ranks:
        values = [(place, found[layer]) for place, found in stated if layer in found]
        for place, value in values[1:]:
            first, expected = values[0]
            if not math.isclose(value, expected, rel_tol=_CLOSE):
                raise LoraError(
                    f"{file.path}: {layer} is scaled by {expected:g} according to {first}, and by {value:g} according "
                    f"to {place}; which is meant cannot be told: remove the wrong one, or save the LoRA again"
                )
        scales[layer] = values[0][1] if values else 1.0
    return scales, [place for place, found in stated if found]


_Stated = tuple[str, dict[str, float]]


def _by_tensors(file: LoraFile) -> Iterable[_Stated]:
    if not file.alphas:
        return
    if lost := sorted(file.alphas.keys() - file.ranks.keys()):
        raise LoraError(f"{file.path}: {lost[0]} has an alpha but no LoRA; the file is incomplete")
    found = {}
    for layer, alpha in file.alphas.items():
        _check(file, f"the tensor {layer}.alpha", alpha)
        found[layer] = lora_scale(file.ranks[layer], alpha)
    yield "its tensors .alpha", found


def _by_configs(file: LoraFile) -> Iterable[_Stated]:
    """peft's configuration, wherever it stands; its fields may have a model's name before them."""
    configs: list[tuple[str, Mapping[str, Any]]] = []
    if file.config is not None:
        configs.append((ADAPTER_CONFIG, file.config))
    for key, text in sorted(file.header.items()):
        fields = _json(file, key, text)
        if key == _METADATA_KEY or any(name.rpartition(".")[2] == "lora_alpha" for name in fields):
            configs.append((f"{key!r} in its header", fields))
    for place, fields in configs:
        groups: dict[str, dict[str, Any]] = {}
        for name, value in fields.items():
            prefix, _, field = name.rpartition(".")
            groups.setdefault(prefix, {})[field] = value
        found = {}
        for layers, config in _assigned(file, groups, place):
            found.update(_by_config(file, place, layers, config))
        yield place, found


def _by_config(file: LoraFile, place: str, layers: Collection[str], config: Mapping[str, Any]) -> dict[str, float]:
    kind = str(config.get("peft_type") or "LORA").upper().rpartition(".")[2]
    if kind != "LORA":
        raise LoraError(f"{file.path}: {place} says peft_type={kind}, which is no LoRA; {MERGE}")
    more = [name for name in _MORE_THAN_A_LORA if config.get(name)]
    more += [] if config.get("bias") in (None, "none") else ["bias"]
    more += [] if config.get("init_lora_weights", True) in _INITS else ["init_lora_weights"]
    if more:
        listed = ", ".join(f"{name}={config[name]!r}" for name in more)
        raise LoraError(f"{file.path}: {place} says {listed}, so it is more than a LoRA's B·A; {MERGE}")
    if "lora_alpha" not in config:
        raise LoraError(f"{file.path}: {place} has no lora_alpha; add the value that the LoRA was trained with")
    alphas, ranks = (_patterns(file, place, config, name) for name in ("alpha_pattern", "rank_pattern"))
    rslora = _flag(file, f"use_rslora of {place}", config.get("use_rslora"))
    used: set[str] = set()
    scales = {}
    for layer in layers:
        rank = file.ranks[layer]
        declared = next((ranks[pattern] for pattern in _matching(file, place, ranks, layer)), config.get("r"))
        if declared is not None and _number(file, f"the rank of {layer} in {place}", declared) != rank:
            raise LoraError(
                f"{file.path}: {layer} has rank {declared} according to {place}, but its tensors have rank {rank}; "
                "the two are not of one LoRA"
            )
        matching = _matching(file, place, alphas, layer)
        used.update(matching)
        stated = alphas[matching[0]] if matching else config["lora_alpha"]
        alpha = _number(file, f"the alpha of {layer} in {place}", stated)
        scales[layer] = lora_scale(rank, alpha, rslora)
    if unused := sorted(set(alphas) - used) if scales else []:
        raise LoraError(
            f"{file.path}: alpha_pattern of {place} names {unused[0]}, which no layer of the file is; "
            "save the LoRA again with the program that made it"
        )
    return scales


def _by_header(file: LoraFile) -> Iterable[_Stated]:
    """Plain entries; kohya's `ss_` ones are the settings of its training, from which single layers may deviate."""
    entries: dict[str, dict[str, str]] = {}
    for key, text in file.header.items():
        prefix, _, name = key.rpartition(".")
        if name.lower() in (*_ALPHAS, *_RANKS, *_RSLORA, "ss_network_args"):
            entries.setdefault(prefix, {})[name.lower()] = text
    stated = {prefix: fields for prefix, fields in entries.items() if any(name in fields for name in _ALPHAS)}
    for layers, fields in _assigned(file, stated, "its header"):
        for name in _ALPHAS:
            if name not in fields or fields[name].strip().lower() in _UNSTATED:
                continue
            kohya = name.startswith("ss_")
            if kohya and layers <= file.alphas.keys():
                each = {file.alphas[layer] for layer in layers}
                if len(each) > 1 or not _is_number(fields[name]):
                    continue
            arguments = _json(file, "ss_network_args", fields.get("ss_network_args", "{}")) if kohya else {}
            if not layers <= file.alphas.keys() and (own := [a for a in arguments if a in _PER_LAYER]):
                raise LoraError(
                    f"{file.path}: ss_network_args gives {own[0]}, another alpha for some layers, but the file has no "
                    "tensors .alpha that say which; save it again with them"
                )
            alpha = _number(file, f"{name!r} in its header", fields[name])
            flags = {**{key: arguments.get(key) for key in _RSLORA}, **({} if kohya else fields)}
            # A tensor .alpha beside it has the root in it already: rank-stabilised kohya files hold alpha·√r there.
            rslora = any(_flag(file, f"{key} in its header", flags.get(key)) for key in _RSLORA)
            for key in (key for key in _RANKS if key in fields and key.startswith("ss_") == kohya):
                _check_rank(file, key, fields[key], layers)
            place = f"{name}={fields[name]} in its header"
            scales = {layer: lora_scale(file.ranks[layer], alpha, rslora) for layer in layers}
            converted = kohya and "ss_network_module" in file.header and not file.alphas
            if converted and any(scale != 1 for scale in scales.values()):
                raise LoraError(
                    f"{file.path}: {place} is of the kohya file that this one was made of, whose tensors .alpha are "
                    "gone; converters differ in whether they multiply the weights by it. Use the kohya file, or remove "
                    "ss_network_alpha (it is in the weights) or ss_network_module (it is not) from the header"
                )
            yield place, scales


_PER_LAYER = ("conv_alpha", "block_alphas", "conv_block_alphas")


def _check_rank(file: LoraFile, key: str, text: str, layers: Iterable[str]) -> None:
    ranks = {file.ranks[layer] for layer in layers}
    if _is_number(text) and ranks and float(text) not in ranks:
        listed = ", ".join(map(str, sorted(ranks)))
        raise LoraError(
            f"{file.path}: {key}={text} in its header, but its tensors have rank {listed}; "
            "the header is of another LoRA, so its alpha is not trusted: save the LoRA again"
        )


def _assigned(
    file: LoraFile, groups: Mapping[str, dict[str, Any]], place: str
) -> Iterable[tuple[set[str], dict[str, Any]]]:
    """Which layers each group of settings, by the model's name before them ("": none), is for."""
    layers: dict[str, set[str]] = {}
    for layer in file.ranks:
        full = file.start + layer
        named = [prefix for prefix in groups if prefix and re.match(rf"(pipe\.)?{re.escape(prefix)}\.", full)]
        others = [prefix for prefix in groups if not _TEXT_ENCODER.match(f"{prefix}.")]
        if named:
            chosen = max(named, key=len)
        elif "" in groups:
            chosen = ""
        elif _TEXT_ENCODER.match(full) or not others:
            continue
        elif len(others) == 1:  # "transformer" is diffusers' name of what others call diffusion_model, dit or nothing
            chosen = others[0]
        else:
            listed = " and ".join(sorted(others))
            raise LoraError(
                f"{file.path}: {place} has settings for {listed}, but {full} is of neither; rename the keys"
            )
        layers.setdefault(chosen, set()).add(layer)
    return [(found, groups[prefix]) for prefix, found in layers.items()]


def _patterns(file: LoraFile, place: str, config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = config.get(name)
    if value is not None and not isinstance(value, dict):
        raise LoraError(f"{file.path}: {name} of {place} is {value!r}, no object of layers and numbers; correct it")
    return value or {}


def _matching(file: LoraFile, place: str, patterns: Mapping[str, Any], layer: str) -> list[str]:
    """Patterns that are the layer's name or a whole end of it; by peft's rule (`get_pattern_key`) the first counts."""
    try:
        return [p for p in patterns if re.match(rf"(.*\.)?({p})$", layer)]
    except re.error as err:
        raise LoraError(f"{file.path}: {place} holds a pattern that is no regular expression: {err}") from err


def _json(file: LoraFile, key: str, text: str) -> Mapping[str, Any]:
    """The JSON object that a header's entry holds; nothing for other entries."""
    try:
        value = json.loads(text) if text.lstrip().startswith("{") else None
    except (ValueError, RecursionError):
        value = None
    if isinstance(value, dict):
        return value
    if key == _METADATA_KEY:
        raise LoraError(f"{file.path}: {key} in its header is no JSON object; save the LoRA again")
    return {}


def _is_number(value: object) -> bool:
    try:
        return math.isfinite(float(str(value)))
    except ValueError:
        return False


def _number(file: LoraFile, place: str, value: object) -> float:
    text = str(value).strip().strip("\"'")
    if isinstance(value, bool) or not _is_number(text):
        raise LoraError(f"{file.path}: {place} is {value!r}, no number, so its strength is unknown; correct it")
    return _check(file, place, float(text))


def _check(file: LoraFile, place: str, alpha: float) -> float:
    if not math.isfinite(alpha) or alpha == 0:
        raise LoraError(f"{file.path}: {place} is {alpha:g}, with which the LoRA has no meaning; save it again")
    return alpha


def _flag(file: LoraFile, place: str, value: object) -> bool:
    text = str(value).strip().lower()
    if text in ("true", "1"):
        return True
    if text in ("false", "0", *_UNSTATED):
        return False
    raise LoraError(f"{file.path}: {place} is {value!r}, neither true nor false; correct it")


MERGE = "merge it into the model with the program that made it, or save it as a plain LoRA"
