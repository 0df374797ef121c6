"""What lies in a part's folder (``transformer/``, ``vae/``, …) of a diffusers or transformers model; no torch."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

from ray_diffsynth.data.placeholders import wrong_content
from ray_diffsynth.errors import UserError

# In the order in which diffusers (an index first) and transformers (a single file first) look for them.
STANDARD_FILES = (
    "diffusion_pytorch_model.safetensors.index.json",
    "diffusion_pytorch_model.safetensors",
    "model.safetensors",
    "model.safetensors.index.json",
)
PICKLE_SUFFIXES = frozenset({".bin", ".pt", ".pth", ".ckpt", ".pkl"})
KNOWN_PARTS = frozenset(
    {
        *("transformer", "transformer_2", "unet", "vae", "audio_vae", "vocoder", "connectors", "controlnet"),
        *("text_encoder", "text_encoder_2", "text_encoder_3", "image_encoder"),
    }
)


class ModelFolderError(UserError):
    """A model's folder or file is absent, incomplete or of a kind that cannot be loaded."""


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object in ``path``; ModelFolderError when it is absent or is not one."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise ModelFolderError(f"{path} does not exist") from None
    except OSError as err:
        raise ModelFolderError(f"{path} cannot be read: {err}") from err
    try:
        value = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as err:
        why = wrong_content(data) or f"not JSON: {err}; copy it again from the model's repository"
        raise ModelFolderError(f"{path} is {why}") from err
    if not isinstance(value, dict):
        raise ModelFolderError(f"{path} holds no JSON object; copy it again from the model's repository")
    return value


def files_as_text(folder: Path, limit: int = 30) -> str:
    """The files below ``folder``, relative and sorted, as text for an error; at most ``limit`` of them."""
    names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    more = f", … ({len(names) - limit} more)" if len(names) > limit else ""
    return (", ".join(names[:limit]) + more) or "no files"


def require_config(folder: Path) -> dict[str, Any]:
    """``config.json`` of a part's folder; ModelFolderError says how to get it when it is not there."""
    if not folder.is_dir():
        raise ModelFolderError(
            f"{folder} does not exist on {socket.gethostname()}; it should hold config.json and *.safetensors of this "
            "part (with several machines: at the same path on each, or on a shared file system)"
        )
    if not (folder / "config.json").is_file():
        raise ModelFolderError(
            f"{folder} has no config.json, so the part's architecture is unknown (it holds: {files_as_text(folder)}); "
            "copy config.json from the same folder of the model's repository in diffusers layout"
        )
    return read_json_object(folder / "config.json")


def shards_of_index(index: Path) -> tuple[str, ...]:
    """File names of the shards that a ``*.safetensors.index.json`` lists, sorted."""
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelFolderError(f"{index} has no weight_map; copy it again from the model's repository")
    return tuple(sorted({str(name) for name in weight_map.values()}))


def standard_names(folder: Path) -> tuple[str, ...]:
    """Names of the files that ``from_pretrained(folder)`` asks for, there or not: one, or an index's shards, or ()."""
    for name in STANDARD_FILES:
        if (folder / name).is_file():
            return shards_of_index(folder / name) if name.endswith(".json") else (name,)
    return ()


def standard_weights(folder: Path) -> tuple[str, ...]:
    """``standard_names``; ModelFolderError when an index names shards that are not there."""
    names = standard_names(folder)
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise ModelFolderError(
            f"{folder} is incomplete: its index names {', '.join(missing)}, which "
            f"{'is' if len(missing) == 1 else 'are'} not there; download the rest of the folder"
        )
    return names


def choose_weights(folder: Path, picked: tuple[str, ...] = ()) -> tuple[str, ...]:
    """The weight files to load from ``folder``, sorted: ``picked``, narrowed to the standard ones if it has them all.

    Without ``picked``: the standard files, or else every ``*.safetensors`` there. Raises ModelFolderError when there
    are none, when only pickled weights are there, or when ``picked`` is only some of an index's shards.
    """
    chosen = set(picked)
    if chosen and not chosen & set(standard_names(folder)):
        return tuple(sorted(chosen))
    standard = standard_weights(folder)
    if chosen >= set(standard) and standard:
        return standard
    if chosen:
        left = ", ".join(sorted(set(standard) - chosen))
        raise ModelFolderError(
            f"{folder}: {', '.join(sorted(chosen))} is only a part of the weights; the pattern leaves out {left}"
        )
    found = standard or tuple(sorted(p.name for p in folder.glob("*.safetensors")))
    if not found:
        pickled = sorted(p.name for p in folder.iterdir() if p.suffix in PICKLE_SUFFIXES)
        why = (
            f"{', '.join(pickled)} are pickles, which are not read" if pickled else f"it holds {files_as_text(folder)}"
        )
        raise ModelFolderError(f"{folder} holds no *.safetensors ({why}); use the safetensors files of the model")
    return found


def part_name(folder: Path) -> str:
    """Which part of a pipeline ``folder`` holds: its own name if that is a part's, else a guess from config.json."""
    if folder.name in KNOWN_PARTS or not (folder / "config.json").is_file():
        return folder.name
    index = folder.parent / "model_index.json"
    if index.is_file() and folder.name in read_json_object(index):
        return folder.name
    config = read_json_object(folder / "config.json")
    cls = str(config.get("_class_name") or "")
    if "Autoencoder" in cls:
        return "vae"
    if "Transformer" in cls:
        return "transformer"
    return "text_encoder" if config.get("architectures") else folder.name
