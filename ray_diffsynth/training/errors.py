"""What a training run may end with."""

from ray_diffsynth.errors import UserError


class TrainingError(UserError):
    """A training run that cannot start or go on."""
