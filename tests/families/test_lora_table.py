"""docs/lora_formats.md says what diffusers does with each layout of keys; here it does it, family by family."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import save_file
from torch import Tensor

from ray_diffsynth.models.lora import match_targets
from ray_diffsynth.pipelines.core.base import BasePipeline
from tests.families.cases import FAMILIES, FamilyCase

PAGE = Path(__file__).resolve().parents[2] / "docs" / "lora_formats.md"
RANK = 2
LAYOUTS = (
    "`transformer.<layer>`",
    "`diffusion_model.<layer>`",
    "what training writes",
    "`base_model.model.<layer>`",
    "`<layer>` alone",
    "`<layer>.lora_A.default`",
    "`transformer.<layer>.lora_A.default`",
    "`dit.<layer>`",
    "layers of another model",
)


def rewritten(state: dict[str, Tensor], rename: Callable[[str], str]) -> dict[str, Tensor]:
    return {rename(key): value for key, value in state.items()}


def in_layout(layout: str, state: dict[str, Tensor], pipe: BasePipeline) -> dict[str, Tensor]:
    """`state` has the keys `<layer>.lora_A.weight`."""
    if layout == "what training writes":
        return rewritten(state, lambda key: pipe.lora_prefix + pipe.original_lora_key(key))
    if layout == "layers of another model":
        return rewritten(state, lambda key: f"transformer.another.{key}")
    prefix = layout.split("<layer>")[0].strip("`")
    inside = ".default.weight" if ".default" in layout else ".weight"
    return rewritten(state, lambda key: prefix + key.replace(".weight", inside))


class Records(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.found: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.found.append(record.getMessage())


def outcome(theirs: Any, path: Path, expected: dict[str, Tensor]) -> str:
    """What `load_lora_weights` makes of a file whose layers shall get the updates `expected`."""
    records, loggers = Records(), [logging.getLogger("diffusers"), logging.getLogger("peft")]
    for logger in loggers:
        logger.addHandler(records)
    try:
        theirs.load_lora_weights(str(path), adapter_name="tried")
    except Exception as err:
        return f"error ({type(err).__name__})"
    finally:
        for logger in loggers:
            logger.removeHandler(records)
        layers = [(p, m) for p, m in theirs.transformer.named_modules() if isinstance(m, BaseTunerLayer)]
        updates = {p: update_of(layer) for p, layer in layers if "tried" in getattr(layer, "scaling", {})}
        active = theirs.get_active_adapters()
        theirs.unload_lora_weights()
        assert not any(isinstance(module, BaseTunerLayer) for module in theirs.transformer.modules())
    about = (f"associated to {type(theirs.transformer).__name__}", "unexpected keys")
    told = "a warning" if any(words in text for text in records.found for words in about) else "not a word"
    if any(update is None for update in updates.values()):
        return f"**layers without weights**, {told}"
    right = [p for p, update in expected.items() if is_close(updates.get(p), update)]
    # Wan's image-to-video models get layers of zeros for those that a text-to-video LoRA lacks.
    others = [update for path, update in updates.items() if path not in expected and update.any()]
    if len(right) == len(expected) and not others:
        return "loads"
    if not updates:
        assert active == []
        return f"**nothing**, {told}"
    return f"**{len(right)} of {len(expected)} layers**, {told}"


def update_of(layer: Any) -> Tensor | None:
    """What the adapter adds to a layer's weight; None if it has no values."""
    if layer.lora_A["tried"].weight.is_meta:
        return None
    update: Tensor = layer.get_delta_weight("tried").detach()
    return update


def is_close(found: Tensor | None, expected: Tensor) -> bool:
    return found is not None and torch.allclose(found, expected, atol=1e-5)


def row_of(case: FamilyCase, pipe: BasePipeline, theirs: Any, folder: Path) -> list[str]:
    """The row of the family: an outcome for each of LAYOUTS."""
    generator = torch.Generator().manual_seed(0)
    state: dict[str, Tensor] = {}
    expected: dict[str, Tensor] = {}
    for layer in match_targets(pipe.dit, pipe.lora_targets):
        weight = pipe.dit.get_submodule(layer).weight
        down = torch.randn(RANK, weight.shape[1], generator=generator)
        up = torch.randn(weight.shape[0], RANK, generator=generator)
        state |= {f"{layer}.lora_A.weight": down, f"{layer}.lora_B.weight": up}
        expected[layer] = up @ down
    found = []
    for layout in LAYOUTS:
        path = folder / "tried.safetensors"
        save_file({key: value.clone() for key, value in in_layout(layout, state, pipe).items()}, path)
        found.append(outcome(theirs, path, expected))
    return found


def documented() -> dict[str, list[str]]:
    """Family -> its row of the table."""
    part = PAGE.read_text(encoding="utf-8").partition("## What diffusers does")[2].partition("\n## ")[0]
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in re.findall(r"^\|.*\|$", part, re.M)]
    head, _, *rows = lines
    assert tuple(head[1:]) == LAYOUTS
    return {row[0].strip("`"): row[1:] for row in rows}


def test_every_family_has_a_row() -> None:
    assert list(documented()) == list(FAMILIES)


def test_the_row_is_what_diffusers_does(case: FamilyCase, loaded: BasePipeline, theirs: Any, tmp_path: Path) -> None:
    found = row_of(case, loaded, theirs, tmp_path)
    print(f"| `{case.family}` | {' | '.join(found)} |")  # of a failing test: the row to write
    assert found[LAYOUTS.index("what training writes")] == "loads"
    assert documented()[case.family] == found
