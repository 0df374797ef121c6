"""`adapter_config.json`, which peft writes beside a LoRA file and which holds its alpha."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from ray_diffsynth import storage
from ray_diffsynth.data.placeholders import wrong_content
from ray_diffsynth.models.lora_alpha import ADAPTER_CONFIG, LoraError


def adapter_config(path: str, *, peft_names: bool) -> Mapping[str, Any] | None:
    """peft's configuration beside the LoRA file `path`, if it is of that file; None if there is none.

    peft_names: whether the file's keys are peft's own. Raises LoraError: it cannot be read, or is no JSON object.
    """
    data = adapter_config_bytes(path, peft_names=peft_names)
    if data is None:
        return None
    try:
        config = json.loads(data)
    except (ValueError, RecursionError) as err:
        why = wrong_content(data) or f"no JSON ({err}); copy it again"
        raise LoraError(f"{ADAPTER_CONFIG}, which says how strong the LoRA {path} beside it is, is {why}") from err
    if not isinstance(config, dict):
        raise LoraError(
            f"{ADAPTER_CONFIG} beside {path} holds no JSON object; copy it again from the LoRA's repository"
        )
    return config


def adapter_config_bytes(path: str, *, peft_names: bool) -> bytes | None:
    """Its bytes. It is of the file if that has peft's names, in its keys or its own, or is the only one there."""
    folder, slash, name = path.rpartition("/")
    folder = folder or slash or "."
    place = storage.join(folder, ADAPTER_CONFIG)
    try:
        data = storage.read_bytes(place)
    except FileNotFoundError:
        return None
    except OSError as err:
        if isinstance(err, PermissionError) and storage.is_remote(path):
            return None  # what S3 answers about an absent file, if the folder may not be listed
        raise LoraError(f"{place} cannot be read: {err}; it says how strong the LoRA {path} is") from err
    alone = peft_names or name == "adapter_model.safetensors"
    return data if alone or storage.list_files(folder, suffix=".safetensors") == [name] else None
