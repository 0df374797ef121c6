"""`PipelineUnit`: one step that prepares what the denoising model needs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from ray_diffsynth.pipelines.core.errors import MissingInputError
from ray_diffsynth.pipelines.core.versions import attributes_hash, stated_versions


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


def _names(names: Sequence[str] | None) -> tuple[str, ...] | None:
    # ("vae") without the comma is a string: read it as the one name that was meant.
    return (names,) if isinstance(names, str) else None if names is None else tuple(names)


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
    writers = [type(unit).__name__ for unit in earlier if name in unit.fetch_output_params()]
    late = [type(unit).__name__ for unit in later if name in unit.fetch_output_params()]
    if writers:
        who = f"{' or '.join(writers)} should have written it but did not run, or returned without it"
    elif late:
        who = f"{' or '.join(late)} writes it, but runs later: put it earlier in `units`"
    else:
        who = "no unit writes it, so the dataset (a metadata column) or the caller must give it"
    return MissingInputError(f"{reader} needs {name!r}, which is missing: {who}")
