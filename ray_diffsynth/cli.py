"""The command line of the jobs: flags and YAML into a checked configuration, errors into messages and exit codes.

Exit codes: 0 done, 1 an error while running, 2 a bad configuration, 130 interrupted, 143 ended by SIGTERM. What is
printed after its reader has gone (`| head`) is dropped, and changes no exit code. This module imports no torch
and no ray, so that ``--help`` and a typing mistake take well under a second.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import logging
import re
import reprlib
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar, get_args, get_origin, get_type_hints

import docstring_parser
import yaml
from jsonargparse import ArgumentParser

from ray_diffsynth.config import GenerateConfig, PreprocessConfig, TrainConfig
from ray_diffsynth.console import prepare_process
from ray_diffsynth.diffsynth_flags import NO_EFFECT, REFUSED
from ray_diffsynth.errors import ConfigError, UserError, nearest
from ray_diffsynth.job_config import JobConfig
from ray_diffsynth.option_effects import without_effect
from ray_diffsynth.output_path import check_output_path
from ray_diffsynth.system_errors import explain
from ray_diffsynth.yaml_config import read_options, read_value

C = TypeVar("C", bound=JobConfig)

# The groups of --help. A field that is not listed here appears under "Further options".
GROUPS: dict[str, tuple[str, ...]] = {
    "What to do": ("task", "output_path", "seed", "resume", "dry_run"),
    "Data": (
        *("dataset_base_path", "dataset_metadata_path", "data_file_keys", "extra_inputs", "dataset_repeat"),
        *("dataset_num_workers", "height", "width", "max_pixels", "resolution", "num_frames", "fps", "cache_codec"),
        *("max_upscale", "max_crop", "max_decode_memory"),
        *("max_quarantine", "retry_quarantined", "shard_cache", "shard_cache_gb"),
    ),
    "Model": (
        *("model", "model_id_with_origin_paths", "model_paths", "tokenizer_path", "processor_path", "family", "dtype"),
        "pipeline_settings",
        *("trainable_models", "preset_lora_path", "preset_lora_model"),
    ),
    "LoRA": (
        *("lora_base_model", "lora_target_modules", "lora_rank", "lora_alpha", "lora_checkpoint", "lora_dropout"),
        *("use_rslora", "use_dora", "lora_format"),
    ),
    "Optimisation": (
        *("learning_rate", "num_epochs", "max_steps", "batch_size", "gradient_accumulation_steps", "weight_decay"),
        *("max_grad_norm", "lr_scheduler", "lr_warmup_steps", "adam_beta1", "adam_beta2", "adam_epsilon"),
        *("customized_optimizer", "optimizer_arguments", "ema_decay", "caption_dropout", "loss_weighting"),
        *("timestep_sampling", "logit_mean", "logit_std", "mode_scale", "timestep_shift"),
        *("min_timestep_boundary", "max_timestep_boundary"),
    ),
    "Generating": (
        *("prompt", "prompt_path", "negative_prompt", "num_inference_steps", "cfg_scale", "seeds", "images_per_prompt"),
        *("rand_device", "lora", "lora_scale", "grid", "student_steps"),
    ),
    "Memory": (
        *("use_gradient_checkpointing", "gradient_checkpointing_every", "use_gradient_checkpointing_offload"),
        *("fp8_base", "shard_base"),
    ),
    "Saving and logging": (
        *("save_steps", "keep_checkpoints", "log_every", "log_with", "validation_samples", "validation_steps"),
        *("validation_prompts", "sample_steps", "sample_inference_steps", "sample_resources", "verbose"),
    ),
    "Cluster": ("num_workers", "resources", "pools", "ray_address"),
}


class _Parser(ArgumentParser):
    """jsonargparse's parser with errors of one line that name the flag, the value and the fix."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if missing := re.search(r"arguments are required: (\w+)", message):
            what = next(str(action.help) for action in self._actions if action.dest == missing[1])
            _refuse(self.prog, f"--{missing[1]} is missing: {what}")
        _refuse(self.prog, _readable(message))


def parse(config_class: type[C], argv: Sequence[str] | None = None, *, prog: str | None = None) -> C:
    """Read ``config_class`` from flags and ``--config`` files; later ones win.

    Exits with 2 and one message if something is unknown or cannot work. Notes on options that have no effect here go
    to stderr, one line each.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    prog = prog or Path(sys.argv[0]).name
    try:
        arguments, given, mappings = _arguments(config_class, argv)
        values = vars(_make_parser(config_class, prog).parse_args(arguments)) | mappings
        config = config_class(**{field.name: values[field.name] for field in dataclasses.fields(config_class)})
        check_output_path(config.output_path, writes=not getattr(config, "dry_run", False))
    except ConfigError as error:
        _refuse(prog, str(error))
    if not isinstance(config, GenerateConfig):
        for name, effect in without_effect(config, sorted(given)):
            if effect.noted:
                _note(name, effect.reason)
    return config


def main(config_class: type[C], run: Callable[[C], object], argv: Sequence[str] | None = None) -> int:
    """Parse, call ``run`` with the configuration, and turn what it raises into a message and an exit code."""
    if argv is None:
        prepare_process()
    config = parse(config_class, argv)
    _show_messages(config.verbose)
    try:
        run(config)
    except KeyboardInterrupt:
        done = f"what is finished lies in {config.output_path}; the same command goes on from there"
        print(f"\ninterrupted: {done}", file=sys.stderr)
        return 130
    except Exception as error:
        user_error = find_user_error(error)
        told = explain(error) if user_error is None else str(user_error)
        if config.verbose or told is None:
            traceback.print_exc()
        if told is None:
            return 1
        print(f"error: {told}", file=sys.stderr)
        for note in dict.fromkeys(note for each in (user_error, error) for note in getattr(each, "__notes__", ())):
            print(note, file=sys.stderr)
        return 2 if isinstance(user_error, ConfigError) else 1
    return 0


def find_user_error(error: BaseException) -> UserError | None:
    """The UserError that caused ``error``, through chained exceptions and Ray's wrappers around remote ones."""
    seen: set[int] = set()
    waiting: list[object] = [error]
    while waiting:
        current = waiting.pop(0)
        if not isinstance(current, BaseException) or id(current) in seen:
            continue
        seen.add(id(current))
        remote = getattr(current, "cause", None)  # ray.exceptions.RayTaskError: the original, without the remote trace
        if isinstance(current, UserError) and not isinstance(remote, UserError):
            return current
        failures = getattr(current, "worker_failures", None)  # ray.train.WorkerGroupError: rank -> exception
        waiting += [remote, *(failures.values() if isinstance(failures, dict) else ())]
        waiting += [current.__cause__, None if current.__suppress_context__ else current.__context__]
    return None


def _make_parser(config_class: type[JobConfig], prog: str) -> ArgumentParser:
    needed = "--prompt TEXT" if config_class is GenerateConfig else "--dataset_base_path PATH"
    usage = f"{prog} {needed} --model MODEL [options]"
    parser = _Parser(prog=prog, usage=usage, description=inspect.getdoc(config_class))
    parser.add_argument(
        "--config", action="config", metavar="FILE", help="YAML file of options; one file may serve all jobs."
    )
    fields = {field.name: field for field in dataclasses.fields(config_class)}
    hints, sentences = get_type_hints(config_class), _sentences(config_class)
    listed = {name for names in GROUPS.values() for name in names}
    groups = {**GROUPS, "Further options": tuple(name for name in fields if name not in listed)}
    for title, names in groups.items():
        if not (mine := [name for name in names if name in fields]):
            continue
        group = parser.add_argument_group(title)
        for name in mine:
            hint, options = hints[name], dict[str, Any](help=sentences[name])
            if get_origin(hint) is Literal:  # the configuration refuses bad values itself, with the nearest name
                options["metavar"] = "{" + ",".join(get_args(hint)) + "}"
                if len(f"  --{name} {options['metavar']}") > 80:
                    options["metavar"] = "NAME"
                    options["help"] += f" One of {', '.join(get_args(hint))}."
                hint = str
            elif hint is not bool:  # jsonargparse shows a bool's values itself
                options["metavar"] = _metavar(name, hint)
            if fields[name].default is dataclasses.MISSING:
                options["required"] = True
            else:
                options["default"] = fields[name].default
            group.add_argument(f"--{name}", type=hint, **options)
    return parser


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


def _arguments(config_class: type[JobConfig], argv: list[str]) -> tuple[list[str], set[str], dict[str, Any]]:
    """``argv`` without the options that have no effect here, the names of the fields that are given, and the values of
    those that may hold anything: of their texts jsonargparse would make numbers again.

    A bare boolean flag gets its ``true``, and a YAML file is read and checked here, to be handed on as JSON.
    """
    hints = get_type_hints(config_class)
    arguments: list[str] = []
    given: set[str] = set()
    mappings: dict[str, Any] = {}
    free = {name for name, hint in hints.items() if "Any" in str(hint)}
    for flag, value in _flags(argv):
        name = flag.removeprefix("--")
        if not flag.startswith("--") or name in ("help", "print_config"):
            arguments += [flag] if value is None else [f"{flag}={value}"]
        elif name == "config":
            if value is None:
                raise ConfigError("--config needs the path of a YAML file")
            settings = _read_yaml(config_class, value)
            given |= settings.keys()
            mappings |= {name: value for name, value in settings.items() if name in free and isinstance(value, dict)}
            arguments += ["--config", _as_json(settings, value)]
        elif _is_field(config_class, name.split(".")[0], name, flag):
            given.add(name)
            if value is None and hints.get(name) is bool:
                value = "true"
            elif value is not None:
                value, mapping = read_value(name, hints.get(name), value)
                if name.split(".")[0] in free:
                    mappings.pop(name.split(".")[0], None)
                    mappings |= {name: mapping} if mapping is not None else {}
            arguments += [flag] if value is None else [f"{flag}={value}"]
    return arguments, given, mappings


def _flags(argv: list[str]) -> Iterator[tuple[str, str | None]]:
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


def _read_yaml(config_class: type[JobConfig], path: str) -> dict[str, Any]:
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
        settings = read_options(text, get_type_hints(config_class))
    except ConfigError as error:
        raise ConfigError(f"--config {path}: {error}") from error
    # ValueError: not UTF-8; RecursionError: nested without end.
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise ConfigError(f"--config {path} cannot be read: {error}; mend the file") from error
    if settings is None:
        return {}
    if not isinstance(settings, dict) or not all(isinstance(key, str) for key in settings):
        raise ConfigError(f"--config {path} is not a YAML mapping of options; write one `name: value` a line")
    return {key: value for key, value in settings.items() if _is_field(config_class, key, key, f"{path}: {key}")}


def _as_json(settings: dict[str, Any], path: str) -> str:
    for name, value in settings.items():
        try:
            json.dumps(value)
        except (TypeError, ValueError, RecursionError) as error:  # a date, a set, or a value within itself
            raise ConfigError(
                f"{path}: {name} is {reprlib.repr(value)}, which no option takes ({error}); write a text in quotes"
            ) from error
    return json.dumps(settings)


def _is_field(config_class: type[JobConfig], field: str, name: str, shown: str) -> bool:
    """Whether ``name`` is an option of this job; notes it if it has no effect, raises ConfigError if it is unknown."""
    fields = {f.name for f in dataclasses.fields(config_class)}
    if field in fields:
        return True
    for other in (PreprocessConfig, TrainConfig, GenerateConfig):
        if field in {f.name for f in dataclasses.fields(other)}:
            _note(name, f"it belongs to jobs/{other.job}.py")
            return False
    if field in NO_EFFECT:
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


def _show_messages(verbose: bool) -> None:
    """This package's log messages go to stderr as they are; of other libraries only warnings."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("ray_diffsynth").setLevel(logging.DEBUG if verbose else logging.INFO)


def _note(name: str, reason: str) -> None:
    print(f"note: --{name} has no effect here: {reason}", file=sys.stderr)


def _refuse(prog: str, message: str) -> NoReturn:
    print(f"{prog}: {message}\nSee {prog} --help.", file=sys.stderr)
    raise SystemExit(2)
