"""`PipelineUnit`: one step that prepares what the denoising model needs, and the runner that executes a list of them.

The state of one sample is three dicts: `shared`, `posi` and `nega` (the two sides of classifier-free guidance). What
the positive side sees, `{**shared, **posi}`, is one flat namespace in which the last write wins; that is what makes a
list of units a straight-line program over named parameters, which `graph.split_units` can cut in two.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from ray_diffsynth.errors import UserError
from ray_diffsynth.pipelines.core.versions import attributes_hash, stated_versions


class MissingInputError(UserError, KeyError):
    """A unit (or `model_fn`) needs a parameter that nobody has written."""


class UnitError(UserError, ValueError):
    """A unit broke its own declaration."""


class PipelineUnit:
    """A step over named parameters; subclass it, declare what it reads and writes, and implement `process`.

    Three modes:

    * direct: `process(pipe, **inputs)` returns a dict of outputs, written to the shared side;
    * separate-CFG (`seperate_cfg=True`): `process` runs with the inputs of the positive side and, if `cfg_scale` is
      not 1, again with those of the negative side; each result is written to its side;
    * take-over (`take_over=True`): `process(pipe, inputs_shared, inputs_posi, inputs_nega)` returns all three dicts.

    Args:
        input_params: names read from the shared side.
        output_params: names that the unit may write; it may return fewer.
        input_params_posi: argument name of `process` -> parameter name, on the positive side.
        input_params_nega: the same on the negative side.
        onload_model_names: models of the pipeline that the unit runs.
        seperate_cfg: DiffSynth-Studio's spelling, kept; `separate_cfg` is accepted too.

    An input whose argument has a Python default in `process` is optional; any other must be there.
    """

    version: ClassVar[int]
    """Part of the cache key. Each class that defines more than `__init__` states its own, `version = 1`; raise it when
    what the unit makes changes, by its own code or by that of functions that it calls."""

    def __init__(
        self,
        seperate_cfg: bool = False,
        take_over: bool = False,
        input_params: Sequence[str] | None = None,
        output_params: Sequence[str] | None = None,
        input_params_posi: Mapping[str, str] | None = None,
        input_params_nega: Mapping[str, str] | None = None,
        onload_model_names: Sequence[str] | None = None,
        *,
        separate_cfg: bool = False,
    ) -> None:
        self.seperate_cfg = seperate_cfg or separate_cfg
        self.take_over = take_over
        self.input_params = _names(input_params)
        self.output_params = _names(output_params)
        self.input_params_posi = None if input_params_posi is None else dict(input_params_posi)
        self.input_params_nega = None if input_params_nega is None else dict(input_params_nega)
        self.onload_model_names = _names(onload_model_names)

    # `*args: Any, **kwargs: Any` lets a subclass name its own arguments.
    def process(self, pipe: Any, *args: Any, **kwargs: Any) -> Any:
        """Compute the outputs of one sample: a dict, or the three dicts of a take-over unit."""
        return {}

    def process_batch(self, pipe: Any, batch: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Compute the outputs of several samples, in order. Override it where one call of the model serves them all."""
        return [self.process(pipe, **inputs) for inputs in batch]

    @property
    def opaque(self) -> bool:
        """Whether the unit may read or write anything: a take-over unit that does not declare both."""
        return self.take_over and (self.input_params is None or self.output_params is None)

    def fetch_input_params(self) -> tuple[str, ...]:
        """Names that the unit may read, from any side, in declaration order."""
        names = [*(self.input_params or ())]
        names += (self.input_params_posi or {}).values()
        names += (self.input_params_nega or {}).values()
        if self.seperate_cfg:
            names.append("cfg_scale")  # the runner reads it to decide on the negative side
        return tuple(dict.fromkeys(names))

    def fetch_output_params(self) -> tuple[str, ...]:
        """Names that the unit may write."""
        return tuple(dict.fromkeys(self.output_params or ()))

    def code_version(self) -> str:
        """Identity of what the unit does, for cache keys: the versions of its classes, its attributes by value.

        Raises CacheKeyError for a class without a version of its own, and an attribute that has no value to compare.
        """
        stated = stated_versions(type(self), PipelineUnit)
        return f"{stated} {attributes_hash(type(self).__qualname__, vars(self))}"


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


def _names(names: Sequence[str] | None) -> tuple[str, ...] | None:
    # ("vae") without the comma is a string: read it as the one name that was meant.
    return (names,) if isinstance(names, str) else None if names is None else tuple(names)


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


def missing_input(reader: str, name: str, pipe: Any, *, before: PipelineUnit | None = None) -> MissingInputError:
    """The error for a parameter that `reader` needs: it says who should have written it.

    Args:
        before: the unit that reads; only the units of the pipeline before it could have written the parameter.
    """
    units = list(getattr(pipe, "units", None) or ())
    if before in units:
        earlier, later = units[: units.index(before)], units[units.index(before) + 1 :]
    else:
        earlier, later = units, []
    writers = [_label(unit) for unit in earlier if name in unit.fetch_output_params()]
    late = [_label(unit) for unit in later if name in unit.fetch_output_params()]
    if writers:
        who = f"{' or '.join(writers)} should have written it but did not run, or returned without it"
    elif late:
        who = f"{' or '.join(late)} writes it, but runs later: put it earlier in `units`"
    else:
        who = "no unit writes it, so the dataset (a metadata column) or the caller must give it"
    return MissingInputError(f"{reader} needs {name!r}, which is missing: {who}")


def _check_declared(unit: PipelineUnit, names: Sequence[str]) -> None:
    undeclared = sorted(set(names) - set(unit.fetch_output_params()))
    if undeclared:
        raise UnitError(
            f"{_label(unit)} wrote {', '.join(map(repr, undeclared))} without declaring it; "
            f"add it to output_params={unit.fetch_output_params()!r}"
        )


def _label(unit: PipelineUnit) -> str:
    return type(unit).__name__
