"""The command line of a job: flags and YAML files into a checked configuration.

This module imports no torch and no ray, so that ``--help`` and a typing mistake take well under a second.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
import reprlib
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import docstring_parser
import yaml
from jsonargparse import ArgumentParser

from ray_diffsynth.config import JOBS, JobConfig
from ray_diffsynth.config.diffsynth import NO_EFFECT, REFUSED
from ray_diffsynth.config.options import (
    as_text,
    choices_of,
    options_of,
    owner_of,
    section_options,
    types_of,
    without_effect,
)
from ray_diffsynth.config.yaml_file import read_options, read_value
from ray_diffsynth.errors import ConfigError, nearest
from ray_diffsynth.output_path import check_output_path
from ray_diffsynth.program import command

C = TypeVar("C", bound=JobConfig)

GROUPS = (
    "What to do",
    "Data",
    "Model",
    "LoRA",
    "Optimisation",
    "Generating",
    "Memory",
    "Saving and logging",
    "Cluster",
)
"""The order of the headings in ``--help``; one that is not here comes last."""


class _Parser(ArgumentParser):
    """jsonargparse's parser with errors of one line that name the flag, the value and the fix."""

    sentences: Mapping[str, str] = {}
    """Option -> what it is."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if missing := re.search(r"arguments are required: (\w+)", message):
            refuse(self.prog, f"--{missing[1]} is missing: {self.sentences[missing[1]]}")
        refuse(self.prog, _readable(message))


def parse(
    config_class: type[C],
    argv: Sequence[str] | None = None,
    *,
    prog: str | None = None,
    silent: Collection[str] = (),
) -> C:
    """Read ``config_class`` from flags and ``--config`` files; later ones win.

    Exits with 2 and one message if something is unknown or cannot work. Notes on options that have no effect here go
    to stderr, one line each, but for those that are to be `silent`.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    prog = prog or Path(sys.argv[0]).name
    try:
        arguments, given, mappings = _arguments(config_class, argv, silent)
        values = vars(_make_parser(config_class, prog).parse_args(arguments)) | mappings
        config = config_class(**{field.name: values[field.name] for field in dataclasses.fields(config_class)})
        check_output_path(config.output_path, writes=not getattr(config, "dry_run", False))
    except ConfigError as error:
        refuse(prog, str(error))
    for name in sorted(given.difference(silent)):
        effect = without_effect(config, name)
        if effect is not None and effect.noted:
            _note(name, effect.reason)
    return config


def _make_parser(config_class: type[JobConfig], prog: str) -> ArgumentParser:
    usage = f"{prog} {config_class.needed} --model MODEL [options]"
    parser = _Parser(prog=prog, usage=usage, description=inspect.getdoc(config_class))
    parser.add_argument(
        "--config", action="config", metavar="FILE", help="YAML file of options; one file may serve all jobs."
    )
    fields = {field.name: field for field in dataclasses.fields(config_class)}
    sentences = parser.sentences = _sentences(config_class)
    for title, names in _groups(config_class).items():
        group = parser.add_argument_group(title)
        for name in names:
            hint, options = types_of(config_class)[name], dict[str, Any](help=sentences.get(name, ""))
            if choices := choices_of(config_class, name):  # the configuration refuses others itself, with the nearest
                options["metavar"] = "{" + ",".join(choices) + "}"
                if len(f"  --{name} {options['metavar']}") > 80:
                    options["metavar"] = "NAME"
                    options["help"] += f" One of {', '.join(choices)}."
                hint = str
            elif hint is not bool:  # jsonargparse shows a bool's values itself
                options["metavar"] = _metavar(name, hint)
            if fields[name].default is dataclasses.MISSING:
                options["required"] = True
            else:
                options["default"] = fields[name].default
            group.add_argument(f"--{name}", type=hint, **options)
    return parser


def _groups(config_class: type[JobConfig]) -> dict[str, list[str]]:
    """The options below each heading."""
    found: dict[str, list[str]] = {title: [] for title in GROUPS}
    for name, known in options_of(config_class).items():
        found.setdefault(known.group or owner_of(config_class, name).title, []).append(name)
    return {title: names for title, names in found.items() if names}


def _metavar(name: str, hint: object) -> str:
    kinds = {"int": "N", "float": "X", "str": "PATH" if name.endswith("_path") else "TEXT", "dict": "JSON"}
    written = hint.__name__ if isinstance(hint, type) else str(hint)
    return next(shown for kind, shown in kinds.items() if written.startswith(kind))


def _sentences(config_class: type[JobConfig]) -> dict[str, str]:
    """The docstring below each field, the subclass's over the base's."""
    sentences: dict[str, str] = {}
    for cls in reversed([cls for cls in config_class.__mro__ if dataclasses.is_dataclass(cls)]):
        parsed = docstring_parser.parse_from_object(cls)
        sentences |= {p.arg_name: " ".join((p.description or "").split()) for p in parsed.params}
    return sentences


def _arguments(
    config_class: type[JobConfig], argv: list[str], silent: Collection[str] = ()
) -> tuple[list[str], set[str], dict[str, Any]]:
    """``argv`` without the options that have no effect here, the names of the fields that are given, and the values of
    those that may hold anything: of their texts jsonargparse would make numbers again.

    A bare boolean flag gets its ``true``, and a YAML file is read and checked here, to be handed on as JSON.
    """
    hints = types_of(config_class)
    arguments: list[str] = []
    given: set[str] = set()
    mappings: dict[str, Any] = {}
    free = {name for name, hint in hints.items() if "Any" in str(hint)}
    for flag, value in split_flags(argv):
        name = flag.removeprefix("--")
        if not flag.startswith("--") or name in ("help", "print_config"):
            arguments += as_words(flag, value)
        elif name == "config":
            if value is None:
                raise ConfigError("--config needs the path of a YAML file")
            settings = read_file(config_class, value, silent)
            given |= settings.keys()
            mappings |= {name: value for name, value in settings.items() if name in free and isinstance(value, dict)}
            arguments += ["--config", _as_json(settings, value)]
        elif _is_field(config_class, name.split(".")[0], name, flag):
            given.add(name.split(".")[0])
            if value is None and hints.get(name) is bool:
                value = "true"
            elif value is not None:
                value, mapping = read_value(name, hints.get(name), _from_list(config_class, name, value))
                if name.split(".")[0] in free:
                    mappings.pop(name.split(".")[0], None)
                    mappings |= {name: mapping} if mapping is not None else {}
            arguments += as_words(flag, value)
    return arguments, given, mappings


def as_words(flag: str, value: str | None) -> list[str]:
    """What `split_flags` gives, as a word of a command line again."""
    return [flag] if value is None else [f"{flag}={value}"]


def split_flags(argv: list[str]) -> Iterator[tuple[str, str | None]]:
    """``--a 1 --b --c=2`` → ("--a", "1"), ("--b", None), ("--c", "2"); stray words come through as flags."""
    waiting = list(argv)
    while waiting:
        word = waiting.pop(0)
        if word.startswith("--") and "=" in word:
            flag, value = word.split("=", 1)
            yield flag, value
        elif word.startswith("--") and waiting and not waiting[0].startswith("--"):
            yield word, waiting.pop(0)
        else:
            yield word, None


def read_file(config_class: type[JobConfig], path: str, silent: Collection[str] = ()) -> dict[str, Any]:
    """The options of a YAML file that this job has; notes the others, but the `silent` ones.

    What stands below the name of a job is for that job, and wins there over the rest of the file. Raises ConfigError
    for what is no option.
    """
    jobs = {job.job for job in JOBS}
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
        settings = read_options(text, types_of(config_class), {*section_options(JOBS), *jobs})
    except ConfigError as error:
        raise ConfigError(f"--config {path}: {error}") from error
    # ValueError: not UTF-8; RecursionError: nested without end.
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise ConfigError(f"--config {path} cannot be read: {error}; mend the file") from error
    if settings is None:
        return {}
    if not isinstance(settings, dict) or not all(isinstance(key, str) for key in settings):
        raise ConfigError(f"--config {path} is not a YAML mapping of options; write one `name: value` a line")
    own = {job: settings.pop(job) for job in jobs & settings.keys()}
    for job, options in own.items():
        if not isinstance(options, dict):
            raise ConfigError(f"--config {path}: {job} is the name of a job; write options below it, or leave it out")
    flat = _flattened(settings, f"--config {path}")
    flat |= _flattened(own.get(config_class.job, {}), f"--config {path}: {config_class.job}")
    mine = [name for name in flat if _is_field(config_class, name, name, f"{path}: {name}", silent)]
    return {name: as_text(config_class, name, flat[name]) for name in mine}


def _flattened(settings: Mapping[str, Any], shown: str) -> dict[str, Any]:
    """The options of a file that may put them below the section of their component."""
    sections = section_options(JOBS)
    found: dict[str, Any] = {}
    places: dict[str, str] = {}

    def take(name: str, value: Any, place: str) -> None:
        if name in found:
            raise ConfigError(f"{shown}: {name} stands there twice, {places[name]} and {place}; leave one of them out")
        found[name], places[name] = value, place

    for key, value in settings.items():
        if key not in sections or not isinstance(value, dict):
            take(key, value, "by itself")
            continue
        for name, inner in value.items():
            other = next((section for section, names in sections.items() if name in names), None)
            if other is not None and name not in sections[key]:
                raise ConfigError(f"{shown}: {name} is no option of {key}; write it below {other}, or by itself")
            take(str(name), inner, f"below {key}")
    return found


def _from_list(config_class: type[JobConfig], name: str, text: str) -> str:
    """The value of a flag for several in one text, where it is written as a JSON list."""
    known = options_of(config_class).get(name)
    if known is None or not known.many or not text.lstrip().startswith("["):
        return text
    try:
        found = json.loads(text)
    except ValueError:
        return text
    return str(as_text(config_class, name, found))


def _as_json(settings: dict[str, Any], path: str) -> str:
    for name, value in settings.items():
        try:
            json.dumps(value)
        except (TypeError, ValueError, RecursionError) as error:  # a date, a set, or a value within itself
            raise ConfigError(
                f"{path}: {name} is {reprlib.repr(value)}, which no option takes ({error}); write a text in quotes"
            ) from error
    return json.dumps(settings)


def _is_field(config_class: type[JobConfig], field: str, name: str, shown: str, silent: Collection[str] = ()) -> bool:
    """Whether ``name`` is an option of this job; notes it if it has no effect, raises ConfigError if it is unknown."""
    fields = {f.name for f in dataclasses.fields(config_class)}
    if field in fields:
        return True
    for other in JOBS:
        if field in {f.name for f in dataclasses.fields(other)}:
            if field not in silent:
                _note(name, f"it belongs to {command(other.job)}")
            return False
    if field in NO_EFFECT:
        if field not in silent:
            _note(name, NO_EFFECT[field])
        return False
    if field in REFUSED:
        raise ConfigError(f"{shown}: {REFUSED[field]}")
    close = nearest(field, fields)
    raise ConfigError(f"{shown} is not an option" + (f"; did you mean {' or '.join(close)}?" if close else ""))


def _readable(message: str) -> str:
    """jsonargparse's message on one line: the key, what was expected, the value."""
    text = " ".join(message.split())
    if lonely := re.fullmatch(r"argument (--\w+): expected one argument", text):
        return f"{lonely[1]} needs a value"
    if stray := re.fullmatch(r"unrecognized arguments: (\S+).*", text):
        return f"{stray[1]!r} belongs to no option; options begin with --, and a value with spaces needs quotes"
    key = re.search(r'[Kk]ey "([^"]+)"', text)
    value = re.search(r".*(?:Given value|Got value): (.*?)\.?$", text)
    if key and value and value[1].startswith("{"):
        return f'--{key[1]} {value[1]}: expected a JSON object of what --help shows, e.g. {{"GPU": 1}} for --resources'
    expected = dict.fromkeys(re.findall(r"Expected an? (?:<class '(\w+)'>|(\w+))", text))
    if key and value and expected:
        kinds = {"int": "a whole number", "float": "a number", "bool": "true or false", "dict": "a JSON object"}
        names = [kinds.get(a or b, a or b) for a, b in expected if (a or b) != "NoneType"]
        return f"--{key[1]} {value[1]}: expected {' or '.join(names)}"
    return text


def _note(name: str, reason: str) -> None:
    print(f"note: --{name} has no effect here: {reason}", file=sys.stderr)


def refuse(prog: str, message: str) -> NoReturn:
    print(f"{prog}: {message}\nSee {prog} --help.", file=sys.stderr)
    raise SystemExit(2)
