"""What saves memory, and what it costs."""

from __future__ import annotations

from dataclasses import dataclass

from ray_diffsynth.config.effects import REMOTE_CACHE, SEVERAL_WORKERS, needs
from ray_diffsynth.config.options import Component, option, set_option
from ray_diffsynth.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class MemoryConfig(Component):
    """Gradient checkpointing, 8 bits, sharding."""

    section = "memory"
    title = "Memory"

    use_gradient_checkpointing: bool = option(False, identity=False)
    """Compute activations again in the backward pass: less memory, about a third more time."""
    gradient_checkpointing_every: int | None = option(
        None, least=1, used_as=1, identity=False, effects=(needs("use_gradient_checkpointing"),)
    )
    """Of the model's blocks, every how many-th is computed again with use_gradient_checkpointing; 1 when not given."""
    use_gradient_checkpointing_offload: bool = option(False, identity=False)
    """Keep the checkpointed activations in main memory; implies use_gradient_checkpointing."""
    fp8_base: bool = False
    """Keep the frozen model's linear layers in 8 bits, with a scale for each output: half the memory of bfloat16. What
    diffusers' layerwise casting leaves out of the family's model keeps its precision; the log says what."""
    shard_base: bool = option(False, identity=False, effects=(SEVERAL_WORKERS,))
    """Share the frozen base out among the workers, block by block (FSDP2), for models that one GPU cannot hold."""

    def resolve(self) -> None:
        """Offloading is a kind of checkpointing."""
        if self.use_gradient_checkpointing_offload:
            set_option(self, use_gradient_checkpointing=True)

    def check(self) -> None:
        """Raise ConfigError for what does not work together."""
        if self.fp8_base and self.shard_base:
            raise ConfigError("fp8_base and shard_base do not work together; choose one")
        if self.fp8_base and getattr(self, "use_dora", False):
            raise ConfigError("fp8_base and use_dora do not work together: DoRA needs the weights themselves")


@dataclass(frozen=True, kw_only=True)
class LocalCacheConfig(Component):
    """Local copies of a remote cache's files."""

    section = "local_cache"
    title = "Data"

    shard_cache: str | None = option(None, identity=False, effects=(REMOTE_CACHE,))
    """Local folder in which each node keeps the files of a remote cache that it has read."""
    shard_cache_gb: float | None = option(None, least=0, used_as=100.0, identity=False, effects=(needs("shard_cache"),))
    """Size limit of shard_cache in GB; what was used the longest ago goes first; 100 when not given."""
