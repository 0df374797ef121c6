"""What a part's weights are, as a hash of their bytes; remembered on disk by size and times of the file. No torch."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ray_diffsynth import storage
from ray_diffsynth.models.folder import ModelFolderError, read_json_object
from ray_diffsynth.models.locate import ModelSource

logger = logging.getLogger(__name__)

# Written by whoever saved the folder; two saves of one model differ in them and encode the same.
VOLATILE_KEYS = ("_name_or_path", "_diffusers_version", "transformers_version")
_CHUNK = 16 << 20  # bytes
_SETTLED = 2.0  # seconds: a file changed more recently may change again within one tick of its timestamp


def part_fingerprint(source: ModelSource, subfolder: str) -> str:
    """Hex blake2b (32 digits) of a part's config.json and the contents of its weight files.

    A folder without either is hashed over all its files; of tokenizers and processors see ``companion_meaning``. The
    folder's place and the versions that saved it do not count. Raises ModelFolderError as ``ModelSource.weight_files``
    and ``companion`` do, or when a file changes while it is read.
    """
    if source.has(subfolder) or (source.folder(subfolder) / "config.json").is_file():
        files = source.weight_files(subfolder)
        config = source.folder(subfolder) / "config.json"
        kept = {k: v for k, v in read_json_object(config).items() if k not in VOLATILE_KEYS}
        parts = [("config.json", json.dumps(kept, sort_keys=True))]
    else:
        folder = source.companion(subfolder)
        files = sorted(p for p in folder.iterdir() if p.is_file() and not p.name.startswith("."))
        if not files:
            raise ModelFolderError(f"{folder} is empty; copy the files of {subfolder}/ from the model's repository")
        parts = []
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:  # hashlib lets go of the GIL
        parts += [(f.name, digest) for f, digest in zip(files, pool.map(file_digest, files), strict=True)]
    whole = hashlib.blake2b(digest_size=16)
    for name, value in parts:
        whole.update(json.dumps([name, value]).encode())
    return whole.hexdigest()


SKETCH = "sketch:"
"""Prefix of a part's sketch among the fingerprint parts of a cache."""
_ENDS = 64 << 10


def part_sketch(source: ModelSource, subfolder: str) -> str | None:
    """A cheap identity of a part: its config.json, and size, first and last 64 KiB of each weight file.

    Tells other weights apart without reading them, so that stage 2 can check which encoders a cache is from. None where
    the part is not there. Not for cache keys: an edit in the middle of a file does not show.
    """
    try:
        files = source.weight_files(subfolder)
    except ModelFolderError:
        return None
    whole = hashlib.blake2b(digest_size=16)
    config = {
        k: v for k, v in read_json_object(source.folder(subfolder) / "config.json").items() if k not in VOLATILE_KEYS
    }
    whole.update(json.dumps(config, sort_keys=True).encode())
    for path in files:
        try:
            size = path.stat().st_size
            with path.open("rb") as file:
                head = file.read(_ENDS)
                file.seek(max(0, size - _ENDS))
                whole.update(f"{path.name} {size}".encode() + head + file.read())
        except OSError as err:
            raise ModelFolderError(f"{path} cannot be read: {err}") from err
    return whole.hexdigest()


def file_digest(path: Path) -> str:
    """Hex blake2b of a file's bytes, from what is kept of the last time when size, times and inode are the same."""
    before = _stamp(path)
    kept = _digest_file(path)
    known = _read_known(kept) if kept is not None else None
    if known is not None and known.get("stamp") == before and isinstance(known.get("digest"), str):
        return str(known["digest"])
    digest = hashlib.blake2b(digest_size=16)
    try:
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
    except OSError as err:
        raise ModelFolderError(f"{path} cannot be read: {err}") from err
    if _stamp(path) != before:
        raise ModelFolderError(f"{path} changed while it was read; wait until it is written, then start again")
    if kept is not None and _settled(path):
        _write_known(kept, {"path": str(path.resolve()), "stamp": before, "digest": digest.hexdigest()})
    return digest.hexdigest()


def _stamp(path: Path) -> str:
    try:
        return storage.stamp(str(path))
    except OSError as err:
        raise ModelFolderError(f"{path} cannot be read: {err}") from err


def _settled(path: Path) -> bool:
    try:
        return time.time() - path.stat().st_mtime > _SETTLED
    except OSError:  # gone in this moment
        return False


def _digest_file(path: Path) -> Path | None:
    """None for a user without a home, in a container."""
    base = os.path.expanduser(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    if base.startswith("~"):
        return None
    name = hashlib.blake2b(str(path.resolve()).encode(errors="surrogateescape"), digest_size=16).hexdigest()
    return Path(base) / "ray_diffsynth" / "fingerprints" / f"{name}.json"


def _read_known(kept: Path) -> dict[str, object] | None:
    try:
        value = json.loads(kept.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None  # absent or damaged: the file is read again
    return value if isinstance(value, dict) else None


def _write_known(kept: Path, value: dict[str, object]) -> None:
    try:
        storage.write_bytes_atomic(str(kept), json.dumps(value).encode())
    except OSError as err:
        logger.warning("the fingerprint of %s is not remembered: %s", value["path"], err)
