"""Load one part of a model, frozen, from safetensors on disk; and the tokenizers and schedulers beside it."""

from __future__ import annotations

import importlib
import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from ray_diffsynth.models.folder import ModelFolderError, require_config, standard_weights
from ray_diffsynth.models.integrity import check_companion, check_safetensors
from ray_diffsynth.models.locate import ModelSource


def load_part(
    source: ModelSource, subfolder: str, cls: str, *, torch_dtype: torch.dtype, device: torch.device | str
) -> nn.Module:
    """The part in eval mode, frozen, in ``torch_dtype`` on ``device``. Reads this part's folder and nothing else.

    Args:
        cls: ``"diffusers:QwenImageTransformer2DModel"``, ``"transformers:Qwen2_5_VLForConditionalGeneration"``, or your
            own ``"my_package.my_model:MyModel"``, a subclass of diffusers' ModelMixin or transformers' PreTrainedModel.

    Raises ModelFolderError: no folder, config.json or safetensors; another class than ``cls``; weights that do not fill
    the model or that are damaged.
    """
    model_class = _resolve(cls)
    folder = source.folder(subfolder)
    config = require_config(folder)
    library, name = _library(cls, model_class), cls.partition(":")[2]
    held = config.get("_class_name", name)
    if library == "diffusers" and held != name:
        raise ModelFolderError(f"{folder} holds a {held}, but {subfolder} must be a {name}; name the right model")
    files = source.weight_files(subfolder)
    for file in files:
        check_safetensors(file)
    options = {"dtype": torch_dtype, "use_safetensors": True, "local_files_only": True, "output_loading_info": True}
    with _standard_folder(folder, files, library) as place:
        try:
            module, info = model_class.from_pretrained(str(place), **options)
        except Exception as err:  # whatever the library raises, the user needs to know which folder it was
            raise ModelFolderError(f"{folder} cannot be loaded as {name}: {type(err).__name__}: {err}") from err
    missing = sorted(info["missing_keys"])
    if missing:  # from_pretrained fills them with random numbers and goes on
        raise ModelFolderError(
            f"{folder}: the weights lack {len(missing)} tensors of {name}: {', '.join(missing[:5])}"
            f"{', …' if len(missing) > 5 else ''}; config.json and weights do not belong together, or a file is missing"
        )
    loaded: nn.Module = module.to(device=device).eval().requires_grad_(False)
    return loaded


def load_companion(source: ModelSource, subfolder: str, cls: str) -> Any:
    """A tokenizer, processor or scheduler, e.g. ``("tokenizer", "transformers:AutoTokenizer")``; no weights."""
    folder = source.companion(subfolder)
    check_companion(source, subfolder)
    try:
        return _resolve(cls).from_pretrained(str(folder), local_files_only=True)
    except Exception as err:  # as in load_part
        name = cls.partition(":")[2]
        raise ModelFolderError(f"{folder} cannot be loaded as {name}: {type(err).__name__}: {err}") from err


def _resolve(cls: str) -> Any:
    library, _, name = cls.partition(":")
    if not library or not name:
        raise ValueError(f"{cls!r} names no class; write 'diffusers:Name', 'transformers:Name' or 'my_module:Name'")
    try:
        module = importlib.import_module(library)
    except ModuleNotFoundError as err:
        raise ValueError(f"{cls!r} is not importable: {err}; is its folder on PYTHONPATH?") from err
    try:
        found = getattr(module, name, None)
    except (ImportError, RuntimeError) as err:  # diffusers and transformers import a class when it is asked for
        cause = str(err).strip().splitlines() or [type(err).__name__]
        raise ModelFolderError(
            f"{cls} cannot be imported from {library}: {cause[-1]}; install what it needs, in fitting versions"
        ) from err
    if found is None:
        raise ValueError(f"{library} has no class {name}; check the name or the installed version of {library}")
    return found


def _library(cls: str, model_class: Any) -> str:
    """Whose way to load a class has, diffusers' or transformers'; ValueError if neither's."""
    library = cls.partition(":")[0]
    if library in ("diffusers", "transformers"):
        return library
    bases = {(base.__module__.partition(".")[0], base.__name__) for base in getattr(model_class, "__mro__", ())}
    for library, base in (("diffusers", "ModelMixin"), ("transformers", "PreTrainedModel")):
        if (library, base) in bases:
            return library
    raise ValueError(
        f"{cls!r} is no model that can be loaded; subclass diffusers' ModelMixin or transformers' PreTrainedModel"
    )


@contextmanager
def _standard_folder(folder: Path, files: Sequence[Path], library: str) -> Iterator[Path]:
    """``folder`` if from_pretrained reads exactly ``files`` there, else a folder of links under standard names."""
    if tuple(f.name for f in files) == standard_weights(folder):
        yield folder
        return
    stem = "diffusion_pytorch_model" if library == "diffusers" else "model"
    with tempfile.TemporaryDirectory(prefix="ray_diffsynth-") as name:
        place = Path(name)
        for extra in folder.glob("*.json"):
            if not extra.name.endswith(".index.json"):
                (place / extra.name).symlink_to(extra.resolve())
        weight_map: dict[str, str] = {}
        for number, file in enumerate(files, start=1):
            link = f"{stem}.safetensors" if len(files) == 1 else f"{stem}-{number:05d}-of-{len(files):05d}.safetensors"
            (place / link).symlink_to(file.resolve())
            if len(files) > 1:
                weight_map.update(dict.fromkeys(_keys(file), link))
        if weight_map:
            index = {"metadata": {"total_size": sum(f.stat().st_size for f in files)}, "weight_map": weight_map}
            (place / f"{stem}.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
        yield place


def _keys(file: Path) -> list[str]:
    try:
        with safe_open(str(file), framework="pt") as opened:
            return list(opened.keys())
    except Exception as err:  # safetensors raises its own type, OSError or ValueError, by the damage
        raise ModelFolderError(f"{file} is not a readable safetensors file ({err}); download it again") from err
