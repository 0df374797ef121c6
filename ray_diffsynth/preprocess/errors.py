"""The error of stage 1 that ends a run. Light: Ray Data brings a callback to each task, with the modules it needs."""

from ray_diffsynth.errors import UserError


class EncoderError(UserError):
    """The shards of a group cannot be encoded or written at all, so no sample is to blame."""


def described(error: BaseException) -> str:
    """An error in one line: the message of one that is meant for users, else its class too."""
    return str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
