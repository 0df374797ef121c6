"""How many optimizer steps a run has."""

from __future__ import annotations


def total_steps(num_epochs: int | None, max_steps: int | None, per_epoch: int) -> int:
    """Steps of a run whose epochs have `per_epoch` each: `max_steps` alone takes as many epochs as it needs, with both
    the smaller counts, and without either it is one epoch.
    """
    if num_epochs is None:
        return per_epoch if max_steps is None else max_steps
    return num_epochs * per_epoch if max_steps is None else min(num_epochs * per_epoch, max_steps)


def describe_length(num_epochs: int, max_steps: int, per_epoch: int) -> str:
    """What to tell a user who gave both."""
    by_epochs = num_epochs * per_epoch
    total = min(by_epochs, max_steps)
    if by_epochs == max_steps:
        return f"num_epochs={num_epochs} and max_steps={max_steps} are both {total} steps here"
    ends, other = ("num_epochs", "max_steps") if by_epochs < max_steps else ("max_steps", "num_epochs")
    return (
        f"num_epochs={num_epochs} is {by_epochs} steps here ({per_epoch} an epoch), max_steps={max_steps}: the smaller "
        f"counts, so the run ends after {total} steps; leave {ends} out to let {other} decide"
    )
