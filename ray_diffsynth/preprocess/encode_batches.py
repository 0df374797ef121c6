"""Samples through the units of a group in batches: out of memory, numbers that are not finite, samples that fail."""

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from ray_diffsynth.cache.codec import CodecError
from ray_diffsynth.cache.finite import all_finite
from ray_diffsynth.data.warnings import warn
from ray_diffsynth.diffusion.out_of_memory import is_out_of_memory
from ray_diffsynth.diffusion.transfer import map_tensors
from ray_diffsynth.errors import UserError
from ray_diffsynth.pipelines.core.base import BasePipeline
from ray_diffsynth.pipelines.core.errors import MissingInputError, MissingModelError, UnitError
from ray_diffsynth.pipelines.core.graph import UnitGroup
from ray_diffsynth.pipelines.core.runner import run_units
from ray_diffsynth.pipelines.core.sides import row_of
from ray_diffsynth.pipelines.core.state import make_state
from ray_diffsynth.preprocess.records import Failure

logger = logging.getLogger(__name__)

RUN_ERRORS = (MissingInputError, UnitError, MissingModelError, CodecError)
"""Errors of the units or the configuration, not of one sample: they end the run."""


class NonFiniteError(UserError):
    """An encoder returned NaN or infinity for a sample."""


class DeviceError(Exception):
    """The GPU cannot be used by this process any more: each further call would fail as well."""


def encode_samples(
    pipe: BasePipeline,
    group: UnitGroup,
    settings: Mapping[str, Any],
    inputs: Sequence[Mapping[str, Any]],
    batch_size: int,
    on_batch: Callable[[int, int], None] = lambda start, end: None,
) -> tuple[list[dict[str, Any] | Failure], int]:
    """Parameters of each sample, or why it failed; and the batch size that fits, for the next call.

    Out of memory halves the batch size; at 1 it is the sample's own failure. A batch that fails otherwise is cut into
    halves until the sample that is to blame stands alone. `on_batch` is called before each batch with the
    positions of its first sample and after its last. Raises DeviceError, and what is the run's own mistake.
    """
    results: list[dict[str, Any] | Failure] = []
    fits = 1
    while len(results) < len(inputs):
        start = len(results)
        batch = inputs[start : start + batch_size]
        on_batch(start, start + len(batch))
        failure, of_memory = Failure("", ""), False
        try:
            results += _encode_batch(pipe, group, settings, batch)
            fits = max(fits, len(batch))
            continue
        except RUN_ERRORS:
            raise
        except Exception as error:
            # Kept as text: the error itself holds its frames, and with them the batch's tensors.
            failure, of_memory = Failure(_name(error), str(error)), is_out_of_memory(error)
            if not of_memory and _is_device_error(error):
                raise DeviceError(f"{type(error).__name__}: {error}") from error
        if of_memory and torch.cuda.is_available():
            torch.cuda.empty_cache()
        if len(batch) == 1:
            results.append(failure)
            batch_size = fits if of_memory else batch_size  # the sample was to blame, not the size of its batch
        elif of_memory:
            batch_size = len(batch) // 2
            warn("batch_halved", "", f"{group.name}: {len(batch)} samples to {batch_size}")
        else:
            logger.warning("%s: a batch of %d failed (%s); trying its halves", group.name, len(batch), failure.message)
            middle = len(batch) // 2
            for part in (batch[:middle], batch[middle:]):
                first = len(results)
                results += encode_samples(pipe, group, settings, part, len(part), _shifted(on_batch, first))[0]
    return results, batch_size


def _shifted(on_batch: Callable[[int, int], None], by: int) -> Callable[[int, int], None]:
    return lambda start, end: on_batch(by + start, by + end)


def _encode_batch(
    pipe: BasePipeline, group: UnitGroup, settings: Mapping[str, Any], inputs: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any] | Failure]:
    """All samples in one batch."""
    states = [make_state(pipe.units, {**settings, **sample}) for sample in inputs]
    with torch.no_grad():
        states = run_units(group.units, pipe, states)
    found = [row_of(state, group.parameters, group.sided) for state in states]
    return _checked(found)


def _checked(found: Sequence[Mapping[str, Any]]) -> list[dict[str, Any] | Failure]:
    verdicts = iter(all_finite([value for values in found for value in values.values()]))
    results: list[dict[str, Any] | Failure] = []
    for values in found:
        bad = [name for name in values if not next(verdicts)]
        if bad:
            why = f"{bad[0]} holds NaN or infinity; try --dtype float32, or look at the source"
            results.append(Failure(NonFiniteError.__name__, why))
        else:
            results.append({name: map_tensors(torch.Tensor.cpu, value) for name, value in values.items()})
    return results


def _name(error: Exception) -> str:
    """The class of an error as the quarantine shows it: one for all kinds of too little memory."""
    return "OutOfMemoryError" if is_out_of_memory(error) else type(error).__name__


def _is_device_error(error: Exception) -> bool:
    """Whether it is an error of CUDA after which the process's device is lost (an assertion, an illegal access)."""
    accelerator = getattr(torch, "AcceleratorError", ())  # since torch 2.8
    return isinstance(error, accelerator) or (isinstance(error, RuntimeError) and "CUDA error" in str(error))
