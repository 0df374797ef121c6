"""The split of a list of units in two stages, as pure functions over what the units declare.

A list of units is a straight-line program over named parameters: each unit may read `fetch_input_params()`, may write
`fetch_output_params()` (it may return fewer) and runs the models `onload_model_names`. A unit with a true `opaque`
attribute may read and write anything.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from ray_diffsynth.config.options import split_names
from ray_diffsynth.errors import UserError


class DeclaredUnit(Protocol):
    """What the functions here need to know of a unit."""

    @property
    def onload_model_names(self) -> Sequence[str] | None: ...
    def fetch_input_params(self) -> Sequence[str]: ...
    def fetch_output_params(self) -> Sequence[str]: ...


U = TypeVar("U", bound=DeclaredUnit)


class SplitError(UserError, ValueError):
    """The units do not declare enough to be split."""


@dataclass(frozen=True)
class UnitGroup:
    """The stage-1 units that produce some of the cached parameters, and share their models with no other group."""

    name: str
    """The models joined by "+", or "inputs" for parameters that no model is needed for."""
    models: tuple[str, ...]
    units: tuple[Any, ...]
    parameters: tuple[str, ...]
    inputs: tuple[str, ...]
    """Names that may flow into the group from outside: what its units read, and its parameters (a unit may return
    without writing one, which then passes through). A name that is neither in the data nor a setting is made inside."""
    sided: tuple[str, ...] = ()
    """Those of the parameters that are kept with their sides: see `sides.sided_parameters`."""


def model_root(name: str) -> str:
    """The model that a dotted name is part of: `text_encoder.layers.3` -> `text_encoder`."""
    return name.partition(".")[0]


def split_units(units: Sequence[U], model_names: Collection[str] | str) -> tuple[list[U], list[U]]:
    """Split `units` into (stage 1: needs no gradient, stage 2), each in the given order.

    Stage 2 holds the units that run one of `model_names` and, of the units after them, those that conflict with one
    already in it: read after write, write after read, write after write. So stage 1 and then stage 2 leave the same
    value in every parameter as `units` in order.

    Args:
        model_names: the trainable models, also as one text with commas; dotted names stand for the whole model.
    """
    names = split_names(model_names) if isinstance(model_names, str) else model_names
    trainable = {model_root(name.strip()) for name in names if name.strip()}
    stage1: list[U] = []
    stage2: list[U] = []
    for unit in units:
        runs_trainable = not trainable.isdisjoint(_models(unit))
        if runs_trainable or any(_conflict(earlier, unit) for earlier in stage2):
            stage2.append(unit)
        else:
            stage1.append(unit)
    return stage1, stage2


def cached_parameters(
    stage1: Sequence[DeclaredUnit],
    stage2: Sequence[DeclaredUnit],
    *,
    reads: Collection[str],
    provided: Collection[str],
    inputs: Collection[str],
) -> tuple[str, ...]:
    """The parameters whose value after stage 1 can be read in stage 2: what the cache must hold, and all of it.

    Args:
        reads: names that `model_fn` and the loss read, after the units of stage 2.
        provided: names that are surely written between the units of stage 2 and `reads` (by the loss or by collation),
            or that are settings which no unit of stage 1 writes.
        inputs: names that each sample brings from the dataset.

    A unit may return less than it declares, so its outputs never make an earlier value unreadable.
    The order is that of the writing units, then that of `inputs` (sorted if it is a set).

    Raises:
        SplitError: units of both stages do not declare their parameters.
    """
    ordered_inputs = sorted(inputs) if isinstance(inputs, AbstractSet) else list(inputs)
    available = [*_union(unit.fetch_output_params() for unit in stage1), *ordered_inputs]
    live = {*_union(unit.fetch_input_params() for unit in stage2), *(set(reads) - set(provided))}
    opaque1, opaque2 = (next((unit for unit in stage if _opaque(unit)), None) for stage in (stage1, stage2))
    if opaque1 is not None and opaque2 is not None:
        raise SplitError(
            f"cannot tell what to cache: {type(opaque1).__name__} (stage 1) and {type(opaque2).__name__} (stage 2) "
            f"declare no parameters; give one of them input_params and output_params"
        )
    if opaque2 is not None:
        return tuple(dict.fromkeys(available))
    if opaque1 is not None:
        available += sorted(live)
    return tuple(dict.fromkeys(name for name in available if name in live))


def group_units(stage1: Sequence[Any], parameters: Sequence[str]) -> list[UnitGroup]:
    """Divide stage 1 into groups that can be run, cached and reused apart.

    Each parameter needs the units that may influence it (its backward slice); parameters whose slices share a model
    form one group. A unit without a model may be in several groups. The order follows each group's first parameter.
    """
    slices = {parameter: _slice(stage1, parameter) for parameter in parameters}
    models = {parameter: _group_models([stage1[i] for i in slices[parameter]]) for parameter in parameters}
    groups: list[list[str]] = []
    for parameter in parameters:
        # Parameters without a model form one group too.
        related = [
            group
            for group in groups
            if any(set(models[parameter]) & set(models[p]) or not (models[parameter] or models[p]) for p in group)
        ]
        merged = [name for group in related for name in group] + [parameter]
        groups = [group for group in groups if group not in related] + [merged]
    order = {parameter: index for index, parameter in enumerate(parameters)}
    ordered = sorted((sorted(group, key=order.__getitem__) for group in groups), key=lambda group: order[group[0]])
    return [_group(stage1, group, slices) for group in ordered]


def _group(stage1: Sequence[Any], parameters: Sequence[str], slices: dict[str, set[int]]) -> UnitGroup:
    units = tuple(stage1[i] for i in sorted(set().union(*(slices[parameter] for parameter in parameters))))
    models = _group_models(units)
    read = _union(unit.fetch_input_params() for unit in units)
    inputs = tuple(dict.fromkeys([*read, *parameters]))
    return UnitGroup("+".join(models) or "inputs", models, units, tuple(parameters), inputs)


def _slice(units: Sequence[DeclaredUnit], parameter: str) -> set[int]:
    """Indices of the units that may influence the last value of `parameter`."""
    live = {parameter}
    everything = False  # an opaque unit below reads whatever there is
    found: set[int] = set()
    for index in range(len(units) - 1, -1, -1):
        unit = units[index]
        if everything or _opaque(unit) or not live.isdisjoint(unit.fetch_output_params()):
            found.add(index)
            live.update(unit.fetch_input_params())
            everything = everything or _opaque(unit)
    return found


def _conflict(earlier: DeclaredUnit, later: DeclaredUnit) -> bool:
    if _opaque(earlier) or _opaque(later):
        return True
    reads, writes = set(earlier.fetch_input_params()), set(earlier.fetch_output_params())
    return not (
        writes.isdisjoint(later.fetch_input_params())
        and reads.isdisjoint(later.fetch_output_params())
        and writes.isdisjoint(later.fetch_output_params())
    )


def _models(unit: DeclaredUnit) -> tuple[str, ...]:
    return tuple(dict.fromkeys(model_root(name) for name in unit.onload_model_names or ()))


def _group_models(units: Iterable[DeclaredUnit]) -> tuple[str, ...]:
    return tuple(_union(_models(unit) for unit in units))


def _union(names: Iterable[Iterable[str]]) -> list[str]:
    return list(dict.fromkeys(name for part in names for name in part))


def _opaque(unit: object) -> bool:
    return bool(getattr(unit, "opaque", False))
