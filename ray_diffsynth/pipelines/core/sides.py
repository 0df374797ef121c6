"""Parameters whose side (shared, positive, negative) units of stage 2 can tell, and how a row of the cache keeps it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from ray_diffsynth.pipelines.core.errors import PipelineError
from ray_diffsynth.pipelines.core.state import SIDES, UnitState, make_state
from ray_diffsynth.pipelines.core.unit import PipelineUnit


def sided_parameters(
    units: Sequence[PipelineUnit],
    stage1: Sequence[PipelineUnit],
    stage2: Sequence[PipelineUnit],
    parameters: Sequence[str],
) -> tuple[str, ...]:
    """Those of the cached parameters that a unit of stage 1 may move to a side, and one of stage 2 looks for there.

    A unit that takes over writes and reads any side. A separate-CFG unit writes the positive and the negative one, and
    for the negative one reads what is not on the positive one alone; a direct unit writes the shared one. What no unit
    of stage 1 writes lies where `make_state` puts it, in both stages. `units`: all those of the pipeline.
    """
    return tuple(
        name
        for name in parameters
        if any(_moves(unit, name, units) for unit in stage1) and any(_tells_sides(unit, name) for unit in stage2)
    )


def row_of(state: UnitState, parameters: Collection[str], sided: Collection[str]) -> dict[str, Any]:
    """What the cache holds of a sample: parameter -> its value, or {side: value} of those in `sided`.

    A parameter that no unit has written is left out: a unit may return less than it declares.
    """
    flat = state.flat()
    row = {name: state.sides(name) if name in sided else flat.get(name) for name in parameters}
    return {name: value for name, value in row.items() if (value if name in sided else name in flat)}


def state_of(units: Sequence[PipelineUnit], row: Mapping[str, Any], sided: Collection[str]) -> UnitState:
    """The inverse of `row_of`; `row` may hold settings and inputs too. `units`: all those of the pipeline.

    Raises PipelineError for a row that was cached without sides.
    """
    state = make_state(units, {name: value for name, value in row.items() if name not in sided})
    for name in sided:
        if name not in row:
            continue
        sides = row[name]
        if not (isinstance(sides, dict) and sides and set(sides) <= set(SIDES)):
            raise PipelineError(
                f"the cache holds {name!r} without its sides, which units of stage 2 tell apart now; run stage 1 again"
            )
        for side, value in sides.items():
            getattr(state, side)[name] = value
    return state


def _moves(unit: PipelineUnit, name: str, units: Sequence[PipelineUnit]) -> bool:
    """Whether `unit` may put the parameter where `make_state` would not."""
    if unit.opaque or name not in unit.fetch_output_params():
        return unit.opaque
    return unit.take_over or unit.seperate_cfg or "shared" not in make_state(units, {name: None}).sides(name)


def _tells_sides(unit: PipelineUnit, name: str) -> bool:
    if unit.take_over:
        return unit.opaque or name in (*unit.fetch_input_params(), *unit.fetch_output_params())
    read_negative = (*(unit.input_params or ()), *(unit.input_params_nega or {}).values())
    return unit.seperate_cfg and name in read_negative
