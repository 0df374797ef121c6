"""A folder of images or videos with captions in `.txt` files beside them, as rows; what is left out is named."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

from ray_diffsynth import storage
from ray_diffsynth.data.formats import READERS, DatasetError, RawRow, RawTable
from ray_diffsynth.data.media import MediaError, with_retries
from ray_diffsynth.data.on_threads import on_threads
from ray_diffsynth.data.suffixes import IMAGE_SUFFIXES, UNREADABLE_SUFFIXES, VIDEO_SUFFIXES, why_unreadable
from ray_diffsynth.data.text import TextError, decode_text
from ray_diffsynth.data.warnings import warn

CAPTION_SUFFIX = ".txt"


def read_folder(folder: str, file_column: str, text_column: str) -> RawTable:
    """Every image below `folder` in order of its path, with the text of the `.txt` file of the same stem.

    For the column "video", the videos too. Links to folders are followed. Files that look like images or videos, or
    have a caption, and cannot be used are warned of. Raises DatasetError for a folder without any image, StoreFailure.
    """
    suffixes = (*IMAGE_SUFFIXES, *(VIDEO_SUFFIXES if file_column == "video" else ()))
    names = storage.list_files(folder, recursive=True, hidden=True, follow_links=True)
    seen = [name for name in names if not storage.is_hidden(name)]
    captions = {name[: -len(CAPTION_SUFFIX)]: name for name in seen if name.lower().endswith(CAPTION_SUFFIX)}

    def row(item: tuple[int, str]) -> RawRow:
        number, name = item
        values: dict[str, Any] = {file_column: name}
        error = ""
        if caption := captions.get(name.rpartition(".")[0]):
            try:
                path = storage.join(folder, caption)
                data = with_retries(path, partial(storage.read_bytes, path))
                values[text_column] = decode_text(caption, data).strip()
            except TextError as problem:
                error = f"the caption file cannot be read: {caption} {problem}"
            except MediaError as problem:
                error = f"the caption file cannot be read: {problem}"
        return RawRow(number, storage.join(folder, name), None if error else values, error)

    images = [name for name in seen if name.lower().endswith(suffixes)]
    warn_of_left_out(names, suffixes, captions)
    rows = on_threads(row, enumerate(images, 1))
    if not rows:
        raise DatasetError(
            f"{folder} has neither a metadata file ({', '.join('metadata' + s for s in READERS)}) nor images "
            f"({', '.join(dict.fromkeys(suffixes))}); {_what_is_there(names)}check --dataset_base_path, or name the "
            "file with --dataset_metadata_path"
        )
    absent = "is absent: there is no .txt file of the same stem beside the image"
    return RawTable((file_column, text_column), tuple(rows), absent_text=absent)


def _is_table(lower: str) -> bool:
    """Whether the name (lower case) is that of a dataset's rows; JSON beside images is mostly about one of them."""
    return lower.endswith(tuple(READERS.keys() - {".json"})) or lower.rpartition("/")[2] == "metadata.json"


def _what_is_there(names: Sequence[str]) -> str:
    strange = [name for name in names if name.lower().endswith((*UNREADABLE_SUFFIXES, *VIDEO_SUFFIXES))]
    return f"it has {strange[0]} ({len(strange)} such files), which is not read here; " if strange else ""


def warn_of_left_out(names: Sequence[str], read: tuple[str, ...], captions: Iterable[str] = ()) -> None:
    """Warn of files (`names`, hidden ones too) that look like images or videos, or have a caption, and are not read.

    read: suffixes of the files that are read. captions: stems of the caption files.
    """
    captions = set(captions)
    alone = set(captions)
    for name in names:
        lower, stem = name.lower(), name.rpartition(".")[0]
        if storage.is_hidden(name):
            if lower.endswith((*read, *UNREADABLE_SUFFIXES, *VIDEO_SUFFIXES)):
                warn("file_left_out", name, "hidden: its name begins with a dot")
            continue
        if lower.endswith(CAPTION_SUFFIX):
            continue
        alone.discard(stem)
        if lower.endswith(read):
            continue
        if lower.endswith(VIDEO_SUFFIXES):
            warn("file_left_out", name, "a video, where images are trained on")
        elif lower.endswith(UNREADABLE_SUFFIXES):
            warn("file_left_out", name, why_unreadable(name))
        elif _is_table(lower):
            warn("file_left_out", name, "a table beside the images; name it by --dataset_metadata_path to read it")
        elif lower.endswith((".tar", ".zip")):
            warn("file_left_out", name, f"a {lower[-3:]} in a folder of images; name it by --dataset_metadata_path")
        elif stem in captions:
            warn("file_left_out", name, "it has a caption, but its ending is that of no known image; rename it")
    for stem in sorted(alone):
        warn("caption_alone", f"{stem}{CAPTION_SUFFIX}", "")
