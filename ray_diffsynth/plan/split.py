"""The split of a family's units as plain data, which travels to actors and workers: units are numbers there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ray_diffsynth.pipelines.core.base import BasePipeline
from ray_diffsynth.pipelines.core.errors import PipelineError
from ray_diffsynth.pipelines.core.graph import UnitGroup
from ray_diffsynth.pipelines.core.stages import Stages


@dataclass(frozen=True)
class Split:
    """`Stages` whose units, also those of its groups, are numbers in `pipe.units`.

    units: the class names of `pipe.units`, by which a process sees that it has the same.
    """

    units: tuple[str, ...]
    stage1: tuple[int, ...]
    stage2: tuple[int, ...]
    parameters: tuple[str, ...]
    groups: tuple[UnitGroup, ...]
    trainable: tuple[str, ...]
    sided: tuple[str, ...]

    @classmethod
    def of(cls, stages: Stages, pipe: BasePipeline) -> Split:
        """The split that `plan_stages` made of `pipe`."""
        numbers = {id(unit): number for number, unit in enumerate(pipe.units)}

        def numbered(units: Sequence[Any]) -> tuple[int, ...]:
            return tuple(numbers[id(unit)] for unit in units)

        return cls(
            units=_class_names(pipe),
            stage1=numbered(stages.stage1),
            stage2=numbered(stages.stage2),
            parameters=stages.parameters,
            groups=tuple(replace(group, units=numbered(group.units)) for group in stages.groups),
            trainable=stages.trainable,
            sided=stages.sided,
        )

    def group(self, name: str) -> UnitGroup:
        """The group of this name, which must be there."""
        return next(group for group in self.groups if group.name == name)

    def stages(self, pipe: BasePipeline) -> Stages:
        """The split with the units of `pipe`, a pipeline of the same family and model.

        Raises PipelineError if its units are others: this process has imported another version of the family.
        """
        if (here := _class_names(pipe)) != self.units:
            raise PipelineError(
                f"{type(pipe).__name__} has the units {', '.join(here)} here, and {', '.join(self.units)} where "
                "the run was planned; give all machines the same version of the family's module"
            )

        def units(numbers: Sequence[int]) -> tuple[Any, ...]:
            return tuple(pipe.units[number] for number in numbers)

        groups = tuple(replace(group, units=units(group.units)) for group in self.groups)
        return Stages(units(self.stage1), units(self.stage2), self.parameters, groups, self.trainable, sided=self.sided)


def _class_names(pipe: BasePipeline) -> tuple[str, ...]:
    return tuple(type(unit).__name__ for unit in pipe.units)
