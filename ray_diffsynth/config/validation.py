"""What shows how a training goes: validation loss, sample images, trackers; and what is kept of it."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec

from ray_diffsynth.config.cluster import check_labels
from ray_diffsynth.config.effects import needs
from ray_diffsynth.config.options import Component, option, set_option, split_names
from ray_diffsynth.errors import ConfigError

_DRAWN = needs("validation_prompts")


@dataclass(frozen=True, kw_only=True)
class ValidationConfig(Component):
    """The validation loss."""

    section = "validation"
    title = "Saving and logging"

    validation_samples: int = option(0, least=0)
    """Samples that are held out, never trained on, for the validation loss (fixed noise and timesteps)."""
    validation_steps: int | None = option(None, least=1, identity=False, effects=(needs("validation_samples"),))
    """Steps between two validation losses; at each checkpoint when not given."""


@dataclass(frozen=True, kw_only=True)
class SampleImageConfig(Component):
    """Sample images that are drawn during training."""

    section = "sample_images"
    title = "Saving and logging"

    validation_prompts: str | None = option(None, many="|", identity=False)
    """Prompts with | between them, a text file with a prompt a line, or a csv or jsonl file as jobs/generate.py takes,
    with the images that a family needs: drawn during training, in its size, first by the base model."""
    sample_steps: int | None = option(None, least=1, identity=False, effects=(_DRAWN,))
    """Steps between two grids of sample images; at each checkpoint when not given."""
    sample_inference_steps: int | None = option(None, least=1, identity=False, effects=(_DRAWN,))
    """Inference steps of the sample images; the family's default when not given."""
    sample_resources: dict[str, float] | None = option(None, identity=False, effects=(_DRAWN,))
    """Ray resources of the actor that makes the sample images; a GPU when the workers leave one, else the workers
    draw between steps."""
    sample_node_labels: dict[str, str] | None = option(None, identity=False, effects=(_DRAWN,))
    """Machines for the actor that makes the sample images, by Ray's labels; those of the workers when not given."""

    def check(self) -> None:
        """Raise ConfigError for what is no selector of labels."""
        check_labels("sample_node_labels", self.sample_node_labels)


@dataclass(frozen=True, kw_only=True)
class TrackingConfig(Component):
    """Where the metrics go."""

    section = "tracking"
    title = "Saving and logging"

    log_with: str | None = option(
        None, many=",", identity=False, names="ray_diffsynth.training.report.trackers:TRACKERS", none="none"
    )
    """Comma-separated trackers, or none for metrics.jsonl alone; tensorboard when not given, csv where that is not
    installed."""
    log_every: int = option(1, least=1, identity=False)
    """Steps between two reported losses."""

    def resolve(self) -> None:
        """TensorBoard is an extra: without it the metrics go to a table."""
        if self.log_with is None:
            set_option(self, log_with="tensorboard" if find_spec("tensorboard") else "csv")

    def check(self) -> None:
        """Raise ConfigError for none beside others."""
        if self.trackers and "none" in split_names(self.log_with):
            raise ConfigError(f"log_with={self.log_with!r}: none stands beside others; leave it or them out")

    @property
    def trackers(self) -> tuple[str, ...]:
        """``log_with`` as names, without ``none``."""
        return tuple(dict.fromkeys(name for name in split_names(self.log_with) if name != "none"))


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig(Component):
    """What is saved, and how a run goes on."""

    section = "checkpoints"
    title = "Saving and logging"

    save_steps: int | None = option(None, least=1, identity=False)
    """Save a LoRA and a checkpoint every this many steps; at the end of each epoch when not given."""
    keep_checkpoints: int = option(2, least=1, identity=False)
    """How many of the newest checkpoints are kept (the LoRA files all are)."""
    resume: str = option("auto", identity=False, group="What to do")
    """auto goes on from the newest checkpoint in output_path; never starts anew, and sets what lies there aside; or the
    folder of one checkpoint. After a kill the same command goes on, whichever it is."""

    def check(self) -> None:
        """Raise ConfigError for an empty place."""
        if not self.resume:
            raise ConfigError("resume is empty; use auto, never, or the folder of a checkpoint")
