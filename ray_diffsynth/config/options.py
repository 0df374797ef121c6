"""What is known of an option, at its field: a component's configuration is a small dataclass made of such fields.

A job's configuration is composed of components as its base classes, so that flags and YAML are flat while the owner of
a component asks for its part alone. The string below a field is its ``--help`` text; what else is known of it is given
to `option`. A field without it is an ordinary option too. This module imports no torch, so that ``--help`` is fast.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeVar, get_args, get_origin, get_type_hints

from ray_diffsynth.errors import ConfigError, did_you_mean

T = TypeVar("T")
REQUIRED = dataclasses.MISSING
"""The default of an option that must be given."""


@dataclass(frozen=True)
class Effect:
    """An option has an effect `when` this holds of the configuration; else it is without one for this `reason`.

    `noted`: it is told in a line, as it changes no result; else it is refused, as a user would get another training
    than the one that was asked for.
    """

    when: Callable[[Any], bool]
    reason: str
    noted: bool = False


@dataclass(frozen=True)
class Option:
    """What is known of an option beside its type, its default and its sentence.

    group: its heading in ``--help``, where that is not its component's title.
    least, most: bounds of a number, both allowed. below: a bound that is not allowed.
    names: what it may be, as ``module:TABLE``, whose keys count; the module is imported when a value is checked.
    none: a further name, of none of them.
    many: it is several in one text, with this between them. A list is taken as well.
    json_list: it is a list, kept as the text of its JSON.
    identity: whether a run that goes on must have the same, as it decides what is trained.
    effects: what it needs in order to do anything.
    used_as: its value where it is not given (None) and has an effect.
    """

    group: str = ""
    least: float | None = None
    most: float | None = None
    below: float | None = None
    names: str = ""
    none: str = ""
    many: str = ""
    json_list: bool = False
    identity: bool = True
    effects: tuple[Effect, ...] = ()
    used_as: Any = None


def option(default: Any, **known: Any) -> Any:
    """A field of a configuration with what is known of it; `known`: see `Option`."""
    return dataclasses.field(default=default, metadata={"option": Option(**known)})


class Component:
    """A part of a job's configuration. A subclass is a frozen dataclass with keyword-only fields."""

    section: ClassVar[str] = ""
    """Its name in a nested YAML file."""
    title: ClassVar[str] = "Further options"
    """The heading of its options in ``--help``."""

    def resolve(self) -> None:
        """Set what follows from other options. A job asks each of its components, so nothing is left to `super`."""

    def check(self) -> None:
        """Raise ConfigError for values that cannot work. Asked as `resolve` is, once all options have their values."""


def _per_class(function: Callable[[type[Any]], T]) -> Callable[[type[Any]], T]:
    """Ask once for each class: what is known of its options does not change."""
    known: dict[type[Any], T] = {}

    def asked(config_class: type[Any]) -> T:
        if config_class not in known:
            known[config_class] = function(config_class)
        return known[config_class]

    return asked


def components(config_class: type[Any]) -> list[type[Component]]:
    """The components that a job's configuration is made of, the most general first."""
    return [cls for cls in reversed(config_class.__mro__) if issubclass(cls, Component) and cls is not Component]


@_per_class
def options_of(config_class: type[Any]) -> dict[str, Option]:
    """Every option of a configuration, in order of its fields."""
    return {field.name: _known(config_class, field.name) for field in dataclasses.fields(config_class)}


def _known(config_class: type[Any], name: str) -> Option:
    """A class that gives an option another default or type need not repeat what its base knows."""
    for cls in config_class.__mro__:
        field = vars(cls).get("__dataclass_fields__", {}).get(name)
        if field is not None and "option" in field.metadata:
            found: Option = field.metadata["option"]
            return found
    return Option()


def owner_of(config_class: type[Any], name: str) -> type[Component]:
    """The component that brings an option in."""
    return next(cls for cls in components(config_class) if name in vars(cls).get("__annotations__", {}))


@_per_class
def types_of(config_class: type[Any]) -> dict[str, Any]:
    """The type of every option."""
    hints = get_type_hints(config_class)
    return {field.name: hints[field.name] for field in dataclasses.fields(config_class)}


def names_in(table: str) -> tuple[str, ...]:
    """The keys of a table, given as ``module:TABLE``."""
    module, _, name = table.partition(":")
    return tuple(getattr(importlib.import_module(module), name))


def choices_of(config_class: type[Any], name: str) -> tuple[str, ...]:
    """What an option may be; empty if that is not a matter of names."""
    known, hint = options_of(config_class)[name], types_of(config_class)[name]
    if known.names:
        return (*names_in(known.names), *filter(None, (known.none,)))
    return get_args(hint) if get_origin(hint) is Literal else ()


def split_names(value: str | None, between: str = ",") -> tuple[str, ...]:
    """``"a, b"`` → ``("a", "b")``; None and the empty string give no names."""
    return tuple(name.strip() for name in (value or "").split(between) if name.strip())


def as_text(config_class: type[Any], name: str, value: Any) -> Any:
    """A list that was given for an option of several in one text, as that text; any other value as it is.

    Raises ConfigError for an entry that would be taken for two.
    """
    known = options_of(config_class)[name]
    if not isinstance(value, (list, tuple)) or not (known.many or known.json_list):
        return value
    if known.json_list:
        return json.dumps(list(value))
    for entry in value:
        if not isinstance(entry, (str, int, float)) or isinstance(entry, bool):
            raise ConfigError(f"{name}: {entry!r} is neither a text nor a number; write a list of those")
        if known.many in str(entry):
            raise ConfigError(f"{name}: {entry!r} holds {known.many!r}, which stands between two entries; leave it out")
    return known.many.join(str(entry) for entry in value)


def check_options(config: Any) -> None:
    """Raise ConfigError for a value that is none of an option's names or beyond its bounds; make lists texts."""
    cls = type(config)
    for name, known in options_of(cls).items():
        value, hint = getattr(config, name), types_of(cls)[name]
        if (text := as_text(cls, name, value)) is not value:
            value = text
            set_option(config, **{name: text})
        if value is None:
            if type(None) not in get_args(hint):
                raise ConfigError(f"{name} is null; give a value, or leave it out for its default")
            continue
        _check_names(name, value, known, choices_of(cls, name))
    for name, known in options_of(cls).items():
        if (value := getattr(config, name)) is not None:
            _check_bounds(name, value, known)


def _check_names(name: str, value: Any, known: Option, choices: Sequence[str]) -> None:
    if not choices:
        return
    if known.many:
        for one in split_names(value, known.many):
            if one not in choices:
                raise ConfigError(f"{name}={value!r}: {one!r} is not known; {did_you_mean(one, choices)}")
    elif value not in choices:
        raise ConfigError(f"{name}={value!r} is not known; {did_you_mean(str(value), choices)}")


def _check_bounds(name: str, value: Any, known: Option) -> None:
    least = known.least
    if known.below is not None and not (least or 0) <= value < known.below:
        raise ConfigError(f"{name}={value} is out of range; use at least {least or 0:g} and less than {known.below:g}")
    if known.most is not None and not (least or 0) <= value <= known.most:
        raise ConfigError(f"{name}={value} is out of range; use {least or 0:g} to {known.most:g}")
    if least is not None and not (math.isfinite(value) and value >= least):
        raise ConfigError(f"{name}={value} is too small; use at least {least}")


def identity_of(config: Any) -> dict[str, Any]:
    """The options that decide what is trained, with their values; those without an effect are left out."""
    values = dataclasses.asdict(config)
    known = options_of(type(config))
    return {name: value for name, value in values.items() if known[name].identity and has_effect(config, name)}


def defaults_of(config_class: type[Any]) -> dict[str, Any]:
    """The value of each option that is not given, where it has an effect; those that must be given are left out."""
    fields = [f for f in dataclasses.fields(config_class) if f.default is not dataclasses.MISSING]
    known = options_of(config_class)
    return {f.name: f.default if known[f.name].used_as is None else known[f.name].used_as for f in fields}


def has_effect(config: Any, name: str) -> bool:
    """Whether the option does anything in this configuration."""
    return without_effect(config, name) is None


def without_effect(config: Any, name: str) -> Effect | None:
    """What an option lacks in this configuration to do anything; None if it does something."""
    return next((effect for effect in options_of(type(config))[name].effects if not effect.when(config)), None)


def check_effects(config: Any) -> None:
    """Raise ConfigError naming each option that is given and could do nothing, unless that is only noted."""
    given = [f.name for f in dataclasses.fields(config) if getattr(config, f.name) != f.default]
    reasons: dict[str, list[str]] = {}
    for name in given:
        effect = without_effect(config, name)
        if effect is not None and not effect.noted:
            reasons.setdefault(effect.reason, []).append(name)
    if reasons:
        found = "; ".join(f"{', '.join(names)}: {reason}" for reason, names in reasons.items())
        raise ConfigError(f"an option would have no effect: {found}")


def use_defaults(config: Any) -> None:
    """Set the options that are not given to what they are used as, where they have an effect."""
    for name, known in options_of(type(config)).items():
        if known.used_as is not None and getattr(config, name) is None and has_effect(config, name):
            set_option(config, **{name: known.used_as})


def set_option(config: Any, **values: Any) -> None:
    """Set options of a frozen configuration while it is made."""
    for name, value in values.items():
        object.__setattr__(config, name, value)


def section_options(config_classes: tuple[type[Any], ...]) -> Mapping[str, frozenset[str]]:
    """The options of each section that a YAML file may have."""
    found: dict[str, frozenset[str]] = {}
    for config_class in config_classes:
        for cls in components(config_class):
            if "section" in vars(cls):  # an inherited one is of the base alone
                names = frozenset(field.name for field in dataclasses.fields(cls))  # type: ignore[arg-type]
                found[cls.section] = found.get(cls.section, frozenset()) | names
    return found
