"""From the command line's way to name a model to a ``ModelSource``: where each part and its files lie; no torch."""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray_diffsynth.config import JobConfig
from ray_diffsynth.config.options import split_names
from ray_diffsynth.models.folder import (
    KNOWN_PARTS,
    ModelFolderError,
    choose_weights,
    files_as_text,
    read_json_object,
    require_config,
)
from ray_diffsynth.models.hub import find_repository
from ray_diffsynth.models.named_parts import NamedParts, matching

__all__ = ["ModelFolderError", "ModelSource", "locate_configured", "locate_model"]


@dataclass(frozen=True)
class ModelSource:
    """Where a model's parts lie; plain data, so it travels to actors and into JSON.

    ``parts``: the subfolders that were named (None = whatever is in the folder). ``files``: per part, the weight files
    that a pattern picked. ``folders``: parts that do not lie at ``root/<part>``.
    """

    root: str
    model_id: str
    parts: frozenset[str] | None = None
    files: tuple[tuple[str, tuple[str, ...]], ...] = ()
    tokenizer_path: str | None = None
    processor_path: str | None = None
    folders: tuple[tuple[str, str], ...] = ()

    def has(self, subfolder: str) -> bool:
        """Whether the part was named, or, when none was, whether its folder has a config.json."""
        if self.parts is not None:
            return subfolder in self.parts
        return (self.folder(subfolder) / "config.json").is_file()

    def folder(self, subfolder: str) -> Path:
        """The part's folder (which need not exist)."""
        return Path(dict(self.folders).get(subfolder) or Path(self.root) / subfolder)

    def config(self, subfolder: str) -> dict[str, Any]:
        """The part's config.json; empty where there is none. Raises ModelFolderError if it is damaged."""
        return _json(self.folder(subfolder) / "config.json")

    def index(self) -> dict[str, Any]:
        """model_index.json of the whole model; empty where there is none. Raises ModelFolderError."""
        return _json(Path(self.root) / "model_index.json")

    def weight_files(self, subfolder: str) -> list[Path]:
        """The part's safetensors files, sorted. ModelFolderError: see ``choose_weights``, ``require_config``."""
        folder = self.folder(subfolder)
        require_config(folder)
        return [folder / name for name in choose_weights(folder, dict(self.files).get(subfolder, ()))]

    def companion(self, subfolder: str) -> Path:
        """The folder of a tokenizer, processor or scheduler: the path given, ``root/<subfolder>``, or beside a part."""
        given = {"tokenizer": self.tokenizer_path, "processor": self.processor_path}.get(subfolder)
        if given is not None:
            return Path(given)
        named = dict(self.folders)
        places = [named[subfolder]] if subfolder in named else []
        places += [str(Path(self.root) / subfolder), *(str(Path(f).parent / subfolder) for f in named.values())]
        for place in places:
            if Path(place).is_dir():
                return Path(place)
        flag = f"give --{subfolder}_path, or " if subfolder in ("tokenizer", "processor") else ""
        raise ModelFolderError(
            f"model {self.model_id} has no {subfolder}: looked at {', '.join(dict.fromkeys(places))}; "
            f"{flag}copy the folder {subfolder}/ of the model's repository there"
        )


def locate_model(
    model: str | None,
    *,
    model_id_with_origin_paths: str | None = None,
    model_paths: str | None = None,
    tokenizer_path: str | None = None,
    processor_path: str | None = None,
    base_path: str | None = None,
    wanted: Collection[str] | None = None,
) -> ModelSource:
    """Find a model named by a folder or hub id, by ``id:pattern,id:pattern``, or by a JSON list of files.

    Args:
        model: a folder in diffusers layout or a hub id.
        model_id_with_origin_paths: e.g. ``Qwen/Qwen-Image:vae/diffusion_pytorch_model.safetensors``; the id may be a
            folder. Each pattern names a part by its folder and picks its weights.
        model_paths: JSON list of weight files (or lists of shards); each file's folder has the part's config.json.
        tokenizer_path, processor_path: a folder, ``id`` or ``id:folder/``.
        base_path: instead of ``$DIFFSYNTH_MODEL_BASE_PATH``.
        wanted: with ``model``, the subfolders whose weights to download (None: all); never a limit on local files.

    Raises ModelFolderError: nothing or too much given, a model found nowhere (lists the places), a pattern that matches
    nothing (lists the files), a part without config.json, pickled weights.
    """
    by_part = bool(model_id_with_origin_paths or model_paths)
    if model and by_part:
        raise ModelFolderError(
            "--model names the whole model; give it or --model_id_with_origin_paths/--model_paths, not both"
        )
    if not model and not by_part:
        raise ModelFolderError(
            "no model is given; use --model <folder or hub id> or --model_id_with_origin_paths <id:pattern,…>"
        )

    tokenizer = _companion_path(tokenizer_path, "tokenizer", base_path)
    processor = _companion_path(processor_path, "processor", base_path)
    if model:
        root = _whole_model(model, base_path, wanted)
        return ModelSource(str(root), model, tokenizer_path=tokenizer, processor_path=processor)

    found = NamedParts()
    for entry in split_names(model_id_with_origin_paths):
        found.add_pattern(*_split_entry(entry), base_path=base_path)
    for path in _parse_model_paths(model_paths):
        found.add_file(path)
    root, model_id = found.main()
    for part, names in found.files.items():  # raised now, not when the first actor loads it
        choose_weights(found.folders[part], tuple(names))
    folders = {part: str(f) for part, f in found.folders.items() if f != root / part}
    return ModelSource(
        root=str(root),
        model_id=model_id,
        parts=frozenset(p for p in found.folders if p in found.files),
        files=tuple(sorted((part, tuple(sorted(names))) for part, names in found.files.items() if names)),
        tokenizer_path=tokenizer,
        processor_path=processor,
        folders=tuple(sorted(folders.items())),
    )


def locate_configured(config: JobConfig, wanted: Collection[str] | None = None) -> ModelSource:
    """The model that a job's configuration names; see `locate_model`.

    With `wanted=()` only configuration files are downloaded, which is enough to know the family and to plan.
    """
    return locate_model(
        config.model,
        model_id_with_origin_paths=config.model_id_with_origin_paths,
        model_paths=config.model_paths,
        tokenizer_path=config.tokenizer_path,
        processor_path=config.processor_path,
        wanted=wanted,
    )


def _json(path: Path) -> dict[str, Any]:
    return read_json_object(path) if path.is_file() else {}


def _split_entry(entry: str) -> tuple[str, str]:
    model_id, _, pattern = entry.rpartition(":")
    return (model_id, pattern) if model_id else (pattern, "")


def _parse_model_paths(text: str | None) -> list[Path]:
    if not text:
        return []
    try:
        value = json.loads(text)
    except ValueError as err:
        raise ModelFolderError(
            f'--model_paths must be a JSON list of files, ["a.safetensors", …]; it is {text!r} ({err})'
        ) from err
    items: list[Any] = []
    for item in value if isinstance(value, list) else [value]:
        items += item if isinstance(item, list) else [item]
    wrong = [item for item in items if not isinstance(item, str)]
    if wrong:
        raise ModelFolderError(f"--model_paths holds {wrong[0]!r}; each entry is a file's path or a list of paths")
    try:
        return [Path(item).expanduser().absolute() for item in items]
    except RuntimeError as err:  # no such ~user
        raise ModelFolderError(f"--model_paths {text}: {err}") from err


def _whole_model(model: str, base_path: str | None, wanted: Collection[str] | None) -> Path:
    weights = [f"{part}/*.safetensors" for part in (["*"] if wanted is None else sorted(wanted))]
    root = find_repository(model, weights, base_path=base_path, complete=lambda r: _is_complete(r, wanted))
    if (root / "model_index.json").is_file() or any(root.glob("*/config.json")):
        return root
    if (root / "config.json").is_file():
        raise ModelFolderError(f"{root} holds one part, not a pipeline; use --model_paths, or give its parent folder")
    raise ModelFolderError(
        f"{root} is not a model in diffusers layout: it has no model_index.json and no <part>/config.json. "
        f"It holds: {files_as_text(root)}"
    )


def _is_complete(root: Path, wanted: Collection[str] | None) -> bool:
    """Whether a cached snapshot has the weights of every wanted part (None: of every part model_index.json names)."""
    if not (root / "model_index.json").is_file():
        return False
    if wanted is None:
        try:
            index = read_json_object(root / "model_index.json")
        except ModelFolderError:
            return False
        wanted = [k for k, v in index.items() if k in KNOWN_PARTS and isinstance(v, list) and v and v[0] is not None]
    try:
        return all(choose_weights(root / part) for part in wanted if require_config(root / part) is not None)
    except ModelFolderError:
        return False


def _companion_path(text: str | None, subfolder: str, base_path: str | None) -> str | None:
    if not text:
        return None
    path = Path(text).expanduser()
    if path.exists():
        return str((path if path.is_dir() else path.parent).absolute())
    model_id, pattern = _split_entry(text)
    try:
        root = find_repository(
            model_id, [], base_path=base_path, complete=lambda r: bool(_companion_folders(r, pattern, subfolder))
        )
    except ModelFolderError as err:
        raise ModelFolderError(f"--{subfolder}_path: {err}") from err
    folders = _companion_folders(root, pattern, subfolder)
    if not folders:
        raise ModelFolderError(
            f"--{subfolder}_path {text} matches nothing in {root}, which holds: {files_as_text(root)}"
        )
    return str(folders[0])


def _companion_folders(root: Path, pattern: str, subfolder: str) -> list[Path]:
    if pattern.strip("/"):
        return [p if p.is_dir() else p.parent for p in matching(root, pattern)]
    return [p for p in (root / subfolder, root) if p.is_dir() and any(p.glob("*.json"))]
