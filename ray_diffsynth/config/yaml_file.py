"""YAML files of options, read so that a value means what stands there.

PyYAML follows YAML 1.1, in which 010 is eight, 1:30 is ninety, `yes` is true, 2026-01-01 a date and 1e-4 a text. Here
the core schema of YAML 1.2 holds, as in JSON; what two readers take for different numbers is refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any, get_args, get_origin

import yaml

from ray_diffsynth.errors import ConfigError

_INT = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_DOUBTFUL = (
    (re.compile(r"[-+]?0[0-9_]+"), "a leading zero makes it octal for some readers and decimal for others"),
    (re.compile(r"[-+]?[0-9]+(:[0-5]?[0-9])+(\.[0-9]*)?"), "some readers take it for a number of base 60"),
    (re.compile(r"[-+]?[0-9][0-9_]*_[0-9_]*(\.[0-9_]*)?"), "the _ in it means nothing to some readers"),
    (re.compile(r"[-+]?0[bB][01_]+"), "some readers take it for a binary number, others for a text"),
)
"""Plain scalars that look like numbers and are read in different ways."""


class _Loader(yaml.SafeLoader):
    """SafeLoader with the scalars of YAML 1.2's core schema, and without repeated keys."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # PyYAML's own name


for tag, pattern, first in (
    ("bool", re.compile(r"true|True|TRUE|false|False|FALSE"), "tTfF"),
    ("null", re.compile(r"~|null|Null|NULL|"), ["~", "n", "N", ""]),
    ("int", _INT, "-+0123456789"),
    ("float", _FLOAT, "-+.0123456789"),
    ("merge", re.compile(r"<<"), "<"),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{tag}", re.compile(rf"(?:{pattern.pattern})\Z"), list(first))


def _construct_int(loader: _Loader, node: yaml.ScalarNode) -> int:
    text = str(node.value)
    return int(text, 0) if text[:2] in ("0o", "0x") else int(text)


def _construct_float(loader: _Loader, node: yaml.ScalarNode) -> float:
    return float(str(node.value).lower().replace(".inf", "inf").replace(".nan", "nan"))


def _construct_mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[str] = set()
    for key, _ in node.value:
        if key.value in seen and not key.tag.endswith(":merge"):
            raise ConfigError(f"{key.value} stands there twice ({_line(key)}); leave one of them out")
        seen.add(key.value)
    return dict(loader.construct_mapping(node, deep=True))


_Loader.add_constructor("tag:yaml.org,2002:int", _construct_int)
_Loader.add_constructor("tag:yaml.org,2002:float", _construct_float)
_Loader.add_constructor("tag:yaml.org,2002:map", _construct_mapping)


def read_options(text: str, hints: Mapping[str, Any], sections: Collection[str] = ()) -> Any:
    """What a YAML text says: a mapping of options, if it is such a file.

    hints: type of each option. One that is a text is what stands there, whatever a YAML reader would make of it: 512
    for `resolution`, no for `family`. sections: keys below which options may stand. Raises yaml.YAMLError, and
    ConfigError for what is said twice or is not clear.
    """

    def check(node: yaml.Node) -> None:
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                if key.value in sections and isinstance(value, yaml.MappingNode):
                    check(value)
                else:
                    _check(str(key.value), hints.get(key.value), value)

    return _read(text, check)


def read_value(name: str, hint: Any, text: str) -> tuple[str, dict[str, Any] | None]:
    """The value of a flag: as JSON and as a mapping where it is one, else as it stands.

    Raises ConfigError for numbers that are not clear.
    """
    kinds = get_args(hint) or (hint,)
    if any(get_origin(kind) is dict for kind in kinds):
        try:
            found = _read(text, lambda node: _check(f"--{name}", hint, node))
        except (yaml.YAMLError, RecursionError):
            return text, None  # refused where its type is checked
        return (json.dumps(found), found) if isinstance(found, dict) else (text, None)
    if {int, float} & set(kinds) or "." in name:
        check_clear(f"--{name} {text}", text)
    return text, None


def _read(text: str, check: Callable[[yaml.Node], None]) -> Any:
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        check(node)
        return loader.construct_document(node)
    finally:
        loader.dispose()


def _check(name: str, hint: Any, node: yaml.Node) -> None:
    """Make the plain scalar of an option that is a text one; raise ConfigError for numbers that are not clear."""
    kinds = get_args(hint) or (hint,)
    if isinstance(node, yaml.ScalarNode):
        number = bool({int, float} & set(kinds))
        if number or (node.style is None and str not in kinds):
            check_clear(f"{name}: {node.value}", str(node.value), _line(node))
        if node.style is None and str in kinds and not number and not node.tag.endswith(":null"):
            node.tag = "tag:yaml.org,2002:str"
    elif isinstance(node, yaml.SequenceNode):
        for child in node.value:
            _check(name, Any, child)
    elif isinstance(node, yaml.MappingNode):
        inner = next((get_args(kind)[1] for kind in kinds if get_origin(kind) is dict), Any)
        for key, child in node.value:
            _check(f"{name}: {key.value}", inner, child)


def check_clear(shown: str, text: str, where: str = "") -> None:
    """Raise ConfigError for a number that two readers would take for different ones."""
    for pattern, why in _DOUBTFUL:
        if pattern.fullmatch(text):
            place = f" ({where})" if where else ""
            raise ConfigError(
                f"{shown}{place} is not clear: {why}; write the number in decimals, without leading zeros"
            )


def _line(node: yaml.Node) -> str:
    return f"line {node.start_mark.line + 1}"
