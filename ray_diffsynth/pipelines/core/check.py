"""What a unit does beside what it declares, which would make training from a cache differ from training without one.

The split believes the declarations: it asks nobody for a value that was left on the pipeline, and a cache holds what a
parameter was when its unit returned it. So a unit's effects must be its outputs, and nothing else.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from ray_diffsynth.pipelines.core.content import content_of
from ray_diffsynth.pipelines.core.errors import UnitError
from ray_diffsynth.pipelines.core.graph import model_root
from ray_diffsynth.pipelines.core.runner import run_units
from ray_diffsynth.pipelines.core.state import SIDES, UnitState, make_state
from ray_diffsynth.pipelines.core.unit import PipelineUnit


def check_units(pipe: Any, inputs: Mapping[str, Any], units: Sequence[PipelineUnit] | None = None) -> dict[str, Any]:
    """Run units on one sample, each twice, and look at what they do beside their declarations; for tests.

    Args:
        pipe: with the models that the units run loaded.
        inputs: parameters of the sample, and the settings (`pipe.training_settings()`).
        units: in order; None: those of `pipe`.

    Returns what the positive side sees after them.

    Raises:
        UnitError: the first unit that changes a parameter in place, leaves something on the pipeline or on itself, runs
            a model or reads a parameter that it does not declare, or gives another result the second time; it names
            all of it. Further: what `run_units` raises, e.g. for an output that is not declared.
    """
    state = make_state(pipe.units, inputs)
    for unit in pipe.units if units is None else units:
        state = _checked(unit, pipe, state)
    return state.flat()


def _checked(unit: PipelineUnit, pipe: Any, state: UnitState) -> UnitState:
    before, around = _contents(state), _surroundings(pipe, unit)
    result, problems = _run(unit, pipe, state)
    for side, name in before:
        if before[side, name] != content_of(getattr(state, side)[name]):
            problems.append(f"changes the parameter {name!r} in place: work on a copy, and return it as an output")
    after = _surroundings(pipe, unit)
    for name in dict.fromkeys([*around, *after]):
        if around.get(name) != after.get(name):
            problems.append(f"sets or changes {name}: return it as an output that output_params names")
    if not problems:
        again = _run_openly(unit, pipe, state)
        first, second = _contents(result), _contents(again)
        for side, name in dict.fromkeys([*first, *second]):
            if first.get((side, name)) != second.get((side, name)):
                problems.append(
                    f"returns another {name!r} the second time: it may draw from a global generator, keep something, "
                    "or look for what it does not declare"
                )
    if problems:
        raise UnitError(f"{type(unit).__name__} " + "; ".join(dict.fromkeys(problems)))
    return result


def _run(unit: PipelineUnit, pipe: Any, state: UnitState) -> tuple[UnitState, list[str]]:
    """The state after `unit`, and what it used that it does not declare."""
    used: list[str] = []
    guarded = _without_undeclared(unit, state, used)
    try:
        with _other_models_hidden(pipe, unit, used), _generators_kept(), torch.no_grad():
            (result,) = run_units([unit], pipe, [guarded])
    except UnitError:
        raise
    except Exception as error:
        if used:  # what was hidden made it fail
            raise UnitError(f"{type(unit).__name__} " + "; ".join(dict.fromkeys(used))) from error
        raise
    return _restored(result, state, used), used


def _run_openly(unit: PipelineUnit, pipe: Any, state: UnitState) -> UnitState:
    """The state after `unit`, with all that there is."""
    with _generators_kept(), torch.no_grad():
        (result,) = run_units([unit], pipe, [state])
    return result


def _contents(state: UnitState) -> dict[tuple[str, str], bytes]:
    return {(side, name): content_of(value) for side in SIDES for name, value in getattr(state, side).items()}


def _surroundings(pipe: Any, unit: PipelineUnit) -> dict[str, bytes]:
    """What lies on the pipeline and on the unit, without the models, whose state is their own."""
    models = {*getattr(pipe, "parts", ()), *getattr(pipe, "companions", ())}
    own = {name: value for name, value in vars(pipe).items() if name not in models and name != "units"}
    for name in ("_modules", "_parameters", "_buffers"):
        own |= {inner: value for inner, value in own.pop(name, {}).items() if inner not in models}
    found = {f"pipe.{name}": content_of(value) for name, value in own.items()}
    found["pipe.units"] = content_of([id(each) for each in pipe.units])
    return found | {f"its own attribute {name!r}": content_of(value) for name, value in vars(unit).items()}


class _Hidden:
    """Stands for something that a unit does not declare: whatever is done with it is noted, and fails."""

    def __init__(self, what: str, used: list[str]) -> None:
        self.__dict__["_note"] = lambda: used.append(what)

    def __getattr__(self, name: str) -> Any:
        self.__dict__["_note"]()
        raise AttributeError(name)

    def _fail(self, *args: Any, **kwargs: Any) -> Any:
        self.__dict__["_note"]()
        raise TypeError("it is not declared")

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for value in (*args, *(kwargs or {}).values()):
            for item in value if isinstance(value, (list, tuple)) else [value]:
                if isinstance(item, cls):
                    item._fail()

    __array__ = __call__ = __getitem__ = __setattr__ = __iter__ = __len__ = __bool__ = __str__ = __index__ = (
        __float__
    ) = _fail
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __rtruediv__ = __neg__ = _fail
    __eq__ = __lt__ = __gt__ = __le__ = __ge__ = __contains__ = __matmul__ = __format__ = _fail
    __hash__ = None  # type: ignore[assignment]


@contextmanager
def _other_models_hidden(pipe: Any, unit: PipelineUnit, used: list[str]) -> Iterator[None]:
    """Within it the pipeline has only the models that `unit` names, with their tokenizers and processors."""
    declared = {model_root(name) for name in unit.onload_model_names or ()}
    parts = getattr(pipe, "parts", {})
    declared |= {companion for name in declared if name in parts for companion in parts[name].companions}
    own, modules = vars(pipe), getattr(pipe, "_modules", {})
    everything = {*parts, *getattr(pipe, "companions", ()), *modules}
    hidden = {name: own.get(name, modules.get(name)) for name in everything - declared}
    kept_own, kept_modules = dict(own), dict(modules)
    try:
        for name, value in hidden.items():
            if value is not None:
                modules.pop(name, None)
                own[name] = _Hidden(f"uses {name!r}: name its model in onload_model_names", used)
        yield
    finally:
        for name in hidden:
            own.pop(name, None)
            if name in kept_own:
                own[name] = kept_own[name]
        if modules is not own and kept_modules:
            added = {name: value for name, value in modules.items() if name not in kept_modules}
            modules.clear()
            modules.update(kept_modules | added)


def _without_undeclared(unit: PipelineUnit, state: UnitState, used: list[str]) -> UnitState:
    """`state`; for a unit that takes over and declares what it reads, with the rest hidden. Others get no more."""
    if not unit.take_over or unit.opaque:
        return UnitState(dict(state.shared), dict(state.posi), dict(state.nega))
    reads = unit.fetch_input_params()
    sides = (
        {
            name: value if name in reads else _Hidden(f"reads {name!r}: name it in input_params", used)
            for name, value in getattr(state, side).items()
        }
        for side in SIDES
    )
    return UnitState(*sides)


def _restored(result: UnitState, state: UnitState, used: list[str]) -> UnitState:
    """`result` with what was hidden in its place again; notes where a unit handed it on under another name."""
    for side in SIDES:
        values = getattr(result, side)
        for name in [name for name, value in values.items() if _holds_hidden(value)]:
            if isinstance(values[name], _Hidden) and name in getattr(state, side):
                values[name] = getattr(state, side)[name]
            else:
                used.append(f"makes {name!r} of parameters that it does not declare: name them in input_params")
    return result


def _holds_hidden(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return any(_holds_hidden(item) for item in value)
    if isinstance(value, dict):
        return any(_holds_hidden(item) for item in value.values())
    return isinstance(value, _Hidden)


@contextmanager
def _generators_kept() -> Iterator[None]:
    """Within it the global generators stand at another place each time; behind it as before."""
    python, numpy_state = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            torch.seed()
            np.random.seed()
            random.seed()
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy_state)
