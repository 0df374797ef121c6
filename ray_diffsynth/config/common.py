"""What every job's configuration has, and how it is made and checked."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeAlias

from ray_diffsynth.config.cluster import ClusterConfig
from ray_diffsynth.config.model import ModelConfig
from ray_diffsynth.config.options import (
    Component,
    check_effects,
    check_options,
    components,
    option,
    use_defaults,
)

JobName: TypeAlias = Literal["preprocess", "train", "generate"]


@dataclass(frozen=True, kw_only=True)
class RunConfig(Component):
    """Where the results go, and what is random."""

    section = "run"
    title = "What to do"

    output_path: str = option("./models", identity=False)
    """Folder or URL for the results: the cache of preprocess, the LoRA and checkpoints of train."""
    seed: int = option(0, least=0)
    """Seed of everything random: the order, the noise, the timesteps and the LoRA's start."""
    verbose: bool = option(False, identity=False, group="Saving and logging")
    """Show Ray's own messages too."""


@dataclass(frozen=True, kw_only=True)
class JobConfig(RunConfig, ModelConfig, ClusterConfig):
    """The configuration of a job: its components, checked when it is made."""

    job: ClassVar[JobName]
    needed: ClassVar[str]
    """What its command cannot do without, beside the model, for the first line of ``--help``."""

    def __post_init__(self) -> None:
        """Raise ConfigError for a value that cannot work, and resolve the defaults that depend on other options."""
        check_options(self)
        mine = components(type(self))
        for component in mine:
            if "resolve" in vars(component):
                vars(component)["resolve"](self)
        check_effects(self)
        use_defaults(self)
        for component in mine:
            if "check" in vars(component):
                vars(component)["check"](self)

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON values, for the report and the checkpoint."""
        return dataclasses.asdict(self)
