"""One command line for both stages: which options go to which, before either is read."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from ray_diffsynth.config.diffsynth import NO_EFFECT, REFUSED
from ray_diffsynth.config.flags import as_words, parse, refuse, split_flags
from ray_diffsynth.config.options import options_of
from ray_diffsynth.config.preprocess import PreprocessConfig
from ray_diffsynth.config.task import TASK_ENDINGS
from ray_diffsynth.config.train import TrainConfig
from ray_diffsynth.errors import ConfigError, nearest
from ray_diffsynth.program import command

STAGES = {config.job: config for config in (PreprocessConfig, TrainConfig)}
_OPTIONS = frozenset(name for config in STAGES.values() for name in options_of(config))
USAGE = """usage: {prog} --model MODEL --dataset_base_path IMAGES --cache_path CACHE --output_path LORA [options]

Both stages, one after the other: preprocess encodes IMAGES into CACHE, and when that is committed train makes LORA of
it. Killed and started again it goes on where it was: what is encoded stays, and training goes on from its newest
checkpoint.

  --cache_path PATH     Folder or URL of the cache: the result of preprocess, and what train reads.
  --task NAME           sft (the default) or direct_distill.
  --config FILE         YAML file of options; what stands below `preprocess:` or `train:` is for that stage alone.
  --preprocess.NAME X   An option of preprocess alone, e.g. --preprocess.node_labels '{{"stage": "encode"}}'.
  --train.NAME X        An option of train alone, e.g. --train.num_workers 8.

Every other option goes to the stages that have it: see {preprocess} --help and {train} --help.
Each stage asks the cluster for its own machines when it begins, and gives them back when it ends."""


def parse_both(argv: Sequence[str] | None = None, *, prog: str | None = None) -> tuple[PreprocessConfig, TrainConfig]:
    """The configurations of both stages. Exits with 2 and one message if something is unknown or cannot work."""
    words = list(sys.argv[1:] if argv is None else argv)
    prog = prog or Path(sys.argv[0]).name
    if {"-h", "--help"} & set(words):
        print(USAGE.format(prog=prog, preprocess=command("preprocess"), train=command("train")))
        raise SystemExit(0)
    try:
        arguments = split_arguments(words)
    except ConfigError as error:
        refuse(prog, str(error))
    # What both have is told where it first has no effect; of a cache that is made here nobody asked for an effect.
    first = parse(PreprocessConfig, arguments["preprocess"], prog=prog, silent=_OPTIONS)
    second = parse(TrainConfig, arguments["train"], prog=prog, silent={*_OPTIONS, *NO_EFFECT})
    return first, second


def split_arguments(words: Sequence[str]) -> dict[str, list[str]]:
    """The words of each stage's own command line. Raises ConfigError for what cannot be shared out."""
    arguments: dict[str, list[str]] = {job: [] for job in STAGES}
    alone: dict[str, list[str]] = {job: [] for job in STAGES}
    cache: str | None = None
    task = "sft"
    for flag, value in split_flags(list(words)):
        job, _, name = flag.removeprefix("--").partition(".")
        if flag == "--cache_path" and value:
            cache = value
        elif flag == "--task" and value:
            task = value
        elif job in STAGES and name:
            alone[job] += as_words(f"--{name}", value)
        else:
            for stage in _stages_with(flag, job):
                arguments[stage] += as_words(flag, value)
    if cache is None:
        raise ConfigError("--cache_path is missing: the folder or URL that preprocess writes and train reads")
    if any(ending and task.endswith(ending) for ending in TASK_ENDINGS):
        raise ConfigError(f"task={task!r} is one stage of {task.partition(':')[0]!r}; name that, and both are run")
    own = {
        "preprocess": [f"--output_path={cache}", f"--task={task}:data_process"],
        "train": [f"--dataset_base_path={cache}", f"--task={task}:train"],
    }
    return {job: [*arguments[job], *own[job], *alone[job]] for job in STAGES}


def _stages_with(flag: str, option: str) -> list[str]:
    if flag == "--config":
        return list(STAGES)
    having: list[str] = [stage for stage, config in STAGES.items() if option in options_of(config)]
    if not having and option in NO_EFFECT | REFUSED:
        return ["preprocess"]  # which says so, once
    if not having:
        close = nearest(option, [*_OPTIONS, "cache_path"])
        raise ConfigError(f"{flag} is no option" + (f"; did you mean {' or '.join(close)}?" if close else ""))
    return having
