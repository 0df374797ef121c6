"""Find the folder of a model id: a local folder, a base path, the Hugging Face cache, a download; no torch."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from ray_diffsynth.models.folder import PICKLE_SUFFIXES, ModelFolderError
from ray_diffsynth.system_errors import explain

BASE_PATH_VARIABLE = "DIFFSYNTH_MODEL_BASE_PATH"
# Small files that every loader may ask for: configs, indices, tokenizers. In the hub's patterns "*" crosses "/".
METADATA_PATTERNS = ("*.json", "*.txt", "*.model", "*.jinja")
VARIANTS = ("*.fp16*.safetensors", "*.bf16*.safetensors", "*.fp8*.safetensors", "*.non_ema*.safetensors")


def is_path(model: str) -> bool:
    """Whether ``model`` can only be meant as a path, not as an ``owner/name`` id."""
    return model.startswith(("/", ".", "~", "\\")) or model.count("/") > 1 or "\\" in model


def find_repository(
    model: str, weights: Sequence[str], *, base_path: str | None = None, complete: Callable[[Path], bool]
) -> Path:
    """The absolute folder of ``model``, downloaded when it is nowhere on this machine.

    Places, in order: the path itself; ``base_path`` or ``$DIFFSYNTH_MODEL_BASE_PATH`` (default ``./models``) / id; the
    Hugging Face cache, if ``complete(folder)``; a download of ``weights`` (patterns) with configs and tokenizers.
    A snapshot that is not complete is still returned when nothing can be downloaded: a stage that needs little of it
    runs.
    Raises ModelFolderError with every place looked at.
    """
    try:
        path = Path(model).expanduser()
        is_folder, is_file = path.is_dir(), path.is_file()
    except (OSError, RuntimeError) as err:  # a name that is too long, a folder that may not be read, no such ~user
        raise ModelFolderError(f"the model {model} cannot be looked up as a path: {err}") from err
    if is_folder:
        return path.absolute()
    if is_file and path.suffix in PICKLE_SUFFIXES:
        raise ModelFolderError(f"{model} is a pickle, which is not read; give the model's folder in diffusers layout")
    if is_file:
        raise ModelFolderError(f"{model} is a file, not a model's folder; give its folder, or name it in --model_paths")
    looked = [f"the folder {path.absolute()}"]
    if is_path(model):
        raise ModelFolderError(f"model folder {path.absolute()} does not exist; give a diffusers folder or a hub id")

    base = base_path or os.environ.get(BASE_PATH_VARIABLE) or "./models"
    local = (Path(base).expanduser() / model).absolute()
    if local.is_dir():
        return local
    looked.append(f"{local} (from {'base_path' if base_path else '$' + BASE_PATH_VARIABLE + ' or ./models'})")

    import huggingface_hub
    from huggingface_hub import constants

    cached: Path | None = None
    try:
        cached = Path(huggingface_hub.snapshot_download(model, local_files_only=True))
    except Exception as err:  # a damaged cache is neither an OSError nor a ValueError
        looked.append(f"the Hugging Face cache {constants.HF_HUB_CACHE} ({type(err).__name__})")
    if cached is not None and complete(cached):
        return cached
    ignore = list(VARIANTS) if all(w.endswith("/*.safetensors") for w in weights) else None
    try:
        return Path(
            huggingface_hub.snapshot_download(
                model, allow_patterns=[*METADATA_PATTERNS, *weights], ignore_patterns=ignore
            )
        )
    except Exception as err:  # some of the hub's own errors and of the network's derive from Exception alone
        if explain(err):  # a full disk, rights: nothing that another place would help
            raise
        if cached is not None:
            return cached
        reason = (str(err).strip().splitlines() or [""])[0]
        looked.append(f"the hub {constants.ENDPOINT} ({type(err).__name__}: {reason})")
    raise ModelFolderError(
        f"model {model!r} was not found. Looked at: {'; '.join(looked)}. Give a local folder in diffusers layout, "
        f"set {BASE_PATH_VARIABLE} to the folder that holds {model}, or download it on a machine with network access"
    )
