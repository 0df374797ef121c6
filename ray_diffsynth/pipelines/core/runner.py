"""Runs units: each on all samples at once, in order, and checked against what it declares."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from ray_diffsynth.pipelines.core.errors import UnitError
from ray_diffsynth.pipelines.core.state import UnitState
from ray_diffsynth.pipelines.core.unit import PipelineUnit, missing_input


class PipelineUnitRunner:
    """Runs one unit on the three dicts of one sample, as DiffSynth-Studio's runner does, but changes none of them."""

    def __call__(
        self,
        unit: PipelineUnit,
        pipe: Any,
        inputs_shared: Mapping[str, Any],
        inputs_posi: Mapping[str, Any],
        inputs_nega: Mapping[str, Any],
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        """Return the shared, positive and negative dicts after the unit.

        Raises:
            MissingInputError: names the unit, the parameter and who should have written it.
            UnitError: the unit returned something that it does not declare.
        """
        state = UnitState(dict(inputs_shared), dict(inputs_posi), dict(inputs_nega))
        (result,) = _run_unit(unit, pipe, [state])
        return result.shared, result.posi, result.nega


def run_units(units: Sequence[PipelineUnit], pipe: Any, states: Sequence[UnitState]) -> list[UnitState]:
    """Run `units` in order on several samples, each unit on all of them through `process_batch`; the order is kept.

    The states that are passed in are not changed. Errors as `PipelineUnitRunner`.
    """
    result = list(states)
    for unit in units:
        result = _run_unit(unit, pipe, result)
    return result


def _run_unit(unit: PipelineUnit, pipe: Any, states: Sequence[UnitState]) -> list[UnitState]:
    if unit.take_over:
        return [_take_over(unit, pipe, state) for state in states]
    result = [UnitState(dict(state.shared), dict(state.posi), dict(state.nega)) for state in states]
    if not unit.seperate_cfg:
        batch = [_gather(unit, pipe, state.flat(), {}) for state in result]
        for state, outputs in zip(result, _process(unit, pipe, batch), strict=True):
            for name, value in outputs.items():
                state.posi.pop(name, None)  # the last write wins: a stale value of a side must not hide this one
                state.nega.pop(name, None)
                state.shared[name] = value
        return result
    guided = [state for state in result if _cfg_scale(unit, pipe, state) != 1]
    batch = [_gather(unit, pipe, state.flat(), unit.input_params_posi or {}) for state in result]
    batch_nega = [_gather(unit, pipe, state.flat_nega(), unit.input_params_nega or {}) for state in guided]
    for state, outputs in zip(result, _process(unit, pipe, batch), strict=True):
        state.posi.update(outputs)
    for state, outputs in zip(guided, _process(unit, pipe, batch_nega), strict=True):
        state.nega.update(outputs)
    return result


def _take_over(unit: PipelineUnit, pipe: Any, state: UnitState) -> UnitState:
    before = UnitState(dict(state.shared), dict(state.posi), dict(state.nega))
    result = unit.process(
        pipe, inputs_shared=dict(state.shared), inputs_posi=dict(state.posi), inputs_nega=dict(state.nega)
    )
    if not (isinstance(result, tuple) and len(result) == 3 and all(isinstance(side, Mapping) for side in result)):
        raise UnitError(
            f"{_label(unit)} takes over, so its process() must return (inputs_shared, inputs_posi, inputs_nega), "
            f"not {type(result).__name__}"
        )
    after = UnitState(*(dict(side) for side in result))
    if not unit.opaque:
        for old, new in ((before.shared, after.shared), (before.posi, after.posi), (before.nega, after.nega)):
            changed = [name for name, value in new.items() if name not in old or old[name] is not value]
            _check_declared(unit, [*changed, *(name for name in old if name not in new)])
    return after


def _process(unit: PipelineUnit, pipe: Any, batch: list[dict[str, Any]]) -> list[dict[str, Any]]:
    if not batch:
        return []
    results = unit.process_batch(pipe, batch)
    if len(results) != len(batch):
        raise UnitError(f"{_label(unit)}.process_batch got {len(batch)} samples and returned {len(results)}")
    for outputs in results:
        if not isinstance(outputs, Mapping):
            raise UnitError(f"{_label(unit)}.process must return a dict of its outputs, not {type(outputs).__name__}")
        _check_declared(unit, list(outputs))
    return [dict(outputs) for outputs in results]


def _gather(unit: PipelineUnit, pipe: Any, values: Mapping[str, Any], renamed: Mapping[str, str]) -> dict[str, Any]:
    """Collect the arguments of `process`; `renamed` maps an argument to the name of its parameter on this side."""
    parameters = inspect.signature(unit.process).parameters
    inputs: dict[str, Any] = {}
    for argument, name in [*renamed.items(), *((name, name) for name in unit.input_params or ())]:
        if name in values:
            inputs[argument] = values[name]
        elif argument not in parameters or parameters[argument].default is inspect.Parameter.empty:
            raise missing_input(_label(unit), name, pipe, before=unit)
    return inputs


def _cfg_scale(unit: PipelineUnit, pipe: Any, state: UnitState) -> float:
    if "cfg_scale" not in state.shared:
        raise missing_input(_label(unit), "cfg_scale", pipe, before=unit)
    return float(state.shared["cfg_scale"])


def _check_declared(unit: PipelineUnit, names: Sequence[str]) -> None:
    undeclared = sorted(set(names) - set(unit.fetch_output_params()))
    if undeclared:
        raise UnitError(
            f"{_label(unit)} wrote {', '.join(map(repr, undeclared))} without declaring it; "
            f"add it to output_params={unit.fetch_output_params()!r}"
        )


def _label(unit: PipelineUnit) -> str:
    return type(unit).__name__
