"""Options in the reference: their default alone, where the source has `option(default, …)` with all that is known."""

from __future__ import annotations

from typing import Any

from griffe import Attribute, ExprCall, Extension


class OptionDefaults(Extension):
    """Shows `learning_rate: float | None = None`, not the call that makes the field."""

    def on_attribute_instance(self, *, attr: Attribute, **_: Any) -> None:
        value = attr.value
        if isinstance(value, ExprCall) and value.canonical_path.endswith("config.options.option"):
            default = value.arguments[0]
            attr.value = None if str(default) == "REQUIRED" else default
