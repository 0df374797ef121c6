"""The lines of Python that a page shows: how its LoRA is loaded in diffusers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any


def load_lines(report: Mapping[str, Any], output_path: str) -> tuple[str, ...]:
    """Python that shows the LoRA in diffusers: what was trained, or what images were made with.

    None before the first file, and for a model in full. A LoRA on an object store, where diffusers reads none, is first
    copied into the working folder.
    """
    config = report.get("config", {})
    if report.get("lora"):
        return _lines(config, [(output_path, report["lora"]["file"])])
    return _lines(config, [(lora["folder"], lora["file"]) for lora in report.get("loras", ())])


def _lines(config: Mapping[str, Any], loras: Sequence[tuple[str, str]]) -> tuple[str, ...]:
    if not loras:
        return ()
    ids = str(config.get("model_id_with_origin_paths") or "")
    model = config.get("model") or ids.split(":")[0] or "the model's folder"
    lines = ["import fsspec"] if any("://" in folder for folder, _ in loras) else []
    lines += ["from diffusers import DiffusionPipeline", f"pipe = DiffusionPipeline.from_pretrained({_text(model)})"]
    names = [f"lora_{number}" for number in range(len(loras))] if len(loras) > 1 else [""]
    for (folder, file), name in zip(loras, names, strict=True):
        if "://" in folder:
            protocol, url = folder.partition("://")[0], f"{folder.rstrip('/')}/{file}"
            folder, file = ".", f"{name}.safetensors" if name else file
            lines.append(f"fsspec.filesystem({_text(protocol)}).get({_text(url)}, {_text(file)})")
        adapter = f", adapter_name={_text(name)}" if name else ""
        lines.append(f"pipe.load_lora_weights({_text(folder)}, weight_name={_text(file)}{adapter})")
    if len(loras) > 1:
        lines.append(f"pipe.set_adapters([{', '.join(map(_text, names))}])")
    return tuple(lines)


def _text(value: str) -> str:
    return json.dumps(value, ensure_ascii=False)
