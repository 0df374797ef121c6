"""The parameters of one sample while units run, and on which side of classifier-free guidance each lies.

The state is three dicts: `shared`, `posi` and `nega` (the two sides). What the positive side sees, `{**shared,
**posi}`, is one flat namespace in which the last write wins; that is what makes a list of units a straight-line program
over named parameters, which `graph.split_units` can cut in two.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ray_diffsynth.pipelines.core.unit import PipelineUnit

SIDES = ("shared", "posi", "nega")
"""The three dicts of a state: what both sides of guidance see, the positive side, the negative one."""


@dataclass
class UnitState:
    """The parameters of one sample while units run."""

    shared: dict[str, Any] = field(default_factory=dict)
    posi: dict[str, Any] = field(default_factory=dict)
    nega: dict[str, Any] = field(default_factory=dict)

    def sides(self, name: str) -> dict[str, Any]:
        """Side -> value, of the sides on which the parameter lies."""
        return {side: values[name] for side in SIDES if name in (values := getattr(self, side))}

    def flat(self) -> dict[str, Any]:
        """What the positive side, `model_fn` and the loss see."""
        return {**self.shared, **self.posi}

    def flat_nega(self) -> dict[str, Any]:
        """What `model_fn` sees for the negative side."""
        return {**self.shared, **self.nega}


def make_state(units: Sequence[PipelineUnit], inputs: Mapping[str, Any]) -> UnitState:
    """Put each input on the side from which `units`, all those of a pipeline, use it.

    That is where `input_params_posi` or `input_params_nega` name it; a name used from both, or by a separate-CFG unit
    from the shared side, is shared. What only other units use, which find it on either, lies where a caller of a
    pipeline puts it: `prompt` and `negative_prompt` on their sides, everything else on the shared one.
    """
    sides: dict[str, set[str]] = {}
    for unit in units:
        shared = unit.input_params or () if unit.seperate_cfg else ()
        posi, nega = (unit.input_params_posi or {}).values(), (unit.input_params_nega or {}).values()
        for side, names in (("posi", posi), ("nega", nega), ("shared", shared)):
            for name in names:
                sides.setdefault(name, set()).add(side)
    state = UnitState()
    for name, value in inputs.items():
        used = sides.get(name) or {_CALLERS_SIDE.get(name, "shared")}
        side = next(iter(used)) if len(used) == 1 else "shared"
        getattr(state, side)[name] = value
    return state


_CALLERS_SIDE = {"prompt": "posi", "negative_prompt": "nega"}
