"""Parts of a model that are named one by one: by patterns within a model's folder, or by files; no torch."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

from ray_diffsynth.models.folder import (
    PICKLE_SUFFIXES,
    ModelFolderError,
    files_as_text,
    part_name,
    require_config,
    standard_weights,
)
from ray_diffsynth.models.hub import find_repository


class NamedParts:
    """Parts of a model, gathered from patterns and files.

    folders: part -> its folder. files: part -> names of the weight files that were picked there, none for all of them;
    a folder without weights (a tokenizer's) is in ``folders`` alone. roots: part -> (its model's root, the model's id).
    """

    def __init__(self) -> None:
        self.folders: dict[str, Path] = {}
        self.files: dict[str, set[str]] = {}
        self.roots: dict[str, tuple[Path, str]] = {}

    def add_pattern(self, model_id: str, pattern: str, *, base_path: str | None) -> None:
        """Add what ``pattern`` matches in the model's folder.

        Raises ModelFolderError: it leaves that folder or matches nothing, a pickle, a part without config.json, two
        folders for one part; or the model is not found.
        """
        if PurePosixPath(pattern).is_absolute() or ".." in PurePosixPath(pattern).parts:
            raise ModelFolderError(f"{model_id}:{pattern}: the pattern must stay inside the model's folder")
        weights = [pattern if pattern.endswith(".safetensors") else f"{pattern.rstrip('/') or '*'}/*.safetensors"]
        root = find_repository(model_id, weights, base_path=base_path, complete=lambda r: _is_there(r, pattern))
        matches = matching(root, pattern)
        if not matches:
            raise ModelFolderError(
                f"{model_id}:{pattern} matches nothing in {root}, which holds: {files_as_text(root)}"
            )
        for match in matches:
            if match.is_dir():
                self._add_folder(match, root, model_id)
            else:
                self._add(match, root, model_id)

    def add_file(self, path: Path) -> None:
        """Add one weight file, or a part's folder. Raises ModelFolderError as `add_pattern`, and for an absent one."""
        if path.is_dir():
            self._add_folder(path, path.parent, str(path))
        elif path.is_file():
            self._add(path, path.parent.parent, str(path.parent.parent))
        else:
            raise ModelFolderError(f"--model_paths names {path}, which does not exist")

    def main(self) -> tuple[Path, str]:
        """Root and id of the transformer if there is one (it decides the family), else of the first part named."""
        if not self.roots:
            raise ModelFolderError("no part of a model is named by --model_id_with_origin_paths or --model_paths")
        return self.roots.get("transformer") or next(iter(self.roots.values()))

    def _add_folder(self, folder: Path, root: Path, model_id: str) -> None:
        if (folder / "config.json").is_file() or any(folder.glob("*.safetensors")):
            require_config(folder)
            self.files.setdefault(self._claim(folder, root, model_id), set())
        else:
            self._claim(folder, root, model_id)

    def _add(self, file: Path, root: Path, model_id: str) -> None:
        if file.suffix in PICKLE_SUFFIXES:
            raise ModelFolderError(f"{file} is a pickle, which is not read; use the model's *.safetensors")
        if file.suffix == ".safetensors":
            require_config(file.parent)
            self.files.setdefault(self._claim(file.parent, root, model_id), set()).add(file.name)
        else:
            self._claim(file.parent, root, model_id)

    def _claim(self, folder: Path, root: Path, model_id: str) -> str:
        part = part_name(folder)
        other = self.folders.setdefault(part, folder)
        if other != folder:
            raise ModelFolderError(f"two folders are named for the part {part}: {other} and {folder}; name one of them")
        # The root of a lone part's folder is its parent, where a tokenizer or another part may lie beside it.
        self.roots.setdefault(part, (folder.parent if folder == root else root, model_id))
        return part


def matching(root: Path, pattern: str) -> list[Path]:
    """Files (or folders, for a pattern like ``vae/``) under ``root``; an empty pattern is the model's own parts."""
    if not pattern.strip("/"):
        lone = [root] if (root / "config.json").is_file() else []
        return sorted(p.parent for p in root.glob("*/config.json")) or lone
    try:
        return sorted(root.glob(pattern.rstrip("/")))
    except (ValueError, NotImplementedError, OSError) as err:
        raise ModelFolderError(f"{pattern!r} is no pattern of files in {root}: {err}; e.g. vae/*.safetensors") from err


def _is_there(root: Path, pattern: str) -> bool:
    """Whether a cached snapshot holds what ``pattern`` means: files, with all shards of an index beside them."""
    matches = matching(root, pattern)
    folders = {m if m.is_dir() else m.parent for m in matches}
    try:
        return bool(matches) and all(standard_weights(f) or not (f / "config.json").is_file() for f in folders)
    except ModelFolderError:
        return False
