"""The errors of pipelines and their units."""

from __future__ import annotations

from ray_diffsynth.errors import UserError


class PipelineError(UserError, ValueError):
    """A pipeline is used without a model that it needs, or with inputs that do not fit together."""


class MissingModelError(PipelineError):
    """A unit or `model_fn` runs a model that was not loaded."""


class MissingInputError(UserError, KeyError):
    """A unit (or `model_fn`) needs a parameter that nobody has written."""


class UnitError(UserError, ValueError):
    """A unit broke its own declaration."""
