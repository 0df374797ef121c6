"""What a tokenizer or an image processor does, as a hash: not the bytes of its files."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from ray_diffsynth.models.fingerprint import VOLATILE_KEYS, file_digest
from ray_diffsynth.models.load import load_companion
from ray_diffsynth.models.locate import ModelSource

# Who saved it, from where and by what; and what is no more than bookkeeping of a call.
_VOLATILE = {*VOLATILE_KEYS, "name_or_path", "processor_class"}
_TOKENIZER = (
    "chat_template", "clean_up_tokenization_spaces", "model_input_names", "model_max_length", "padding_side",
    "split_special_tokens", "truncation_side", "add_bos_token", "add_eos_token", "pad_token_type_id",
)  # fmt: skip
_DATA = (".json", ".txt", ".model", ".jinja", ".tiktoken", ".spm", ".vocab", ".merges", ".bpe")


def companion_meaning(source: ModelSource, subfolder: str, cls: str) -> str:
    """Hex blake2b (32 digits) of what the companion does; it is loaded for that, as the encoder loads it.

    A fast tokenizer: vocabulary, merges, normalisation and special tokens of its backend, chat template, sides and
    maximum length. An image processor: its effective parameters. Of any other class the JSON of its folder by value,
    and the bytes of its other data files. Raises ModelFolderError as `load_companion`.
    """
    loaded = load_companion(source, subfolder, cls)
    facts: Any
    if hasattr(loaded, "backend_tokenizer"):
        backend = json.loads(loaded.backend_tokenizer.to_str())
        # The padding and truncation of the last call; each call gives its own.
        backend = {name: value for name, value in backend.items() if name not in ("padding", "truncation")}
        own = {name: getattr(loaded, name, None) for name in _TOKENIZER}
        facts = {"backend": backend, "special": loaded.special_tokens_map, **own}
    elif hasattr(loaded, "image_processor_type") or "ImageProcessor" in type(loaded).__name__:
        facts = _without_volatile(loaded.to_dict())
    else:
        facts = _folder(source.companion(subfolder))
    text = json.dumps([cls.partition(":")[2], facts], sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=16).hexdigest()


def _folder(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for file in sorted(folder.iterdir()):
        if not file.is_file() or file.name.startswith(".") or file.suffix not in _DATA:
            continue
        try:
            content = json.loads(file.read_text(encoding="utf-8")) if file.suffix == ".json" else file_digest(file)
        except (ValueError, RecursionError):
            content = file_digest(file)
        found[file.name] = _without_volatile(content)
    return found


def _without_volatile(content: Any) -> Any:
    return {k: v for k, v in content.items() if k not in _VOLATILE} if isinstance(content, dict) else content
