"""Which machines a selector of labels means, by Ray's rules."""

from __future__ import annotations

from collections.abc import Mapping

Selector = Mapping[str, str]
"""Label -> condition: `value`, `!value`, `in(a, b)` or `!in(a, b)`. All must hold."""


def matches(labels: Mapping[str, str], selector: Selector) -> bool:
    """Whether a machine with these labels is meant. One without a label is not the value, and none of the values."""
    return all(_holds(labels.get(label), condition) for label, condition in selector.items())


def _holds(value: str | None, condition: str) -> bool:
    values, excluded = parsed(condition)
    return (value in values) is not excluded


def parsed(condition: str) -> tuple[list[str], bool]:
    """The values of a condition, and whether it excludes them: `!in(a, b)` -> (["a", "b"], True)."""
    wanted = condition.removeprefix("!")
    listed = wanted.startswith("in(")
    values = [part.strip() for part in wanted[3:-1].split(",")] if listed else [wanted]
    return values, condition.startswith("!")


def described(selector: Selector) -> str:
    """` with stage=encode`, as part of a sentence; empty without labels."""
    return f" with {', '.join(f'{label}={condition}' for label, condition in selector.items())}" if selector else ""
