from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from ray_diffsynth.errors import UserError
from ray_diffsynth.pipelines.core.base import BasePipeline
from ray_diffsynth.pipelines.core.errors import MissingInputError, UnitError
from ray_diffsynth.pipelines.core.runner import PipelineUnitRunner, run_units
from ray_diffsynth.pipelines.core.state import UnitState, make_state
from ray_diffsynth.pipelines.core.unit import PipelineUnit
from ray_diffsynth.pipelines.core.versions import CacheKeyError


class Double(PipelineUnit):
    version = 1

    def __init__(self) -> None:
        super().__init__(input_params=("x",), output_params=("y",))

    def process(self, pipe: Any, x: int) -> dict[str, Any]:
        return {"y": 2 * x}


class Embed(PipelineUnit):
    version = 1

    def __init__(self) -> None:
        super().__init__(
            seperate_cfg=True,
            input_params=("scale",),
            input_params_posi={"text": "prompt"},
            input_params_nega={"text": "negative_prompt"},
            output_params=("embeds",),
            onload_model_names=("text_encoder",),
        )

    def process(self, pipe: Any, text: str, scale: int = 1) -> dict[str, Any]:
        pipe.calls.append(text)
        return {"embeds": text * scale}


class TakeOver(PipelineUnit):
    def __init__(self) -> None:
        super().__init__(take_over=True, input_params=("y",), output_params=("z",))

    def process(self, pipe: Any, inputs_shared: Any, inputs_posi: Any, inputs_nega: Any) -> Any:
        inputs_shared["z"] = inputs_shared["y"] + 1
        inputs_nega["z"] = 0
        return inputs_shared, inputs_posi, inputs_nega


class Pipe:
    def __init__(self, *units: PipelineUnit) -> None:
        self.units = list(units)
        self.calls: list[str] = []


def test_direct_unit_writes_the_shared_side_and_changes_no_argument() -> None:
    shared, posi, nega = {"x": 3}, {"prompt": "p"}, {"negative_prompt": "n"}
    result = PipelineUnitRunner()(Double(), Pipe(), shared, posi, nega)
    assert result == ({"x": 3, "y": 6}, {"prompt": "p"}, {"negative_prompt": "n"})
    assert (shared, posi, nega) == ({"x": 3}, {"prompt": "p"}, {"negative_prompt": "n"})


@pytest.mark.parametrize(("cfg_scale", "calls"), [(1, ["p"]), (4.0, ["p", "n"])])
def test_separate_cfg_runs_the_negative_side_only_for_guidance(cfg_scale: float, calls: list[str]) -> None:
    pipe = Pipe()
    shared, posi, nega = PipelineUnitRunner()(
        Embed(), pipe, {"cfg_scale": cfg_scale, "scale": 2}, {"prompt": "p"}, {"negative_prompt": "n"}
    )
    assert pipe.calls == calls
    assert posi["embeds"] == "pp"
    assert nega.get("embeds") == ("nn" if cfg_scale != 1 else None)
    assert "embeds" not in shared


def test_take_over_unit_gets_and_returns_the_three_dicts() -> None:
    shared = {"y": 1}
    assert PipelineUnitRunner()(TakeOver(), Pipe(), shared, {}, {}) == ({"y": 1, "z": 2}, {}, {"z": 0})
    assert shared == {"y": 1}


def test_missing_input_names_unit_parameter_and_writer() -> None:
    class Plus(PipelineUnit):
        def __init__(self) -> None:
            super().__init__(input_params=("y",), output_params=("z",))

        def process(self, pipe: Any, y: int) -> dict[str, Any]:
            return {"z": y + 1}

    plus = Plus()
    with pytest.raises(MissingInputError) as caught:
        PipelineUnitRunner()(plus, Pipe(Double(), plus), {}, {}, {})
    assert str(caught.value) == (
        "Plus needs 'y', which is missing: Double should have written it but did not run, or returned without it"
    )
    with pytest.raises(MissingInputError, match="Double writes it, but runs later"):
        PipelineUnitRunner()(plus, Pipe(plus, Double()), {}, {}, {})
    with pytest.raises(MissingInputError, match=r"Double needs 'x'.*the dataset \(a metadata column\) or the caller"):
        PipelineUnitRunner()(Double(), Pipe(), {}, {}, {})
    assert isinstance(caught.value, KeyError) and isinstance(caught.value, UserError)


def test_missing_cfg_scale_is_not_guessed() -> None:
    with pytest.raises(MissingInputError, match="cfg_scale"):
        PipelineUnitRunner()(Embed(), Pipe(), {}, {"prompt": "p"}, {})


def test_an_input_with_a_default_is_optional_and_none_is_a_value() -> None:
    class Optional(PipelineUnit):
        def __init__(self) -> None:
            super().__init__(input_params=("x",), output_params=("seen",))

        def process(self, pipe: Any, x: Any = "default") -> dict[str, Any]:
            return {"seen": x}

    assert PipelineUnitRunner()(Optional(), Pipe(), {}, {}, {})[0]["seen"] == "default"
    assert PipelineUnitRunner()(Optional(), Pipe(), {"x": None}, {}, {})[0]["seen"] is None


def test_an_undeclared_output_is_an_error() -> None:
    class Sloppy(Double):
        def process(self, pipe: Any, x: int) -> dict[str, Any]:
            return {"y": x, "extra": 1}

    class SloppyTakeOver(TakeOver):
        def process(self, pipe: Any, inputs_shared: Any, inputs_posi: Any, inputs_nega: Any) -> Any:
            return {**inputs_shared, "extra": 1}, inputs_posi, inputs_nega

    for unit in (Sloppy(), SloppyTakeOver()):
        with pytest.raises(UnitError, match=r"wrote 'extra' without declaring"):
            PipelineUnitRunner()(unit, Pipe(), {"x": 1, "y": 1}, {}, {})


def test_a_unit_that_returns_no_dict_is_an_error() -> None:
    class Nothing(Double):
        def process(self, pipe: Any, x: int) -> Any:
            return None

    with pytest.raises(UnitError, match="must return a dict"):
        PipelineUnitRunner()(Nothing(), Pipe(), {"x": 1}, {}, {})


def test_run_units_batches_and_keeps_order() -> None:
    class Batched(Double):
        def process_batch(self, pipe: Any, batch: list[dict[str, Any]]) -> list[dict[str, Any]]:
            pipe.calls.append(len(batch))
            return [{"y": 10 * inputs["x"]} for inputs in batch]

    pipe = Pipe()
    units = [Batched(), TakeOver(), Embed()]
    states = [make_state(units, {"x": i, "prompt": f"p{i}", "cfg_scale": 1}) for i in range(3)]
    flat = [state.flat() for state in run_units(units, pipe, states)]
    assert [state["z"] for state in flat] == [1, 11, 21]
    assert [state["embeds"] for state in flat] == ["p0", "p1", "p2"]
    assert pipe.calls == [3, "p0", "p1", "p2"]
    assert "y" not in states[0].flat()


def test_a_batch_of_another_length_is_an_error() -> None:
    class Short(Double):
        def process_batch(self, pipe: Any, batch: list[dict[str, Any]]) -> list[dict[str, Any]]:
            return []

    with pytest.raises(UnitError, match="got 1 samples and returned 0"):
        run_units([Short()], Pipe(), [UnitState({"x": 1})])


def test_make_state_puts_names_where_the_units_read_them() -> None:
    inputs = {"x": 1, "prompt": "p", "negative_prompt": "n", "other": 0}
    state = make_state([Double(), Embed()], inputs)
    assert (state.shared, state.posi, state.nega) == ({"x": 1, "other": 0}, {"prompt": "p"}, {"negative_prompt": "n"})


def test_a_name_that_two_sides_read_reaches_both() -> None:
    class Both(PipelineUnit):
        def __init__(self) -> None:
            super().__init__(
                separate_cfg=True,
                input_params_posi={"image": "edit_image"},
                input_params_nega={"image": "edit_image"},
                output_params=("out",),
            )

        def process(self, pipe: Any, image: str) -> dict[str, Any]:
            return {"out": image}

    (state,) = run_units([Both()], Pipe(), [make_state([Both()], {"edit_image": "i", "cfg_scale": 2})])
    assert (state.posi["out"], state.nega["out"]) == ("i", "i")


def test_the_last_write_wins_across_sides() -> None:
    class Rewrite(PipelineUnit):
        def __init__(self) -> None:
            super().__init__(input_params=("embeds",), output_params=("embeds",))

        def process(self, pipe: Any, embeds: str) -> dict[str, Any]:
            return {"embeds": embeds.upper()}

    units = [Embed(), Rewrite()]
    (state,) = run_units(units, Pipe(), [make_state(units, {"prompt": "p", "cfg_scale": 1})])
    assert state.flat()["embeds"] == "P"


def test_declared_reads_and_writes() -> None:
    assert Embed().fetch_input_params() == ("scale", "prompt", "negative_prompt", "cfg_scale")
    assert Embed().fetch_output_params() == ("embeds",)
    assert PipelineUnit(input_params="x").fetch_input_params() == ("x",)  # ("x") without its comma
    assert PipelineUnit().fetch_output_params() == ()
    assert PipelineUnit(take_over=True).opaque
    assert not TakeOver().opaque


def test_code_version_changes_with_code_version_and_settings() -> None:
    class Scaled(Double):
        def __init__(self, factor: int) -> None:
            super().__init__()
            self.factor = factor

    class Newer(Double):
        version = 2

    assert Double().code_version() == Double().code_version()
    assert "Double:v1 " in Double().code_version()
    assert Scaled(1).code_version() != Scaled(2).code_version()
    assert "Newer:v2 " in Newer().code_version()
    assert Embed().code_version() != Double().code_version()


def test_a_class_that_changes_a_unit_states_its_version() -> None:
    class Silent(Double):
        def process(self, pipe: Any, x: int) -> dict[str, Any]:
            return {"y": 3 * x}

    with pytest.raises(CacheKeyError, match=r"Silent defines process and states no version .* write `version = 1`"):
        Silent().code_version()
    Silent.version = 1
    assert Silent().code_version() != Double().code_version()
    with pytest.raises(CacheKeyError, match="TakeOver defines process"):
        TakeOver().code_version()


def test_attributes_of_a_unit_count_by_value() -> None:
    def version(value: Any) -> str:
        unit = Double()
        unit.extra = value  # type: ignore[attr-defined]
        return unit.code_version()

    values = [
        torch.ones(2), torch.zeros(2), torch.ones(2, dtype=torch.bfloat16), np.ones(2), {"a": [1, (2, None)]},
        {"a": [1, [2, None]]}, torch.float32, {1, 2}, "1", 1, 1.5, True,
    ]  # fmt: skip
    assert len({version(value) for value in values}) == len(values)
    assert version({"a": 1, "b": torch.ones(2)}) == version({"b": torch.ones(2), "a": 1})
    with pytest.raises(
        CacheKeyError, match=r"Double.extra\['f'\]\[0\] is a builtins.function, .*cannot be compared by value"
    ):
        version({"f": [lambda: None]})


def test_a_pipeline_has_diffsynths_runner() -> None:
    pipe = BasePipeline()
    shared, posi, nega = pipe.unit_runner(Double(), pipe, {"x": 3}, {"prompt": "p"}, {})
    assert (shared, posi, nega) == ({"x": 3, "y": 6}, {"prompt": "p"}, {})
