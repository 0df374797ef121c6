"""The split: random unit programs end alike split and unsplit, with only the cached parameters carried over."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ray_diffsynth.pipelines.core.graph import SplitError, cached_parameters, group_units, split_units

NAMES = ("a", "b", "c", "d", "e")
MODELS = ("m0", "m1", "m2", "m0.layers.3", "m1.layers.0")
DATA = ("a", "b")


@dataclass(frozen=True)
class Unit:
    """A unit as a pure function: its outputs are formulas over its inputs, some of which it may leave out."""

    label: int
    reads: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()
    onload_model_names: tuple[str, ...] | None = None
    skips: str = "never"  # "never", "always", or "sometimes": by what it reads
    opaque: bool = False

    def fetch_input_params(self) -> tuple[str, ...]:
        return self.reads

    def fetch_output_params(self) -> tuple[str, ...]:
        return self.writes

    def run(self, state: Mapping[str, Any]) -> dict[str, Any]:
        seen = tuple(state.get(name) for name in self.reads)
        if self.skips == "always" or (self.skips == "sometimes" and len(str(seen)) % 2):
            return {}
        return {name: (self.label, name, seen) for name in self.writes}


def run(units: Sequence[Unit], state: Mapping[str, Any], trace: dict[int, Any] | None = None) -> dict[str, Any]:
    result = dict(state)
    for unit in units:
        outputs = unit.run(result)
        if trace is not None:
            trace[unit.label] = outputs
        result.update(outputs)
    return result


names = st.lists(st.sampled_from(NAMES), max_size=3, unique=True).map(tuple)
models = st.lists(st.sampled_from(MODELS), max_size=2, unique=True).map(tuple)
units = st.builds(
    Unit,
    label=st.just(0),
    reads=names,
    writes=names,
    onload_model_names=st.one_of(st.none(), models),
    skips=st.sampled_from(("never", "never", "sometimes", "always")),
)
programs = st.lists(units, max_size=8).map(
    lambda drawn: [Unit(i, u.reads, u.writes, u.onload_model_names, u.skips) for i, u in enumerate(drawn)]
)
trainables = st.lists(st.sampled_from(("m0", "m1", "m2.blocks.7")), max_size=2, unique=True)


@settings(max_examples=200)
@given(program=programs, trainable=trainables)
def test_split_run_equals_unsplit_run_for_every_parameter(program: list[Unit], trainable: list[str]) -> None:
    stage1, stage2 = split_units(program, trainable)
    data = {name: f"data {name}" for name in DATA}
    assert run(stage2, run(stage1, data)) == run(program, data)


@settings(max_examples=200)
@given(program=programs, trainable=trainables)
def test_split_is_a_partition_in_order_and_stage_1_runs_no_trainable_model(
    program: list[Unit], trainable: list[str]
) -> None:
    stage1, stage2 = split_units(program, trainable)
    assert sorted([u.label for u in stage1] + [u.label for u in stage2]) == [u.label for u in program]
    assert [u.label for u in stage1] == sorted(u.label for u in stage1)
    assert [u.label for u in stage2] == sorted(u.label for u in stage2)
    roots = {name.split(".")[0] for name in trainable}
    assert all(name.split(".")[0] not in roots for unit in stage1 for name in unit.onload_model_names or ())


@settings(max_examples=300)
@given(program=programs, trainable=trainables, reads=names, provided=names)
def test_cached_parameters_are_enough(
    program: list[Unit], trainable: list[str], reads: tuple[str, ...], provided: tuple[str, ...]
) -> None:
    """Stage 2 sees only what is cached, and ends with the unsplit value of all that model_fn and the loss read."""
    stage1, stage2 = split_units(program, trainable)
    cached = cached_parameters(stage1, stage2, reads=reads, provided=provided, inputs=DATA)
    data = {name: f"data {name}" for name in DATA}
    after1 = run(stage1, data)
    split: dict[int, Any] = {}
    unsplit: dict[int, Any] = {}
    final = run(stage2, {name: after1[name] for name in cached if name in after1}, split)
    expected = run(program, data, unsplit)
    for name in set(reads) - set(provided):
        assert final.get(name) == expected.get(name)
    assert split == {unit.label: unsplit[unit.label] for unit in stage2}


@settings(max_examples=200)
@given(program=programs, trainable=trainables, reads=names)
def test_cached_parameters_can_all_be_read_by_stage_2(
    program: list[Unit], trainable: list[str], reads: tuple[str, ...]
) -> None:
    stage1, stage2 = split_units(program, trainable)
    cached = cached_parameters(stage1, stage2, reads=reads, provided=(), inputs=DATA)
    readable = set(reads).union(*(unit.reads for unit in stage2))
    made = set(DATA).union(*(unit.writes for unit in stage1))
    assert set(cached) == readable & made
    assert len(set(cached)) == len(cached)


@settings(max_examples=300)
@given(program=programs, trainable=trainables, reads=names)
def test_groups_run_apart_give_the_parameters_of_stage_1(
    program: list[Unit], trainable: list[str], reads: tuple[str, ...]
) -> None:
    stage1, stage2 = split_units(program, trainable)
    cached = cached_parameters(stage1, stage2, reads=reads, provided=(), inputs=DATA)
    groups = group_units(stage1, cached)
    data = {name: f"data {name}" for name in DATA}
    whole = run(stage1, data)
    assert sorted(p for group in groups for p in group.parameters) == sorted(cached)
    assert len({group.name for group in groups}) == len(groups)
    for group in groups:
        apart = run(group.units, {name: data[name] for name in group.inputs if name in data})
        for parameter in group.parameters:
            assert apart.get(parameter) == whole.get(parameter)
    used = [model for group in groups for model in group.models]
    assert len(set(used)) == len(used)


def labels(units: Sequence[Unit]) -> list[int]:
    return [unit.label for unit in units]


def test_a_later_write_of_the_same_parameter_stays_last() -> None:
    program = [Unit(0, (), ("a",), ("m0",)), Unit(1, (), ("a",))]
    assert [labels(stage) for stage in split_units(program, ["m0"])] == [[], [0, 1]]


def test_a_trainable_unit_sees_the_value_before_a_later_write() -> None:
    program = [Unit(0, ("a",), ("b",), ("m0",)), Unit(1, (), ("a",))]
    assert [labels(stage) for stage in split_units(program, ["m0"])] == [[], [0, 1]]


def test_a_write_that_may_not_happen_keeps_the_dependence() -> None:
    program = [Unit(0, (), ("c",), ("m0",)), Unit(1, (), ("c",), skips="always"), Unit(2, ("c",), ("b",))]
    assert [labels(stage) for stage in split_units(program, ["m0"])] == [[], [0, 1, 2]]


def test_units_before_the_trainable_one_stay_in_stage_1() -> None:
    program = [
        Unit(0, ("a",), ("b",)),
        Unit(1, ("b",), ("c",), ("m0",)),
        Unit(2, ("a",), ("d",)),
        Unit(3, ("c",), ("e",)),
    ]
    assert [labels(stage) for stage in split_units(program, ["m0"])] == [[0, 2], [1, 3]]


@pytest.mark.parametrize("trainable", [["text_encoder.layers.3"], "vae, text_encoder", ["text_encoder"]])
@pytest.mark.parametrize("onload", ["text_encoder", "text_encoder.layers.0"])
def test_a_dotted_name_is_the_whole_model(trainable: list[str] | str, onload: str) -> None:
    program = [Unit(0, ("a",), ("b",), (onload,)), Unit(1, ("a",), ("c",), ("text_encoder_2",))]
    assert [labels(stage) for stage in split_units(program, trainable)] == [[1], [0]]


def test_nothing_trainable_leaves_all_in_stage_1() -> None:
    program = [Unit(0, ("a",), ("b",), ("m0",))]
    assert split_units(program, [""]) == (program, [])


def test_only_what_stage_2_reads_is_cached() -> None:
    vae = Unit(0, ("input_image",), ("input_latents", "noise", "latents"), ("vae",))
    text = Unit(1, ("prompt",), ("prompt_embeds",), ("text_encoder",))
    cached = cached_parameters(
        [vae, text],
        [],
        reads=("latents", "timestep", "prompt_embeds", "input_latents"),
        provided=("latents", "timestep", "noise"),
        inputs={"prompt", "input_image"},
    )
    assert cached == ("input_latents", "prompt_embeds")


def test_a_parameter_that_stage_2_reads_before_the_loss_writes_it_is_cached() -> None:
    noise, user = Unit(0, (), ("noise",)), Unit(1, ("noise",), ("x",), ("m0",))
    cached = cached_parameters([noise], [user], reads=("x", "noise"), provided=("noise",), inputs=())
    assert cached == ("noise",)


def test_groups_join_models_that_one_parameter_needs() -> None:
    program = [
        Unit(0, ("image",), ("z",), ("vae",)),
        Unit(1, ("prompt",), ("e",), ("text_encoder",)),
        Unit(2, ("image",), ("clip",), ("image_encoder",)),
        Unit(3, ("clip", "z"), ("y",)),
    ]
    groups = group_units(program, ("z", "e", "y", "size"))
    assert [(g.name, g.parameters, labels(g.units)) for g in groups] == [
        ("vae+image_encoder", ("z", "y"), [0, 2, 3]),
        ("text_encoder", ("e",), [1]),
        ("inputs", ("size",), []),
    ]
    assert groups[1].inputs == ("prompt", "e")
    assert groups[2].inputs == ("size",)


def test_a_unit_without_declarations_conflicts_with_all() -> None:
    opaque = Unit(1, opaque=True)
    program = [Unit(0, ("a",), ("b",)), opaque, Unit(2, ("d",), ("e",), ("m0",)), Unit(3, ("a",), ("c",))]
    assert [labels(stage) for stage in split_units(program, ["m0"])] == [[0, 1, 3], [2]]
    program = [Unit(0, ("a",), ("b",), ("m0",)), opaque, Unit(2, ("d",), ("e",))]
    assert [labels(stage) for stage in split_units(program, ["m0"])] == [[], [0, 1, 2]]


def test_an_opaque_unit_in_stage_2_may_read_all_that_there_is() -> None:
    cached = cached_parameters([Unit(0, ("a",), ("b",))], [Unit(1, opaque=True)], reads=(), provided=(), inputs=("a",))
    assert cached == ("b", "a")


def test_an_opaque_unit_in_stage_1_may_write_all_that_is_read() -> None:
    cached = cached_parameters([Unit(0, opaque=True)], [], reads=("x", "y"), provided=("y",), inputs=())
    assert cached == ("x",)
    assert labels(group_units([Unit(0, opaque=True)], cached)[0].units) == [0]


def test_opaque_units_in_both_stages_are_an_error() -> None:
    with pytest.raises(SplitError, match="output_params"):
        cached_parameters([Unit(0, opaque=True)], [Unit(1, opaque=True)], reads=(), provided=(), inputs=())
